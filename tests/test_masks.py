import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlock_jax.errors import ConfigError, InputError
from kvlock_jax.lock import dilate, to_latent_mask, to_token_mask


def random_mask(seed, shape, density=0.05):
    return np.random.default_rng(seed).random(shape) < density


def latent_by_hand(mask):
    """METHOD.md section 2 read aloud, one pixel at a time."""
    frames, height, width = mask.shape
    out = np.zeros((1 + -(-(frames - 1) // 4), -(-height // 8), -(-width // 8)), bool)
    for f, y, x in np.argwhere(mask):
        out[0 if f == 0 else 1 + (f - 1) // 4, y // 8, x // 8] = True
    return out


def tokens_by_hand(latent):
    rows, columns = -(-latent.shape[1] // 2), -(-latent.shape[2] // 2)
    out = [False] * (latent.shape[0] * rows * columns)
    for t, h, w in np.argwhere(latent):
        out[(t * rows + h // 2) * columns + w // 2] = True
    return np.array(out)


@pytest.mark.parametrize(
    "shape", [(1, 16, 16), (9, 96, 96), (17, 32, 48), (2, 17, 31), (6, 8, 40), (5, 1, 1)]
)
@pytest.mark.parametrize("density", [0.002, 0.05])
def test_pooling_is_the_loop(shape, density):
    mask = random_mask(sum(shape), shape, density)
    latent = to_latent_mask(jnp.asarray(mask))
    np.testing.assert_array_equal(latent, latent_by_hand(mask))
    np.testing.assert_array_equal(to_token_mask(latent), tokens_by_hand(np.asarray(latent)))


@pytest.mark.parametrize(
    ("frame", "latent_frame"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3), (80, 20)]
)
def test_one_pixel_lights_its_own_cell_and_token(frame, latent_frame):
    mask = np.zeros((81, 48, 80), bool)
    mask[frame, 23, 40] = True
    latent = to_latent_mask(jnp.asarray(mask))
    assert latent.shape == (21, 6, 10)
    np.testing.assert_array_equal(np.argwhere(latent), [[latent_frame, 2, 5]])
    # A 3x5 token grid: row 1, column 2.
    tokens = to_token_mask(latent)
    np.testing.assert_array_equal(np.flatnonzero(tokens), [latent_frame * 15 + 1 * 5 + 2])


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    frames=st.integers(1, 10),
    height=st.integers(1, 36),
    width=st.integers(1, 36),
    density=st.sampled_from([0.0, 0.003, 0.1, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_no_edited_pixel_is_under_a_background_token(frames, height, width, density, seed):
    mask = random_mask(seed, (frames, height, width), density)
    tokens = np.asarray(to_token_mask(to_latent_mask(jnp.asarray(mask))))
    rows, columns = -(-height // 16), -(-width // 16)
    grid = tokens.reshape(-1, rows, columns)
    # From tokens back to pixels, along a way that shares nothing with the pooling.
    times = np.repeat(np.arange(len(grid)), [1] + [4] * (len(grid) - 1))[:frames]
    cover = grid[times].repeat(16, axis=1).repeat(16, axis=2)[:, :height, :width]
    assert cover.shape == mask.shape
    assert not (mask & ~cover).any()
    # And no token is foreground without a reason.
    assert grid.sum() <= mask.sum()
    assert tokens.any() == mask.any()


def test_other_strides_and_patches():
    mask = np.zeros((4, 4, 6), bool)
    mask[3, 1, 4] = True
    latent = to_latent_mask(jnp.asarray(mask), strides=(2, 2, 3))
    np.testing.assert_array_equal(np.argwhere(latent), [[2, 0, 1]])
    tokens = to_token_mask(latent, patch=(3, 1, 1))
    np.testing.assert_array_equal(tokens, [False, True, False, False])


@pytest.mark.parametrize("radius", [0, 1, 3])
def test_dilation_is_the_loop(radius):
    mask = random_mask(7, (3, 11, 14), 0.02)
    expected = np.zeros_like(mask)
    for f, y, x in np.argwhere(mask):
        expected[f, max(y - radius, 0) : y + radius + 1, max(x - radius, 0) : x + radius + 1] = True
    np.testing.assert_array_equal(dilate(jnp.asarray(mask), radius), expected)


def test_dilation_grows_over_a_token_border():
    mask = np.zeros((1, 32, 32), bool)
    mask[0, 15, 15] = True
    assert to_token_mask(to_latent_mask(jnp.asarray(mask))).sum() == 1
    assert to_token_mask(to_latent_mask(dilate(jnp.asarray(mask), 1))).all()


def test_batched_jitted_and_mapped_masks_agree():
    masks = jnp.asarray(random_mask(3, (2, 3, 6, 20, 20)))

    def tokens(mask):
        return to_token_mask(to_latent_mask(dilate(mask, 1)))

    one_by_one = np.stack([[tokens(m) for m in row] for row in masks])
    np.testing.assert_array_equal(tokens(masks), one_by_one)
    np.testing.assert_array_equal(jax.jit(tokens)(masks), one_by_one)
    np.testing.assert_array_equal(jax.vmap(jax.vmap(tokens))(masks), one_by_one)


def test_numpy_masks_are_taken():
    mask = random_mask(1, (5, 16, 16))
    np.testing.assert_array_equal(to_latent_mask(dilate(mask, 0)), latent_by_hand(mask))


@pytest.mark.parametrize("pool", [to_latent_mask, to_token_mask, lambda mask: dilate(mask, 1)])
def test_a_grey_mask_is_refused(pool):
    with pytest.raises(InputError, match=r"boolean.*uint8"):
        pool(np.zeros((1, 16, 16), np.uint8))


def test_a_negative_radius_is_refused():
    with pytest.raises(ConfigError, match="found -1"):
        dilate(np.zeros((1, 16, 16), bool), -1)
