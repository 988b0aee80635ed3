"""Manifests of batches, and what a batch left in its folder."""

import json
from pathlib import Path

import batches

from kvlock_jax.errors import SamplingError
from kvlock_jax.media import decode

BOX = {"src_video": "0.mkv", "bbox": "0,0,8,8", "prompt": "a star"}


def write(folder: Path, *rows: dict, name: str = "edits.jsonl") -> Path:
    """A manifest of edits `0`, `1`, ...; each row says how it differs from `BOX`."""
    full = [
        BOX | {"id": str(n), "save_file": f"{n}.mkv", "lossless": True} | row
        for n, row in enumerate(rows)
    ]
    (folder / name).write_text("\n".join(map(json.dumps, full)))
    return folder / name


def failures(save_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (save_dir / "failed.jsonl").read_text().splitlines()]


def names(save_dir: Path) -> list[str]:
    return sorted(path.name for path in save_dir.iterdir())


def all_frames(save_dir: Path) -> dict[str, bytes]:
    return {p.name: decode.read_video(p).frames.tobytes() for p in save_dir.glob("*.mkv")}


def poor(model, inputs, *rest):
    """A runner that fails as a whole if one of its edits is bad, or leaves a mark in its place."""
    if any(given.prompt == "bug" for given in inputs):
        raise KeyError("a bug")
    results = batches.runner(model, inputs, *rest)
    diverged = SamplingError("latents are not finite after step 1 of 2")
    return [diverged if i.prompt == "bad" else r for i, r in zip(inputs, results, strict=True)]
