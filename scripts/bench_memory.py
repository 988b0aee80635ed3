"""Peak resident memory of `kvlock edit` on a CPU, with networks that leave and with all kept.

    python scripts/bench_memory.py [--layers 4] [--runs runs/memory]

The checkpoint has random weights: a UMT5 of the published width with some of its 24 layers (4 by
default, 1.8 billion parameters), the text-to-video 1.3B transformer, and a narrow VAE. It is made
once, and stays in `--runs`. One step over 5 frames of 64x96, so that weights are what takes the
memory. Each edit is a process of its own. Weights are float32, in which a CPU computes: XLA widens
a stack of bfloat16 weights in one piece before its loop over layers, on CPUs alone, and the peak
would be that of the copy (`--dtype bfloat16` shows it).
"""

import argparse
import os
import pathlib
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
from flax import nnx

from kvlock_jax.checkpoints import format, registry
from kvlock_jax.checkpoints.registry import Configs
from kvlock_jax.checkpoints.store import Parameter
from kvlock_jax.media.encode import write_video
from kvlock_jax.models.text import tokenizer
from kvlock_jax.models.text.config import UMT5Config
from kvlock_jax.models.vae.config import VAEConfig
from kvlock_jax.models.wan.config import WanConfig

ROOT = pathlib.Path(__file__).parents[1]
BAR = 0.7
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def parameters(config, pool: np.ndarray) -> dict[str, Parameter]:
    """Parameters of a network, cut from one random array."""

    def one(shape: tuple[int, ...]) -> Parameter:
        """A parameter whose every row is the start of the pool."""
        size = int(np.prod(shape[1:], initial=1))

        def rows(first: int, last: int) -> np.ndarray:
            """Some of its rows."""
            return np.broadcast_to(
                pool[:size].reshape(shape[1:]), (last - first, *shape[1:])
            ).copy()

        return Parameter(shape, pool.dtype, max(1, min(shape[0], (1 << 24) // max(size, 1))), rows)

    flat = nnx.to_flat_state(nnx.state(registry.abstract(config)))
    return {".".join(map(str, path)): one(leaf.get_value().shape) for path, leaf in flat}


def make(folder: pathlib.Path, layers: int, dtype: np.dtype) -> None:
    """Writes the checkpoint."""
    configs = Configs(
        WanConfig(12, 128, 30, 8960),
        VAEConfig(base_dim=8),
        UMT5Config(256_384, 4096, 64, 10_240, layers, 64),
        {},
    )
    largest = 4096 * 10_240  # numbers of a layer of UMT5's feed-forward
    pool = 0.02 * np.random.default_rng(0).standard_normal(largest, np.float32)
    pool = pool.astype(dtype)
    tokenizer.write_word_tokenizer(folder.parent / "words", ["a", "red", "star"], 512)
    networks = {name: parameters(getattr(configs, name), pool) for name in configs.networks}
    format.save(folder, configs, networks, folder.parent / "words", lambda: {"files": {}})


def peak(argv: list[str]) -> float:
    """Gigabytes of a command's largest resident memory."""
    process = subprocess.Popen(argv, env=dict(os.environ, JAX_PLATFORMS="cpu"))
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(argv)} failed")
    return usage.ru_maxrss * 1024 / 1e9


def main() -> None:
    """Runs both edits and prints their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights")
    parser.add_argument("--runs", type=pathlib.Path, default=ROOT / "runs" / "memory")
    args = parser.parse_args()
    folder = args.runs / f"umt5-{args.layers}-{args.dtype}"
    args.runs.mkdir(parents=True, exist_ok=True)
    if not format.is_checkpoint(folder):
        make(folder, args.layers, DTYPES[args.dtype])
    clip = np.random.default_rng(0).integers(0, 255, (5, 64, 96, 3), np.uint8)
    write_video(args.runs / "in.mkv", clip, 8, lossless=True)
    size = {name: m.size / 1e9 for name, m in format.describe(folder).models.items()}
    print("weights: " + ", ".join(f"{name} {gb:.2f} GB" for name, gb in size.items()))
    argv = [sys.executable, "-m", "kvlock_jax.cli.main", "edit", "--ckpt_dir", str(folder)]
    argv += ["--src_video", str(args.runs / "in.mkv"), "--bbox", "8,8,40,40", "--prompt", "a star"]
    argv += ["--sample_steps", "1", "--save_file", str(args.runs / "out.mkv")]
    leaving, kept = peak(argv), peak([*argv, "--keep_in_memory"])
    print(f"peak resident memory: leaving {leaving:.2f} GB, kept {kept:.2f} GB")
    print(f"ratio {leaving / kept:.2f} (bar {BAR})")


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()
