import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvlock_jax.lock import KVCache, Lock, fuse

B, L, N, K = 2, 5, 3, 4


def case(branches=2, seed=0):
    rng = np.random.default_rng(seed)
    new = rng.standard_normal((branches * B, L, N, K)).astype(np.float32)
    cached = rng.standard_normal((B, L, N, K)).astype(np.float32)
    foreground = np.array([[1, 0, 0, 1, 0], [0, 0, 1, 0, 0]], bool)
    return new, cached, foreground


def bits(x):
    x = np.asarray(x)
    return x.view(f"uint{8 * x.dtype.itemsize}")


def assert_same_bits(x, y):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(bits(x), bits(y))


@pytest.mark.parametrize("branches", [1, 2, 3])
def test_fusion_is_the_loop(branches):
    new, cached, foreground = case(branches)
    ratio = np.array([0.25, 0.9])
    expected = new.astype(np.float64)
    for row in range(branches * B):
        edit = row // branches
        for token in range(L):
            if not foreground[edit, token]:
                kept = (1 - ratio[edit]) * expected[row, token]
                expected[row, token] = kept + ratio[edit] * cached[edit, token]
    mix = fuse(new, cached, jnp.asarray(foreground), jnp.asarray(ratio, jnp.float32))
    np.testing.assert_allclose(mix, expected, atol=2e-7)


@pytest.mark.parametrize("beta", [0.1, 0.75])
def test_a_ratio_of_the_foreground_is_the_loop(beta):
    new, cached, foreground = case()
    ratio = np.array([1.0, 0.3])
    expected = new.astype(np.float64)
    for row, token in np.ndindex(2 * B, L):
        share = beta if foreground[row // 2, token] else ratio[row // 2]
        kept = (1 - share) * expected[row, token]
        expected[row, token] = kept + share * cached[row // 2, token]
    alpha = jnp.asarray(ratio, jnp.float32)
    held = Lock(
        KVCache(cached, cached), jnp.asarray(foreground), alpha, foreground_ratio=jnp.float32(beta)
    )
    np.testing.assert_allclose(held.lead(new, cached), expected, atol=2e-7)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_ratio_of_the_foreground_is_exact_at_both_ends(dtype):
    new, cached, foreground = case()
    new[:, :, 0], cached[:, :, 0] = [-0.0, 1e8, np.inf, 3.0], [0.0, 1.0, 2.0, -np.inf]
    new, cached = jnp.asarray(new).astype(dtype), jnp.asarray(cached).astype(dtype)
    alpha, mask = jnp.full(B, 0.5), jnp.asarray(foreground)
    without = fuse(new, cached, mask, alpha)
    traced = jax.jit(fuse)(new, cached, mask, alpha, jnp.float32(0))
    assert_same_bits(traced, without)
    whole = jax.jit(fuse)(new, cached, jnp.ones((B, L), bool), alpha, jnp.float32(1))
    assert_same_bits(whole, jnp.repeat(cached, 2, axis=0))


def test_a_case_worked_by_hand():
    new = jnp.asarray([8.0, 8.0, 2.0, 2.0]).reshape(2, 2, 1, 1)
    cached = jnp.asarray([4.0, 4.0]).reshape(1, 2, 1, 1)
    mix = fuse(new, cached, jnp.asarray([[False, True]]), jnp.asarray([0.5]))
    np.testing.assert_array_equal(mix.ravel(), [6, 8, 3, 2])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("jit", [False, True])
def test_both_ends_are_exact_to_the_bit(dtype, jit):
    new, cached, foreground = case(3)
    # Where arithmetic gives way: signed zeros, infinities, values that swallow each other.
    new[:, 1, 0] = [-0.0, 0.0, np.inf, 1e30]
    cached[:, 1, 0] = [1.0, -0.0, 2.0, 1e-30]
    new[:, 2, 1] = [1e8, -0.0, 1e-30, 3.0]
    cached[:, 2, 1] = [1.0, 0.0, np.inf, -np.inf]
    new, cached = jnp.asarray(new).astype(dtype), jnp.asarray(cached).astype(dtype)
    mix = jax.jit(fuse) if jit else fuse
    foreground = jnp.asarray(foreground)
    assert_same_bits(mix(new, cached, foreground, jnp.zeros(B)), new)
    assert_same_bits(mix(new, cached, jnp.ones((B, L), bool), jnp.ones(B)), new)

    locked = np.asarray(mix(new, cached, foreground, jnp.ones(B)))
    for row in range(len(new)):
        for token in range(L):
            edit = row // 3
            kept = foreground[edit, token]
            source = new[row, token] if kept else cached[edit, token]
            assert_same_bits(locked[row, token], source)


def test_a_batch_may_hold_both_ends():
    new, cached, _ = case()
    mix = fuse(new, cached, jnp.zeros((B, L), bool), jnp.asarray([0.0, 1.0]))
    assert_same_bits(mix[:2], new[:2])
    for row in mix[2:]:
        assert_same_bits(row, cached[1])


def test_bfloat16_is_mixed_in_float32():
    # 10 + 0.7 (-7 - 10) = -1.9 is -243.2 / 128, nearest -243 / 128; rounding every step to bfloat16
    # gives -240 / 128.
    new = jnp.full((1, 1, 1, 1), 10, jnp.bfloat16)
    cached = jnp.full((1, 1, 1, 1), -7, jnp.bfloat16)
    mix = fuse(new, cached, jnp.zeros((1, 1), bool), jnp.asarray([0.7]))
    assert mix.dtype == jnp.bfloat16
    assert mix.item() == -243 / 128


def test_cache_and_new_may_differ_in_dtype():
    new, cached, foreground = case()
    mix = fuse(new, jnp.asarray(cached, jnp.bfloat16), jnp.asarray(foreground), jnp.ones(B))
    assert mix.dtype == jnp.float32
    np.testing.assert_array_equal(mix[0, 1], np.asarray(jnp.asarray(cached, jnp.bfloat16)[0, 1]))


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_gradients_are_those_of_the_line_even_at_its_ends(alpha):
    new, cached, foreground = case()
    weights = np.random.default_rng(9).standard_normal(new.shape).astype(np.float32)

    def loss(new, cached, ratio):
        return (weights * fuse(new, cached, jnp.asarray(foreground), ratio)).sum()

    ratio = jnp.full(B, alpha)
    d_new, d_cached, d_ratio = jax.grad(loss, argnums=(0, 1, 2))(new, cached, ratio)
    background = ~foreground[:, :, None, None]
    share = alpha * background
    np.testing.assert_allclose(d_new, weights * (1 - np.repeat(share, 2, axis=0)), rtol=1e-6)
    by_branch = weights.reshape(B, 2, L, N, K)
    np.testing.assert_allclose(d_cached, share * by_branch.sum(1), rtol=1e-5, atol=1e-6)
    pull = (background * cached)[:, None] - background[:, None] * new.reshape(B, 2, L, N, K)
    np.testing.assert_allclose(d_ratio, (by_branch * pull).sum((1, 2, 3, 4)), rtol=1e-5)


def test_edits_of_one_source_share_its_cache():
    new, cached, _ = case(3)  # 1 source, 3 edits of it, 2 branches of each
    foreground = np.random.default_rng(2).random((3, L)) > 0.5
    ratio = np.array([0.1, 0.5, 0.9], np.float32)
    together = fuse(new, cached[:1], jnp.asarray(foreground), jnp.asarray(ratio))
    for edit in range(3):
        rows = slice(2 * edit, 2 * edit + 2)
        alone = fuse(new[rows], cached[:1], foreground[edit][None], ratio[edit : edit + 1])
        np.testing.assert_array_equal(together[rows], alone)


def test_fusion_maps_over_layers():
    layers = [case(seed=s) for s in range(3)]
    new, cached = (jnp.stack([layer[i] for layer in layers]) for i in (0, 1))
    foreground, ratio = jnp.asarray(layers[0][2]), jnp.asarray([0.2, 0.6])
    mapped = jax.vmap(fuse, in_axes=(0, 0, None, None))(new, cached, foreground, ratio)
    for i in range(3):
        np.testing.assert_array_equal(mapped[i], fuse(new[i], cached[i], foreground, ratio))


def test_a_lock_is_scanned_layer_by_layer():
    shape = (3, B, L, N, K)
    keys = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
    lock = Lock(KVCache(k=keys, v=-keys), jnp.zeros((B, L), bool), jnp.ones(B))

    @jax.jit
    def run(lock, x):
        def layer(x, cache):
            k = fuse(x, cache.k, lock.foreground, lock.fusion_ratio)
            v = fuse(x, cache.v, lock.foreground, lock.fusion_ratio)
            return x, KVCache(k, v)

        return jax.lax.scan(layer, x, lock.cache)[1]

    seen = run(lock, jnp.zeros((B, L, N, K)))
    np.testing.assert_array_equal(seen.k, keys)
    np.testing.assert_array_equal(seen.v, -keys)


def test_abstract_and_zeros_describe_the_same_cache():
    shape = (3, B, L, N, K)
    abstract, zeros = KVCache.abstract(shape, jnp.bfloat16), KVCache.zeros(shape, jnp.bfloat16)
    assert jax.eval_shape(lambda: zeros) == abstract
    assert abstract.nbytes == zeros.nbytes == 2 * 3 * B * L * N * K * 2
    assert zeros.k.unsafe_buffer_pointer() != zeros.v.unsafe_buffer_pointer()


@pytest.mark.parametrize(("layers", "heads", "gib"), [(30, 12, 5.6), (40, 40, 25.0)])
def test_published_sizes(layers, heads, gib):
    cache = KVCache.abstract((layers, 1, 21 * 30 * 52, heads, 128), jnp.bfloat16)
    assert cache.nbytes / 2**30 == pytest.approx(gib, abs=0.05)


def test_rows_that_are_no_multiple_of_the_edits_are_refused():
    new, cached, foreground = case()
    with pytest.raises(TypeError, match="reshape"):
        fuse(jnp.asarray(new[:3]), cached, jnp.asarray(foreground), jnp.ones(B))
