"""The protocol of a model family: everything that the rest of the package asks of one.

A family is a folder of `models/` that defines a `Family`, a table of `convert/` for each published
layout, and a line of `checkpoints/registry.py`. `docs/new-model.md` builds a small one with joint
attention from nothing. Its transformer follows `sampling.loop.Denoiser`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8

from kvlock_jax.grid import Grid
from kvlock_jax.models.layout import ParameterRules
from kvlock_jax.shapes import Latents


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
    """Latents of a row of clips; equal clips were encoded once."""

    parts: Sequence[Float[Array | np.ndarray, "clips T H W C"]]
    index: Int[Array | np.ndarray, "rows"]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape `rows T H W C`."""
        return (len(self.index), *self.parts[0].shape[1:])

    def rows(self) -> Latents:
        """The latents, one row for each clip; to be called inside a compiled program."""
        return jnp.concatenate(self.parts)[self.index]


jax.tree_util.register_dataclass(Encoded, ["parts", "index"], [])

Clips = Sequence[UInt8[np.ndarray, "frames height width 3"]]
Masks = Sequence[Bool[np.ndarray, "frames height width"]]

Pictures = Sequence[UInt8[np.ndarray, "_ _ 3"]]
"""Reference pictures, each of its own size."""


class EncodeClips(Protocol):
    """Encodes clips by the VAE, whatever their length."""

    def __call__(self, clips: Clips, masks: Masks, *, inside: bool) -> Encoded:
        """Encodes the pixels inside each clip's mask, or those outside; the others are blank."""


class Conditioner(Protocol):
    """Turns prompts, clips, masks and reference pictures into a transformer's context.

    Its attributes are constants: it is a static argument of compiled programs.

    Attributes:
      takes_references: whether the transformer can be shown reference pictures.
      sees_source: whether the context holds the source's latents, even where no lock needs them.
    """

    takes_references: bool
    sees_source: bool

    def canvases(self, pictures: Pictures, height: int, width: int) -> list[Array | np.ndarray]:
        """Reference pictures, `height width 3` in [-1, 1], in the order of their latent frames."""

    def encode(
        self,
        encode: EncodeClips,
        sources: Clips,
        masks: Masks,
        *,
        scale: float,
        show_masked: bool,
    ) -> Any:
        """Encodes what the context shows of the clips; the result is handed to `contexts`.

        Args:
          encode: the VAE.
          sources: clips of the sources; each has equally many edits, one after another.
          masks: mask of each edit, true where it generates. A long clip's may be mapped to a file
            or be views of one frame, so they are best not copied.
          scale: weight of the context, `edit.context_scale`.
          show_masked: whether pixels under the mask are shown, `edit.show_masked`.
        """

    def contexts(
        self,
        texts: Float[Array, "R S D"],
        source_texts: Float[Array, "sources S D"],
        latents: Float[Array, "sources T H W C"],
        references: Sequence[Float[Array, "sources 1 H W C"]],
        encoded: Any,
        grid: Grid,
    ) -> tuple[Any, Any]:
        """The contexts of the edits' rows and of the sources' rows, for `Denoiser.condition`.

        Runs inside a compiled program.

        Args:
          texts: embedded prompt and negative prompt of each edit.
          source_texts: embedded prompt of each source.
          latents: encoded sources.
          references: encoded canvases, a latent frame each.
          encoded: the result of `encode`.
          grid: tokens of a row, references included.
        """


@dataclasses.dataclass(frozen=True)
class TextOnly:
    """The `Conditioner` of a text-to-video transformer: its context is the text alone."""

    takes_references: bool = False
    sees_source: bool = False

    def canvases(self, pictures: Pictures, height: int, width: int) -> list:
        """None: it can be shown no pictures."""
        return []

    def encode(self, encode: EncodeClips, sources: Clips, masks: Masks, **settings: Any) -> None:
        """Encodes nothing."""

    def contexts(
        self, texts: Array, source_texts: Array, *others: Any
    ) -> tuple[Float[Array, "R S D"], Float[Array, "sources S D"]]:
        """The texts."""
        return texts, source_texts


@dataclasses.dataclass(frozen=True)
class Network:
    """One network of a family.

    Attributes:
      config: dataclass of its sizes.
      build: constructor, called with a config, `dtype` and `rngs`.
      parameters: how a mesh shards its parameters, and which may be rounded.
      float32: whether it computes in float32, whatever dtype the user asks for.
    """

    config: type
    build: Callable[..., nnx.Module]
    parameters: ParameterRules
    float32: bool = False


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
      name: name in checkpoints and in `kvlock info`, such as `"wan2.1-vace"`.
      networks: the networks `transformer`, `vae` and `text_encoder`.
      describes: whether a checkpoint's configs (`registry.Configs`) belong to this family.
      conditioner: the transformer's context.
      settings: from a checkpoint's configs to the name of its default settings in `configs/`.
      takes_known_tokens: whether it was trained on a timestep for every token, and so can be given
        clean ones (`LockConfig.background` `"clean"`).
      results: pytree classes of the transformer's results and the conditioner's contexts, so that
        programs that return them can be cached.
    """

    name: str
    networks: Mapping[str, Network]
    describes: Callable[[Any], bool]
    conditioner: Conditioner
    settings: Callable[[Any], str]
    results: tuple[type, ...] = ()
    takes_known_tokens: bool = False
