"""What tells one checkpoint, input file or edit from another: hashes of their content."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from etils import epath

from kvlock_jax import demo
from kvlock_jax.batch.manifest import Request
from kvlock_jax.checkpoints import format
from kvlock_jax.media import storage
from kvlock_jax.media.folders import IMAGE_SUFFIXES

_ENDS = 1 << 16  # bytes of a weight file's head and tail that tell it from another


def checkpoint_identity(source: str) -> dict[str, str]:
    """What tells a checkpoint of `edit.load` from another, without reading its weights.

    Its name and a digest: of a converted one, of the checksums of what it was made of (its own are
    others each time) and of its dtypes; of a published one, of its files' names, sizes and ends.
    """
    folder = Path(demo.__file__).parent / "weights" if source == "demo" else source
    folder = epath.Path(folder).expanduser()
    digest = hashlib.sha256()
    if format.is_checkpoint(folder):
        told = format.read_metadata(folder)
        dtypes = {name: model.dtypes for name, model in told.models.items()}
        made_of = [dict(told.source.get("files") or told.files), dtypes]
        digest.update(json.dumps(made_of, sort_keys=True).encode())
    else:
        for file in sorted(_weight_files(folder, depth=2)):
            size = file.stat().length
            with file.open("rb") as content:
                ends = content.read(_ENDS)
                content.seek(max(0, size - _ENDS))
                ends += content.read(_ENDS)
            digest.update(f"{file.parent.name}/{file.name} {size} ".encode() + ends)
    return {"name": source, "identity": digest.hexdigest()}


def _weight_files(folder: epath.Path, depth: int) -> Iterator[epath.Path]:
    """Weights and configs in a folder, and in folders down to a depth; hidden ones do not count.

    Listed, not globbed: the folder's name may hold characters of a pattern.
    """
    for entry in folder.iterdir():
        if entry.name.startswith("."):
            continue
        if entry.name.endswith((".safetensors", ".pth", ".json")):
            yield entry
        elif depth and entry.is_dir():
            yield from _weight_files(entry, depth - 1)


def content_identity(path: str) -> str:
    """What tells a file, or a folder of images, from another."""
    files = storage.files(path, IMAGE_SUFFIXES)
    if files == [path]:
        return storage.identity(path)
    told = [(os.path.basename(file), storage.identity(file)) for file in files]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def request_hash(request: Request, contents: Sequence[str], checkpoint: Mapping[str, str]) -> str:
    """The hash of all that an edit is made of.

    Args:
      request: the line of the manifest.
      contents: hashes of `request.files`, in their order.
      checkpoint: of `checkpoint_identity`, and the compute dtype.
    """
    made_of = {
        "id": request.id,
        "noise_id": request.noise_id,
        "prompt": request.prompt,
        "box": None if isinstance(request.mask, str) else request.mask,
        "save_file": request.save_file,
        "lossless": request.lossless,
        "settings": dataclasses.asdict(request.settings),
        "files": contents,
        "checkpoint": dict(checkpoint),
    }
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
