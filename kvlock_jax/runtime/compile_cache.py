"""Calls and compiles jitted functions, and caches their traces for the next process.

A run calls programs through a `Compiler`: `call` runs one, `compile` prepares it and returns the
shapes of its results. JAX's persistent cache finds a compiled program by the text of its lowering,
so every process has to trace and lower it first. `CachingCompiler` keeps that text too, for
programs of one device.
"""

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import stat
import sys
import uuid
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import platformdirs
from etils import epath
from jax import export

from kvlock_jax.runtime.identity import describe, name_of


def cache_folder() -> str:
    """The user's own cache folder for compiled programs."""
    return str(platformdirs.user_cache_path("kvlock_jax") / "programs")


Call = Callable[..., Any]
"""Calls a jitted function with its arguments, or returns the shapes of its results."""


def call(program: Callable[..., Any], /, *args: Any, **static: Any) -> Any:
    """The `Call` that runs a program as JAX does by itself."""
    return program(*args, **static)


class Compiler:
    """Programs as JAX traces, compiles and caches them by itself."""

    def __init__(self) -> None:
        self._made: dict[Any, Any] = {}

    def call(self, program: Any, /, *args: Any, **static: Any) -> Any:
        """Calls a jitted function; static arguments are named."""
        return call(program, *args, **static)

    def compile(self, program: Any, /, *args: Any, **static: Any) -> Any:
        """Compiles it for arguments, or their shapes; returns its results' shapes and shardings."""
        leaves, tree = jax.tree.flatten(args)
        given = tuple((jax.typeof(x), getattr(x, "sharding", None)) for x in leaves)
        key = program, tree, given, tuple(static.items())
        if key not in self._made:  # pieces of a clip are many calls of one program
            lowered = program.lower(*args, **static)
            places = lowered.compile().output_shardings
            self._made[key] = jax.tree.map(
                lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
                lowered.out_info,
                places,
            )
        return self._made[key]


class CachingCompiler(Compiler):
    """Programs for one device, traced once for all processes of a user.

    A file's name is a digest of everything that its trace depends on: sources and versions, the
    kind of device, JAX's settings, the structure and shapes of the arguments, and the static values
    among them. A program, and every function among the static values, must be defined at the top of
    a module (`identity.name_of`).

    A file holds a program as `jax.export` serialises it: StableHLO for XLA, and the tree of the
    results, whose classes `trees.register` lists. Reading a forged file runs no Python code, but
    the file is still a program: it may return any results for its arguments, call any custom call
    that is registered with XLA, or exploit a fault of XLA's. So the compiler uses a folder only if
    it belongs to this user and nobody else may write to it; otherwise it warns, and traces every
    program.

    Args:
      folder: folder of the files, made when needed; they may be deleted at any time.
    """

    def __init__(self, folder: epath.PathLike):
        super().__init__()
        self._folder, self._compiled = epath.Path(folder), {}
        self._trusted: bool | None = None

    def call(self, program: Any, /, *args: Any, **static: Any) -> Any:
        """Calls a jitted function; static arguments are named.

        Raises:
          ConfigError: the program or a static value has no name in other processes.
        """
        return self._find(program, args, static)(*jax.tree.leaves(args))

    def compile(self, program: Any, /, *args: Any, **static: Any) -> Any:
        """Compiles it for arguments, or their shapes; returns the shapes of its results.

        Raises:
          ConfigError: as `call`.
        """
        infos = self._find(program, args, static).out_info
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), infos)

    def _find(self, program: Any, args: tuple, static: dict[str, Any]) -> Any:
        """The compiled program, from the leaves of its arguments to its results."""
        leaves, tree = jax.tree.flatten(args)
        key = _key(program, leaves, tree, static)
        if key not in self._compiled:
            path = self._folder / f"{program.__name__}-{key}"
            cached = _read(path, leaves) if self._trusts() else None
            if cached is None:
                traced = program.trace(*args, **static)
                infos = enumerate(jax.tree.leaves(traced.args_info))
                donated = tuple(n for n, info in infos if info.donated)
                flat = _flat(program, tree, static)
                exported = _export(flat, leaves)
                if exported and self._trusts(make=True):
                    _write(path, exported, donated)
                function = exported.call if exported else flat
            else:
                exported, donated = cached
                function = exported.call
            jitted = jax.jit(_named(program.__name__, function), donate_argnums=donated)
            self._compiled[key] = jitted.lower(*leaves).compile()
        return self._compiled[key]

    def _trusts(self, make: bool = False) -> bool:
        """Whether the folder exists and is private; `make` creates it."""
        if self._trusted is None:
            with contextlib.suppress(OSError):
                if make and not self._folder.exists():
                    self._folder.parent.mkdir(parents=True, exist_ok=True)
                    self._folder.mkdir(mode=0o700, exist_ok=True)
            if not self._folder.is_dir():
                return False
            self._trusted = _is_private(self._folder)
        return self._trusted


def _is_private(folder: epath.Path) -> bool:
    """Whether a folder belongs to this user and nobody else may write to it; warns if not."""
    if "://" in os.fspath(folder):  # the bucket controls access
        return True
    status = os.stat(folder)
    private = status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if not private:
        warnings.warn(
            f"{folder} belongs to another user or others may write to it, so no program is read "
            "from it or kept there; make it yours alone (chmod 700) or name another folder with "
            "--jax_cache_dir",
            stacklevel=3,
        )
    return private


def _key(program: Any, leaves: list[Any], tree: Any, static: dict[str, Any]) -> str:
    """A digest of everything that a trace depends on."""
    shapes = [(str(x.dtype), x.shape, bool(getattr(x, "weak_type", False))) for x in leaves]
    text = describe((name_of(program), tree, shapes, static, _surroundings(program)))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _flat(program: Any, tree: Any, static: dict[str, Any]) -> Callable[..., Any]:
    """A program of the leaves of its arguments: a file need not know the arguments' classes."""

    def flat(*leaves: Any) -> Any:
        """Its arguments' trees exist only while it is traced."""
        return program(*jax.tree.unflatten(tree, leaves), **static)

    return flat


def _named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function under another name, in profiles and in JAX's cache."""

    def named(*leaves: Any) -> Any:
        """A new function, since an exported program's name cannot be set."""
        return function(*leaves)

    named.__name__ = name
    return named


def _export(flat: Callable[..., Any], leaves: list[Any]) -> export.Exported | None:
    """The exported program; `None` where JAX does not promise that it stays valid."""
    # A file serves these versions alone, so a kernel need not be stable between them.
    kernel = export.DisabledSafetyCheck.custom_call("__cudnn$fmhaSoftmax")
    try:
        return export.export(jax.jit(flat), disabled_checks=[kernel])(*leaves)
    except ValueError:  # it calls something else of which no stability is promised
        return None


def _read(path: epath.Path, leaves: list[Any]) -> tuple[export.Exported, tuple[int, ...]] | None:
    """The program in a file and the arguments it donates; `None` if it is absent or damaged."""
    try:
        header, body = path.read_bytes().split(b"\n", 1)
        facts = json.loads(header)
        if facts["sha256"] != hashlib.sha256(body).hexdigest():
            return None
        donated = tuple(n for n in range(len(leaves)) if n in facts["donated"])
        exported = export.deserialize(bytearray(body))
        jax.eval_shape(exported.call, *leaves)  # of another program's shapes it fails here
    except Exception:  # whatever a damaged or a forged file makes of the parsers
        return None
    return exported, donated


def _write(path: epath.Path, exported: export.Exported, donated: tuple[int, ...]) -> None:
    """Writes a program for other processes; one that cannot be written is traced by each."""
    # ValueError: a result's class is not registered (`trees.register`)
    with contextlib.suppress(OSError, ValueError):
        body = bytes(exported.serialize())
        facts = {"sha256": hashlib.sha256(body).hexdigest(), "donated": donated}
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}")
        try:
            partial.write_bytes(json.dumps(facts).encode() + b"\n" + body)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def _surroundings(program: Any) -> tuple:
    """What a trace depends on beside its arguments."""
    device = jax.devices()[0]
    settings = {name: str(v) for name, v in jax.config.values.items() if "cache" not in name}
    source = getattr(sys.modules[program.__module__], "__file__", None)
    where = device.platform, device.device_kind, device.client.platform_version
    return _sources(), _digest(source), where, settings


def _digest(path: str | None) -> str:
    """SHA-256 of a module's source."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else ""


@functools.lru_cache
def _sources() -> tuple:
    """A digest of this package's sources, and the versions of the libraries that they use."""
    digest = hashlib.sha256()
    for folder in _folders():
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return digest.hexdigest(), tuple(version(name) for name in ("jax", "jaxlib", "flax", "numpy"))


def _folders() -> list[Path]:
    """The package's folder, and those of its parts that an editable install keeps elsewhere."""
    root = Path(__file__).parents[1]
    specs = [importlib.util.find_spec(f"kvlock_jax.{part}") for part in ("convert", "configs")]
    parts = [Path(where) for spec in specs if spec for where in spec.submodule_search_locations]
    return [root, *(part for part in parts if not part.is_relative_to(root))]


def _private_cache_folder() -> str:
    """The user's cache folder, made if missing; an empty name if others may write to it."""
    folder = epath.Path(cache_folder())
    if not jax.config.jax_enable_compilation_cache:
        return os.fspath(folder)
    with contextlib.suppress(OSError):
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    return os.fspath(folder) if not folder.exists() or _is_private(folder) else ""


def keep_programs(folder: str | None) -> None:
    """Makes JAX keep compiled programs in a folder.

    Compiled programs are machine code that JAX runs as it finds it, so the default folder is used
    only if it is private; JAX's own setting and a folder named here are the caller's to judge.

    Args:
      folder: folder of the programs; an empty name keeps none, and `None` stands for the folder of
        JAX's own setting, or else the user's cache folder.
    """
    if folder is None:
        folder = jax.config.jax_compilation_cache_dir or _private_cache_folder()
    jax.config.update("jax_compilation_cache_dir", folder or None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
