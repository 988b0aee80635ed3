"""Which dimension of a parameter is which, for sharding, and which parameters may be rounded.

In a stacked block a kernel is `layers`, its inputs, its outputs. `N` stands for heads times their
size, whose outer part is the head; a parameter that is not named here lies on every device.
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
"""Parameters of `UMT5Encoder`; 5.7 billion of them, used once an edit."""


def place(mesh: Mesh, path: str, shape: tuple[int, ...], *, spread: bool) -> NamedSharding:
    """Where a parameter of a checkpoint lies on a mesh.

    Args:
      mesh: of the axes of `sharding.AXES`.
      path: `transformer.blocks...`, `text_encoder.block...` or `vae...`.
      shape: of the parameter.
      spread: whether the transformer's weights are spread over `frames` too. The text encoder's
        always are, over all devices; what a mesh axis does not divide lies on all of it.
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
    """One layer's weights as its products take them: only heads and feed-forward are spread.

    Said inside the scan over layers, so that one layer is gathered at a time: left to itself XLA
    may sum partial products over all tokens instead.
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
"""Parameters that a module takes in its compute dtype, and the text encoder's vocabulary, which is
published in bfloat16. All others, and so all of the VAE, are taken in float32 (DESIGN.md 3)."""


def dtype_of(path: str, found: np.dtype, asked: Any) -> np.dtype:
    """The dtype that a parameter gets where one is asked for: rounded only if `MULTIPLIED`.

    Args:
      path: of the parameter, such as `transformer.proj_out.kernel`.
      found: its dtype in the source.
      asked: what is asked for; None keeps all as they are.
    """
    found, asked = np.dtype(found), np.dtype(found if asked is None else asked)
    rounds = asked.itemsize < np.dtype(np.float32).itemsize
    return found if rounds and not MULTIPLIED.fullmatch(path) else asked
