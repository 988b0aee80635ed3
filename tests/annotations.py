"""Checks the array annotations of the package while tests run; tests/conftest.py installs it."""

from typing import Annotated, Any, get_args

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
            hints[name] = hint | _NotAnArray
    function.__annotations__ = hints
    return beartype(function, conf=_conf)
