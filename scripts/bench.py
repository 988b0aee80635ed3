"""Speed and memory beside the peers, as ratios of one run, and docs/benchmarks.md of them.

    python scripts/bench.py [--only block] [--rounds 5] [--page docs/benchmarks.md]

Every row runs two programs in turn, round by round, on this machine's CPU in float32: its clock may
drift, their ratio does not. What is kept of a row is the median of each and the ratio of each round.
The peer is Diffusers, or our own program without what a row is about. The lock is measured on the
widths of 1.3B with few layers, where what is left out (the other layers) is the same again.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import re
import statistics
import time
from collections.abc import Callable

THREADS = 2
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kvlock_jax import costs, lock
from kvlock_jax.config import VAEConfig, WanConfig
from kvlock_jax.models import vae
from kvlock_jax.models.vace import VACEContext, wan_transformer
from kvlock_jax.patches import Grid
from kvlock_jax.sampling import solvers
from kvlock_jax.sampling.sampler import Edits, Program, bucket, sample

ROOT = pathlib.Path(__file__).parents[1]
WIDE = WanConfig(12, 128, 1, 8960)  # the widths of 1.3B
TEXT = 512


@dataclasses.dataclass(frozen=True)
class Row:
    """Two programs that are compared.

    Attributes:
      name: what of.
      bar: what the ratio must not be over; at least, where `least`.
      make: gives both, each a function that runs once and waits for its result.
      scale: what the ratio is multiplied with, such as 1 / edits.
      least: whether more is better.
    """

    name: str
    bar: float
    make: Callable[[], tuple[Callable[[], None], Callable[[], None]]]
    scale: float = 1.0
    least: bool = False


def grid_of(tokens: int) -> tuple[int, int, int]:
    """Latent frames, rows and columns of about as many tokens."""
    return {390: (5, 12, 26), 1950: (5, 30, 52), 8000: (5, 64, 100)}[tokens]


# --- models -----------------------------------------------------------------------------------


def block(tokens: int):
    """A block of 1.3B's widths, batch 2, beside Diffusers' of the same weights."""
    import torch
    from diffusers import WanTransformer3DModel

    torch.set_num_threads(THREADS)
    config = dataclasses.replace(WIDE, num_layers=1)
    space = grid_of(tokens)
    grid = Grid.of(space)
    rng = np.random.default_rng(0)
    z = rng.normal(size=(2, *space, 16)).astype(np.float32)
    text = rng.normal(size=(2, TEXT, 4096)).astype(np.float32)
    ours = wan_transformer(config, rngs=nnx.Rngs(0))
    cells, times = grid.split(jnp.asarray(z)), jnp.full(2, 500.0)
    told = jax.jit(lambda m, t: m.condition(t, grid))(ours, text)
    run = jax.jit(lambda m, *given: m(*given))
    peer = WanTransformer3DModel(num_attention_heads=12, num_layers=1, ffn_dim=8960).eval()
    latents = torch.tensor(z).permute(0, 4, 1, 2, 3)
    given = latents, torch.full((2,), 500.0), torch.tensor(text)

    def theirs() -> None:
        with torch.no_grad():
            peer(*given)

    return lambda: jax.block_until_ready(run(ours, cells, times, told)), theirs


def decode(frames: int, height: int, width: int):
    """The VAE's decoder at the published widths, beside Diffusers'."""
    import torch
    from diffusers import AutoencoderKLWan

    torch.set_num_threads(THREADS)
    shape = (1, (frames - 1) // 4 + 1, height // 8, width // 8, 16)
    z = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    network = vae.WanVAE(VAEConfig(), rngs=nnx.Rngs(0))
    peer = AutoencoderKLWan().eval()
    latents = torch.tensor(z).permute(0, 4, 1, 2, 3)

    def theirs() -> None:
        with torch.no_grad():
            peer.decode(latents)

    return lambda: jax.block_until_ready(vae.decode(network, z)), theirs


def loops(config: WanConfig, preset: str, edits: int = 1, steps: int = 50, share: float = 0.2):
    """A whole sampling loop with a preset, beside `cfg`, one edit; `share` of the tokens edited."""
    space = grid_of(390)
    grid, rng = Grid.of(space), np.random.default_rng(0)
    model = wan_transformer(config, rngs=nnx.Rngs(0))

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    def given(count: int) -> Edits:
        source, noise = (grid.split(normal(1, *space, 16)) for _ in range(2))
        own = jnp.arange(grid.length) < share * grid.length
        foreground = jnp.broadcast_to(own[None, :, None], (count, grid.length, 4))
        texts, source_texts = normal(2 * count, TEXT, 4096), normal(1, TEXT, 4096)
        if config.vace_layers:
            control = grid.split(normal(1, *space, 96))
            many = jnp.repeat(control, count, axis=0)
            texts = VACEContext(texts, many, jnp.ones(count))
            source_texts = VACEContext(source_texts, control, jnp.ones(1))
        return Edits(source, noise, foreground, texts, source_texts, grid)

    def program(name: str, count: int) -> Callable[[], None]:
        settings, what = lock.preset(name, 5.0), given(count)
        tokens = bucket(int(what.own.sum(axis=1).max()), grid)
        args = what, solvers.unipc(steps, 5.0), lock.knobs(settings, 5.0)
        kind = Program.of(settings, tokens)

        def run() -> None:
            start = jnp.array(what.spread(what.noise), copy=True)
            jax.block_until_ready(sample(model, start, *args, program=kind))

        return run

    return program(preset, edits), program("cfg", 1)


def matmul():
    """The transformer's matrix products at the rate that a bare product of this machine has."""
    config = dataclasses.replace(WIDE, num_layers=2)
    ours, _ = passes(config)
    flops = costs.pass_flops(costs.Workload(config, 17, 240, 416), 2).total
    x, w = (jnp.asarray(np.random.default_rng(0).normal(size=s), jnp.float32)
            for s in ((3900, 1536), (1536, 8960)))  # fmt: skip
    product = jax.jit(jnp.matmul)
    times = round(flops / (2 * 3900 * 1536 * 8960))

    def best() -> None:
        for _ in range(times):
            y = product(x, w)
        jax.block_until_ready(y)

    return ours, best


def passes(config: WanConfig):
    """A pass over two rows of 1,950 tokens."""
    grid, rng = Grid.of(grid_of(1950)), np.random.default_rng(0)
    model = wan_transformer(config, rngs=nnx.Rngs(0))
    z = jnp.asarray(rng.normal(size=(2, grid.length, 4, 16)), jnp.float32)
    text = jnp.asarray(rng.normal(size=(2, TEXT, 4096)), jnp.float32)
    told = jax.jit(lambda m, t: m.condition(t, grid))(model, text)
    run = jax.jit(lambda m, *given: m(*given))
    return lambda: jax.block_until_ready(run(model, z, jnp.full(2, 500.0), told)), grid


VACE = dataclasses.replace(WIDE, vace_layers=(0,))
ROWS = [
    Row("block of 1.3B, 1,950 tokens, batch 2: ours / Diffusers", 0.75, lambda: block(1950)),
    Row("block of 1.3B, 8,000 tokens, batch 2: ours / Diffusers", 0.75, lambda: block(8000)),
    Row("VAE decode 9x96x96: ours / Diffusers", 0.35, lambda: decode(9, 96, 96)),
    Row("VAE decode 17x240x416: ours / Diffusers", 0.35, lambda: decode(17, 240, 416)),
    Row("matmul rate of a pass / of a bare product", 0.8, matmul, least=True),
    Row("kvlock / cfg, 50 steps, VACE", 1.25, lambda: loops(VACE, "kvlock")),
    Row("hard_lock / cfg, a fifth edited", 0.75, lambda: loops(WIDE, "hard_lock")),
    Row("hard_lock, 4 prompts, each / cfg", 0.4, lambda: loops(WIDE, "hard_lock", 4), scale=1 / 4),
]


def measure(row: Row, rounds: int) -> dict:
    """Runs both in turn; medians in seconds, and the ratios of rounds."""
    both = row.make()
    for run in both:
        run()
    seconds = []
    for _ in range(rounds):
        seconds.append([timed(run) for run in both])
    ratios = [row.scale * (b / a if row.least else a / b) for a, b in seconds]
    medians = [statistics.median(column) for column in zip(*seconds, strict=True)]
    return {"seconds": medians, "ratio": statistics.median(ratios), "ratios": sorted(ratios)}


def timed(run: Callable[[], None]) -> float:
    """Seconds of a run."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    """Measures rows and prints them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="rows with such a name (a regex)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--runs", type=pathlib.Path, default=ROOT / "runs" / "bench.json")
    flags = parser.parse_args()
    flags.runs.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(flags.runs.read_text()) if flags.runs.exists() else {}
    for row in ROWS:
        if not re.search(flags.only, row.name):
            continue
        told = found[row.name] = measure(row, flags.rounds)
        met = told["ratio"] >= row.bar if row.least else told["ratio"] <= row.bar
        spread = f"{told['ratios'][0]:.2f} to {told['ratios'][-1]:.2f}"
        ours, peer = (f"{s:.3g} s" for s in told["seconds"])
        print(f"{row.name}: {told['ratio']:.2f} ({spread}), bar {row.bar}"
              f"{'' if met else ' MISSED'}; {ours} beside {peer}", flush=True)  # fmt: skip
        flags.runs.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
