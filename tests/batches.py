"""Manifests to test by, and edits that take no model: frames made of the inputs and the key.

As a program it reads the paths of a manifest and of a folder, a line each, runs the manifest, and
prints the id of each edit that ended: a process for others to kill.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path

import jax
import numpy as np

from kvlock_jax.batch import runner as batch
from kvlock_jax.batch.manifest import Common
from kvlock_jax.batch.resume import Job, Work, find_work
from kvlock_jax.batch.runner import Summary
from kvlock_jax.evaluate.metrics import EditMetrics
from kvlock_jax.media import encode, storage
from kvlock_jax.pipeline.api import Result
from kvlock_jax.pipeline.inputs import EditInputs
from kvlock_jax.sampling.loop import Trace
from kvlock_jax.settings.schema import run_config

SHAPE = (5, 32, 48)
KINDS = {"scheduled": bool, "finite": bool}
NO_TRACE = Trace(
    **{f.name: np.zeros(2, KINDS.get(f.name, np.float32)) for f in dataclasses.fields(Trace)}
)
METRICS = EditMetrics(30.0, float("inf"), float("nan"), 1.0, 0.5)


def clip(seed: int, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)


def frames(inputs: EditInputs, key: jax.Array) -> np.ndarray:
    """What `runner` makes: noise of the key under the mask, of a shade of the prompt."""
    seed = [*np.asarray(jax.random.key_data(key)).tolist(), len(inputs.prompt)]
    noise = np.random.default_rng(seed).integers(0, 256, inputs.source.shape, np.uint8)
    return np.where(inputs.mask[..., None], noise, inputs.source)


def runner(model, inputs, settings, keys) -> list[Result]:
    """A `batch.Runner` without a model."""
    return [
        Result(
            video=frames(given, key),
            source=given.source,
            mask=given.mask,
            fps=given.fps,
            trace=NO_TRACE,
            metrics=METRICS,
            seconds={"sample": 0.5},
            settings=own,
            footage=given.footage,
        )
        for given, own, key in zip(inputs, settings, keys, strict=True)
    ]


def write_inputs(folder: Path) -> None:
    """Four clips (`0.mkv` to `3.mkv`), a mask, and broken lines."""
    for n in range(4):
        encode.write_video(folder / f"{n}.mkv", clip(n), 12, lossless=True)
    region = np.zeros(SHAPE, np.uint8)
    np.save(folder / "empty.npy", region)
    region[:, 8:16, 8:24] = 255
    np.save(folder / "mask.npy", region)
    np.save(folder / "short.npy", region[:3])
    (folder / "story.mkv").write_text("a story, not a film")


def forty(folder: Path) -> tuple[Path, list[str]]:
    """A manifest of 40 edits, six of them broken, and the ids of the others."""
    write_inputs(folder)
    rows = [
        {
            "id": f"edit-{n:02d}",
            "src_video": f"{n % 4}.mkv",
            "src_mask": "mask.npy",
            "prompt": "a star" + "s" * n,
            "sample_steps": 2 + n % 3,
            "base_seed": n % 2,
            "save_file": f"edit-{n:02d}.mkv",
            "lossless": True,
        }
        for n in range(40)
    ]
    rows[3]["src_video"] = "absent.mkv"
    rows[8]["src_mask"] = "short.npy"
    rows[13]["src_mask"] = "empty.npy"
    rows[27]["id"] = "edit-26"
    rows[33]["src_video"] = "story.mkv"
    lines = [json.dumps(row) for row in rows]
    lines[19] = lines[19][:-1]
    manifest = folder / "edits.jsonl"
    manifest.write_text("\n".join(lines) + "\n")
    good = [f"edit-{n:02d}" for n in range(40) if n not in (3, 8, 13, 19, 27, 33)]
    return manifest, good


def job(manifest: Path | str, save_dir: Path | str, **changes) -> Job:
    common = changes.pop("common", Common(run_config("kvlock", steps=2)))
    paths = (storage.resolve(str(path)) for path in (manifest, save_dir))
    return Job(*paths, common, {"name": "none"}, **changes)


def do(manifest: Path | str, save_dir: Path | str, runner=runner, **changes) -> Summary:
    """Runs a manifest, with `runner` in place of a model."""
    return run(find_work(job(manifest, save_dir, **changes)), runner)


def run(work: Work, runner=runner, on_end=lambda request, failure: None) -> Summary:
    return batch.run(work, lambda: None, runner, on_end)


def main() -> None:
    def slow(*args):
        time.sleep(0.03)
        return runner(*args)

    def on_end(request, failure):
        print("failed" if failure else "done", request.id, flush=True)

    manifest, save_dir = (sys.stdin.readline().rstrip("\n") for _ in range(2))
    if save_dir:
        run(find_work(job(manifest, save_dir, batch_size=2)), slow, on_end)


if __name__ == "__main__":
    main()
