"""Checks the array annotations of the package while tests run; tests/conftest.py installs it."""

import functools
import operator
import types
from typing import Annotated, Any, Union, get_args, get_origin

import jax
import numpy as np
from beartype import BeartypeConf, beartype
from beartype.vale import Is
from jaxtyping import AbstractArray

_NotAnArray = Annotated[object, Is[lambda x: not isinstance(x, jax.Array | np.ndarray)]]
_conf = BeartypeConf(is_pep484_tower=True, violation_door_type=TypeError)


def names_arrays(hint: Any) -> bool:
    """Whether a jaxtyping annotation occurs in a type hint."""
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return True
    return any(names_arrays(part) for part in get_args(hint))


def or_numpy(hint: Any) -> Any:
    """A type hint in which a NumPy array stands for a JAX array of the same shape and dtype.

    JAX's functions take either; what the annotations promise is shapes and dtypes.
    """
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        if hint.array_type is jax.Array:
            return hint | hint.dtype[np.ndarray, hint.dim_str]
        return hint
    parts = get_args(hint)
    if not parts or not names_arrays(hint):
        return hint
    widened = tuple(map(or_numpy, parts))
    if get_origin(hint) in (Union, types.UnionType):
        return functools.reduce(operator.or_, widened)
    return get_origin(hint)[widened]


def arrays(function):
    """The typechecker of jaxtyping's import hook: beartype, of hints that name arrays.

    Other hints are left alone, for tests put stand-ins in the place of models and readers. So are
    leaves that are no arrays in dataclasses: JAX puts shapes and shardings into trees.
    """
    hints = dict(function.__annotations__)
    if not any(map(names_arrays, hints.values())):
        return function
    for name, hint in hints.items():
        if not names_arrays(hint):
            hints[name] = Any
        elif function.__name__ == "__init__":
            hints[name] = or_numpy(hint) | _NotAnArray
        else:
            hints[name] = or_numpy(hint)
    function.__annotations__ = hints
    return beartype(function, conf=_conf)
