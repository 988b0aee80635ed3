"""Prints the seconds that an edit's host spends outside the model: read, measure, write, trace.

    python scripts/bench_host.py [--frames 81] [--size 832*480] [--rounds 3]

The clip is a photo of scikit-image that drifts, so that it compresses as footage does; the edit is
the same clip with noise under its mask and a little outside. Medians of some rounds; the first,
which compiles, is not counted.
"""

import argparse
import statistics
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
from skimage import data, transform

from kvlock_jax.evaluate.metrics import measure
from kvlock_jax.media.encode import write_video
from kvlock_jax.pipeline import report
from kvlock_jax.pipeline.api import Result
from kvlock_jax.pipeline.inputs import read_inputs
from kvlock_jax.pipeline.outputs import Outputs, write_outputs
from kvlock_jax.pipeline.settings import config, resolve_settings
from kvlock_jax.sampling.loop import Trace

STEPS = 50
STAGES = ("read", "metrics", "write", "trace")


def clip(frames: int, width: int, height: int) -> np.ndarray:
    """A photo under a window that moves two pixels a frame."""
    large = transform.resize(data.astronaut(), (height + 2 * frames, width + 2 * frames))
    photo = (large * 255).astype(np.uint8)
    return np.stack([photo[2 * n : 2 * n + height, 2 * n : 2 * n + width] for n in range(frames)])


def rounds(frames: int, width: int, height: int, count: int) -> dict[str, float]:
    """Median seconds of each stage."""
    rng, settings = np.random.default_rng(0), resolve_settings(config("demo"))
    source = clip(frames, width, height)
    mask = np.zeros(source.shape[:3], np.uint8)
    mask[:, height // 4 : height // 2, width // 4 : width // 2] = 255
    noise = rng.integers(-4, 5, source.shape, np.int16) * (1 + 9 * (mask[..., None] > 0))
    edited = np.clip(source + noise, 0, 255).astype(np.uint8)
    numbers, flags = np.zeros(STEPS, np.float32), np.ones(STEPS, bool)
    trace = Trace(numbers, numbers, numbers, numbers, numbers, flags, flags)
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_video(folder / "in.mp4", source, Fraction(16))
        write_video(folder / "mask.mp4", np.repeat(mask[..., None], 3, -1), Fraction(16))
        for _ in range(count + 1):
            times = [time.perf_counter()]
            inputs = read_inputs(folder / "in.mp4", folder / "mask.mp4", "a cat", settings.edit)
            times.append(time.perf_counter())
            measured = measure(inputs.source, edited, inputs.mask)
            times.append(time.perf_counter())
            seen = (inputs.source, inputs.mask, inputs.fps)
            result = Result(edited, *seen, trace, measured, {}, settings, inputs.footage)
            written = write_outputs(Outputs(folder / "out.mp4"), result, {})
            times.append(time.perf_counter())
            assert not written.errors, written.errors
            report.write_trace(folder / "out.json", result)
            report.plot_trace(folder / "out.png", trace, settings)
            times.append(time.perf_counter())
            for stage, a, b in zip(STAGES, times, times[1:], strict=False):
                found.setdefault(stage, []).append(b - a)
    return {stage: statistics.median(seconds[1:]) for stage, seconds in found.items()}


def main() -> None:
    """Parses the flags and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--size", default="832*480")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    width, height = map(int, args.size.split("*"))
    found = rounds(args.frames, width, height, args.rounds)
    for stage, seconds in found.items():
        print(f"{stage:8} {seconds:6.2f} s")
    print(f"{'all':8} {sum(found.values()):6.2f} s")


if __name__ == "__main__":
    main()
