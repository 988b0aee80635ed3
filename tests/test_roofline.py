"""The bound of a step, by counts of its own."""

import dataclasses

import pytest

from kvlock_jax import lock
from kvlock_jax.estimate import costs, roofline
from kvlock_jax.estimate.costs import Layout, Workload
from kvlock_jax.estimate.roofline import CHIPS, Chip, Roofline, Step
from kvlock_jax.models.wan.config import WanConfig

SMALL = WanConfig(12, 128, 30, 8960)
CONTEXT = dataclasses.replace(SMALL, vace_layers=tuple(range(0, 30, 2)))
ANCHOR, CFG = lock.preset("kvlock_anchor", 5.0), lock.preset("cfg", 5.0)
KVLOCK = lock.preset("kvlock", 5.0)
CARRIED = dataclasses.replace(ANCHOR, cache="carried")
STEPS = 50


def video(config: WanConfig = SMALL, **changes: int) -> Workload:
    return Workload(config, 81, 480, 832, **changes)


def step(workload: Workload, devices: int, settings, shard_weights: bool = False) -> Step:
    return roofline.step(
        workload, Layout.of(devices, shard_weights, workload.tokens), settings, STEPS
    )


def test_arithmetic_of_a_step():
    """Two branches, and the source in 20 of 50 steps: the paper's; in all of them: ours."""
    edit, one = costs.pass_flops(video(), 2).total, costs.pass_flops(video(), 1)
    source = one.total - one.head  # its velocity is not needed
    assert step(video(), 1, CFG).flops == edit
    assert step(video(branches=1), 1, CFG).flops == one.total
    assert step(video(), 1, KVLOCK).flops == pytest.approx(edit + 0.4 * source)
    assert step(video(), 1, ANCHOR).flops == edit + source
    padded = costs.pass_flops(video(), 3, Layout.of(8, False, 32_760))
    assert step(video(), 8, ANCHOR).flops == pytest.approx((padded.total - padded.head / 3) / 8)


@pytest.mark.parametrize("config, blocks", [(SMALL, 30), (CONTEXT, 45)])
def test_logits_fill_half_of_a_wide_matrix_unit(config, blocks):
    """Heads of 128 in units of 256: products of queries with keys take twice their time."""
    cost = step(video(config), 1, CFG)
    assert cost.logits == 2 * blocks * 2 * 32_760 * (32_760 + 512) * 1536
    narrow, wide = (
        roofline.roofline(cost, dataclasses.replace(CHIPS["v6e"], unit=unit)).compute
        for unit in (128, 256)
    )
    assert narrow == cost.flops / 918e12
    assert wide == pytest.approx((cost.flops + cost.logits) / 918e12)


@pytest.mark.parametrize(("config", "blocks"), [(SMALL, 30), (CONTEXT, 45)])
def test_keys_and_values_cross_the_interconnect(config, blocks):
    """Device by device: what one of 8 receives of the 7 others, for each block, row and tensor."""
    received = 0
    for _row in ("conditional", "unconditional", "source"):
        for _block in range(blocks):
            for _tensor in ("keys", "values"):
                received += 7 * 4096 * 12 * 128 * 2
    assert step(video(config), 8, ANCHOR).interconnect == received
    assert step(video(config), 1, ANCHOR).interconnect == 0
    assert step(video(config, batch=2), 8, ANCHOR).interconnect == 2 * received
    assert step(video(config, dtype_bytes=4), 8, ANCHOR).interconnect == 2 * received


@pytest.mark.parametrize(("settings", "passes"), [(CARRIED, 2), (ANCHOR, 1), (CFG, 1)])
def test_sharded_weights_are_gathered_in_each_pass(settings, passes):
    whole, sharded = (step(video(), 8, settings, shard) for shard in (False, True))
    gathered = passes * 2 * costs.pass_parameters(SMALL) * 7 / 8
    assert sharded.interconnect - whole.interconnect == pytest.approx(gathered)
    assert sharded.memory - whole.memory == pytest.approx(gathered)  # written down


def test_memory_traffic_of_a_block_by_hand():
    """One layer without a source branch, tensor by tensor as its kernels touch them."""
    config = WanConfig(2, 8, 1, 40, text_dim=32, freq_dim=16)
    workload = Workload(config, 5, 32, 48, text_tokens=3, dtype_bytes=2, weight_bytes=4)
    tokens, wide, rows = 2 * 2 * 3, 16, 2
    stream, narrow = 4 * tokens * wide, 2 * tokens * wide
    touched = [
        *[stream] * 3,  # read before self-attention, read and written after it
        *[narrow] * 3,  # queries, keys, values written
        *[narrow] * 3,  # and read
        *[narrow] * 2,  # result written, and read by its projection
        *[stream] * 3,  # cross-attention alike
        *[narrow] * 2,  # its queries written and read
        *[2 * 3 * wide] * 2,  # keys and values of the text read
        *[narrow] * 2,  # its result
        *[stream] * 3,  # feed-forward
        *[2 * tokens * 40] * 2,  # its hidden layer written and read
    ]
    expected = rows * sum(touched) + 4 * costs.pass_parameters(config)
    assert step(workload, 1, CFG).memory == expected
    cache = 2 * 2 * tokens * wide
    assert costs.keys_values_bytes(workload, Layout()) == cache
    # The source is a third row; its keys and values are written, and read by the edit. A pass of
    # its own reads the weights again.
    locked = expected + sum(touched) + 2 * cache
    assert step(workload, 1, ANCHOR).memory == locked
    assert step(workload, 1, CARRIED).memory == locked + 4 * costs.pass_parameters(config)


def test_gathered_keys_and_values_are_written_and_read():
    workload = video(text_tokens=1)
    one, eight = (roofline.step(workload, Layout(n), CFG, STEPS) for n in (1, 8))
    weights = 2 * costs.pass_parameters(SMALL)
    whole = 2 * 30 * 2 * 32_760 * 1536 * 2  # of both rows, K and V of all tokens, all blocks
    text = 2 * 30 * 2 * 1 * 1536 * 2
    # Per device: an eighth of what depends on its tokens; the whole of keys and values, read, and
    # seven eighths of them written.
    own = (one.memory - weights - whole - text) / 8
    assert eight.memory == pytest.approx(weights + text + own + whole + whole * 7 / 8)


@pytest.mark.parametrize(
    ("cost", "binds", "seconds"),
    [
        (Step(8.0, 4.0, 8, 6.0, 3.0), "compute", 4.0),
        (Step(4.0, 2.0, 4, 15.0, 3.0), "memory", 5.0),
        (Step(4.0, 2.0, 4, 6.0, 30.0), "interconnect", 6.0),
        (Step(4.0, 2.0, 2, 6.0, 3.0), "compute", 3.0),
        (Step(4.0, 2.0, 5, 6.0, 3.0), "compute", 2.6),
    ],
)
def test_the_longest_binds(cost, binds, seconds):
    bound = roofline.roofline(cost, Chip(2.0, unit=4, memory=1, bandwidth=3.0, interconnect=5.0))
    assert (bound.binds, bound.seconds) == (binds, seconds)


def test_a_step_on_paper():
    """1.3B at 81 frames of 480x832 on an H100: 2 x 283 Tflop at 989 Tflop/s."""
    bound = roofline.roofline(step(video(), 1, CFG), CHIPS["h100"])
    assert bound == Roofline(pytest.approx(2 * 282.8e12 / 989e12, rel=1e-3), bound.memory, 0.0)
    assert bound.binds == "compute"


@pytest.mark.parametrize("name", CHIPS)
def test_interconnect_binds_from_some_number_on(name):
    def bound(devices: int) -> Roofline:
        cost = roofline.step(video(), Layout(devices), KVLOCK, STEPS)
        return roofline.roofline(cost, CHIPS[name])

    devices = roofline.interconnect_binds_from(video(), KVLOCK, STEPS, CHIPS[name])
    assert all(bound(n).binds == "compute" for n in range(1, devices))
    assert bound(devices).binds == bound(2 * devices).binds == "interconnect"
    # By hand: compute C / n meets G (n - 1) / n at n = 1 + C / G.
    whole = bound(1).compute
    received = 2 * 2.4 * 30 * 32_760 * 1536 * 2 / CHIPS[name].interconnect
    assert devices == pytest.approx(1 + whole / received, abs=1.0)


def test_interconnect_may_never_bind():
    few = Workload(SMALL, 1, 16, 16)  # one token: reading the weights is all there is
    assert roofline.interconnect_binds_from(few, CFG, STEPS, CHIPS["v5e"], most=64) is None
    assert (
        roofline.interconnect_binds_from(few, CFG, STEPS, CHIPS["v5e"], shard_weights=True, most=64)
        == 2
    )
