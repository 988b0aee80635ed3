"""Files by path or URL: local ones, `gs://`, `s3://`, `memory://`, whatever fsspec knows.

PyAV and the other readers and writers take local files: others are copied (`local_copy`, `upload`).
Paths are strings that `resolve` made. No path is a pattern: `runs[1]` and `a*.mp4` are names, so
nothing here calls those functions of fsspec that expand one (`rm`, `mv`, `get`, `put`, `glob`). A
remote file system may fail in its own ways (credentials, network), so whatever it raises becomes an
`InputError`.
"""

import contextlib
import dataclasses
import errno
import hashlib
import os
import posixpath
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from typing import IO, Any

import fsspec

from kvlock_jax.errors import Error, InputError

FilePath = str | os.PathLike

_SUMS = ("md5Hash", "crc32c", "ETag", "etag", "content_md5")
"""Names that object stores give to the checksum of a file."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Errors of a disk that takes no further file."""


def resolve(path: str, folder: str = ".") -> str:
    """A path in the form that this module's other functions take: a URL, or absolute.

    Args:
      path: a URL, or a local path, absolute, of a home folder, or relative to `folder`.
      folder: a URL or a local path.
    """
    if path.startswith(("file://", "local://")):
        return fsspec.core.url_to_fs(path)[1]
    if is_remote(path):
        return path
    path = os.path.expanduser(path)
    if os.path.isabs(path):
        return os.path.normpath(path)
    if is_remote(folder):
        scheme, _, place = folder.partition("://")
        return f"{scheme}://{posixpath.normpath(posixpath.join(place, path))}"
    return os.path.abspath(os.path.join(os.path.expanduser(folder), path))


def is_remote(path: str) -> bool:
    """Whether a path is a URL."""
    return "://" in path


def join(folder: str, name: str) -> str:
    """The path of a file of a folder."""
    return f"{folder}{'' if folder.endswith('/') else '/'}{name}"


def parent(path: str) -> str:
    """The folder that a file is in."""
    scheme, colon, place = path.rpartition("://")
    return f"{scheme}{colon}{posixpath.dirname(place)}"


def read_bytes(path: str) -> bytes:
    """The bytes of a file."""
    with _named(path), opened(path) as file:
        return file.read()


@contextlib.contextmanager
def opened(path: str) -> Iterator[IO[bytes]]:
    """A file to read bytes from, and to seek in."""
    with _named(path):
        system, place = _at(path)
        file = system.open(place, "rb")
    with file:
        yield file


def files(path: str, suffixes: Sequence[str]) -> list[str]:
    """The file itself, or the files of a folder that end in one of `suffixes`, sorted by name.

    Dot files, such as the `._0001.png` of macOS, are passed over.

    Raises:
      InputError: the file or folder is missing, or cannot be listed.
    """
    with _named(path):
        system, place = _at(path)
        if system.info(place)["type"] != "directory":
            return [path]
        names = sorted(os.path.basename(entry) for entry in system.ls(place, detail=False))
    ends = tuple(suffixes)
    return [join(path, n) for n in names if n.lower().endswith(ends) and not n.startswith(".")]


def identity(path: str) -> str:
    """A checksum of a file's content, the same wherever it lies and whenever it was written.

    An object store answers with a checksum of its own; any other file is read for its SHA-256. Name
    and time of change do not count: a data set can be copied to another machine.

    Raises:
      InputError: the file cannot be read.
    """
    if is_remote(path):
        with _named(path):
            system, place = _at(path)
            info = system.info(place)
        for name in _SUMS:
            if info.get(name):
                return f"{name}:{info[name]}"
    with _named(path), opened(path) as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
    return f"sha256:{digest.hexdigest()}"


@contextlib.contextmanager
def local_copy(path: str, suffixes: Sequence[str]) -> Iterator[str]:
    """A local path of the same content and name: a remote file or folder is copied.

    Args:
      path: a file or a folder. A local one is returned without a look at it.
      suffixes: endings of the files to copy from a folder.

    Raises:
      InputError: it cannot be copied.
    """
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="kvlock-") as folder:
        target = os.path.join(folder, posixpath.basename(path.rstrip("/")))
        with _named(path):
            sources = files(path, suffixes)
            if sources != [path]:
                os.mkdir(target)
            for file in sources:
                local = target if file == path else join(target, posixpath.basename(file))
                system, place = _at(file)
                system.get_file(place, local)
        yield target


def upload(local: str | os.PathLike, path: str, part: str) -> None:
    """Moves a local file to a path, which never holds half of it.

    Args:
      local: the file; of a local path it must be on the same disk. It is gone afterwards.
      path: what to replace.
      part: another path of the same file system, for the file while it is being sent.

    Raises:
      InputError: it cannot be written.
    """
    with _named(path, "cannot be written"):
        if not is_remote(path):
            os.replace(local, path)
            return
        system, place = _at(path)
        _, passing = _at(part)
        system.makedirs(parent(passing), exist_ok=True)
        system.put_file(os.fspath(local), passing)
        if type(system).mv is not fsspec.AbstractFileSystem.mv:
            system.mv(passing, place)
        else:  # which would take the names for patterns
            system.cp_file(passing, place)
            system.rm_file(passing)
        os.unlink(local)


@contextlib.contextmanager
def replacing(path: str) -> Iterator[str]:
    """A local file to write, moved to the path when the block ends, removed if it raises."""
    if is_remote(path):
        with tempfile.TemporaryDirectory(prefix="kvlock-") as folder:
            local = os.path.join(folder, posixpath.basename(path))
            yield local
            upload(local, path, temporary(path))
        return
    part = temporary(path)
    try:
        yield part
        upload(part, path, part)
    except BaseException:  # an interruption too
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise


def temporary(path: str) -> str:
    """A new hidden name beside a path, of 75 bytes at most: file systems take 255, some 143."""
    name = posixpath.basename(path).encode()[:60].decode(errors="ignore")
    return join(parent(path), f".{name}.{uuid.uuid4().hex[:8]}.part")


def write_bytes(path: str, content: bytes) -> None:
    """Writes a file as a whole.

    Raises:
      InputError: it cannot be written.
    """
    with _named(path, "cannot be written"):
        if is_remote(path):
            system, place = _at(path)
            system.pipe_file(place, content)
            return
        with replacing(path) as part, open(part, "wb") as file:
            file.write(content)


def check_writable(path: str) -> None:
    """Writes an empty file beside a path and removes it, to find out before the work starts.

    Raises:
      InputError: nothing can be written there, or the path is a folder, or its name too long.
    """
    with _named(path, "cannot be written"):
        probe = temporary(path)
        if is_remote(path):
            system, place = _at(path)
            if system.isdir(place):
                raise InputError(f"{path}: is a folder, not a file to write")
            system.pipe_file(_at(probe)[1], b"")
            with contextlib.suppress(Exception):  # who may write may not always remove
                system.rm_file(_at(probe)[1])
            return
        if not os.path.isdir(parent(path)):
            raise InputError(f"{path}: the output folder {parent(path)} does not exist, create it")
        if os.path.isdir(path):
            raise InputError(f"{path}: is a folder, not a file to write")
        with contextlib.suppress(FileNotFoundError):
            os.lstat(path)  # raises where the name is too long
        os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.unlink(probe)


def is_full(error: BaseException | None) -> bool:
    """Whether an error was raised because the disk or the quota is full, or the disk read-only."""
    while error is not None:
        if getattr(error, "errno", None) in _FULL:
            return True
        error = error.__cause__ or error.__context__
    return False


@dataclasses.dataclass(frozen=True)
class Listing:
    """Entries of a folder.

    Attributes:
      files: bytes of each file, by its name.
      folders: names of its folders.
    """

    files: dict[str, int]
    folders: list[str]


def listing(folder: str) -> Listing:
    """The entries of a folder; none of a folder that is not there.

    Raises:
      InputError: it cannot be listed.
    """
    with _named(folder):
        system, place = _at(folder)
        system.invalidate_cache()
        try:
            entries: list[dict[str, Any]] = system.ls(place, detail=True)
        except FileNotFoundError:
            return Listing({}, [])
    named = [(posixpath.basename(e["name"].rstrip("/")), e) for e in entries]
    return Listing(
        {name: e["size"] for name, e in named if e["type"] == "file"},
        [name for name, e in named if e["type"] == "directory"],
    )


def sizes(folder: str) -> dict[str, int]:
    """Bytes of the files of a folder by name, and nothing of a folder that is not there."""
    return listing(folder).files


def exists(path: str) -> bool:
    """Whether a file or folder has this path; a remote file system is asked each time."""
    with _named(path):
        system, place = _at(path)
        system.invalidate_cache()
        return system.exists(place)


def make_folder(path: str) -> None:
    """Makes a folder, and those above it, where they are missing."""
    with _named(path, "cannot be made"):
        system, place = _at(path)
        system.makedirs(place, exist_ok=True)


def remove(path: str) -> None:
    """Removes a file, or a folder and all in it, if it is there."""
    with _named(path, "cannot be removed"):
        try:
            if is_remote(path):
                _remove_remote(*_at(path))
            elif os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
            else:
                os.unlink(path)
        except (FileNotFoundError, NotADirectoryError):
            return


def _remove_remote(system: fsspec.AbstractFileSystem, place: str) -> None:
    system.invalidate_cache()
    if system.info(place)["type"] != "directory":
        system.rm_file(place)
        return
    entries = system.find(place, withdirs=True, detail=True)
    for name, entry in entries.items():
        if entry["type"] != "directory":
            system.rm_file(name)
    folders = {name for name, entry in entries.items() if entry["type"] == "directory"}
    for name in sorted({*folders, place}, key=len, reverse=True):
        with contextlib.suppress(Exception):  # an object store has no folders
            system.rmdir(name)


def _at(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a path, and the path as that one has it."""
    if is_remote(path):
        return fsspec.core.url_to_fs(path)
    return fsspec.filesystem("file"), path  # a local name may have what URLs give a meaning


@contextlib.contextmanager
def _named(path: str, what: str = "cannot be read") -> Iterator[None]:
    """Raises an `InputError` that names the path for whatever goes wrong."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError as error:
        missing = "no such file or folder" if what == "cannot be read" else f"{what} ({error})"
        raise InputError(f"{path}: {missing}") from error
    except Exception as error:  # of any library behind fsspec
        if not is_remote(path) and not isinstance(error, OSError):
            raise
        reason = getattr(error, "strerror", None) or error or type(error).__name__
        raise InputError(f"{path}: {what} ({reason})") from error


def at_hand(copies: contextlib.ExitStack, path: str, suffixes: Sequence[str]) -> str:
    """A local path of a file's content; until the stack ends, errors name the original path."""
    local = copies.enter_context(local_copy(path, suffixes))
    copies.enter_context(_as_if(local, path))
    return local


@contextlib.contextmanager
def _as_if(local: str, path: str) -> Iterator[None]:
    try:
        yield
    except Error as error:
        if local == path:
            raise
        raise type(error)(str(error).replace(local, path)) from error
