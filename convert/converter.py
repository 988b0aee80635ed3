"""`kvlock convert`: a published checkpoint of any layout to a folder of this package's own."""

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
"""Told what is converted and how many bytes it makes; gives what is told of them one by one."""


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    dtype: Any = None,
    on_start: OnStart = lambda published, total: lambda count: None,
) -> Contents:
    """Converts a published checkpoint, a layer of a parameter at a time.

    It can be stopped at any moment: what the target holds stays whole until the new checkpoint is,
    and what was left half-written goes with the next conversion.

    Args:
      source: a Diffusers folder, or an original one of the publisher, of Wan 2.1.
      target: folder of the converted checkpoint, local or of a scheme that etils knows; made if
        missing. Files in it that are not ours stay.
      dtype: of the parameters; None keeps the source's.
      on_start: called when all is checked and reading begins.

    Raises:
      CheckpointError: if the source is not one that is known, is damaged or does not fit, or the
        target cannot be written.
    """
    published, target = open_source(source), epath.Path(target).expanduser()
    parameters = published.parameters(dtype)
    _check_target(published.folder, target)
    Tokenizer(published.tokenizer)  # finds what is wrong with it before the work, not after
    total = sum(p.nbytes for values in parameters.values() for p in values.values())
    on_bytes = on_start(published, total)
    with _sums(published) as sums:
        format.save(
            target,
            published.configs,
            parameters,
            published.tokenizer,
            lambda: {
                "layout": published.layout,
                "folder": published.folder.resolve().name,
                "files": {name: future.result() for name, future in sums.items()},
            },
            on_bytes,
        )
    return format.describe(target)


def _check_target(folder: Path, target: epath.Path) -> None:
    if (target / "model_index.json").exists():
        raise CheckpointError(f"{target} is a Diffusers folder; give another --dst")
    if "://" in os.fspath(target):
        return
    if Path(target).resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(f"{target} lies in the source folder, {folder}; give another --dst")


@contextlib.contextmanager
def _sums(published: Published) -> Iterator[dict[str, concurrent.futures.Future[str]]]:
    """SHA-256 of a checkpoint's files, found in other threads until the block ends."""
    left = threading.Event()

    def sha256(path: Path) -> str:
        """Of a file, as far as it is wanted still."""
        digest = hashlib.sha256()
        try:
            with path.open("rb") as file:
                while not left.is_set() and (block := file.read(1 << 22)):
                    digest.update(block)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
        return digest.hexdigest()

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        names = {path.relative_to(published.folder).as_posix(): path for path in published.files}
        try:
            yield {name: pool.submit(sha256, path) for name, path in sorted(names.items())}
        finally:
            left.set()
