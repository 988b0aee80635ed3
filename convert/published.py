"""A published checkpoint of any layout, opened without reading its weights."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kvlock_jax.checkpoints import format, registry
from kvlock_jax.checkpoints.files import ROLES
from kvlock_jax.checkpoints.format import Contents
from kvlock_jax.checkpoints.registry import (
    TRANSFORMERS,
    Checkpoint,
    Configs,
    Filling,
    Opened,
    PlaceFor,
    on_first_device,
)
from kvlock_jax.checkpoints.store import Parameter
from kvlock_jax.convert.table import (
    Changes,
    LazyTensor,
    Source,
    Table,
    changed,
    parameters,
    plan,
    read_one,
)
from kvlock_jax.errors import CheckpointError, ConfigError
from kvlock_jax.models.layout import ParameterRules


@dataclasses.dataclass(frozen=True)
class Weights:
    """Tensors of one model, their layout, and the path that errors name."""

    tensors: Mapping[str, LazyTensor]
    table: Table
    where: Path


@dataclasses.dataclass(frozen=True)
class Part:
    """One of `files.PARTS`, from a checkpoint's folder or from a file of its own.

    Attributes:
      config: sizes of the model.
      weights: weights of the model.
      files: files in the checkpoint's folder that it is read from.
      apart: the others that it is read from, by the name that a list of checksums has for them.
    """

    config: Any
    weights: Weights
    files: tuple[Path, ...] = ()
    apart: Mapping[str, Path] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The folder of a tokenizer's files, and `files` and `apart` as of a `Part`."""

    folder: Path
    files: tuple[Path, ...] = ()
    apart: Mapping[str, Path] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Published:
    """A published checkpoint.

    Attributes:
      layout: `"diffusers"`, `"original"`, or `"files"` for single files without a folder.
      folder: folder of the checkpoint, if there is one.
      configs: sizes of its models.
      weights: weights of each of `configs.networks`.
      tokenizer: folder of its tokenizer.
      files: every file in the folder that it is read from.
      apart: files elsewhere that it is read from, by name.
      changes: of each transformer, by LoRAs.
    """

    layout: str
    folder: Path | None
    configs: Configs
    weights: Mapping[str, Weights]
    tokenizer: Path
    files: tuple[Path, ...]
    apart: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    changes: Mapping[str, Changes] = dataclasses.field(default_factory=dict)

    @classmethod
    def of_parts(
        cls,
        layout: str,
        folder: Path | None,
        parts: Mapping[str, Part],
        tokens: Tokens,
        scheduler: Mapping[str, Any],
        others: tuple[Path, ...] = (),
    ) -> "Published":
        """A checkpoint of its parts, a tokenizer, and `others` of its folder.

        Raises:
          CheckpointError: two experts have different sizes, or one transformer is of no role.
        """
        holders = [*parts.values(), tokens]
        experts = tuple(role for role in ROLES if f"transformer_{role}" in parts)
        if experts and "transformer" in parts:
            where, roles = parts["transformer"].weights.where, " and ".join(experts)
            raise CheckpointError(
                f"{where} stands beside experts for {roles} noise: "
                "give it as --transformer_high or --transformer_low"
            )
        names = dict(zip((f"transformer_{role}" for role in experts), TRANSFORMERS, strict=False))
        networks = {names.get(name, name): part for name, part in parts.items()}
        weights = {name: part.weights for name, part in networks.items()}
        sizes = {name: part.config for name, part in networks.items()}
        try:
            configs = Configs(**sizes, scheduler=scheduler, experts=experts)
        except ConfigError as error:
            where = " and ".join(str(weights[name].where) for name in names.values())
            raise CheckpointError(f"{where} are no experts of one model: {error}") from error
        files = (*others, *(path for one in holders for path in one.files))
        apart = {name: path for one in holders for name, path in one.apart.items()}
        return cls(layout, folder, configs, weights, tokens.folder, files, apart)

    def parameters(self, dtype: Any = None) -> Mapping[str, Mapping[str, Parameter]]:
        """The parameters of each model by dotted path, not read yet.

        Args:
          dtype: dtype of the parameters that may be rounded; None keeps the source's.

        Raises:
          CheckpointError: tensors do not fit the configs; the message lists them for all models.
        """
        fitting, problems = {}, []
        for name, weights in self.weights.items():
            model = nnx.state(self._abstract(name))
            try:
                sources = plan(model, weights.tensors, weights.table, f"{weights.where}")
            except CheckpointError as error:
                problems.append(str(error))
            else:
                rules = registry.network(getattr(self.configs, name)).parameters
                kinds = functools.partial(_dtype, rules, dtype)
                fitting[name] = parameters(sources, weights.tensors, kinds)
                if changes := self.changes.get(name):
                    fitting[name] |= self._changed(name, changes, sources, fitting[name])
        if problems:
            raise CheckpointError("\n".join(problems))
        return fitting

    def _changed(
        self, name: str, changes: Changes, sources: Iterable[Source], made: Mapping[str, Parameter]
    ) -> dict[str, Parameter]:
        """The parameters that LoRAs change, which are read in float32 and rounded once."""
        wide = parameters(sources, self.weights[name].tensors, lambda *_: np.float32)
        return {
            path: changed(wide[path], made[path].dtype, by_layer)
            for path, by_layer in changes.items()
        }

    def describe(self) -> Contents:
        """Describes the checkpoint."""
        arrays = {name: weights.tensors.values() for name, weights in self.weights.items()}
        return format.contents(self.configs, arrays)

    def open(
        self,
        dtype: Any = None,
        compute_dtype: Any = jnp.float32,
        place_for: PlaceFor | None = None,
        weights: str | None = None,
    ) -> Opened:
        """Opens the checkpoint's networks, each of which is read one stacked parameter at a time.

        Args:
          dtype: as in `parameters`.
          compute_dtype: dtype of the modules' matrix products.
          place_for: sharding of each parameter; None is the first device.
          weights: kind of 8-bit values for the large kernels (`models.small.KINDS`).

        Raises:
          CheckpointError: as in `parameters`; and where a network is read, if a file cannot be read
            or holds numbers that are not finite.
        """
        place = place_for(self.configs) if place_for else on_first_device
        sources = self.parameters(dtype)
        shapes = {
            name: {
                path: jax.ShapeDtypeStruct(
                    one.shape, one.dtype, sharding=place(f"{name}.{path}", one.shape)
                )
                for path, one in values.items()
            }
            for name, values in sources.items()
        }
        filling = Filling(self.configs, compute_dtype, weights)
        planned = {name: filling(name, iter(arrays.items())) for name, arrays in shapes.items()}

        def network(name: str) -> nnx.Module:
            """Reads a network."""
            own = _under(name, place)
            arrays = ((path, read_one(path, p, own)) for path, p in sources[name].items())
            return filling(name, arrays)

        return Opened(Checkpoint(self.configs, **planned, tokenizer=self.tokenizer), network)

    def _abstract(self, name: str) -> nnx.Module:
        return registry.abstract(getattr(self.configs, name))


def _dtype(rules: ParameterRules, wanted: Any, path: str, stored: np.dtype) -> np.dtype:
    return rules.dtype(path, stored, wanted)


def _under(name: str, function: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    """Turns a function of a parameter's path in a checkpoint into one of its path in a model."""
    return lambda path, value: function(f"{name}.{path}", value)


def files_in(*folders: Path) -> Iterable[Path]:
    """The files of folders, in order."""
    return (path for folder in folders for path in sorted(folder.iterdir()) if path.is_file())
