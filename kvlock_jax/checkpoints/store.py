"""Writes arrays to an Orbax folder piece by piece and restores them straight to their devices.

Functions import Orbax themselves, so that `import kvlock_jax` does not wait for it.
"""

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import errno
import gc
import glob
import math
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from kvlock_jax.errors import CheckpointError

OnBytes = Callable[[int], None]
"""Called with the number of bytes of each piece that is handed to the disk."""

CHUNK = 1 << 20
"""Largest piece, in bytes, that is one chunk; larger pieces are cut for sharded restores."""

CUTS = 8
"""Parts into which each axis of a larger piece is cut: one of eight devices reads only its own."""

IN_FLIGHT = 1 << 26
"""Bytes that may be read and not yet written; Orbax buffers about twice as many."""

_CONTEXT = {"file_io_sync": False, "data_copy_concurrency": {"limit": 8}}
"""No fsync: checksums find a file that a power cut left unwritten. Threads that transpose wait for
memory more than they compute, hence a fixed number of them."""

DATA_FILE = 1 << 28
"""Bytes of one file of Orbax's store, which holds many arrays."""

RESTORING = 10**9
"""Bytes of shards on the host at once during a restore, unless one shard alone takes more."""


@dataclasses.dataclass(frozen=True)
class Parameter:
    """An array whose shape is known before it is read, and that is read in pieces.

    Attributes:
      shape: shape of the array, of one axis or more.
      dtype: dtype of its values.
      rows: rows of the leading axis that are read and stored together.
      read: function that returns the rows from a first to an exclusive last.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    rows: int
    read: Callable[[int, int], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Size of the array in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def chunk(self) -> tuple[int, ...]:
        """Shape of one stored chunk."""
        piece = (self.rows, *self.shape[1:])
        if math.prod(piece) * self.dtype.itemsize <= CHUNK:
            return piece
        return tuple(size if size % CUTS else size // CUTS for size in piece)

    def whole(self) -> np.ndarray:
        """The whole array."""
        return self.read(0, self.shape[0])


def write(
    folder: epath.Path, parameters: Mapping[str, Parameter], on_bytes: OnBytes = lambda _: None
) -> None:
    """Writes arrays to a new folder, with `IN_FLIGHT` bytes or two pieces of them in memory.

    Raises:
      OSError: the arrays cannot be written.
    """
    import orbax.checkpoint as ocp

    registry = ocp.type_handlers.create_type_handler_registry(
        (Parameter, _handler(on_bytes)),
        (jax.Array, ocp.type_handlers.ArrayHandler()),  # Orbax warns where there is none
    )
    # bf16 weights hardly shrink, and zstd would be most of the work
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False)
    with ocp.Checkpointer(handler) as checkpointer, _plain(folder) as place:
        save = ocp.args.PyTreeSave(dict(parameters), ocdbt_target_data_file_size=DATA_FILE)
        try:
            checkpointer.save(place, args=save)
        except ValueError as error:
            if cause := _disk_error(error):
                raise cause from error
            raise


def _handler(on_bytes: OnBytes) -> Any:
    """Orbax's handler that writes a `Parameter`, which is restored as a NumPy array."""
    import orbax.checkpoint as ocp
    import tensorstore as ts

    async def opened(value: Parameter, info: Any, context: ts.Context) -> ts.TensorStore:
        await info.await_path_creation()
        spec = ocp.type_handlers.get_json_tspec_write(
            info,
            use_ocdbt=True,
            global_shape=value.shape,
            local_shape=value.chunk,
            dtype=value.dtype,
            process_index=0,
        )
        return await ts.open(ts.Spec(spec), create=True, open=True, context=context)

    class Handler(ocp.type_handlers.NumpyHandler):
        """Writes arrays as they are read, some rows at a time."""

        async def serialize(self, values, infos, args=None):
            # Opened together: one after another, each would wait for the writes before it.
            context = ts.Context(_CONTEXT, parent=infos[0].ts_context)
            targets = await asyncio.gather(
                *(opened(v, info, context) for v, info in zip(values, infos, strict=True))
            )
            writes = collections.deque()
            for value, target in zip(values, targets, strict=True):
                for first in range(0, value.shape[0], value.rows):
                    last = min(first + value.rows, value.shape[0])
                    array = value.read(first, last)
                    while writes and array.nbytes + sum(n for _, n in writes) > IN_FLIGHT:
                        await writes.popleft()[0]
                    write = target[first:last].write(
                        array, can_reference_source_data_indefinitely=True
                    )
                    writes.append((write, array.nbytes))
                    on_bytes(array.nbytes)
            for write, _ in writes:
                await write
            return []

    return Handler()


def _disk_error(error: ValueError) -> OSError | None:
    """The operating system's error inside an error of the store; `None` if there is none."""
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES):
        if os.strerror(number) in str(error):
            return OSError(number, os.strerror(number))
    return None


def describe(folder: epath.Path) -> Mapping[str, Any]:
    """Shape and dtype of every array in a folder."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer, _plain(folder) as place:
        return checkpointer.metadata(place).item_metadata.tree


def read(
    folder: epath.Path, targets: Mapping[str, jax.ShapeDtypeStruct]
) -> Iterator[tuple[str, jax.Array]]:
    """Restores arrays by name, each directly to its target's sharding and dtype.

    The largest come first, and some at a time: Orbax holds all that a call has read a second time,
    in cycles of references, until they are collected.
    """
    import orbax.checkpoint as ocp

    def needed(target: jax.ShapeDtypeStruct) -> int:
        """Bytes that Orbax counts for an array: whole chunks of the stored dtype."""
        shard = target.sharding.shard_shape(target.shape)
        if shard == target.shape:  # of at most 4 bytes a number, and part of a chunk over
            return 4 * math.prod(shard) + 8 * CHUNK
        return 4 * math.prod(shard) * target.dtype.itemsize + 8 * CHUNK

    sizes = {name: needed(target) for name, target in targets.items()}
    limit = max(RESTORING, *sizes.values())
    handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=limit / 10**9)
    with ocp.Checkpointer(handler) as checkpointer, _plain(folder) as place:
        for names in _groups(sizes):
            item = {name: targets[name] for name in names}
            arguments = ocp.checkpoint_utils.construct_restore_args(item)
            restore = ocp.args.PyTreeRestore(item, restore_args=arguments, partial_restore=True)
            found = jax.block_until_ready(checkpointer.restore(place, args=restore))
            gc.collect()
            while found:
                yield found.popitem()


def _groups(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Names from the largest size on, in groups of `RESTORING` bytes or one larger array."""
    group: list[str] = []
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        if group and sum(sizes[other] for other in group) + sizes[name] > RESTORING:
            yield group
            group = []
        group.append(name)
    yield group


@contextlib.contextmanager
def _plain(folder: epath.Path) -> Iterator[epath.Path]:
    """A path of a folder without `*`, `?` and `[`: Orbax expands paths as patterns.

    Raises:
      CheckpointError: a remote path has one; a local one is reached by a link.
    """
    path = folder.absolute()
    if not glob.has_magic(os.fspath(path)):
        yield path
        return
    if not os.path.isdir(path.parent):
        raise CheckpointError(f"{folder}: a remote checkpoint's path must be without *, ? and [")
    with tempfile.TemporaryDirectory(prefix="kvlock-") as place:
        link = epath.Path(place) / "folder"
        os.symlink(path.parent, link, target_is_directory=True)
        yield link / path.name


def sums(folder: epath.Path) -> dict[str, str]:
    """CRC-32 of every file under a folder, by relative path."""
    return _sums(folder, [root / name for root, _, names in folder.walk() for name in names])


def _sums(folder: epath.Path, files: Sequence[epath.Path]) -> dict[str, str]:
    with concurrent.futures.ThreadPoolExecutor() as pool:  # zlib lets other threads run
        values = pool.map(_crc32, files)
        return {f.relative_to(folder).as_posix(): s for f, s in zip(files, values, strict=True)}


def _crc32(path: epath.Path) -> str:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


def check(folder: epath.Path, expected: Mapping[str, str]) -> None:
    """Compares the files of a folder with the checksums from when they were written.

    Raises:
      CheckpointError: a file is missing or has changed; the message lists all of them.
    """
    actual = _sums(folder, [folder / name for name in expected if (folder / name).exists()])
    lines = [f"  missing: {name}" for name in expected if name not in actual]
    lines += [
        f"  not as it was written: {name} has CRC-32 {actual[name]}, expected {value}"
        for name, value in expected.items()
        if actual.get(name, value) != value
    ]
    if lines:
        raise CheckpointError("\n".join([f"{folder} is damaged:", *lines]))
