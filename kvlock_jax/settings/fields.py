"""Frozen dataclasses from mappings: an unknown key, a wrong type or range is an error naming it."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar, get_args, get_origin

from kvlock_jax.errors import ConfigError

_T = TypeVar("_T")


def require(ok: bool, owner: Any, field: str, expected: str) -> None:
    """Raises a `ConfigError` that names the field, the expected and the found, unless `ok`."""
    if not ok:
        value = getattr(owner, field)
        raise ConfigError(f"{type(owner).__name__}.{field} must be {expected}, found {value!r}")


def require_positive(sizes: Any) -> None:
    """Every whole number of a model's sizes counts something that must be there."""
    for name, value in dataclasses.asdict(sizes).items():
        if isinstance(value, int) and not isinstance(value, bool):
            require(value > 0, sizes, name, "positive")


def from_config_dict(kind: type[_T], values: Mapping[str, Any]) -> _T:
    """Builds the frozen dataclass `kind` from a mapping; `None` leaves a field at its default.

    Raises:
      ConfigError: for an unknown key, a value of the wrong type, or one out of its range.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in values:
        if name not in fields:
            raise ConfigError(
                f"unknown key {name!r} of {kind.__name__}; it has {', '.join(fields)}"
            )
    given = {n: _as(kind, fields[n], v) for n, v in values.items() if v is not None}
    try:
        return kind(**given)
    except TypeError as error:
        raise ConfigError(f"{kind.__name__}: {error}") from error


def _as(kind: type, field: dataclasses.Field, value: Any) -> Any:
    """`value` as the field's type: ints pass for floats, sequences for tuples, no more."""
    where = f"{kind.__name__}.{field.name}"
    if get_origin(field.type) is not tuple:
        return _scalar(where, field.type, value)
    inner = get_args(field.type)
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{where} must be a sequence of {inner[0].__name__}, found {value!r}")
    if inner[-1] is not ... and len(value) != len(inner):
        raise ConfigError(f"{where} must have {len(inner)} entries, found {value!r}")
    return tuple(_scalar(f"{where}[{i}]", inner[0], v) for i, v in enumerate(value))


def _scalar(where: str, expected: type, value: Any) -> Any:
    # a bool is an int to Python, and never meant as one
    if expected is not bool and isinstance(value, bool):
        matches = False
    else:
        matches = isinstance(value, (float, int) if expected is float else expected)
    if not matches:
        raise ConfigError(f"{where} must be {expected.__name__}, found {value!r}")
    return float(value) if expected is float else value
