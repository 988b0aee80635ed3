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


def per_device(contents: Contents, workload: Workload, layout: Layout, lock: LockConfig) -> Memory:
    """An edit's memory on each of the devices that share it.

    Args:
      contents: contents of the checkpoint, as its weights are stored.
      workload: the edit and its transformer.
      layout: devices, and whether they share the transformer's weights.
      lock: settings of the lock.
    """
    configs, sizes = contents.configs, {name: m.size for name, m in contents.models.items()}
    ways = layout.devices if layout.shard_weights else 1
    names = configs.transformers
    parts = costs.parameters(configs.transformer)
    share = (parts.blocks + parts.vace) / parts.total
    blocks = math.ceil(share * sizes[names[0]] / ways)
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
