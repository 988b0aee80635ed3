"""Frozen dataclasses from mappings, with errors that name the key and the values it may have."""

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, TypeVar, get_args, get_origin

from kvlock_jax.errors import ConfigError

_T = TypeVar("_T")


def require(ok: bool, owner: Any, field: str, expected: str) -> None:
    """Raises a `ConfigError` with the field's name, the expected and the found, unless `ok`."""
    if not ok:
        value = getattr(owner, field)
        raise ConfigError(f"{type(owner).__name__}.{field} must be {expected}, found {value!r}")


def require_positive(sizes: Any) -> None:
    """Raises a `ConfigError` unless all whole numbers of a model's sizes are positive."""
    for name, value in dataclasses.asdict(sizes).items():
        if isinstance(value, int) and not isinstance(value, bool):
            require(value > 0, sizes, name, "positive")


def from_config_dict(kind: type[_T], values: Mapping[str, Any]) -> _T:
    """Builds the frozen dataclass `kind` from a mapping; `None` leaves a field at its default.

    Raises:
      ConfigError: a key is unknown or missing, or a value is of the wrong type or out of range.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in values:
        if name not in fields:
            raise ConfigError(
                f"unknown key {name!r} of {kind.__name__}; it has {', '.join(fields)}"
            )
    converted = {n: _convert(kind, fields[n], v) for n, v in values.items() if v is not None}
    missing = dataclasses.MISSING
    required = [n for n, f in fields.items() if f.default is f.default_factory is missing]
    if absent := [repr(name) for name in required if name not in converted]:
        raise ConfigError(f"{kind.__name__}: {', '.join(absent)} must be set")
    return kind(**converted)


def _convert(kind: type, field: dataclasses.Field, value: Any) -> Any:
    """`value` as the field's type; only ints pass for floats and sequences for tuples."""
    where = f"{kind.__name__}.{field.name}"
    if get_origin(field.type) is not tuple:
        kinds = get_args(field.type) if isinstance(field.type, types.UnionType) else (field.type,)
        return _scalar(where, kinds[0], value)  # of `int | None` the first; None is no value here
    inner = get_args(field.type)
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{where} must be a sequence of {inner[0].__name__}, found {value!r}")
    if inner[-1] is not ... and len(value) != len(inner):
        raise ConfigError(f"{where} must have {len(inner)} entries, found {value!r}")
    return tuple(_scalar(f"{where}[{i}]", inner[0], v) for i, v in enumerate(value))


def _scalar(where: str, expected: type, value: Any) -> Any:
    # A bool is an int to Python, but a user never means one.
    if expected is not bool and isinstance(value, bool):
        matches = False
    else:
        matches = isinstance(value, (float, int) if expected is float else expected)
    if not matches:
        raise ConfigError(f"{where} must be {expected.__name__}, found {value!r}")
    return float(value) if expected is float else value
