"""Sizes of the text encoder."""

import dataclasses
import math

from kvlock_jax.models.layout import ParameterRules
from kvlock_jax.parallel.mesh import AXES
from kvlock_jax.settings.fields import require, require_positive


@dataclasses.dataclass(frozen=True)
class UMT5Config:
    """Sizes of a UMT5 encoder, named as in Transformers' `config.json`."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    def __post_init__(self) -> None:
        require_positive(self)
        require(
            0 < self.layer_norm_epsilon < math.inf, self, "layer_norm_epsilon", "over 0, and finite"
        )
        buckets = self.relative_attention_num_buckets
        require(buckets % 4 == 0, self, "relative_attention_num_buckets", "a multiple of 4")
        far, exact = self.relative_attention_max_distance, buckets // 4
        require(far > exact, self, "relative_attention_max_distance", f"over {exact}")


PARAMETERS = ParameterRules(
    letters={
        r"shared\.embedding": "V D",
        r"SelfAttention\.[qkv]\.kernel": "layers D I",
        r"SelfAttention\.o\.kernel": "layers I D",
        r"DenseReluDense\.wi_[01]\.kernel": "layers D I",
        r"DenseReluDense\.wo\.kernel": "layers I D",
    },
    # All devices share these 5.7 billion parameters, always: they serve once an edit.
    axes={"D": AXES},
    spread_axes={"D": AXES},
    # The vocabulary is published in bfloat16.
    rounded=r".+\.kernel|shared\.embedding",
)
"""The rules of the encoder's parameters."""
