"""The host's memory while a long clip is read, encoded, decoded, measured and written.

    python scripts/bench_stream.py [--frames 2000] [--size 832*480] [--runs runs/stream]

A video and a mask video of noise that moves are written frame by frame; then they go through the
functions that `kvlock edit` calls, with a VAE of random weights and few channels in place of a
model, and no sampling between encoder and decoder. Its process tells, stage by stage, two peaks:
all resident memory, which the limit is for, and the part that the system cannot take back by itself
(anonymous and shared memory). What lies in mapped files counts in the first alone.
"""

import argparse
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

LIMIT = 1.5  # GB of resident memory

_MADE = "clip.mp4", "mask.mp4"


class Watch:
    """Samples this process's memory in a thread, and tells the peaks of each stage."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, float, float, float]] = []
        self._most, self._start = [0.0, 0.0], time.perf_counter()
        threading.Thread(target=self._sample, daemon=True).start()

    def stage(self, name: str) -> None:
        """Ends a stage: notes its seconds and its peaks."""
        self._look()
        self.rows.append((name, time.perf_counter() - self._start, *self._most))
        self._most, self._start = [0.0, 0.0], time.perf_counter()

    def _sample(self) -> None:
        while True:
            self._look()
            time.sleep(0.02)

    def _look(self) -> None:
        found = status()
        now = found["VmRSS"], found["RssAnon"] + found["RssShmem"]
        self._most = [max(pair) for pair in zip(self._most, now, strict=True)]


def status() -> dict[str, float]:
    """Gigabytes of this process's memory, by the kernel's names."""
    text = Path("/proc/self/status").read_text()
    return {name: int(kb) * 1024 / 1e9 for name, kb in re.findall(r"(\w+):\s+(\d+) kB", text)}


def make(folder: Path, frames: int, height: int, width: int) -> None:
    """Writes the video and the mask video, a frame at a time."""
    import av

    still = np.random.default_rng(0).integers(0, 256, (height // 8, 2 * width // 8, 3), np.uint8)
    still = still.repeat(8, axis=0).repeat(8, axis=1)

    def pictures(kind: str) -> Iterator[np.ndarray]:
        """The frames of a video."""
        for frame in range(frames):
            if kind == "clip.mp4":
                yield still[:, frame % width :][:, :width]
                continue
            mask = np.zeros((height, width, 3), np.uint8)
            left = frame % (width // 2)
            mask[height // 4 : height // 2, left : left + width // 4] = 255
            yield mask

    for kind in _MADE:
        with av.open(str(folder / kind), "w") as output:
            stream = output.add_stream("libx264", rate=16, options={"preset": "ultrafast"})
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            for picture in pictures(kind):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
                output.mux(stream.encode(frame))
            output.mux(stream.encode(None))


def measure_in_this_process(folder: Path) -> float:
    """Runs the stages; prints a row of each and returns the peak of all."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from kvlock_jax.evaluate.metrics import measure
    from kvlock_jax.media import encode, room
    from kvlock_jax.media.fit import Fit
    from kvlock_jax.models.vae.autoencoder import WanVAE
    from kvlock_jax.models.vae.config import VAEConfig
    from kvlock_jax.pipeline import pieces
    from kvlock_jax.pipeline.encode import encode_clips
    from kvlock_jax.pipeline.inputs import read_inputs
    from kvlock_jax.runtime.compile_cache import call
    from kvlock_jax.settings.schema import EditConfig

    # Wan's strides and latent channels; patches of pixels and one block a level save time alone
    config = VAEConfig(
        2,
        dim_mult=(1, 1, 1),
        num_res_blocks=1,
        temperal_downsample=(True, True),
        patch_size=2,
    )
    watch = Watch()
    rng = np.random.default_rng(0)
    graph, shapes = nnx.split(nnx.eval_shape(lambda: WanVAE(config, rngs=nnx.Rngs(0))))
    weights = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), x.dtype), shapes)
    vae = nnx.merge(graph, weights)
    watch.stage("start")
    clip, mask = (folder / kind for kind in _MADE)
    inputs = read_inputs(clip, mask, "a red star", EditConfig())
    watch.stage("read video and mask")
    fit = Fit(*inputs.source.shape[:3])
    source, region = fit.apply(inputs.source), fit.apply_mask(inputs.mask)
    watch.stage("pad")
    cells = pieces.latent_mask(region, config.strides)
    watch.stage("mask to latent cells")
    encoded = encode_clips(vae, [source], [region], inside=False)
    (latents,) = jax.block_until_ready(encoded.parts)
    assert latents.shape[1:4] == cells.shape, (latents.shape, cells.shape)
    watch.stage("encode, outside the mask")
    (decoded,) = pieces.gathered(pieces.decode(vae, latents, call), len(source))
    watch.stage("decode")
    edited = room.mapped(
        lambda m, a, b: np.where(m[..., None], a, b), inputs.mask, fit.undo(decoded), inputs.source
    )
    watch.stage("composite")
    metrics = measure(inputs.source, edited, inputs.mask)
    watch.stage("metrics")
    encode.write_video(folder / "out.mp4", edited, inputs.fps, footage=inputs.footage)
    watch.stage("write")
    table = Table("stage", "seconds", "resident, GB", "anonymous and shared, GB")
    for name, seconds, *peaks in watch.rows:
        table.add_row(name, f"{seconds:.1f}", *(f"{peak:.2f}" for peak in peaks))
    Console(width=100).print(table)
    frames, height, width = inputs.mask.shape
    print(f"{frames} frames of {width}x{height}; background PSNR {metrics.background_psnr:.2f} dB")
    return status()["VmHWM"]


def main() -> int:
    """Makes the clip, measures in a process of its own, and says whether the limit is kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=2000)
    parser.add_argument("--size", default="832*480", help="width*height, multiples of 16")
    parser.add_argument("--runs", type=Path, default=Path("runs/stream"))
    parser.add_argument("--measure", action="store_true", help="measure a clip that is there")
    args = parser.parse_args()
    if not args.measure:
        args.runs.mkdir(parents=True, exist_ok=True)
        width, height = map(int, args.size.split("*"))
        make(args.runs, args.frames, height, width)
        return subprocess.run([sys.executable, *sys.argv, "--measure"]).returncode
    peak = measure_in_this_process(args.runs)
    verdict = "met" if peak <= LIMIT else "missed"
    print(f"peak of resident memory (VmHWM) {peak:.2f} GB; limit {LIMIT} GB: {verdict}")
    return peak > LIMIT


if __name__ == "__main__":
    sys.exit(main())
