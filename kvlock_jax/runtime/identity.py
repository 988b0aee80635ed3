"""Names of functions and values that mean the same thing in every process, for cache keys."""

import dataclasses
import enum
import functools
import hashlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from kvlock_jax.errors import ConfigError


def name_of(function: Any) -> str:
    """The `module:name` by which every process finds a function or a class.

    Raises:
      ConfigError: the function has no such name. Closures of one factory share theirs, and a
        partial has none, so a cache would answer for one with the program of another.
    """
    module = getattr(function, "__module__", None)
    name = getattr(function, "__qualname__", None)
    if not module or not name or _look_up(module, name) is not function:
        raise ConfigError(
            f"{function!r} cannot be cached: expected a function or class that its module holds "
            "under its own name, found a closure, a lambda, a partial or a namesake; define it at "
            "the top of a module"
        )
    return f"{module}:{name}"


def _look_up(module: str, name: str) -> Any:
    """The object that a name stands for in a loaded module; `None` if it holds none."""
    return functools.reduce(
        lambda owner, part: getattr(owner, part, None), name.split("."), sys.modules.get(module)
    )


def describe(value: Any) -> str:
    """A text that is equal for equal static values in every process, and different for others.

    Args:
      value: numbers, strings, dtypes, arrays, functions, classes, dataclasses, containers of these,
        or a `PyTreeDef` whose static data are such.

    Raises:
      ConfigError: for a function without a name (see `name_of`), or a value of another kind.
    """
    match value:
        case None | bool() | int() | float() | complex() | str() | bytes():
            return repr(value)
        case enum.Enum():
            return f"{name_of(type(value))}.{value.name}"
        case jax.tree_util.PyTreeDef():
            return _describe_tree(value)
        case tuple() | list():
            return _described(type(value), value)
        case Mapping():
            pairs = sorted((describe(k), describe(v)) for k, v in value.items())
            return f"{name_of(type(value))}{pairs}"
        case set() | frozenset():
            return f"{name_of(type(value))}{sorted(map(describe, value))}"
        case np.dtype():
            return f"dtype {value}"
        case np.ndarray() | np.generic():
            digest = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
            return f"array {value.dtype} {value.shape} {digest}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [getattr(value, field.name) for field in dataclasses.fields(value)]
        return _described(type(value), fields)
    if isinstance(value, Callable):
        return name_of(value)
    raise ConfigError(f"{value!r} cannot be part of a cached program: it is a {type(value)}")


def _described(kind: type, values: Any) -> str:
    return f"{name_of(kind)}({', '.join(map(describe, values))})"


@functools.lru_cache(maxsize=256)  # every step of a run describes the same trees
def _describe_tree(tree: jax.tree_util.PyTreeDef) -> str:
    """The kinds and static data of a tree's nodes; `*` for each leaf."""
    node = tree.node_data()
    if node is None:
        return "*"
    kind, static = node
    if kind is type(None):
        return "None"
    children = ", ".join(map(_describe_tree, tree.children()))
    return f"{name_of(kind)}<{describe(static)}>({children})"
