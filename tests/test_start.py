import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvlock_jax.lock import shift_start

SHAPE = (2, 3, 4, 5, 3)


def case(seed=0):
    rng = np.random.default_rng(seed)
    start, fresh = rng.normal(0.5, 2.0, SHAPE), rng.normal(size=SHAPE)
    region = rng.random(SHAPE[:-1]) < 0.4
    return start.astype(np.float32), fresh.astype(np.float32), region


def by_hand(start, fresh, region, ratio):
    """ProEdit's Latents-Shift, channel by channel of each edit, in float64."""
    out = start.astype(np.float64)
    for edit in range(SHAPE[0]):
        inside = region[edit]
        for channel in range(SHAPE[-1]):
            z = start[edit, ..., channel][inside].astype(np.float64)
            n = fresh[edit, ..., channel][inside].astype(np.float64)
            unit = (z - z.mean()) / np.sqrt(z.var() + 1e-5)
            target = unit * np.sqrt(n.var() + 1e-5) + n.mean()
            out[edit, ..., channel][inside] = ratio * target + (1 - ratio) * z
    return out


@pytest.mark.parametrize("ratio", [0.25, 1.0])
def test_the_shift_is_the_loop_over_channels(ratio):
    start, fresh, region = case()
    shifted = jax.jit(shift_start)(start, fresh, region, jnp.float32(ratio))
    assert shifted.dtype == jnp.float32
    np.testing.assert_allclose(shifted, by_hand(start, fresh, region, ratio), atol=2e-6)


def test_nothing_moves_outside_the_region_or_without_a_ratio():
    start, fresh, region = case()
    shifted = np.asarray(shift_start(start, fresh, region, 0.25))
    np.testing.assert_array_equal(shifted[~region], start[~region])
    assert (shifted[region] != start[region]).all()
    np.testing.assert_array_equal(shift_start(start, fresh, region, 0.0), start)


def test_an_empty_region_and_wild_values_outside_are_harmless():
    start, fresh, region = case()
    region[0] = False
    start[1][~region[1]] = np.nan
    shifted = shift_start(start, fresh, region, 0.25)
    np.testing.assert_array_equal(shifted[0], start[0])
    assert np.isfinite(np.asarray(shifted[1])[region[1]]).all()


def test_the_order_of_cells_does_not_matter():
    start, fresh, region = case()
    rows = (x.reshape(SHAPE[0], 12, 5, -1) for x in (start, fresh))
    patches = shift_start(*rows, region.reshape(SHAPE[0], 12, 5), 0.25)
    whole = shift_start(start, fresh, region, 0.25)
    np.testing.assert_allclose(patches.reshape(SHAPE), whole, atol=1e-6)
