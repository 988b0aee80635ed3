"""How jitted functions are called: at once, ahead of time, or as another process traced them.

A run asks for programs through a `Programs`: `now` calls one, `ahead` compiles it and says what it
would return. JAX's persistent cache finds what was compiled before by the text of a lowered
program, so a process must trace and lower it first. `Kept` keeps that text too, for one device.
"""

import contextlib
import functools
import hashlib
import pickle
import re
import uuid
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import platformdirs
from etils import epath
from jax import export


def cache_folder() -> str:
    """Where JAX keeps compiled programs: where its own setting says, or the user's cache folder."""
    own = platformdirs.user_cache_path("kvlock_jax") / "programs"
    return jax.config.jax_compilation_cache_dir or str(own)


Call = Callable[..., Any]
"""Calls a jitted function with arguments that follow it; or says what would come of it."""


def call(program: Callable[..., Any], /, *args: Any, **static: Any) -> Any:
    """The `Run` that calls it."""
    return program(*args, **static)


class Compiler:
    """Programs as JAX traces and compiles them, and keeps them by itself."""

    def call(self, program: Any, /, *args: Any, **static: Any) -> Any:
        """Calls a jitted function; static arguments are named."""
        return call(program, *args, **static)

    def compile(self, program: Any, /, *args: Any, **static: Any) -> Any:
        """Compiles it for arguments, or their shapes; gives shapes and shardings of its results."""
        lowered = program.lower(*args, **static)
        places = lowered.compile().output_shardings
        return jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            lowered.out_info,
            places,
        )


class _Traced(NamedTuple):
    """A program without its trees: from leaves to leaves."""

    exported: bytes | bytearray | None  # by `jax.export`, if it can
    tree: Any  # of its results
    donated: tuple[int, ...]  # which leaves of its arguments are


class CachingCompiler(Compiler):
    """Programs for one device that are traced once for all processes.

    A file is named by all that a trace depends on: the sources of this package, versions, the kind
    of device, JAX's settings, and structure and shapes of the arguments, with all that is static in
    them, as it is written out. So functions of other packages are no programs for it.

    Args:
      folder: of the files; made when needed. They may be deleted at any time, and must come from
        nobody else: reading one can run code.
    """

    def __init__(self, folder: epath.PathLike):
        self._folder, self._compiled = epath.Path(folder), {}

    def call(self, program: Any, /, *args: Any, **static: Any) -> Any:
        """Calls a jitted function; static arguments are named."""
        compiled, tree = self._find(program, args, static)
        return jax.tree.unflatten(tree, compiled(*jax.tree.leaves(args)))

    def compile(self, program: Any, /, *args: Any, **static: Any) -> Any:
        """Compiles it for arguments, or their shapes; gives the shapes of its results."""
        compiled, tree = self._find(program, args, static)
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in compiled.out_info]
        return jax.tree.unflatten(tree, shapes)

    def _find(self, program: Any, args: tuple, static: dict[str, Any]) -> tuple[Any, Any]:
        """A program that takes and gives leaves, compiled, and the tree of its results."""
        leaves, tree = jax.tree.flatten(args)
        shapes = [(str(x.dtype), x.shape, getattr(x, "weak_type", False)) for x in leaves]
        names = program.__module__, program.__qualname__
        text = repr((names, tree, shapes, static, _surroundings()))
        key = hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", text).encode()).hexdigest()[:32]
        if key not in self._compiled:
            flat, path = _flat(program, tree, static), self._folder / f"{program.__name__}-{key}"
            traced = _read(path)
            if traced is None:
                traced = _trace(program.trace(*args, **static), flat, leaves)
                _write(path, traced)
            call = export.deserialize(bytearray(traced.exported)).call if traced.exported else flat
            call = _named(program.__name__, call)
            jitted = jax.jit(call, donate_argnums=traced.donated)
            self._compiled[key] = jitted.lower(*leaves).compile(), traced.tree
        return self._compiled[key]


def _flat(program: Any, tree: Any, static: dict[str, Any]) -> Callable[..., list[Any]]:
    """A program from leaves to leaves: files know nothing of our classes."""

    def flat(*leaves: Any) -> list[Any]:
        """Its trees are made while it is traced."""
        return jax.tree.leaves(program(*jax.tree.unflatten(tree, leaves), **static))

    return flat


def _named(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """A function under another name, in profiles and in JAX's cache."""

    def named(*leaves: Any) -> Any:
        """What is called is a function of its own: an exported program takes no name."""
        return call(*leaves)

    named.__name__ = name
    return named


def _trace(traced: Any, flat: Callable[..., list[Any]], leaves: list[Any]) -> _Traced:
    # What is kept is for these versions alone, so a kernel need not be stable between them.
    kernel = export.DisabledSafetyCheck.custom_call("__cudnn$fmhaSoftmax")
    try:
        exported = export.export(jax.jit(flat), disabled_checks=[kernel])(*leaves).serialize()
    except ValueError:  # it calls something else of which no stability is promised
        exported = None
    infos = enumerate(jax.tree.leaves(traced.args_info))
    donated = tuple(n for n, info in infos if info.donated)
    return _Traced(exported, jax.tree.structure(traced.out_info), donated)


def _read(path: epath.Path) -> _Traced | None:
    """What `_write` wrote, if it is all there."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, body = content[:32], content[32:]
    return pickle.loads(body) if hashlib.sha256(body).digest() == digest else None


def _write(path: epath.Path, traced: _Traced) -> None:
    """Keeps it for others, if that is possible."""
    if traced.exported is None:
        return
    body = pickle.dumps(traced)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(hashlib.sha256(body).digest() + body)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def _surroundings() -> tuple:
    """What a trace depends on beside its arguments."""
    device = jax.devices()[0]
    settings = {k: v for k, v in jax.config.values.items() if "cache" not in k}
    return _code(), device.platform, device.device_kind, settings


@functools.lru_cache
def _code() -> tuple:
    """The sources of this package, and versions of what they use."""
    sources = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        sources.update(path.read_bytes())
    return sources.hexdigest(), [version(name) for name in ("jax", "jaxlib", "flax", "numpy")]


def keep_programs(folder: str) -> None:
    """Has JAX keep compiled programs in a folder, by their content; an empty name keeps none."""
    jax.config.update("jax_compilation_cache_dir", folder or None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
