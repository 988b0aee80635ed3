"""Files by path or URL: local ones, `gs://`, `s3://`, `memory://`, whatever fsspec knows.

What reads and writes videos wants local files: others are copied (`local_copy`, `upload`). Paths
are strings; `resolve` makes them, and only what it made is handed on. A file system that is not
local may fail in its own ways (credentials, network), so whatever it raises is an `InputError`.
"""

import contextlib
import hashlib
import os
import posixpath
import tempfile
from collections.abc import Iterator, Sequence
from typing import IO, Any

import fsspec

from kvlock_jax.errors import Error, InputError

FilePath = str | os.PathLike

_SUMS = ("md5Hash", "crc32c", "ETag", "etag", "content_md5")
"""What object stores call the checksum of a file."""


def resolve(path: str, folder: str = ".") -> str:
    """A path as the rest of this module takes it: a URL, or absolute.

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
      InputError: there is no such file or folder, or it cannot be listed.
    """
    with _named(path):
        system, place = _at(path)
        if system.info(place)["type"] != "directory":
            return [path]
        names = sorted(os.path.basename(entry) for entry in system.ls(place, detail=False))
    ends = tuple(suffixes)
    return [join(path, n) for n in names if n.lower().endswith(ends) and not n.startswith(".")]


def identity(path: str) -> str:
    """What tells a file's content from another's, wherever it lies and whenever it was written.

    An object store knows a checksum of its own, which is asked for; any other file is read for its
    SHA-256. Neither name nor time of change counts: copying a file, or a data set to another
    machine, changes neither.

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
    """A local path of the same content, under the same name: a copy of what is not local.

    Args:
      path: a file or a folder.
      suffixes: of the files that are copied of a folder.

    Raises:
      InputError: it cannot be copied. A local path is handed back unseen.
    """
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="kvlock-") as folder:
        target = os.path.join(folder, posixpath.basename(path.rstrip("/")))
        with _named(path):
            found = files(path, suffixes)
            if found != [path]:
                os.mkdir(target)
            for file in found:
                local = target if file == path else join(target, posixpath.basename(file))
                system, place = _at(file)
                system.get_file(place, local)
        yield target


def upload(local: str | os.PathLike, path: str, part: str) -> None:
    """Moves a local file to a path, which never holds half of it.

    Args:
      local: the file; of a local path it must be on the same disk. It is gone afterwards.
      path: what to replace.
      part: another path of the same file system, where a file that is on its way lies.

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
        system.mv(passing, place)
        os.unlink(local)


def sizes(folder: str) -> dict[str, int]:
    """Bytes of the files of a folder by name, and nothing of a folder that is not there."""
    with _named(folder):
        system, place = _at(folder)
        system.invalidate_cache()
        try:
            entries: list[dict[str, Any]] = system.ls(place, detail=True)
        except FileNotFoundError:
            return {}
    return {posixpath.basename(e["name"]): e["size"] for e in entries if e["type"] == "file"}


def make_folder(path: str) -> None:
    """Makes a folder, and those above it, where they are missing."""
    with _named(path, "cannot be made"):
        system, place = _at(path)
        system.makedirs(place, exist_ok=True)


def remove(path: str) -> None:
    """Removes a file, or a folder and all in it, if it is there."""
    with _named(path, "cannot be removed"), contextlib.suppress(FileNotFoundError):
        system, place = _at(path)
        system.rm(place, recursive=True)


def _at(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a path, and the path as that one has it."""
    if is_remote(path):
        return fsspec.core.url_to_fs(path)
    return fsspec.filesystem("file"), path  # a local name may have what URLs give a meaning


@contextlib.contextmanager
def _named(path: str, what: str = "cannot be read") -> Iterator[None]:
    """Makes an `InputError`, with the path in it, of whatever goes wrong."""
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
        told = getattr(error, "strerror", None) or error or type(error).__name__
        raise InputError(f"{path}: {what} ({told})") from error


def at_hand(copies: contextlib.ExitStack, path: str, suffixes: Sequence[str]) -> str:
    """A local path; until the stack ends, what is said of it is said of the path it stands for."""
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
