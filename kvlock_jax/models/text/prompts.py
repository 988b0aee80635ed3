"""Encodes prompts into the text context that Wan's transformer attends to."""

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
) -> Float[Array, "B S D"]:
    """The text context of prompts: hidden states, and zeros after each end token, float32.

    Args:
      encoder: network that takes ids and mask, such as `UMT5Encoder`; `config.vocab_size` bounds
        the ids.
      tokenizer: tokenizer of the same checkpoint.
      prompts: texts to encode; an empty string is a prompt too.
      run: caller of the compiled program.

    Raises:
      CheckpointError: the tokenizer has more tokens than the encoder embeds.
      InputError: `prompts` is not a sequence of strings.
    """
    known = encoder.config.vocab_size
    if tokenizer.vocab_size > known:
        raise CheckpointError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, the text encoder embeds "
            f"{known}: they come from different checkpoints"
        )
    return run(encode_ids, encoder, *tokenizer(prompts))


def prompt_warnings(tokenizer: Tokenizer, prompt: str, *others: str) -> list[str]:
    """One line for each way in which the texts of an edit reach the model incomplete.

    A text with more tokens than the model takes loses its tail; words outside the vocabulary are
    lost. Empty where all texts arrive whole.

    Args:
      tokenizer: tokenizer of the model.
      prompt: prompt of the edit.
      others: negative and source prompts. Those with unknown words are passed over: a config
        brings its negative prompt to models of any vocabulary.
    """
    lines, limit = [], f"{tokenizer.text_len} tokens"
    if words := ", ".join(tokenizer.unknown(prompt)):
        lines.append(f"{_short(prompt)} has words that the text encoder does not know: {words}")
    whole = [text for text in dict.fromkeys(others) if not tokenizer.unknown(text)]
    for text in dict.fromkeys((prompt, *whole)):
        if tail := tokenizer.cut_off(text):
            fault = f"is over {limit} long, the model never sees"
            lines.append(f"{_short(text)} {fault} {_short(tail)}")
    return lines


def _short(text: str) -> str:
    """A text in quotes, its middle left out where it is long."""
    return repr(text if len(text) <= 80 else f"{text[:50]} ... {text[-20:]}")


@jax.jit
def encode_ids(
    encoder: nnx.Module, ids: Int[Array, "B S"], mask: Bool[Array, "B S"]
) -> Float[Array, "B S D"]:
    """Hidden states of token ids, float32, and zeros where the mask is false."""
    hidden = encoder(ids, mask).astype(jnp.float32)
    return jnp.where(mask[..., None], hidden, 0.0)
