"""Checks the demo on this machine's GPU, and times steps of 1.3B beside Diffusers'.

    bash scripts/gpu_check.sh [--rounds 3] [--page docs/gpu.md]

Both sides run in processes of their own, which take turns: a round runs each program once. Weights
are random, arithmetic is bfloat16. A step of ours is all of the sampling loop's; Diffusers' is its
transformer's two passes, one for each branch, as `WanPipeline` calls it.
"""

import argparse
import collections
import contextlib
import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
DEMO = ROOT / "kvlock_jax" / "demo"
STEPS = 4
KINDS = ("plain", "full", "foreground")
PEER = "Diffusers"

SECTION = "## Measured on {device}"
ABOUT = """{title}

Written by `bash scripts/gpu_check.sh`; {versions}. The demo's edit in float32 differs from the
CPU's in {differ:.2%} of its values, by {most} of 255 levels at most.

Milliseconds of a step of Wan 2.1 1.3B, {size}, bfloat16, random weights, medians of {rounds} rounds
in turn; `/ Diffusers` is the median of the rounds' ratios, with its range. `plain` guides without a
lock, as Diffusers does; `full` locks all tokens; `foreground` computes a fifth of them. `peak` is
the process's largest device memory, over all its programs.

| step | ms | / Diffusers | cuDNN's attention | products | peak, GB |
|---|---|---|---|---|---|
{lines}
"""


# --- a process of each side ----------------------------------------------------------------------


def ours(size: tuple[int, int, int], layers: int) -> tuple[dict[str, Callable], Callable]:
    """Our programs, and a function that returns facts about them."""
    import hlo
    import jax
    import jax.numpy as jnp
    import tpu_programs
    from gpu_costs import gpu_kind
    from tpu_costs import FOREGROUND

    from kvlock_jax.models.wan.config import WanConfig
    from kvlock_jax.parallel.mesh import make_mesh

    tpu_programs.STEPS = STEPS
    tpu_programs.MODELS["ours"] = WanConfig(12, 128, layers, 8960)
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    frames, height, width = size
    row = tpu_programs.Row("ours", height, width, frames, "h100-1")
    programs, counts = {}, {}

    def run(program: jax.stages.Compiled, args: tuple) -> float:
        """Seconds of a step."""
        model, latents, *rest = args
        latents = jax.block_until_ready(jnp.copy(latents))  # donated
        start = time.perf_counter()
        jax.block_until_ready(program(model, latents, *rest))
        return (time.perf_counter() - start) / STEPS

    def value(info: jax.stages.ArgInfo) -> jax.Array:
        """Any value of an argument, on which no step's work depends but for the foreground."""
        shape, kind = info.shape, info.dtype
        if kind == jnp.bool_ and len(shape) == 3:  # the first fifth of the tokens
            return jnp.broadcast_to(jnp.arange(shape[1])[None, :, None] < shape[1] / 5, shape)
        return jnp.full(shape, 0 if kind == jnp.bool_ else 0.01, kind)

    args = None
    with jax.set_mesh(mesh):
        for kind in KINDS:
            lowered = tpu_programs.loop(mesh, row, False, kind, FOREGROUND)
            args = args or jax.tree.map(value, lowered.args_info[0])
            programs[kind] = functools.partial(run, program := lowered.compile(), args)
            module = hlo.Module(program.as_text())
            counts[kind] = collections.Counter()
            for use in module.uses():
                if use.loops and use.loops[0] == STEPS:
                    counts[kind][gpu_kind(module, use.instruction)] += use.times / STEPS

    def facts() -> dict:
        """What the parent reports."""
        device, version = jax.devices()[0], f"JAX {jax.__version__}"
        peak = (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
        return {"device": device.device_kind, "peak": peak, "counts": counts, "version": version}

    return programs, facts


def peers(size: tuple[int, int, int], layers: int) -> tuple[dict[str, Callable], Callable]:
    """Diffusers' transformer, and a function that returns facts about it."""
    import diffusers
    import torch

    where = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = {"num_attention_heads": 12, "num_layers": layers, "ffn_dim": 8960}
    with torch.device(where):
        peer = diffusers.WanTransformer3DModel(**sizes).to(torch.bfloat16).eval()
        for name, module in peer.named_modules():  # as loading a checkpoint keeps them
            if any(kept in name.split(".") for kept in peer._keep_in_fp32_modules):
                module.float()
        frames, height, width = size
        latents = torch.randn(1, 16, (frames - 1) // 4 + 1, height // 8, width // 8)
        text, timestep = torch.randn(1, 512, 4096), torch.full((1,), 500.0)
    latents, text = latents.to(torch.bfloat16), text.to(torch.bfloat16)

    def run() -> float:
        """Both branches, one after the other."""
        wait = torch.cuda.synchronize if where == "cuda" else (lambda: None)
        wait()
        start = time.perf_counter()
        with torch.no_grad():
            for _ in range(2):
                peer(latents, timestep, text)
        wait()
        return time.perf_counter() - start

    def facts() -> dict:
        """What the parent reports."""
        peak = torch.cuda.max_memory_allocated() if where == "cuda" else 0
        version = f"Diffusers {diffusers.__version__}, torch {torch.__version__}"
        return {"peak": peak, "version": version}

    return {PEER: run}, facts


def work(side: str, size: tuple[int, int, int], layers: int) -> None:
    """Runs the programs that the lines of standard input name, and prints their seconds."""
    programs, facts = {"ours": ours, "peer": peers}[side](size, layers)
    for line in map(str.strip, sys.stdin):
        print("=", json.dumps(facts() if line == "facts" else programs[line]()), flush=True)


def demo(target: str) -> None:
    """Edits the demo clip, and stores the frames."""
    import numpy as np

    import kvlock_jax as kvl

    edited = kvl.edit(kvl.load("demo"), DEMO / "clip.mp4", DEMO / "mask.mp4", "a blue square")
    np.save(target, edited.video)


# --- the parent ----------------------------------------------------------------------------------


class Worker:
    """A process that runs one side's programs when asked."""

    def __init__(self, python: str, side: str, size: str, layers: int, platform: str):
        argv = [python, __file__, "--work", side, "--size", size, "--layers", str(layers)]
        given = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_PLATFORMS": platform}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            argv, stdin=pipe, stdout=pipe, text=True, env=os.environ | given
        )

    def ask(self, what: str) -> Any:
        """The answer to a line."""
        with contextlib.suppress(BrokenPipeError):  # what it wrote tells why
            print(what, file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith("= "):
                return json.loads(line[2:])
        raise SystemExit(f"{' '.join(self.process.args)} ended with {self.process.wait()}")


def parity(platform: str) -> tuple[float, int]:
    """The share of the demo edit's values that differ from the CPU's, and by how much."""
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        videos = []
        for place in ("cpu", platform):
            target = f"{folder}/{len(videos)}.npy"
            given = os.environ | {"JAX_PLATFORMS": place}
            argv = [sys.executable, __file__, "--demo", target]
            subprocess.run(argv, env=given, check=True)
            videos.append(np.load(target).astype(int))
    apart = abs(videos[0] - videos[1])
    return float((apart > 0).mean()), int(apart.max())


def main() -> None:
    """Measures, and writes the section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", default=sys.executable, help="interpreter that has Diffusers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", default="81x480x832", help="frames, height and width")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--platform", default="cuda", help="JAX's name of the device's kind")
    parser.add_argument("--page", type=pathlib.Path, default=ROOT / "docs" / "gpu.md")
    parser.add_argument("--work", choices=("ours", "peer"), help=argparse.SUPPRESS)
    parser.add_argument("--demo", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.demo:
        return demo(args.demo)
    if args.work:
        return work(args.work, tuple(map(int, args.size.split("x"))), args.layers)
    differ, most = parity(args.platform)
    print(f"demo: {differ:.2%} of values differ from the CPU's, by {most} levels at most")
    sizes = args.size, args.layers, args.platform
    mine, other = Worker(sys.executable, "ours", *sizes), Worker(args.peer, "peer", *sizes)
    workers = {PEER: other, **dict.fromkeys(KINDS, mine)}
    rounds = []
    for number in range(args.rounds + 1):  # the first warms up
        rounds.append({name: worker.ask(name) for name, worker in workers.items()})
        print(f"round {number}: {rounds[-1]}", flush=True)
    about, peer = mine.ask("facts"), other.ask("facts")
    lines = []
    for name in workers:
        seconds = [one[name] for one in rounds[1:]]
        ratios = sorted(one[name] / one[PEER] for one in rounds[1:])
        ratio = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        counts = about["counts"].get(name, {})
        numbers = [
            f"{counts.get(key, 0):.0f}" if counts else "" for key in ("attention", "products")
        ]
        peak = (peer if name == PEER else about)["peak"] / 1e9
        cells = [name, f"{statistics.median(seconds) * 1e3:.0f}", ratio if counts else "", *numbers]
        lines.append(f"| {' | '.join(cells)} | {peak:.2f} |")
    text = ABOUT.format(
        title=SECTION.format(device=about["device"]),
        versions=f"{about['version']}, {peer['version']}",
        differ=differ,
        most=most,
        size=args.size,
        rounds=args.rounds,
        lines="\n".join(lines),
    )
    print(text)
    from tpu_costs import section

    args.page.write_text(section(args.page.read_text(), text.splitlines()[0], text))


if __name__ == "__main__":
    main()
