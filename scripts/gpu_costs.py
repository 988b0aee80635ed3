"""What XLA compiles for an H100, without one; writes docs/gpu.md.

    python scripts/gpu_costs.py [--page docs/gpu.md]

Needs the extra `cuda` (`pip install -e '.[cuda]'`) and no GPU. XLA compiles the sampling loop and
the VAE's decoder ahead of time from a description of the chip. It cannot time kernels so, and takes
its defaults where it would try several: the section tells what is in a program and what memory it
takes, not how long it runs. `scripts/gpu_check.sh` measures that, where there is a GPU.
"""

import argparse
import collections
import importlib.metadata
import os
import pathlib

if __name__ == "__main__":  # before JAX starts
    os.environ |= {"CUDA_VISIBLE_DEVICES": "-1", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}

import hlo
import jax
import tpu_costs
import tpu_programs
from jax.experimental import topologies

from kvlock_jax.parallel.mesh import make_mesh

SECTION = "## What XLA compiles for an H100"
STEPS = tpu_programs.STEPS
MODELS = ("T2V 1.3B", "VACE 1.3B")
KINDS = ("plain", "full", "foreground")
TOPOLOGY = {"platform": "cuda", "topology": "1x1x1"}

H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  threads_per_warp: 32  threads_per_block_limit: 1024  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472  l2_cache_size: 52428800
  memory_bandwidth: 3352320000000  device_memory_size: 84929347584
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""A target description as XLA takes it; the chip's numbers are those of openxla/xla's pull request
25919."""

ABOUT = """{title}

Written by `python scripts/gpu_costs.py`; JAX {jax}, without a GPU. Programs for one H100, bfloat16,
480x832x81, one edit. `cuDNN` counts the calls of cuDNN's fused attention in a step, `products` the
matrix products, `fusions` all other kernels that compute; `copies` are the kernels that only move
numbers, with the bytes that they write. Loops inside a step count as often as they turn.
Temporaries and arguments, which are mostly weights, are XLA's own figures. Without a GPU XLA tries
no kernels: products stay Triton's, where a GPU would choose between those and cuBLAS's.

| program | arguments, GB | temporaries, GB | cuDNN | products | fusions | copies | copied, GB |
|---|---|---|---|---|---|---|---|
{lines}
"""


def gpu_kind(module: hlo.Module, one: hlo.Instruction) -> str:
    """What an instruction does: `hlo`'s kinds, and cuDNN's `attention`."""
    if one.op == "custom-call":
        return "attention" if "__cudnn$fmha" in one.attributes else "products"
    return module.kind(one)


def row(name: str, program: jax.stages.Compiled) -> str:
    """A program's row of the table; of a loop, each step's part."""
    module, counts, copied = hlo.Module(program.as_text()), collections.Counter(), 0.0
    uses = module.uses()
    steps = STEPS if any(use.loops and use.loops[0] == STEPS for use in uses) else 1
    for use in uses:
        if steps > 1 and not (use.loops and use.loops[0] == STEPS):
            continue
        one, kind = use.instruction, gpu_kind(module, use.instruction)
        counts[kind] += use.times / steps
        copied += one.nbytes * use.times / steps if kind == "copies" else 0
    memory = program.memory_analysis()
    sizes = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    rest = counts["elementwise"] + counts["reductions"]
    numbers = (counts["attention"], counts["products"], rest, counts["copies"])
    cells = [f"{size / 1e9:.2f}" for size in sizes] + [f"{number:.0f}" for number in numbers]
    return f"| {name} | {' | '.join(cells)} | {copied / 1e9:.2f} |"


def main() -> None:
    """Compiles the programs and writes the section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    page = tpu_costs.ROOT / "docs" / "gpu.md"
    parser.add_argument("--page", type=pathlib.Path, default=page)
    args = parser.parse_args()
    jax.config.update("jax_platforms", "")  # `tpu_programs` asks for the CPU
    chips = topologies.get_topology_desc(**TOPOLOGY, target_config=H100).devices
    mesh, lines = make_mesh(1, 1, 1, devices=chips), []
    with jax.set_mesh(mesh):
        for model in MODELS:
            case = tpu_programs.Row(model, 480, 832, 81, "h100-1")
            for kind in KINDS:
                lowered = tpu_programs.loop(mesh, case, False, kind, tpu_costs.FOREGROUND)
                lines.append(row(f"{model}, {kind} step", lowered.compile()))
                print(lines[-1], flush=True)
        for name in ("encode", "decode"):
            lowered = tpu_programs.PROGRAMS[name](mesh, case)
            lines.append(row(name, lowered.compile()))
            print(lines[-1], flush=True)
    version = importlib.metadata.version("jax")
    text = ABOUT.format(title=SECTION, jax=version, lines="\n".join(lines))
    args.page.write_text(tpu_costs.section(args.page.read_text(), SECTION, text))


if __name__ == "__main__":
    main()
