"""The metadata of a converted checkpoint, `kvlock.json`: its fields, and how each is checked.

A checkpoint may come from anybody, so no field is trusted: each has its type, and a name never
leads out of the checkpoint's folder.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from etils import epath

from kvlock_jax.checkpoints.registry import (
    FAMILIES,
    NETWORKS,
    TRANSFORMERS,
    Configs,
    family_named,
)
from kvlock_jax.errors import CheckpointError, ConfigError
from kvlock_jax.models.family import Family
from kvlock_jax.settings.fields import from_config_dict


@dataclasses.dataclass(frozen=True)
class Stored:
    """One model of a checkpoint: its number of parameters, and the dtypes and bytes on disk."""

    parameters: int
    dtypes: tuple[str, ...]
    size: int


@dataclasses.dataclass(frozen=True)
class Metadata:
    """The fields of `kvlock.json`.

    Attributes:
      family: architecture, a name of `registry.FAMILIES`.
      version: version of the package that wrote the checkpoint.
      source: origin of the conversion: `layout`, `folder`, and under `files` the SHA-256 by file.
      configs: sizes of the models, and the published scheduler.
      models: parameters, dtypes and bytes of each model.
      data: name of the folder with the models and the tokenizer.
      files: CRC-32 of each file in that folder, by relative path. (Orbax's store has no checksums
        of values: a flipped bit would be read as another weight.)
    """

    family: str
    version: str
    source: Mapping[str, Any]
    configs: Configs
    models: Mapping[str, Stored]
    data: str
    files: Mapping[str, str]


def is_data_name(name: str) -> bool:
    """Whether a folder's name is one that a conversion gives to its data."""
    return re.fullmatch(r"kvlock-[0-9a-f]{8}", name) is not None


def parse(values: Mapping[str, Any], path: epath.Path) -> Metadata:
    """Builds the metadata from the JSON object of `kvlock.json`; unknown keys are ignored.

    Args:
      values: the object.
      path: name of the file in errors.

    Raises:
      CheckpointError: a field is missing, of another type, out of range, or names a file outside
        of the checkpoint; or the family is unknown.
    """
    names = [field.name for field in dataclasses.fields(Metadata)]
    if absent := [name for name in names if name not in values]:
        raise CheckpointError(f"{path} has no {', '.join(absent)}")
    family = family_named(values["family"])
    if family is None:
        expected = " or ".join(repr(known.name) for known in FAMILIES)
        raise CheckpointError(f"{path} is of family {values['family']!r}, expected {expected}")
    check = _Checks(path)
    check("version", values["version"], _is_text, "a string")
    check("source", values["source"], _is_source, "an object whose values are strings or SHA-256")
    check(
        "data",
        values["data"],
        lambda name: _is_text(name) and is_data_name(name),
        "the name of a folder beside it, such as kvlock-0123abcd",
    )
    expected = "an object from file names inside the data folder to CRC-32 of 8 hexadecimal digits"
    check("files", values["files"], _is_files, expected)
    return Metadata(
        family=values["family"],
        version=values["version"],
        source=values["source"],
        configs=(configs := _configs(values["configs"], family, path)),
        models=_models(values["models"], configs, check, path),
        data=values["data"],
        files=values["files"],
    )


@dataclasses.dataclass(frozen=True)
class _Checks:
    """Raises where a field of a file is not as expected."""

    path: epath.Path

    def __call__(self, name: str, value: Any, fits: Any, expected: str) -> None:
        """Raises an error with the field, the expected and the found."""
        if not fits(value):
            raise CheckpointError(f"{self.path}: {name} must be {expected}, found {value!r:.80}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_source(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    files = value.get("files", {})
    texts = [v for name, v in value.items() if name != "files"]
    return isinstance(files, Mapping) and all(map(_is_text, (*texts, *files.values())))


def _is_files(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        _is_inside(name) and _is_text(crc) and re.fullmatch("[0-9a-f]{8}", crc)
        for name, crc in value.items()
    )


def _is_inside(name: str) -> bool:
    """Whether a relative path stays inside the folder that it is relative to."""
    path = PurePosixPath(name)
    clean = "\\" not in name and "\0" not in name and str(path) == name
    return clean and not path.is_absolute() and ".." not in path.parts and name != "."


def _configs(values: Any, family: Family, path: epath.Path) -> Configs:
    """Sizes of the models."""
    _check_in_full(values, (*NETWORKS, "scheduler"), path)
    experts = values.get("experts", [])
    second = [TRANSFORMERS[1]] if values.get(TRANSFORMERS[1]) is not None else []
    _check_in_full(values, second, path)
    if not isinstance(experts, list) or not all(map(_is_text, experts)):
        raise CheckpointError(f"{path}: experts must be a list of roles, found {experts!r:.80}")
    kinds = family.networks | {TRANSFORMERS[1]: family.networks[TRANSFORMERS[0]]}
    try:
        sizes = {n: from_config_dict(kinds[n].config, values[n]) for n in (*NETWORKS, *second)}
        return Configs(**sizes, scheduler=values["scheduler"], experts=tuple(experts))
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _models(values: Any, configs: Configs, check: _Checks, path: epath.Path) -> dict[str, Stored]:
    """Parameters, dtypes and bytes of the models."""
    _check_in_full(values, configs.networks, path)
    for name in configs.networks:
        model = values[name]
        absent = [f.name for f in dataclasses.fields(Stored) if f.name not in model]
        if absent:
            raise CheckpointError(f"{path} has no {', '.join(absent)} of {name}")
        for field in ("parameters", "size"):
            check(f"models.{name}.{field}", model[field], _is_count, "a whole number, 0 or more")
        dtypes = model["dtypes"]
        fits = isinstance(dtypes, list) and all(map(_is_text, dtypes))
        check(f"models.{name}.dtypes", dtypes, lambda _, fits=fits: fits, "names of dtypes")
    return {
        name: Stored(model["parameters"], tuple(model["dtypes"]), model["size"])
        for name, model in ((name, values[name]) for name in configs.networks)
    }


def _check_in_full(values: Any, names: Any, path: epath.Path) -> None:
    """Raises unless `values` is an object that holds an object under each name."""
    whole = isinstance(values, Mapping) and all(
        isinstance(values.get(name), Mapping) for name in names
    )
    if not whole:
        expected = ", ".join(names)
        raise CheckpointError(f"{path} does not describe {expected} in full: it has {values!r:.80}")
