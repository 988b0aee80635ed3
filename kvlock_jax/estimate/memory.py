"""The memory that an edit takes on each device, by how its networks come and go.

A network's weights may leave the devices when its stage has ended, so that the peak is the largest
stage; or all stay, and the peak is their sum; or the blocks' weights stay in the host's memory and
two blocks' are on the devices at a time. Nothing is counted of the text encoder's and the VAE's
activations.
"""

import dataclasses
import math

from kvlock_jax.checkpoints.format import Contents
from kvlock_jax.estimate import costs
from kvlock_jax.estimate.costs import Layout, Workload
from kvlock_jax.pipeline.placement import Placement
from kvlock_jax.pipeline.settings import Settings
from kvlock_jax.sampling import windows
from kvlock_jax.settings.schema import LockConfig


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on a device, by part.

    Attributes:
      text_encoder: weights of the text encoder.
      vae: weights of the VAE.
      transformers: weights of each transformer.
      block: weights of one of its blocks.
      blocks: weights of all of its blocks.
      cache: the source's keys and values.
      activations: of the sampling loop beside weights and cache.
    """

    text_encoder: int
    vae: int
    transformers: tuple[int, ...]
    block: int
    blocks: int
    cache: int
    activations: int

    @property
    def kept(self) -> int:
        """The peak where all networks stay."""
        return self.text_encoder + self.vae + sum(self.transformers) + self._loop

    @property
    def leaving(self) -> int:
        """The peak where each network leaves when its stage has ended, one expert at a time."""
        return max(self.text_encoder, self.vae, max(self.transformers) + self._loop)

    @property
    def on_host(self) -> int:
        """The same where the blocks' weights come from the host's memory, two blocks at a time."""
        rest = max(self.transformers) - self.blocks
        return max(self.text_encoder, self.vae, rest + 2 * self.block + self._loop)

    @property
    def _loop(self) -> int:
        return self.cache + self.activations


def workload(
    contents: Contents,
    settings: Settings,
    shape: tuple[int, int, int],
    *,
    references: int = 0,
    dtype_bytes: int = 2,
) -> Workload:
    """The workload of one edit by a checkpoint; of a window of it, where its steps run over them.

    Args:
      contents: contents of the checkpoint.
      settings: settings of the edit.
      shape: frames, height and width of the padded video.
      references: number of reference pictures.
      dtype_bytes: bytes of a number in matrix products and in the cache.
    """
    stored, configs = contents.models["transformer"], contents.configs
    (frames, *sides), time, clip, count = shape, configs.vae.strides[0], 0, 1
    whole = (frames - 1) // time + 1
    if (found := windows.asked(settings.sample, whole, time)) is not None:
        count, clip = windows.number(whole, *found), frames
        frames = min(frames, (found[0] - 1) * time + 1)
    return Workload(
        configs.transformer,
        frames,
        *sides,
        batch=settings.lock.pool_seeds,
        references=references,
        dtype_bytes=dtype_bytes,
        weight_bytes=stored.size / stored.parameters,
        branches=settings.sample.branches,
        strides=configs.vae.strides,
        clip_frames=clip,
        windows=count,
    )


def per_device(
    contents: Contents,
    workload: Workload,
    layout: Layout,
    lock: LockConfig,
    *,
    in_8_bits: bool = False,
) -> Memory:
    """An edit's memory on each of the devices that share it.

    Args:
      contents: contents of the checkpoint, as its weights are stored.
      workload: the edit and its transformer.
      layout: devices, and whether they share the transformer's weights.
      lock: settings of the lock.
      in_8_bits: whether the kernels of the transformers' blocks are kept in 8 bits.
    """
    configs, sizes = contents.configs, {name: m.size for name, m in contents.models.items()}
    ways = layout.devices if layout.shard_weights else 1
    names = configs.transformers
    parts = costs.parameters(configs.transformer)
    number = parts.blocks + parts.vace
    for name in names if in_8_bits else ():
        sizes[name] -= math.ceil(sizes[name] * number / parts.total) - number
    blocks = math.ceil(sizes[names[0]] * number / parts.total / ways)
    if in_8_bits:
        blocks = -(-number // ways)
    count = configs.transformer.num_layers + len(configs.transformer.vace_layers)
    return Memory(
        text_encoder=-(-sizes["text_encoder"] // layout.devices),
        vae=sizes["vae"],
        transformers=tuple(-(-sizes[name] // ways) for name in names),
        block=math.ceil(blocks / count),
        blocks=blocks,
        cache=costs.cache_bytes(workload, layout, lock),
        activations=costs.activations(workload, layout, lock).total,
    )


def fitted(
    placed: Placement, need: Memory, limit: int, *, keep_in_memory: bool = False
) -> tuple[Placement, str]:
    """The placement of one edit that a device's memory asks for, and a line if it is another.

    The blocks' kernels go to the host's memory where the largest stage would not fit otherwise.

    Args:
      placed: placement that the user asks for.
      need: memory that the edit takes.
      limit: bytes of a device's memory.
      keep_in_memory: whether all networks stay, which is then kept to.
    """
    gigabytes = f"{limit / 1e9:.1f} GB of a device"
    near, far = f"{need.leaving / 1e9:.1f} GB", f"{need.on_host / 1e9:.1f} GB"
    if placed.weights_on == "host" or keep_in_memory or need.leaving <= limit:
        peak = need.kept if keep_in_memory else need.leaving
        peak = need.on_host if placed.weights_on == "host" else peak
        over = f"about {peak / 1e9:.1f} GB are needed, over the {gigabytes}: it may not fit"
        return placed, over if peak > limit else ""
    if need.on_host <= limit:
        line = f"about {near} are over the {gigabytes}: blocks stay in the host's memory, {far}"
        return dataclasses.replace(placed, weights_on="host"), line
    line = f"about {near} are needed, {far} with blocks in the host's memory, over the {gigabytes}"
    return placed, f"{line}: it may not fit; try --weights int8, a smaller --size or more devices"
