"""Converts a published checkpoint of any layout to this package's own format."""

import concurrent.futures
import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from kvlock_jax.checkpoints import format
from kvlock_jax.checkpoints.files import NO_FILES, NO_LORAS, Files, Loras
from kvlock_jax.checkpoints.format import Contents
from kvlock_jax.checkpoints.store import OnBytes
from kvlock_jax.convert.published import Published
from kvlock_jax.convert.source import open_source
from kvlock_jax.errors import CheckpointError
from kvlock_jax.models.text.tokenizer import Tokenizer

DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
}

OnStart = Callable[[Published, int], OnBytes]
"""Called with the source and the total bytes of its parameters; returns a callback for progress."""


def convert(
    source: str | os.PathLike | None,
    target: str | os.PathLike,
    dtype: Any = None,
    on_start: OnStart = lambda published, total: lambda count: None,
    loras: Loras = NO_LORAS,
    files: Files = NO_FILES,
) -> Contents:
    """Converts a published checkpoint, a layer of a parameter at a time.

    It can be stopped at any moment: the target's previous checkpoint stays usable until the new one
    is complete, and the next conversion removes half-written data.

    Args:
      source: folder of Wan 2.1 in Diffusers' or the publisher's own layout; None where `files` are
        all that there is.
      target: folder of the converted checkpoint, local or of a scheme that etils knows; made if
        missing. Other files in it stay.
      dtype: dtype of the parameters; None keeps the source's.
      on_start: called after all checks, before parameters are read.
      loras: files and strengths that change the transformer (`convert.lora`).
      files: files of single parts in place of the folder's, as in `open_source`.

    Raises:
      CheckpointError: the source has no known layout, is damaged, does not fit its configs or holds
        numbers that are not finite; or the target cannot be written.
    """
    published, target = open_source(source, files, loras), epath.Path(target).expanduser()
    parameters = published.parameters(dtype)
    _check_target(published.folder, target)
    Tokenizer(published.tokenizer)  # raises its errors before the work, not after
    total = sum(p.nbytes for values in parameters.values() for p in values.values())
    on_bytes = on_start(published, total)
    with _sums(published, loras) as sums:
        format.save(
            target,
            published.configs,
            parameters,
            published.tokenizer,
            lambda: {
                "layout": published.layout,
                "folder": published.folder.resolve().name if published.folder else "",
                "files": {name: future.result() for name, future in sums.items()},
            },
            on_bytes,
        )
    return format.describe(target)


def _check_target(folder: Path | None, target: epath.Path) -> None:
    if (target / "model_index.json").exists():
        raise CheckpointError(f"{target} is a Diffusers folder; give another --dst")
    if folder is None or "://" in os.fspath(target):
        return
    if Path(target).resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(f"{target} lies in the source folder, {folder}; give another --dst")


@contextlib.contextmanager
def _sums(
    published: Published, loras: Loras
) -> Iterator[dict[str, concurrent.futures.Future[str]]]:
    """Computes the SHA-256 of a checkpoint's files in other threads until the `with` block ends.

    A LoRA's name has its strength.
    """
    ended = threading.Event()

    def sha256(path: Path) -> str:
        """The digest of one file; it stops early when the `with` block has ended."""
        digest = hashlib.sha256()
        try:
            with path.open("rb") as file:
                while not ended.is_set() and (block := file.read(1 << 22)):
                    digest.update(block)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
        return digest.hexdigest()

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        names = {path.relative_to(published.folder).as_posix(): path for path in published.files}
        names |= published.apart
        names |= {name: path for name, (path, _) in loras.named}
        try:
            yield {name: pool.submit(sha256, path) for name, path in sorted(names.items())}
        finally:
            ended.set()
