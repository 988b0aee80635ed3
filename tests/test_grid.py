"""Latents to patches and back, against loops over cells."""

import jax.numpy as jnp
import numpy as np
import pytest

from kvlock_jax.errors import InputError
from kvlock_jax.grid import Grid

SPACE, CHANNELS = (4, 4, 6), 3


def latents():
    return np.random.default_rng(0).normal(size=(2, *SPACE, CHANNELS)).astype(np.float32)


@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 1, 3), (1, 1, 1)])
@pytest.mark.parametrize("padding", [0, 5])
def test_tokens_are_frame_major_and_cells_row_by_row(patch, padding):
    z, (p, q, r) = latents(), patch
    grid = Grid(SPACE, Grid.of(SPACE, patch).tokens + padding, patch)
    got = np.asarray(grid.split(jnp.asarray(z)))
    token = 0
    for t in range(0, SPACE[0], p):
        for h in range(0, SPACE[1], q):
            for w in range(0, SPACE[2], r):
                cells = [
                    z[:, t + a, h + b, w + c] for a in range(p) for b in range(q) for c in range(r)
                ]
                np.testing.assert_array_equal(got[:, token], np.stack(cells, axis=1))
                token += 1
    assert token == grid.tokens == grid.length - padding
    assert got.shape == (2, grid.length, p * q * r, CHANNELS)
    assert not got[:, token:].any()
    np.testing.assert_array_equal(grid.join(jnp.asarray(got)), z)


def test_a_mask_has_no_channels():
    grid = Grid(SPACE, 26)
    mask = latents()[..., 0] > 0.3
    got = grid.split(jnp.asarray(mask))
    assert (got.shape, got.dtype) == ((2, 26, 4), bool)
    as_channel = grid.join(grid.split(jnp.asarray(mask, jnp.float32)[..., None]))
    np.testing.assert_array_equal(as_channel[..., 0] > 0, mask)
    assert not got[:, 24:].any()


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match=r"\(4, 4, 5\) cells do not divide into \(1, 2, 2\)"):
        Grid.of((4, 4, 5))
    with pytest.raises(InputError, match="23 tokens are too few"):
        Grid(SPACE, 23)
