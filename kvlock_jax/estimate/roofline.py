"""A lower bound of a step's seconds: its costs over a chip's published peaks."""

import dataclasses
import math

from kvlock_jax.estimate import costs
from kvlock_jax.estimate.costs import Layout, Workload
from kvlock_jax.settings.schema import LockConfig


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published peaks of one chip.

    Attributes:
      flops: operations per second on dense bfloat16 matrices.
      unit: numbers that a matrix unit sums over at once; a shorter sum leaves the rest idle.
      memory: bytes of memory.
      bandwidth: bytes per second to and from memory.
      interconnect: bytes per second that all links to other chips receive; half of the published
        figures, which add both directions.
    """

    flops: float
    unit: int
    memory: int
    bandwidth: float
    interconnect: float


CHIPS = {
    # docs.cloud.google.com/tpu/docs/system-architecture-tpu-vm: matrix units of 128 x 128, and of
    # 256 x 256 from v6e on. NVIDIA's PTX manual: mma and wgmma of bfloat16 sum over 16 numbers.
    # docs.cloud.google.com/tpu/docs/v5e: 197 TFLOPs, 16 GB at 819 GBps, ICI 400 GBps bidirectional.
    "v5e": Chip(197e12, 128, 16 * 10**9, 819e9, 200e9),
    # docs.cloud.google.com/tpu/docs/v6e: 918 TFLOPs, 32 GB at 1638 GBps, ICI 800 GBps.
    "v6e": Chip(918e12, 256, 32 * 10**9, 1638e9, 400e9),
    # docs.cloud.google.com/tpu/docs/v5p: 459 TFLOPs, 95 GiB at 2765 GBps, ICI 1200 GBps.
    "v5p": Chip(459e12, 128, 95 * 2**30, 2765e9, 600e9),
    # NVIDIA H100 data sheet, SXM: 1979 TFLOPS with sparsity, half of it dense; 80 GB at 3.35 TB/s,
    # NVLink 900 GB/s.
    "h100": Chip(989e12, 16, 80 * 10**9, 3350e9, 450e9),
    # NVIDIA A100 data sheet, 80GB SXM: 312 TFLOPS, 80 GB at 2039 GB/s, NVLink 600 GB/s.
    "a100": Chip(312e12, 16, 80 * 10**9, 2039e9, 300e9),
}
"""Chips by name; each with the public source of its peaks."""


@dataclasses.dataclass(frozen=True)
class Step:
    """A device's work in a step of the loop, averaged over a run.

    Attributes:
      flops: operations.
      logits: those among them of products of queries with keys, which sum over a head's numbers.
      head: numbers of a head.
      memory: bytes to and from memory.
      interconnect: bytes from other devices.
    """

    flops: float
    logits: float
    head: int
    memory: float
    interconnect: float


def step(workload: Workload, layout: Layout, lock: LockConfig, steps: int) -> Step:
    """Each device's work in a step of a run, every pass of which computes all tokens.

    Memory: each pass reads its weights once, and a pass over source and edits reads them for both.
    Matrix products and attention are kernels that read their inputs and write their outputs once,
    with all other work fused into them. The source's pass writes its keys and values, and the
    edit's pass reads them. Bytes from other devices are written once.

    Interconnect: the other devices' keys and values, for each block and row, and the other devices'
    part of sharded weights, for each pass.
    """
    read = costs.source_share(lock, steps)
    carried = lock.cache == "carried"
    return step_cost(workload, layout, read / lock.cache_every, read, passes_of_its_own=carried)


def step_cost(
    workload: Workload,
    layout: Layout,
    sources: float,
    reads: float,
    *,
    computed: float = 1.0,
    passes_of_its_own: bool = False,
) -> Step:
    """Each device's work in a step that runs a share of a source pass.

    Args:
      workload: edits and model.
      layout: layout over devices.
      sources: source passes in the step, 0 to 1.
      reads: passes that read the source's keys and values, 0 to 1.
      computed: share of the tokens that the main blocks of the edit's pass compute.
      passes_of_its_own: whether the source's pass reads the weights for itself.
    """
    edit_rows, source_rows = workload.branches * workload.batch, sources * workload.batch
    edits = costs.pass_flops(workload, edit_rows, layout, computed)
    source = costs.pass_flops(workload, workload.batch, layout)
    flops = edits.total + sources * (source.total - source.head)
    # Half of attention; context blocks have a share of their own.
    logits = (edits.self_attention + edits.cross_attention) / 2
    logits += sources * (source.self_attention + source.cross_attention) / 2
    contexts = len(workload.config.vace_layers) / workload.config.num_layers
    of_block = (source.self_attention + source.cross_attention) / 2 / workload.batch
    logits += contexts * of_block * (edit_rows + source_rows)

    cache = costs.keys_values_bytes(workload, layout) * (reads + sources)
    passes = 1 + sources * passes_of_its_own
    weights = costs.pass_parameters(workload.config) * workload.weight_bytes * passes
    gathered = (edit_rows + source_rows) * _gathered(workload, layout)
    if layout.shard_weights:
        gathered += weights * (1 - 1 / layout.devices)
    traffic = (computed * edit_rows + source_rows) * _traffic(workload, layout)
    return Step(
        flops / layout.devices,
        logits / layout.devices,
        workload.config.attention_head_dim,
        weights + gathered + traffic + cache,
        gathered,
    )


def _gathered(workload: Workload, layout: Layout) -> int:
    """Bytes of keys and values that a device receives, in a pass over one row."""
    config = workload.config
    others = (layout.devices - 1) * layout.local(workload.tokens)
    blocks = config.num_layers + len(config.vace_layers)
    return 2 * blocks * others * config.dim * workload.dtype_bytes


def _traffic(workload: Workload, layout: Layout) -> int:
    """Bytes that a device reads and writes of tokens, in a pass over one row."""
    config, number = workload.config, workload.dtype_bytes
    local = layout.local(workload.tokens)
    keys = layout.devices * local
    # Each of a block's three parts reads the residual stream, and later reads it and writes it.
    stream = 9 * costs.FLOAT32 * local * config.dim
    # Queries and results of both attentions are written and read, the keys and values written.
    attention = (8 + 2) * number * local * config.dim
    read = 2 * number * (keys + workload.text_tokens) * config.dim
    hidden = 2 * number * local * config.ffn_dim
    blocks = config.num_layers + len(config.vace_layers)
    return blocks * (stream + attention + read + hidden)


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The seconds that a step needs at a chip's published peaks.

    Attributes:
      compute: seconds of arithmetic.
      memory: seconds of traffic to the chip's memory.
      interconnect: seconds of traffic from other chips.
    """

    compute: float
    memory: float
    interconnect: float

    @property
    def seconds(self) -> float:
        """The lower bound: all three at once, each at its peak."""
        return max(dataclasses.astuple(self))

    @property
    def binds(self) -> str:
        """Which of the three takes longest."""
        return max(dataclasses.asdict(self).items(), key=lambda item: item[1])[0]


def roofline(cost: Step, peaks: Chip) -> Roofline:
    """The bound of a step on a chip.

    A product of queries with keys sums over one head, and takes a matrix unit for as long as if the
    head filled it.
    """
    idle = math.ceil(cost.head / peaks.unit) * peaks.unit / cost.head - 1
    return Roofline(
        (cost.flops + idle * cost.logits) / peaks.flops,
        cost.memory / peaks.bandwidth,
        cost.interconnect / peaks.interconnect,
    )


def interconnect_binds_from(
    workload: Workload,
    lock: LockConfig,
    steps: int,
    peaks: Chip,
    *,
    shard_weights: bool = False,
    most: int = 1024,
) -> int | None:
    """The smallest number of chips, from 2, that the interconnect bounds; None up to `most`.

    More chips divide the arithmetic, while the keys and values that each receives tend to those of
    the whole video. The figure is the model's, not that of an actual run: tokens divide
    with the least padding (blocks of `TOKEN_BLOCK` would make compute bind again at some higher
    numbers), and weights are sharded, or not, at all numbers alike.
    """
    for devices in range(2, most + 1):
        cost = step(workload, Layout(devices, shard_weights), lock, steps)
        if roofline(cost, peaks).binds == "interconnect":
            return devices
    return None
