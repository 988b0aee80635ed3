"""Prompts to the text context that Wan's transformer attends to."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from kvlock_jax.errors import CheckpointError
from kvlock_jax.models.text.tokenizer import Tokenizer
from kvlock_jax.runtime.compile_cache import Call, call


def encode_prompts(
    encoder: nnx.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    run: Call = call,
) -> Float[Array, "B S D"] | jax.ShapeDtypeStruct:
    """The text context of prompts: hidden states, and zeros after each end token, float32.

    Args:
      encoder: called with ids and mask, such as `UMT5Encoder`; its `config.vocab_size` bounds ids.
      tokenizer: of the same checkpoint.
      prompts: one for each edit; an empty string is a prompt too.
      run: how the compiled program is called.

    Raises:
      CheckpointError: if the tokenizer knows more tokens than the encoder.
      InputError: if `prompts` is not a sequence of strings.
    """
    known = encoder.config.vocab_size
    if tokenizer.vocab_size > known:
        raise CheckpointError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, the text encoder embeds "
            f"{known}: they are not of one checkpoint"
        )
    return run(encode_ids, encoder, *tokenizer(prompts))


@jax.jit
def encode_ids(
    encoder: nnx.Module, ids: Int[Array, "B S"], mask: Bool[Array, "B S"]
) -> Float[Array, "B S D"]:
    """Hidden states of token ids, float32, and zeros where the mask is not set."""
    hidden = encoder(ids, mask).astype(jnp.float32)
    return jnp.where(mask[..., None], hidden, 0.0)
