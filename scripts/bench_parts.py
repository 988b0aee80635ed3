"""Rates of a block's parts and of the VAE's convolutions: operations over seconds."""

import dataclasses
import statistics
import time

import jax
from bench_rows import TEXT, WIDE, Run, normal, passes, products, torch_with_threads
from flax import nnx

from kvlock_jax.estimate import costs
from kvlock_jax.models.attention.dispatch import attend
from kvlock_jax.models.vae.convolutions import CausalConv3d

TOKENS, ROWS = 1950, 2
CHUNK = ((1, 30, 52, 384), (2, 60, 104, 384), (4, 120, 208, 192), (4, 240, 416, 96))
"""Features that a convolution of each level returns for one chunk of a 240x416 clip."""


def measure(rounds: int) -> dict:
    """Seconds, share, rate and efficiency of a block's parts; both rates of each convolution."""
    config = dataclasses.replace(WIDE, num_layers=1)
    flops = costs.pass_flops(costs.Workload(config, 17, 240, 416), ROWS)
    bare = costs.pass_flops(costs.Workload(WIDE, 17, 240, 416), ROWS).total
    best = max(bare / median(products(kind), rounds) for kind in ("XLA", "PyTorch")) / 1e9
    parts = {
        "projections of queries, keys, values, outputs": (flops.projections, projections()),
        "self-attention": (flops.self_attention, attention(TOKENS)),
        "cross-attention": (flops.cross_attention, attention(TEXT)),
        "feed-forward": (flops.feed_forward, feed_forward()),
    }
    seconds = {name: median(run, rounds) for name, (_, run) in parts.items()}
    whole = median(passes(TOKENS, 1), rounds)
    lines = [line(name, count, seconds[name], whole, best) for name, (count, _) in parts.items()]
    rest = whole - sum(seconds.values())
    lines.append(
        ["norms, modulation, RoPE, the rest", f"{rest:.3f}", f"{rest / whole:.0%}", "", ""]
    )
    lines.append(line("the whole pass", flops.total, whole, whole, best))
    return {"best": best, "block": lines, "convolutions": [convolution(s, rounds) for s in CHUNK]}


def line(name: str, flops: int, seconds: float, whole: float, best: float) -> list[str]:
    """A row of the table."""
    rate = flops / seconds / 1e9
    return [name, f"{seconds:.3f}", f"{seconds / whole:.0%}", f"{rate:.0f}", f"{rate / best:.2f}"]


def median(run: Run, rounds: int) -> float:
    """The seconds of a warm run."""
    run()
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def projections() -> Run:
    """The six projections of both attentions that take a block's tokens."""
    x, w = normal(ROWS, TOKENS, WIDE.dim), normal(6, WIDE.dim, WIDE.dim)
    run = jax.jit(lambda x, w: [x @ one for one in w])
    return lambda: jax.block_until_ready(run(x, w))


def attention(keys: int) -> Run:
    """Attention of all tokens to a number of keys."""
    heads = (WIDE.num_attention_heads, WIDE.attention_head_dim)
    q, k, v = (normal(ROWS, length, *heads) for length in (TOKENS, keys, keys))
    run = jax.jit(attend)
    return lambda: jax.block_until_ready(run(q, k, v))


def feed_forward() -> Run:
    """Both products of a feed-forward layer and the nonlinearity between them."""
    x, up = normal(ROWS, TOKENS, WIDE.dim), normal(WIDE.dim, WIDE.ffn_dim)
    down, bias = normal(WIDE.ffn_dim, WIDE.dim), normal(WIDE.ffn_dim)
    run = jax.jit(lambda x: jax.nn.gelu(x @ up + bias, approximate=True) @ down)
    return lambda: jax.block_until_ready(run(x))


def convolution(shape: tuple[int, int, int, int], rounds: int) -> list[str]:
    """A causal convolution with features of this shape, ours and PyTorch's."""
    torch = torch_with_threads()
    frames, rows, columns, channels = shape
    x, layer = normal(1, frames + 2, *shape[1:]), CausalConv3d(channels, channels, rngs=nnx.Rngs(0))
    ours = jax.jit(lambda layer, x: layer.valid(x))
    conv3d = torch.nn.functional.conv3d
    features = torch.randn(1, channels, frames + 2, rows, columns)
    kernel = torch.randn(channels, channels, 3, 3, 3)

    def theirs() -> None:
        with torch.no_grad():
            conv3d(features, kernel, padding=(0, 1, 1))

    runs = (lambda: jax.block_until_ready(ours(layer, x)), theirs)
    flops = 54 * frames * rows * columns * channels**2
    rates = [f"{flops / median(run, rounds) / 1e9:.0f}" for run in runs]
    return [f"{frames}, {rows}, {columns}, {channels}", *rates]
