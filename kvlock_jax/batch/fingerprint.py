"""Hashes that identify checkpoints, input files and edits by their content."""

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
from kvlock_jax.checkpoints.files import NO_FILES, NO_LORAS, Files, Loras
from kvlock_jax.media import storage
from kvlock_jax.media.folders import IMAGE_SUFFIXES

_ENDS = 1 << 16  # bytes of a weight file's head and tail that identify it


def checkpoint_identity(
    source: str | None, files: Files = NO_FILES, loras: Loras = NO_LORAS
) -> dict[str, str]:
    """Name and identity of a checkpoint, without reading its weights, and of files beside it.

    The identity of a converted checkpoint is a digest of its sources' checksums (its own files
    differ after each conversion) and of its dtypes; that of a published one, of its files' names,
    sizes and ends. Files of single parts count by their content.
    """
    found = {} if source is None else {"name": source, "identity": _folder_identity(source)}
    for name, path in files.read().items():
        found[name] = f"{path}:{storage.identity(str(path))}"
    sums = [f"{name}:{storage.identity(str(path))}" for name, (path, _) in loras.named]
    if sums:
        found["loras"] = ", ".join(sums)
    return found


def _folder_identity(source: str) -> str:
    folder = Path(demo.__file__).parent / "weights" if source == "demo" else source
    folder = epath.Path(folder).expanduser()
    digest = hashlib.sha256()
    if format.is_checkpoint(folder):
        metadata = format.read_metadata(folder)
        dtypes = {name: model.dtypes for name, model in metadata.models.items()}
        made_of = [dict(metadata.source.get("files") or metadata.files), dtypes]
        digest.update(json.dumps(made_of, sort_keys=True).encode())
    else:
        for file in sorted(_weight_files(folder, depth=2)):
            size = file.stat().length
            with file.open("rb") as content:
                ends = content.read(_ENDS)
                content.seek(max(0, size - _ENDS))
                ends += content.read(_ENDS)
            digest.update(f"{file.parent.name}/{file.name} {size} ".encode() + ends)
    return digest.hexdigest()


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
    """Identity of a file, or of a folder of images by their names and content."""
    files = storage.files(path, IMAGE_SUFFIXES)
    if files == [path]:
        return storage.identity(path)
    named = [(os.path.basename(file), storage.identity(file)) for file in files]
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()


def request_hash(request: Request, contents: Sequence[str], checkpoint: Mapping[str, str]) -> str:
    """The hash of everything that an edit is made from.

    Args:
      request: the line of the manifest.
      contents: identities of `request.files`, in their order.
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
