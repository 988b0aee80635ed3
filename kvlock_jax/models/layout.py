"""Names the dimensions of parameters, for sharding, and the parameters that may be rounded.

The kernel of a stacked block has the dimensions `layers`, inputs, outputs. `N` is heads times head
size, heads outermost. Every device holds a copy of a parameter that is not named here.
"""

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from kvlock_jax.parallel import sharding
from kvlock_jax.parallel.mesh import AXES

_T = TypeVar("_T")

TRANSFORMER = {
    r"to_[qkv]\.kernel": "layers D N",
    r"to_[qkv]\.bias": "layers N",
    r"norm_[qk]\.scale": "layers N",
    r"to_out\.kernel": "layers N D",
    r"net_0\.kernel": "layers D F",
    r"net_0\.bias": "layers F",
    r"net_2\.kernel": "layers F D",
    r"vace_blocks\.proj_out\.kernel": "layers D I",
    r"condition_embedder\.time_proj\.kernel": "D I",
}
"""Parameters of `WanTransformer` and its VACE variant, by the end of their path."""

TEXT_ENCODER = {
    r"shared\.embedding": "V D",
    r"SelfAttention\.[qkv]\.kernel": "layers D I",
    r"SelfAttention\.o\.kernel": "layers I D",
    r"DenseReluDense\.wi_[01]\.kernel": "layers D I",
    r"DenseReluDense\.wo\.kernel": "layers I D",
}
"""Parameters of `UMT5Encoder`: 5.7 billion, used once for each edit."""


def place(mesh: Mesh, path: str, shape: tuple[int, ...], *, spread: bool) -> NamedSharding:
    """The sharding of a checkpoint's parameter on a mesh.

    A dimension that its mesh axis does not divide is replicated along that axis.

    Args:
      mesh: mesh with the axes of `mesh.AXES`.
      path: `transformer.blocks...`, `text_encoder.block...` or `vae...`.
      shape: shape of the parameter.
      spread: whether `frames` shares the transformer's weights too. All devices always share those
        of the text encoder.
    """
    model, _, path = path.partition(".")
    if model == "text_encoder":
        letters, rules = _letters(TEXT_ENCODER, path), {"D": AXES}
    elif model == "transformer":
        letters = _letters(TRANSFORMER, path)
        rules = sharding.SPREAD if spread else sharding.RULES
    else:
        letters, rules = None, {}
    spec = sharding.spec(letters or "", rules)
    return NamedSharding(mesh, sharding.dividing(spec, shape, mesh))


def gathered_layer(weights: _T) -> _T:
    """Gathers one layer's weights for its products; heads and feed-forward stay sharded.

    The constraint stands inside the scan over layers, so that one layer is gathered at a time. XLA
    by itself may sum partial products over all tokens instead.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return weights
    flat = []
    for path, leaf in nnx.to_flat_state(weights):
        letters = _letters(TRANSFORMER, ".".join(map(str, path))) or ""
        spec = sharding.spec(letters.removeprefix("layers "))
        value = leaf.get_value()
        spec = sharding.dividing(spec, value.shape, mesh)
        flat.append((path, leaf.replace(jax.lax.with_sharding_constraint(value, spec))))
    return nnx.from_flat_state(flat)


def _letters(table: Mapping[str, str], path: str) -> str | None:
    return next((v for k, v in table.items() if re.search(rf"(^|\.){k}$", path)), None)


MULTIPLIED = re.compile(
    r"transformer\.(?!condition_embedder\.time_)(.+\.)?kernel"
    r"|text_encoder\.(.+\.kernel|shared\.embedding)"
)
"""Parameters that a module casts to its compute dtype, and the text encoder's vocabulary, which is
published in bfloat16. Modules cast all others, and so the whole VAE, to float32 (DESIGN.md 3)."""


def dtype_of(path: str, source: np.dtype, target: Any) -> np.dtype:
    """The dtype of a parameter after a conversion: narrowed only if it is `MULTIPLIED`.

    Args:
      path: path of the parameter, such as `transformer.proj_out.kernel`.
      source: its dtype in the source.
      target: dtype to convert to; None keeps the source's.
    """
    source, target = np.dtype(source), np.dtype(source if target is None else target)
    rounds = target.itemsize < np.dtype(np.float32).itemsize
    return source if rounds and not MULTIPLIED.fullmatch(path) else target
