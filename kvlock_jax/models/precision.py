"""The precision of matrix products, which their dtype does not determine.

By default XLA rounds float32 operands to what the hardware multiplies fastest: bfloat16 on a TPU, 8
of 24 bits, and TensorFloat-32 on a GPU, 11 of them. Every product of the models therefore names its
precision: all bits of float32 operands, for which a TPU takes six passes, and the fast default for
narrower dtypes. CPUs multiply all bits of float32 either way. docs/precision.md has the figures.
"""

from typing import Any

import jax
import jax.numpy as jnp


def precision_for(dtype: Any) -> jax.lax.Precision | None:
    """The precision of a product of operands of `dtype`: `HIGHEST` of float32, else the default."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None
