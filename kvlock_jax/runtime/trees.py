"""Lets `jax.export` write our classes as part of a program's results, without pickle.

A file names the classes and static values of its trees; reading one looks the names up in the
registered table and nowhere else.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax import export

from kvlock_jax.runtime.identity import name_of


@functools.lru_cache
def register(nodes: tuple[type, ...], statics: tuple[Any, ...] = ()) -> None:
    """Registers the classes of results for `jax.export`'s serialisation, once in a process.

    Args:
      nodes: named tuples, and dataclasses of `jax.tree_util.register_dataclass`.
      statics: functions and dataclasses among the static fields of `nodes`; numbers, strings and
        tuples of these need no entry.
    """
    table = {name_of(value): value for value in statics}
    for kind in nodes:
        if issubclass(kind, tuple):
            export.register_namedtuple_serialization(kind, serialized_name=name_of(kind))
            continue
        export.register_pytree_node_serialization(
            kind,
            serialized_name=name_of(kind),
            serialize_auxdata=lambda static: json.dumps(_write(static, table)).encode(),
            deserialize_auxdata=lambda content: _read(json.loads(bytes(content)), table),
            from_children=functools.partial(_build, kind),
        )


def _write(value: Any, table: Mapping[str, Any]) -> Any:
    """A static value as JSON."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, tuple):
        return [_write(item, table) for item in value]
    if type(value) in table.values():
        names = [field.name for field in dataclasses.fields(value)]
        fields = {name: _write(getattr(value, name), table) for name in names}
        return {"class": name_of(type(value)), "fields": fields}
    if isinstance(value, Callable) and value in table.values():
        return {"constant": name_of(value)}
    raise ValueError(f"{value!r} is not registered as a static value of results")


def _read(value: Any, table: Mapping[str, Any]) -> Any:
    """The static value that `_write` wrote; only what the table holds is looked up."""
    if isinstance(value, list):
        return tuple(_read(item, table) for item in value)
    if isinstance(value, dict) and "constant" in value:
        return table[value["constant"]]
    if isinstance(value, dict):
        kind = table[value["class"]]
        return kind(**{name: _read(item, table) for name, item in value["fields"].items()})
    return value


def _build(kind: type, static: Sequence[Any], children: Sequence[Any]) -> Any:
    """A dataclass of placeholders: `jax.export` asks for its structure, so checks are skipped."""
    fields = dataclasses.fields(kind)
    named = [[f.name for f in fields if bool(f.metadata.get("static")) == s] for s in (True, False)]
    node = object.__new__(kind)
    for names, values in zip(named, (static, children), strict=True):
        for name, value in zip(names, values, strict=True):
            object.__setattr__(node, name, value)
    return node
