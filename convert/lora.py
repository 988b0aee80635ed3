"""LoRA files: changes of a transformer's weights, in the spellings that trainers publish.

A LoRA changes `W` by `strength scale B A`, or by a plain difference. Its keys name layers as the
publisher or as Diffusers does, behind a prefix, with dots or with underscores; each is looked up
among the published names of the model's own parameters. Changes are summed in float32 and rounded
once, into the dtype of the weights.
"""

import dataclasses
import functools
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open

from kvlock_jax.checkpoints import registry
from kvlock_jax.checkpoints.files import ROLES, Lora, Loras
from kvlock_jax.checkpoints.registry import Configs
from kvlock_jax.convert import diffusers, original
from kvlock_jax.convert.table import Changes, LazyTensor, Transform, published_names
from kvlock_jax.convert.weights import lazy_tensors, read_json
from kvlock_jax.errors import CheckpointError

_PAIR = r"[._]lora(?:_linear_layer)?[._](A|B|up|down)(?:\.default)?(?:\.weight)?$"
_ENDS = ((r"\.alpha$", "alpha"), (r"\.diff$", "weight"), (r"\.diff_b$", "bias"))
_ENDS += ((r"\.diff_m$", "modulation"),)
_PREFIX = r"base_model\.model\.|(diffusion_model|transformer|model|unet)\.|lora_unet__?"
_OTHERS = re.compile(r"\b(hada|lokr|oft)_|\.dora_scale|lora_mid|lora_magnitude_vector")
"""LoHa, LoKr, OFT, DoRA and convolutions in three parts."""

_OF_IMAGES = re.compile(r"k_img|v_img|img_emb|add_[kv]_proj|norm_added_[kv]|image_embedder")
"""Layers of image-to-video models, which LoRAs hold whose makers name them for this model."""


@dataclasses.dataclass(frozen=True)
class _Target:
    """A published tensor: its parameter, layer and transform."""

    path: str
    layer: int | None
    shape: tuple[int, ...]
    transform: Transform


def open_loras(loras: Loras, configs: Configs) -> dict[str, Changes]:
    """The changes of each transformer, not read yet; errors as in `open_changes`.

    Raises:
      CheckpointError: a LoRA is of an expert that the checkpoint has not.
    """
    roles = configs.experts or ("",)
    if lost := [role for role in ROLES if getattr(loras, role) and role not in roles]:
        raise CheckpointError(f"--lora_{lost[0]}: the checkpoint has no {lost[0]}-noise expert")
    model = registry.abstract(configs.transformer, jnp.float32)
    named = zip(configs.transformers, roles, strict=True)
    return {name: open_changes(own, model) for name, role in named if (own := loras.of(role))}


def open_changes(loras: Sequence[Lora], transformer: nnx.Module) -> Changes:
    """The changes that LoRA files ask of a transformer, not read yet.

    Args:
      loras: files and strengths, which may change the same layers.
      transformer: model to change, or its shapes.

    Raises:
      CheckpointError: a file is damaged, is of another kind than LoRA, or holds keys that fit no
        layer of the model; the message lists all of them.
    """
    targets = _targets(nnx.state(transformer))
    found: dict[str, dict[int | None, list]] = {}
    for path, strength in loras:
        for target, change in _changes(path, strength, targets):
            found.setdefault(target.path, {}).setdefault(target.layer, []).append(change)
    return found


def merged(transformer: nnx.Module, changes: Changes) -> nnx.Module:
    """A loaded transformer with changes, a layer at a time on its own devices."""
    graph, state = nnx.split(transformer)
    flat = [
        (path, leaf.replace(changed(".".join(map(str, path)), leaf.get_value(), changes)))
        for path, leaf in nnx.to_flat_state(state)
    ]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def changed(path: str, array: jax.Array, changes: Changes) -> jax.Array:
    """A parameter with its changes, if there are any; the array is donated then."""
    if path not in changes:
        return array
    near = array.sharding.with_memory_kind("device")
    made = jax.device_put(array, near)
    add = jax.jit(_add, donate_argnums=0, out_shardings=near)
    for layer, functions in changes[path].items():
        made = add(made, sum(change() for change in functions), layer)
    return jax.device_put(made, array.sharding)


def _add(array: jax.Array, change: jax.Array, layer: int | None) -> jax.Array:
    """An array with a change of one layer, or of all of it, rounded once."""
    if layer is None:
        return (array.astype(jnp.float32) + change).astype(array.dtype)
    old = jax.lax.dynamic_index_in_dim(array, layer, keepdims=False)
    new = (old.astype(jnp.float32) + change).astype(array.dtype)
    return jax.lax.dynamic_update_index_in_dim(array, new, layer, 0)


def _targets(state: nnx.State) -> dict[str, _Target]:
    """The published tensors of a model by name, with underscores for dots."""
    found = {}
    for path, variable in nnx.to_flat_state(state):
        for table in (original.WAN, diffusers.WAN):
            row, names, stacked = published_names(path, variable.shape, table)
            shape = variable.shape[1:] if stacked else variable.shape
            for layer, (name, *_) in enumerate(names):
                place = _Target(
                    ".".join(map(str, path)), layer if stacked else None, shape, row.transform
                )
                found[name.replace(".", "_")] = place
    return found


def _changes(
    path: Path, strength: float, targets: Mapping[str, _Target]
) -> Iterator[tuple[_Target, Callable[[], np.ndarray]]]:
    tensors, metadata = _open(path)
    layers: dict[str, dict[str, LazyTensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        if _OTHERS.search(key):
            raise CheckpointError(
                f"{path} is not a plain LoRA (it holds {key}): LoHa, LoKr, OFT and DoRA change "
                "weights in other ways, which are not built"
            )
        module, part = _split(key)
        if module is None:
            unknown.append(key)
        else:
            layers.setdefault(module, {})[part] = tensor
    of_images = [module for module in layers if _OF_IMAGES.search(module)]
    if of_images:
        warnings.warn(
            f"{path} also changes {len(of_images)} layers of image-to-video models, such as "
            f"{of_images[0]}; they are left out",
            stacklevel=2,
        )
    for module, parts in layers.items():
        if module in of_images:
            continue
        pair = {name: parts.pop(name) for name in ("down", "up", "alpha") if name in parts}
        asked = [(part, (tensor,), 1.0) for part, tensor in parts.items()]
        if "down" in pair and "up" in pair:
            scale = _scale(module, pair, metadata)
            asked.append(("weight", (pair["up"], pair["down"]), scale))
        elif pair:
            unknown.append(f"{module}: half of a pair, {', '.join(pair)}")
        for part, factors, scale in asked:
            target = _target(module, part, targets)
            if target is None:
                unknown.append(f"{module} ({part})")
            elif _shape(factors, target.transform) != target.shape:
                shapes = " by ".join(str(list(factor.shape)) for factor in factors)
                unknown.append(f"{module} ({part}): {shapes}; the model has {list(target.shape)}")
            else:
                yield target, functools.partial(_delta, factors, strength * scale, target.transform)
    if unknown:
        lines = "\n".join(f"  {key}" for key in unknown)
        raise CheckpointError(f"{path} does not fit the model, {len(unknown)} keys:\n{lines}")


def _open(path: Path) -> tuple[dict[str, LazyTensor], dict[str, Any]]:
    """A file's tensors, and what PEFT knows about them."""
    try:
        with safe_open(path, framework="numpy") as file:
            header = (file.metadata() or {}).get("lora_adapter_metadata")
        metadata = json.loads(header) if header else {}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged, or no safetensors file: {error}") from error
    beside = path.with_name("adapter_config.json")
    if not metadata and path.stem == "adapter_model" and beside.is_file():
        metadata = read_json(beside)
    if not isinstance(metadata, Mapping):
        raise CheckpointError(f"{path}: its lora_adapter_metadata must be a JSON object")
    return lazy_tensors(path), {k.removeprefix("transformer."): v for k, v in metadata.items()}


def _split(key: str) -> tuple[str | None, str]:
    """The module that a key names, and the part of its change that it holds."""
    if found := re.search(_PAIR, key):
        return key[: found.start()], {"A": "down", "B": "up"}.get(found[1], found[1])
    for end, part in _ENDS:
        if found := re.search(end, key):
            return key[: found.start()], part
    return None, ""


def _target(module: str, part: str, targets: Mapping[str, _Target]) -> _Target | None:
    """The tensor that a part of a module's change goes to."""
    while True:
        flat = module.replace(".", "_")
        for name in (f"{flat}_{part}", flat):
            if name in targets:
                return targets[name]
        prefix = re.match(_PREFIX, module)
        if prefix is None:
            return None
        module = module[prefix.end() :]


def _scale(module: str, pair: Mapping[str, LazyTensor], metadata: Mapping[str, Any]) -> float:
    """Alpha over the rank; 1 without an alpha."""
    rank = pair["down"].shape[0]
    if "alpha" in pair:
        return float(np.asarray(pair["alpha"].read(), np.float32).item()) / rank
    alpha = metadata.get("lora_alpha")
    for name, value in (metadata.get("alpha_pattern") or {}).items():
        if module == name or module.endswith(f".{name}"):
            alpha = value
    if alpha is None:
        return 1.0
    return float(alpha) / (math.sqrt(rank) if metadata.get("use_rslora") else rank)


def _product_shape(factors: Sequence[LazyTensor]) -> tuple[int, ...]:
    if len(factors) == 1:
        return factors[0].shape
    up, down = (factor.shape for factor in factors)
    return (up[0], *down[1:]) if math.prod(up[1:]) == down[0] else (0,)


def _shape(factors: Sequence[LazyTensor], transform: Transform) -> tuple[int, ...] | None:
    """The shape of a change in our layout; `None` of another rank."""
    try:
        return transform(np.broadcast_to(np.float32(0), _product_shape(factors))).shape
    except ValueError:
        return None


def _delta(factors: Sequence[LazyTensor], scale: float, transform: Transform) -> np.ndarray:
    """A change in our layout."""
    arrays = [np.asarray(factor.read(), np.float32) for factor in factors]
    if len(arrays) == 1:
        whole = arrays[0]
    else:
        up, down = arrays
        whole = up.reshape(len(up), -1) @ down.reshape(len(down), -1)
        whole = whole.reshape(_product_shape(factors))
    if not np.isfinite(whole).all():
        raise CheckpointError("a LoRA holds numbers that are not finite")
    return np.ascontiguousarray(transform(np.float32(scale) * whole))
