"""Wan 2.1 VACE: the transformer, guided by context blocks that see the video and its mask.

The context blocks run beside the main ones on control tokens of their own: the 96-channel
conditioning of METHOD.md section 11 and the noisy latents. Some main blocks are followed by one of
them, whose projected state, the hint, is added to the residual stream. Layout and arithmetic are
the published checkpoint's (`WanVACETransformer3DModel` in Diffusers), except that the input
projection, which only the first context block has, is a module beside the stacked blocks.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from kvlock_jax.grid import Grid
from kvlock_jax.lock import KVCache
from kvlock_jax.models.attention.sharded import Attend, overlapped
from kvlock_jax.models.layout import gathered_layer
from kvlock_jax.models.linear import Linear
from kvlock_jax.models.wan.block import Block, Modulation, Positions, Tokens, stacked, text_cache
from kvlock_jax.models.wan.config import WanConfig
from kvlock_jax.models.wan.parameters import PARAMETERS
from kvlock_jax.models.wan.transformer import Conditioning, Side, WanTransformer
from kvlock_jax.parallel import sharding
from kvlock_jax.shapes import PerEdit

Control = Float[Array, "B all D"]
"""Control tokens: of the whole video, also where the main blocks run on a part of its tokens."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VACEContext:
    """An edit's conditioning beside its latents (METHOD.md section 11).

    Attributes:
      text: text embeddings of every row.
      control: patches of `vace_in_channels` on the grid of the latents. With fewer of them than
        rows, each serves an equal number of consecutive rows.
      scale: scale of the hints, one for each of `control`; 1 as trained, 0 is text-to-video.
    """

    text: Float[Array | np.ndarray, "rows S text_dim"]
    control: Float[Array | np.ndarray, "B L cells C"]
    scale: Float[Array | np.ndarray, "B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VACEConditioning(Conditioning):
    """`Conditioning` of the main blocks and of the context blocks."""

    vace_text: KVCache  # context blocks' cross-attention's, vace_layers B S D
    control: Tokens  # after the input projection, float32
    scale: PerEdit


class VACEBlock(Block):
    """A context block: a block of the transformer, and the projection to its hint."""

    def __init__(self, config: WanConfig, *, dtype: Any, rngs: nnx.Rngs):
        super().__init__(config, dtype=dtype, rngs=rngs)
        self.proj_out = _zero_linear(config.dim, dtype, rngs)

    def hint(
        self, control: Tokens, modulation: Modulation, text: KVCache, positions: Positions
    ) -> tuple[Tokens, Tokens]:
        """The unscaled hint for the main stream, and the control tokens after this block."""
        control, _ = self(control, modulation, text, positions, None)
        return self.proj_out(control), control


class WanVACETransformer(WanTransformer):
    """The VACE transformer; parameters of `vace_blocks` have a leading axis of `vace_layers`.

    With `x_0` the patch-embedded latents, `c_0 = proj_in(control) + x_0`, `i` counting context
    blocks and `l = vace_layers[i]` (METHOD.md section 11):

        c_{i+1} = vace_block_i(c_i)
        x_{l+1} = block_l(x_l) + scale proj_out_i(c_{i+1})

    A lock acts on the main blocks only: `keys_values` returns theirs, and context blocks attend to
    their own tokens alone. Hints of initial parameters are zero, as when the publisher began
    training.
    """

    def __init__(
        self,
        config: WanConfig,
        *,
        dtype: Any = jnp.float32,
        unroll: int = 1,
        attend: Attend = overlapped,
        rngs: nnx.Rngs,
    ):
        super().__init__(config, dtype=dtype, unroll=unroll, attend=attend, rngs=rngs)
        width = int(np.prod(config.patch_size)) * config.vace_in_channels
        self.vace_patch_embedding = Linear(width, config.dim, dtype=dtype, rngs=rngs)
        self.vace_proj_in = _zero_linear(config.dim, dtype, rngs)
        layers = len(config.vace_layers)
        self.vace_blocks = stacked(VACEBlock, layers, config, dtype=dtype, rngs=rngs)

    def condition(self, context: VACEContext, grid: Grid) -> VACEConditioning:
        """Computes the conditioning that all passes over one grid share.

        Args:
          context: text as for `WanTransformer.condition`, control and scale.
          grid: grid of the latents.
        """
        main = super().condition(context.text, grid)
        control = context.control.reshape(*context.control.shape[:2], -1)
        control = self.vace_proj_in(self.vace_patch_embedding(control))
        return VACEConditioning(
            text=main.text,
            positions=main.positions,
            vace_text=text_cache(self.vace_blocks, self.condition_embedder.text(context.text)),
            control=sharding.constrain(control, "BLD"),
            scale=context.scale,
        )

    def _side(
        self,
        x: Tokens,
        modulation: Modulation,
        conditioning: VACEConditioning,
        some: Callable[[Tokens], Tokens],
    ) -> Side:
        graph, params = nnx.split(self.vace_blocks)
        rows = len(x) // len(conditioning.scale)
        scale = jnp.repeat(conditioning.scale.astype(jnp.float32), rows)[:, None, None]
        control = x.reshape(-1, rows, *x.shape[1:]) + conditioning.control[:, None]

        def hinted(x: Tokens, control: Control, index: Array) -> tuple[Tokens, Control]:
            """Adds a hint after a layer."""
            # Indexed inside the branch, so that a layer without a hint moves no weights.
            weights, text = jax.tree.map(lambda p: p[index], (params, conditioning.vace_text))
            block = nnx.merge(graph, gathered_layer(weights, PARAMETERS))
            hint, control = block.hint(control, modulation, text, conditioning.positions)
            return x + scale * some(hint), control

        def plain(x: Tokens, control: Control, index: Array) -> tuple[Tokens, Control]:
            """Leaves the stream as it is."""
            return x, control

        def after(x: Tokens, control: Control, layer: Any) -> tuple[Tokens, Control]:
            """Adds a hint if the layer has one."""
            has_hint, index = layer
            return jax.lax.cond(has_hint, hinted, plain, x, control, index)

        # Each hint is computed where it is added: all 8 of 14B would take 5.4 GB a row, at 81
        # frames of 480x832.
        has_hint = np.isin(np.arange(self.config.num_layers), self.config.vace_layers)
        index = np.maximum(np.cumsum(has_hint, dtype=np.int32) - 1, 0)
        control = sharding.constrain(control.reshape(x.shape), "BLD")
        return Side(control, (has_hint, index), after)


def wan_transformer(
    config: WanConfig,
    *,
    dtype: Any = jnp.float32,
    unroll: int = 1,
    attend: Attend = overlapped,
    rngs: nnx.Rngs,
) -> WanTransformer:
    """The transformer that a config describes: VACE where it has `vace_layers`."""
    kind = WanVACETransformer if config.vace_layers else WanTransformer
    return kind(config, dtype=dtype, unroll=unroll, attend=attend, rngs=rngs)


def _zero_linear(width: int, dtype: Any, rngs: nnx.Rngs) -> Linear:
    linear = Linear(width, width, dtype=dtype, rngs=rngs)
    linear.kernel[...] = jnp.zeros((width, width), jnp.float32)
    return linear
