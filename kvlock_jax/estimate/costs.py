"""Estimates an edit's memory and arithmetic from the sizes of the model.

No function here touches an array. Arithmetic counts matrix products, two operations per
multiply-add; in a block of 1.3B at 81 frames of 480x832 XLA counts under 2 % more (exponentials
apart). A function that takes a `Layout` counts one device out of those that share an edit's tokens;
a mesh axis of further edits only multiplies their number.

Attention is assumed to keep its logits on the chip, as blockwise kernels do: at 81 frames of
480x832 those of one block and row of 1.3B would take 48 GiB.
"""

import dataclasses
import math

from kvlock_jax.errors import ConfigError
from kvlock_jax.models.wan.block import FEED_FORWARD_TOKENS
from kvlock_jax.models.wan.config import WanConfig
from kvlock_jax.parallel.padding import token_block
from kvlock_jax.settings.schema import LockConfig
from kvlock_jax.shapes import VAE_STRIDES

TEXT_TOKENS = 512
"""Length to which Wan 2.1 pads each text."""

FLOAT32 = 4


@dataclasses.dataclass(frozen=True)
class Workload:
    """A batch of edits, and the model that runs them.

    Attributes:
      config: sizes of the transformer.
      frames: frames of each video after padding, 4n + 1.
      height: height of each video in pixels, a multiple of the VAE's stride times the patch.
      width: width of each video, likewise.
      batch: number of edits `B`.
      branches: guidance branches of each edit: 2, or 1 without guidance.
      strides: pixels per latent cell of the VAE.
      references: reference pictures of a VACE edit, a latent frame each (METHOD.md section 11).
      text_tokens: number of text tokens `S`.
      dtype_bytes: bytes of a number in matrix products and in the cache, 2 for bfloat16.
      weight_bytes: mean bytes of a stored parameter.
      clip_frames: frames of a longer clip of which these are a window; 0 where there is none.
      windows: number of windows that a step runs over, one after another.
    """

    config: WanConfig
    frames: int
    height: int
    width: int
    batch: int = 1
    references: int = 0
    text_tokens: int = TEXT_TOKENS
    dtype_bytes: int = 2
    weight_bytes: float = 2.0
    branches: int = 2
    strides: tuple[int, int, int] = VAE_STRIDES
    clip_frames: int = 0
    windows: int = 1

    def __post_init__(self) -> None:
        for name in ("frames", "height", "width", "batch", "text_tokens", "dtype_bytes"):
            _require(getattr(self, name) > 0, self, name, "over 0")
        _require(self.references >= 0, self, "references", "0 or more")
        time, rows, columns = (
            s * p for s, p in zip(self.strides, self.config.patch_size, strict=True)
        )
        _require((self.frames - 1) % time == 0, self, "frames", f"1 more than a multiple of {time}")
        _require(self.height % rows == 0, self, "height", f"a multiple of {rows}")
        _require(self.width % columns == 0, self, "width", f"a multiple of {columns}")

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Latent frames (those of references included), rows and columns `T H W`."""
        time, rows, columns = self.strides
        frames = (self.frames - 1) // time + 1 + self.references
        return frames, self.height // rows, self.width // columns

    @property
    def tokens(self) -> int:
        """Tokens `L` of one edit or of a window of it, without padding."""
        return math.prod(self.latent_shape) // math.prod(self.config.patch_size)

    @property
    def clip_tokens(self) -> int:
        """Tokens of one edit."""
        clip = dataclasses.replace(self, frames=max(self.frames, self.clip_frames))
        return clip.tokens


@dataclasses.dataclass(frozen=True)
class Layout:
    """The layout of edits over the devices that share their tokens.

    Attributes:
      devices: number of devices; all hold the same number of tokens, with padding at the end.
      shard_weights: whether each device holds an equal part of the weights and gathers the rest
        block by block, or holds all.
      block: divisor of the number of tokens on a device.
    """

    devices: int = 1
    shard_weights: bool = False
    block: int = 1

    def __post_init__(self) -> None:
        for name in ("devices", "block"):
            _require(getattr(self, name) > 0, self, name, "over 0")

    @classmethod
    def of(cls, devices: int, shard_weights: bool, tokens: int) -> "Layout":
        """The layout of a number of devices, with the padding that the programs use for it."""
        return cls(devices, shard_weights, token_block(tokens, devices))

    def local(self, tokens: int) -> int:
        """Tokens of one device, with padding; times `devices` it is the padded length of keys."""
        return -(-tokens // (self.devices * self.block)) * self.block


def _require(ok: bool, owner: Workload | Layout, name: str, expected: str) -> None:
    if not ok:
        found = getattr(owner, name)
        raise ConfigError(f"{type(owner).__name__}.{name} must be {expected}, found {found}")


# --- memory -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Parameters of a transformer by part.

    Attributes:
      patch_embedding: latents to tokens.
      time: embedding of the timestep, and its projection to the modulation.
      text: embedding of the text.
      blocks: all main blocks.
      head: tokens to velocity.
      vace: context blocks and their input projections; 0 without VACE.
    """

    patch_embedding: int
    time: int
    text: int
    blocks: int
    head: int
    vace: int

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(dataclasses.astuple(self))


def parameters(config: WanConfig) -> Parameters:
    """The exact number of a transformer's parameters."""
    wide, cells = config.dim, math.prod(config.patch_size)
    square = _linear(wide, wide)
    context = len(config.vace_layers)
    control = _linear(cells * config.vace_in_channels, wide) + square
    return Parameters(
        patch_embedding=_linear(cells * config.in_channels, wide),
        time=_linear(config.freq_dim, wide) + square + _linear(wide, 6 * wide),
        text=_linear(config.text_dim, wide) + square,
        blocks=config.num_layers * _block_parameters(config),
        head=_linear(wide, cells * config.out_channels) + 2 * wide,
        vace=(control + context * (_block_parameters(config) + square)) if context else 0,
    )


def _linear(c_in: int, c_out: int) -> int:
    return c_in * c_out + c_out


def _block_parameters(config: WanConfig) -> int:
    wide = config.dim
    attention = 4 * _linear(wide, wide) + 2 * wide  # with the norms of queries and keys
    norm = 2 * wide if config.cross_attn_norm else 0
    feed_forward = _linear(wide, config.ffn_dim) + _linear(config.ffn_dim, wide)
    return 2 * attention + norm + feed_forward + 6 * wide


def pass_parameters(config: WanConfig) -> int:
    """The number of parameters that a pass reads.

    The others encode texts before the loop, once for all passes.
    """
    parts, wide = parameters(config), config.dim
    text = 2 * _linear(wide, wide) + wide  # of each block: keys, their norm, values
    blocks = config.num_layers + len(config.vace_layers)
    return parts.total - parts.text - blocks * text


def weight_bytes(workload: Workload, layout: Layout) -> int:
    """Bytes of the transformer's weights on a device."""
    total = parameters(workload.config).total * workload.weight_bytes
    return math.ceil(total / (layout.devices if layout.shard_weights else 1))


def keys_values_bytes(workload: Workload, layout: Layout) -> int:
    """Bytes of the source's keys and values on a device: its part of two `layers B L N K`."""
    config = workload.config
    numbers = config.num_layers * workload.batch * layout.local(workload.tokens) * config.dim
    return 2 * numbers * workload.dtype_bytes


def cache_bytes(workload: Workload, layout: Layout, lock: LockConfig) -> int:
    """Bytes of source keys and values that the loop holds on a device, of all blocks or one."""
    if not lock.enabled:
        return 0
    blocks = 1 if lock.cache == "carried" else workload.config.num_layers
    return keys_values_bytes(workload, layout) // blocks


@dataclasses.dataclass(frozen=True)
class Activations:
    """Bytes on a device beside weights and cache, by part.

    Attributes:
      latents: source, noise, edit, the solver's three, and 10 clean estimates, float32.
      text: keys and values of all cross-attentions, for the edit's rows and the source's, whole on
        each device, in the compute dtype.
      control: control tokens of a VACE edit and of its source, float32.
      positions: cosines and sines of all tokens, float32.
      stream: residual stream before and after a block, float32; of the edit's rows, and of the
        source's where they pass through the blocks together.
      carried: the same for the control tokens that the context blocks pass on.
      block: largest temporaries inside a block (`activations`).
      weights: weights of the running block, gathered from all devices if they are sharded.
    """

    latents: int
    text: int
    control: int
    positions: int
    stream: int
    carried: int
    block: int
    weights: int

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(dataclasses.astuple(self))


def activations(workload: Workload, layout: Layout, lock: LockConfig) -> Activations:
    """A device's memory in a step of the loop beside weights and cache, with all tokens computed.

    The guidance branches of `B` edits run as one pass of `R = 2 B` rows; without guidance `R = B`.
    The source's `B` rows run before them in each block, or, with a carried cache, in a pass of
    their own. With `n` tokens on each of `P` devices, `D` and `F` the widths and `a` bytes of the
    compute dtype, a block holds at most the largest of

    - `R n D (a + 3 * 4)`: input, and queries, keys and values before their cast;
    - `R n D (3 a + 4) + 2 a R P n D`: all three, the result, and the keys and values of all
      devices, if there are several;
    - `R n D (a + 4) + m F (4 + a)`: the feed-forward's input and output, and its hidden layer
      before and after the cast, of `m` tokens, at most `FEED_FORWARD_TOKENS`.

    It is an estimate: a compiler may hold less, by splitting work, or more, by prefetching
    weights. Attention's logits stay on the chip.
    """
    config, number, edits = workload.config, workload.dtype_bytes, workload.batch
    wide, rows, local = (
        config.dim,
        workload.branches * workload.batch,
        layout.local(workload.tokens),
    )
    tokens, contexts = rows * local, len(config.vace_layers)
    text = (config.num_layers + contexts) * (rows + edits) * workload.text_tokens * wide
    gathered = 2 * number * layout.devices * wide if layout.devices > 1 else 0
    cells = layout.local(workload.clip_tokens) * math.prod(config.patch_size)
    channels = 16 * config.in_channels + (2 * config.vace_in_channels if contexts else 0)
    stream = tokens + (edits * local if lock.enabled and lock.cache == "fused" else 0)
    hidden = min(tokens, FEED_FORWARD_TOKENS) * config.ffn_dim
    return Activations(
        latents=FLOAT32 * edits * cells * channels,
        text=2 * number * text,
        control=2 * FLOAT32 * edits * local * wide if contexts else 0,
        positions=FLOAT32 * local * config.attention_head_dim,
        stream=2 * FLOAT32 * stream * wide,
        carried=2 * FLOAT32 * stream * wide if contexts else 0,
        block=max(
            tokens * wide * (number + 3 * FLOAT32),
            tokens * (wide * (3 * number + FLOAT32) + gathered),
            tokens * wide * (number + FLOAT32) + hidden * (FLOAT32 + number),
        ),
        weights=math.ceil(workload.weight_bytes * _block_parameters(config))
        if layout.shard_weights
        else 0,
    )


# --- arithmetic -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Flops:
    """Operations of a pass by part.

    Attributes:
      projections: projections of both attentions, in the main blocks.
      self_attention: products of queries with keys, and of weights with values.
      cross_attention: the same with the text's keys and values.
      feed_forward: feed-forward layers of the main blocks.
      context: context blocks of VACE and their hints; 0 without VACE.
      embedding: latents to tokens, timestep to modulation.
      head: tokens to velocity.
    """

    projections: int
    self_attention: int
    cross_attention: int
    feed_forward: int
    context: int
    embedding: int
    head: int

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(dataclasses.astuple(self))


def pass_flops(
    workload: Workload, rows: int, layout: Layout | None = None, computed: float = 1.0
) -> Flops:
    """Operations of one pass over `rows` videos, on all devices together, padding included.

    The main blocks compute a share `computed` of the tokens; they attend to all keys.

    With `L` queries and keys, `S` text keys, width `D` and feed-forward width `F`, a block needs
    `6 L D^2` multiply-adds in projections (the text's keys and values are computed before the
    loop), `2 L^2 D` and `2 L S D` in attention, and `2 L D F` in the feed-forward.
    """
    layout = layout or Layout()
    config, wide = workload.config, workload.config.dim
    tokens = layout.devices * layout.local(workload.tokens)
    cells = math.prod(config.patch_size)
    projections = 12 * tokens * wide**2
    self_attention = 4 * tokens**2 * wide
    cross_attention = 4 * tokens * workload.text_tokens * wide
    feed_forward = 4 * tokens * wide * config.ffn_dim
    block = projections + self_attention + cross_attention + feed_forward
    layers, time = rows * config.num_layers, config.freq_dim * wide + 7 * wide**2
    channels, control = config.in_channels, 0
    if config.vace_layers:
        channels, control = channels + config.vace_in_channels, tokens * wide**2
    return Flops(
        projections=round(computed * layers * projections),
        self_attention=round(computed * layers * self_attention),
        cross_attention=round(computed * layers * cross_attention),
        feed_forward=round(computed * layers * feed_forward),
        context=rows * len(config.vace_layers) * (block + 2 * tokens * wide**2),
        embedding=rows * 2 * (tokens * cells * channels * wide + control + time),
        head=round(computed * rows * 2 * tokens * cells * config.out_channels * wide),
    )


def source_share(lock: LockConfig, steps: int) -> float:
    """The share of a run's steps with a source pass: those on which alpha can be over 0."""
    injected = min(lock.injected_steps, steps)
    window = min(lock.kappa, steps - injected)
    inside = lock.adapt_fusion_ratio or lock.fusion_ratio > 0
    before = lock.warmup_fusion_ratio > 0
    others = window * inside + (steps - injected - window) * before
    return lock.enabled * (injected + others) / steps
