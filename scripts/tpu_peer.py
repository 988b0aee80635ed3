"""Compares a step's work between attention with MaxDiffusion's, by the TPU's compiler.

    python scripts/tpu_peer.py FOLDER [--runs runs/costs] [--page docs/tpu.md]

FOLDER is a checkout of AI-Hypercomputer/maxdiffusion; its imports need `pip install einops
qwix aqtp` beside the test dependencies. Both are Wan 2.1 1.3B at
480x832x81 on v6e-8 in bfloat16, conditional and unconditional branch at once, with weights whole on
every chip: ours is all of a `plain` step but attention, theirs the scan over layers without its
attention kernels, compiled with and without the flags that its README publishes. A difference of
attention kernels is not counted.
"""

import argparse
import importlib.machinery
import itertools
import os
import pathlib
import re
import subprocess
import sys
import types
from unittest import mock

import hlo
import tpu_costs
from tpu_kernels import CLOCKS

FLAGS = """
xla_tpu_megacore_fusion_allow_ags=false xla_enable_async_collective_permute=true
xla_tpu_enable_ag_backward_pipelining=true xla_tpu_enable_data_parallel_all_reduce_opt=true
xla_tpu_data_parallel_opt_different_sized_ops=true xla_tpu_enable_async_collective_fusion=true
xla_tpu_enable_async_collective_fusion_multiple_steps=true
xla_tpu_overlap_compute_collective_tc=true xla_enable_async_all_gather=true
xla_tpu_scoped_vmem_limit_kib=65536 xla_tpu_enable_async_all_to_all=true
xla_tpu_enable_all_experimental_scheduler_features=true
xla_tpu_enable_scheduler_memory_pressure_tracking=true xla_tpu_host_transfer_overlap_limit=24
xla_tpu_aggressive_opt_barrier_removal=ENABLED xla_lhs_prioritize_async_depth_over_stall=ENABLED
xla_should_allow_loop_variant_parameter_in_chain=ENABLED
xla_should_add_loop_invariant_op_in_chain=ENABLED xla_max_concurrent_host_send_recv=100
xla_tpu_scheduler_percent_shared_memory_limit=100 xla_latency_hiding_scheduler_rerun=2
xla_tpu_use_minor_sharding_for_major_trivial_input=true
xla_tpu_relayout_group_size_threshold_for_reduce_scatter=1
xla_tpu_assign_all_reduce_scatter_layout=true
""".split()
"""The README's, but for `xla_tpu_enable_async_collective_fusion_fuse_all_gather`, which libtpu
refuses for v6e."""

LAYERS, HEADS, HEAD, FEED_FORWARD = 30, 12, 128, 8960
GRIDS = {"32,760 tokens": (21, 60, 104), "32,768 tokens": (16, 64, 128)}
"""Latent frames, rows and columns: the video's, which 8 chips do not divide evenly in 8s of tokens,
and as many tokens as ours pads it to."""

CHIP = "v6e"

SECTION = "## Beside MaxDiffusion"
ABOUT = """{title}

Written by `python scripts/tpu_peer.py` from MaxDiffusion {commit}. Milliseconds per chip of
estimated cycles without attention, of Wan 2.1 1.3B at 480x832x81 on v6e-8 with both branches and
weights whole on every chip: all of our `plain` step, and MaxDiffusion's scan over layers alone.

| program | ms | ours / it |
|---|---|---|
{lines}
"""


def stand_ins() -> None:
    """Puts empty modules in place of what MaxDiffusion imports and a transformer does not use."""
    import jax
    import jax.experimental

    old = types.ModuleType("jax.experimental.shard_map")

    def shard_map(f, mesh=None, in_specs=None, out_specs=None, check_rep=None, **_):
        return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    old.shard_map = shard_map
    jax.experimental.shard_map = sys.modules["jax.experimental.shard_map"] = old
    unused = "google google.cloud google.cloud.storage tensorboardX transformers torch torch.nn"
    for name in f"{unused} torch.utils torch.utils.data".split():
        try:
            __import__(name)
        except ImportError:
            module = types.ModuleType(name)
            module.__spec__, module.__path__ = importlib.machinery.ModuleSpec(name, None), []
            module.__getattr__ = lambda _: mock.MagicMock()
            sys.modules[name] = module


def compile_peer(folder: pathlib.Path, grid: tuple[int, ...], target: pathlib.Path) -> None:
    """Compiles MaxDiffusion's transformer, and writes the optimised program's text."""
    os.environ["TPU_ACCELERATOR_TYPE"] = "v6e-8"
    sys.path.insert(0, str(folder / "src"))
    stand_ins()
    import jax
    import jax.numpy as jnp
    import numpy as np
    import yaml
    from flax import linen, nnx
    from flax.linen import partitioning
    from jax.experimental import topologies
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    import maxdiffusion.tpu_utils as chips  # isort: skip
    from maxdiffusion import common_types as names  # isort: skip

    chips.get_tpu_type = lambda *_, **__: chips.TpuType.TPU_V6_LITE
    from maxdiffusion.models import attention_flax, embeddings_flax  # isort: skip
    from maxdiffusion.models.wan.transformers import transformer_wan  # isort: skip

    attention_flax.get_tpu_type = embeddings_flax.get_tpu_type = chips.get_tpu_type
    config = yaml.safe_load((folder / "src/maxdiffusion/configs/base_wan_1_3b.yml").read_text())

    def rule(name: str, axes: list | str | None) -> tuple:
        return name, tuple(axes) if isinstance(axes, list) else axes

    rules = [rule(*pair) for pair in names.SEQUENCE_PARALLEL_AXIS_RULES]
    rules += [rule(*pair) for pair in config["logical_axis_rules"]]
    rules += [(names.LENGTH, names.CONTEXT), (names.KV_LENGTH, names.CONTEXT)]
    rules += [("layers_per_stage", None)]
    rules = [pair for pair in rules if pair[0] not in ("embed", "conv_out")]  # weights whole
    devices = topologies.get_topology_desc("v6e:2x4", platform="tpu").devices
    mesh = Mesh(np.array(devices).reshape(1, 1, 8, 1), config["mesh_axes"])
    whole = NamedSharding(mesh, PartitionSpec())
    blocks = {f"block_{name}": 512 for name in ("q", "kv", "kv_compute", "q_dkv", "kv_dkv")}
    blocks |= {f"block_{name}": 512 for name in ("kv_dkv_compute", "q_dq", "kv_dq")}
    exponents = {"use_base2_exp": True, "use_experimental_scheduler": True}
    sizes = {
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD,
        "ffn_dim": FEED_FORWARD,
        "num_layers": LAYERS,
        "mesh": mesh,
        "dtype": jnp.bfloat16,
        "weights_dtype": jnp.bfloat16,
        "attention": "flash",
        "flash_block_sizes": splash.BlockSizes(**blocks, use_fused_bwd_kernel=False),
        "flash_min_seq_length": 0,
        "mask_padding_tokens": True,
        "scan_layers": True,
        "attention_config": exponents | {"ulysses_shards": -1, "ulysses_attention_chunks": 1},
    }

    def lies(x: jax.Array, where: NamedSharding = whole) -> jax.ShapeDtypeStruct:
        """An abstract array, floats in bfloat16."""
        kind = jnp.bfloat16 if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype
        return jax.ShapeDtypeStruct(x.shape, kind, sharding=where)

    with mesh, partitioning.axis_rules(rules):
        model = nnx.eval_shape(lambda: transformer_wan.WanModel(rngs=nnx.Rngs(params=0), **sizes))
        graph, state, rest = nnx.split(model, nnx.Param, ...)
        places = linen.logical_to_mesh_sharding(nnx.get_partition_spec(state), mesh, rules)
        places = {
            path: getattr(place, "get_value", lambda p=place: p)()
            for path, place in nnx.to_flat_state(places)
        }
        flat = nnx.to_flat_state(state)
        laid = [(path, x.replace(lies(x.get_value(), places[path]))) for path, x in flat]
        state, rest = (
            nnx.from_flat_state(laid),
            jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), rest),
        )
        text = jax.ShapeDtypeStruct((2, 512, 4096), jnp.bfloat16, sharding=whole)
        latents = jax.ShapeDtypeStruct((2, 16, *grid), jnp.bfloat16, sharding=whole)
        timestep = jax.ShapeDtypeStruct((2,), jnp.float32, sharding=whole)
        caches = jax.eval_shape(
            lambda *parts: nnx.merge(graph, *parts[:2]).compute_kv_cache(parts[2]),
            state,
            rest,
            text,
        )
        caches = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), caches
        )

        def run(state, rest, latents, timestep, text, caches):
            """The transformer, with the text's keys and values made before."""
            return nnx.merge(graph, state, rest)(
                hidden_states=latents,
                timestep=timestep,
                encoder_hidden_states=text,
                deterministic=True,
                rngs=None,
                kv_cache=caches[0],
                encoder_attention_mask=caches[1],
            )

        program = jax.jit(run).lower(state, rest, latents, timestep, text, caches).compile()
    partial = target.with_suffix(".part")
    partial.write_text(program.as_text())
    partial.replace(target)


def between_attention(text: str) -> float:
    """Milliseconds of the scan over layers but its kernels, by estimated cycles."""
    module = hlo.Module(text)
    cycles = sum(
        (use.instruction.cycles or 0) * use.times
        for use in module.uses()
        if use.loops and use.loops[0] == LAYERS and module.kind(use.instruction) != "kernel"
    )
    return cycles / CLOCKS[CHIP] * 1e3


def main() -> None:
    """Compiles what is missing, prints the ratios and writes the section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path, help="checkout of MaxDiffusion")
    parser.add_argument("--runs", type=pathlib.Path, default=tpu_costs.ROOT / "runs" / "costs")
    parser.add_argument("--page", type=pathlib.Path, default=tpu_costs.ROOT / "docs" / "tpu.md")
    parser.add_argument("--compile", nargs=2, metavar=("GRID", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.compile:
        grid, target = args.compile
        return compile_peer(args.folder, GRIDS[grid], pathlib.Path(target))
    args.runs.mkdir(parents=True, exist_ok=True)
    case = tpu_costs.Case("T2V 1.3B", 480, 832, "v6e-8", "plain")
    spent = tpu_costs.step(tpu_costs.compiled(case, args.runs)[0], case, args.runs)
    ours = sum(spent.kinds.values()) * 1e3
    lines = [f"| ours | {ours:.1f} | |"]
    for grid, flags in itertools.product(GRIDS, ([], FLAGS)):
        name = f"MaxDiffusion, {grid}" + ", its published flags" * bool(flags)
        target = args.runs / (re.sub("[^a-z0-9]+", "_", name.lower()) + ".txt")
        if not target.exists():
            argv = [sys.executable, __file__, str(args.folder), "--compile", grid, str(target)]
            given = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
            given["LIBTPU_INIT_ARGS"] = " ".join(f"--{flag}" for flag in flags)
            subprocess.run(argv, env=os.environ | given, check=True)
        taken = between_attention(target.read_text())
        lines.append(f"| {name} | {taken:.1f} | {ours / taken:.2f} |")
    print("\n".join(lines))
    head = subprocess.run(
        ["git", "-C", str(args.folder), "rev-parse", "--short", "HEAD"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=False,
    )
    commit = head.stdout.strip() or "of an unknown commit"
    text = ABOUT.format(title=SECTION, commit=commit, lines="\n".join(lines))
    args.page.write_text(tpu_costs.section(args.page.read_text(), SECTION, text))


if __name__ == "__main__":
    main()
