"""Cycles of the package's Pallas kernels on TPUs, from the bundles that libtpu's compiler dumps.

python scripts/tpu_kernels.py KERNEL CHIP SIZE SIZE     # compiles one; `bundles` reads its dump
"""

import functools
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import hlo

CLOCKS = {"v5e": 1.5e9, "v6e": 1.75e9, "v5p": 1.75e9}
"""Cycles a second: a chip's published rate over the operations of its matrix units in a cycle, four
of 128 x 128 on v5e, eight on v5p, four of 256 x 256 on v6e."""


@functools.cache
def bundles(kernel: str, chip: str, sizes: tuple[int, ...], runs: pathlib.Path) -> int:
    """Instruction bundles of a kernel's inner block, dumped by libtpu in a process of its own."""
    file = runs / f"bundles_{kernel}_{chip}_{'_'.join(map(str, sizes))}.json"
    if not file.exists():
        with tempfile.TemporaryDirectory() as folder:
            flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_hlo_text=false"
            flags += " --xla_jf_dump_llo_text=true --xla_jf_emit_annotations=true"
            env = dict(os.environ, LIBTPU_INIT_ARGS=flags, ALLOW_MULTIPLE_LIBTPU_LOAD="1")
            command = [sys.executable, __file__, kernel, chip, *map(str, sizes)]
            ran = subprocess.run(command, env=env, capture_output=True, text=True)
            if ran.returncode:
                raise RuntimeError(f"{' '.join(command)}: {ran.stderr[-2000:]}")
            found = [
                path
                for path in pathlib.Path(folder).glob(f"**/*{kernel}*-final_bundles.txt")
                if "schedule" not in path.name
            ]
            file.write_text(json.dumps(largest_region(found[0].read_text())))
    return json.loads(file.read_text())


def largest_region(text: str) -> int:
    """Bundles of the largest straight part of a kernel, from libtpu's text of its last bundles."""
    marks, last = [], 0
    for line in text.splitlines():
        if address := re.match(r"\s*(0x[0-9a-f]+)", line):
            last = int(address[1], 16)
            if re.search(r"(Start|End) .*region|End region", line):
                marks.append(last)
    marks.append(last)
    return max(b - a for a, b in zip([0, *marks], marks, strict=False))


def compile_kernel(kernel: str, chip: str, sizes: list[int]) -> None:
    """Compiles a kernel for one chip of a kind, whose bundles libtpu then dumps."""
    import jax
    import jax.numpy as jnp
    import tpu_programs

    from kvlock_jax.models import norms
    from kvlock_jax.models.attention.flash import flash

    mesh = tpu_programs.mesh_of(tpu_programs.Row("T2V 1.3B", 480, 832, 81, f"{chip}-8"))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def array(*shape: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
        """An abstract array, whole on every chip."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    def run(function, *arrays) -> None:
        """Compiles a function that every chip runs alone."""
        spec = jax.sharding.PartitionSpec()
        alone = jax.shard_map(function, in_specs=spec, out_specs=spec, check_vma=False)
        with jax.set_mesh(mesh):
            jax.jit(alone).lower(*arrays).compile()

    if kernel == "flash_attention":
        block_q, block_kv = sizes
        q, k = array(1, block_q * 4, 1, 128), array(1, block_kv * 4, 1, 128)
        run(flash, q, k, k)
        return
    tokens, wide = sizes
    x, row = array(1, 16 * tokens, wide, dtype=jnp.float32), array(1, wide, dtype=jnp.float32)
    options = dict(eps=1e-6, dtype=jnp.bfloat16)
    if kernel == "modulated":
        run(functools.partial(norms.modulated_kernel, **options), x, row, row)
    else:
        table = array(16 * tokens, 64, dtype=jnp.float32)
        scale = array(wide, dtype=jnp.float32)
        run(functools.partial(norms.rotated_kernel, **options), x, scale, table, table)


def kernel_cycles(
    use: hlo.Use, shapes: dict[str, str], chip: str, runs: pathlib.Path
) -> tuple[str, float]:
    """The name of a Pallas kernel and its cycles, once."""
    from kvlock_jax.estimate import roofline
    from kvlock_jax.models import norms
    from kvlock_jax.models.attention import flash

    one = use.instruction
    kernel = one.name.split(".")[0]
    operands = [hlo.arrays(shapes[name]) for name in one.operands]
    sizes = [size for parts in operands for _, size in parts]
    moved = sum(hlo.nbytes(shapes[name]) for name in one.operands) + one.nbytes
    if kernel == "flash_attention":
        (rows, queries, wide), (_, keys, _) = (s for s in sizes[1:3])
        block_q, block_kv = (flash.block_of(n, 1024) for n in (queries, keys))
        blocks = rows * wide // 128 * math.ceil(queries / block_q) * math.ceil(keys / block_kv)
        once = bundles(kernel, chip, (block_q, block_kv), runs)
    else:
        rows, length, wide = sizes[0]
        tokens = norms.tokens_of(length, wide)
        blocks, once = (
            rows * math.ceil(length / tokens),
            bundles(kernel, chip, (tokens, wide), runs),
        )
    slowest = moved / roofline.CHIPS[chip].bandwidth * CLOCKS[chip]
    return kernel, max(blocks * once, slowest)


if __name__ == "__main__":
    compile_kernel(*sys.argv[1:3], [int(size) for size in sys.argv[3:]])
