"""Sizes of the text encoder."""

import dataclasses
import math

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
