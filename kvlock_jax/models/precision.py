"""How exactly products of matrices are made, which a dtype alone does not say.

A TPU multiplies bfloat16 numbers, and a GPU TensorFloat-32. By default XLA rounds float32 operands
to these: a product "in float32" then has 8 or 11 significant bits of 24. Every product here
therefore names its precision: all bits of float32 operands, which takes a TPU six passes, and the
fast default where the compute dtype is narrower. CPUs multiply float32 either way.
"""

from typing import Any

import jax
import jax.numpy as jnp


def precision_for(dtype: Any) -> jax.lax.Precision | None:
    """The precision of a product of operands of `dtype`: `HIGHEST` of float32, else the default."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None
