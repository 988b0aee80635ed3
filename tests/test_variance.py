import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvlock_jax.lock import X0Window, hallucination, pooled, push, ready

SHAPE = (2, 2, 3, 4, 2)


def estimates(count, seed=0, shape=SHAPE):
    return np.random.default_rng(seed).standard_normal((count, *shape)).astype(np.float32)


def fill(window, x0s):
    for x0 in x0s:
        window = push(window, jnp.asarray(x0))
    return window


def region(seed=1):
    chosen = np.random.default_rng(seed).random(SHAPE[:-1]) < 0.4
    assert chosen.any(axis=(1, 2, 3)).all()
    return chosen


def by_hand(x0s, chosen):
    """The statistic in Python's own arithmetic, element by element."""
    out = []
    for edit in range(chosen.shape[0]):
        variances = [
            statistics.variance([float(x0[edit, t, h, w, c]) for x0 in x0s])
            for t, h, w in np.argwhere(chosen[edit])
            for c in range(x0s[0].shape[-1])
        ]
        out.append(statistics.fmean(variances))
    return out


@pytest.mark.parametrize("count", [2, 3, 5, 6, 13])
def test_statistic_is_the_loop_over_the_last_estimates(count):
    x0s, chosen = estimates(count), region()
    window = fill(X0Window.zeros(5, SHAPE), x0s)
    sigma2 = hallucination(window, jnp.asarray(chosen))
    assert sigma2.dtype == jnp.float32
    np.testing.assert_allclose(sigma2, by_hand(x0s[-5:], chosen), rtol=1e-5)
    everything = np.ones_like(chosen)
    np.testing.assert_allclose(
        hallucination(window, jnp.asarray(everything)), by_hand(x0s[-5:], everything), rtol=1e-5
    )


def test_a_case_worked_by_hand():
    # One element sees 1, 2, 3 (variance 1), its neighbour 0, 0, 6 (variance 12).
    x0s = np.array([[1, 0], [2, 0], [3, 6]], np.float32).reshape(3, 1, 1, 1, 2, 1)
    window = fill(X0Window.zeros(10, (1, 1, 1, 2, 1)), x0s)
    for chosen, expected in ([1, 0], 1.0), ([0, 1], 12.0), ([1, 1], 6.5):
        mask = jnp.asarray(chosen, bool).reshape(1, 1, 1, 2)
        np.testing.assert_allclose(hallucination(window, mask), [expected], rtol=1e-6)


def test_the_ring_overwrites_the_oldest():
    window = X0Window.zeros(3, (1, 1, 1, 1, 1))
    for i in range(7):
        window = push(window, jnp.full((1, 1, 1, 1, 1), float(i)))
    assert window.count == 7
    assert sorted(window.estimates.ravel().tolist()) == [4, 5, 6]


def test_push_leaves_its_window_alone():
    before = X0Window.zeros(2, SHAPE)
    push(before, jnp.ones(SHAPE))
    assert before.count == 0
    assert not before.estimates.any()


@pytest.mark.parametrize("count", [0, 1])
def test_no_statistic_before_the_second_estimate(count):
    window = fill(X0Window.zeros(4, SHAPE), estimates(count))
    assert not ready(window)
    np.testing.assert_array_equal(hallucination(window, jnp.asarray(region())), [0, 0])
    assert ready(push(push(window, jnp.zeros(SHAPE)), jnp.zeros(SHAPE)))


def test_a_window_of_one_is_never_mistaken_for_agreement():
    one = X0Window.zeros(4, SHAPE)
    assert ready(fill(one, estimates(2))) and not ready(fill(one, estimates(1)))


def test_an_empty_region_gives_zero_and_spares_the_others():
    x0s, chosen = estimates(4), region()
    chosen[0] = False
    sigma2 = hallucination(fill(X0Window.zeros(4, SHAPE), x0s), jnp.asarray(chosen))
    assert sigma2[0] == 0
    np.testing.assert_allclose(sigma2[1], by_hand(x0s[:, 1:], chosen[1:])[0], rtol=1e-5)


def test_edits_share_nothing():
    x0s, chosen = estimates(4), jnp.asarray(region())
    alone = hallucination(fill(X0Window.zeros(4, SHAPE), x0s), chosen)
    x0s[:, 1] *= 100
    together = hallucination(fill(X0Window.zeros(4, SHAPE), x0s), chosen)
    assert alone[0] == together[0]
    assert together[1] > 1000 * alone[1]


def test_nothing_outside_the_region_is_read():
    x0s, chosen = estimates(4), region()
    expected = by_hand(x0s, chosen)
    x0s[:, ~chosen] = np.nan
    sigma2 = hallucination(fill(X0Window.zeros(4, SHAPE), x0s), jnp.asarray(chosen))
    np.testing.assert_allclose(sigma2, expected, rtol=1e-5)


def test_a_small_variance_beside_a_large_mean_survives():
    # E[x^2] - E[x]^2 in float32 would be off by whole units here; representable values in, so the
    # oracle sees the same numbers.
    x0s = (1000 + 0.1 * estimates(10)).astype(np.float32)
    chosen = region()
    sigma2 = hallucination(fill(X0Window.zeros(10, SHAPE), x0s), jnp.asarray(chosen))
    np.testing.assert_allclose(sigma2, by_hand(x0s, chosen), rtol=1e-3)
    assert (np.asarray(sigma2) < 0.02).all()


def test_bfloat16_estimates_are_kept_in_float32():
    window = push(X0Window.zeros(2, SHAPE), jnp.ones(SHAPE, jnp.bfloat16))
    assert window.estimates.dtype == jnp.float32


def test_under_scan_and_jit():
    x0s, chosen = estimates(7), region()

    @jax.jit
    def run(x0s, chosen):
        def step(window, x0):
            window = push(window, x0)
            return window, (hallucination(window, chosen), ready(window))

        return jax.lax.scan(step, X0Window.zeros(3, SHAPE), x0s)[1]

    sigma2, is_ready = run(jnp.asarray(x0s), jnp.asarray(chosen))
    np.testing.assert_array_equal(is_ready, [False] + [True] * 6)
    for k in range(1, 7):
        np.testing.assert_allclose(sigma2[k], by_hand(x0s[max(0, k - 2) : k + 1], chosen), 1e-5)


def test_under_vmap():
    runs = np.stack([estimates(3, seed=s) for s in range(3)])
    chosen = region()

    def statistic(x0s):
        return hallucination(fill(X0Window.zeros(3, SHAPE), x0s), jnp.asarray(chosen))

    mapped = jax.vmap(statistic)(jnp.asarray(runs))
    np.testing.assert_allclose(mapped, [by_hand(x0s, chosen) for x0s in runs], rtol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_gradient_is_the_closed_form(count):
    x0s, chosen = estimates(count), region()

    def total(x0s):
        window = fill(X0Window.zeros(5, SHAPE), x0s)
        return hallucination(window, jnp.asarray(chosen)).sum()

    gradient = jax.grad(total)(jnp.asarray(x0s))
    # d/dx_i of sum_j (x_j - mean)^2 / (n - 1) is 2 (x_i - mean) / (n - 1).
    share = chosen / chosen.sum(axis=(1, 2, 3), keepdims=True) / SHAPE[-1]
    expected = 2 * (x0s - x0s.mean(0)) / max(count - 1, 1) * share[..., None]
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-7)


def test_seeds_of_one_edit_are_pooled():
    sigma2 = jnp.asarray([1.0, 2.0, 4.0, 6.0])
    groups = jnp.asarray([5, 0, 5, 2])
    np.testing.assert_allclose(pooled(sigma2, groups), [2.5, 2.0, 2.5, 6.0])
    np.testing.assert_allclose(jax.jit(pooled)(sigma2, jnp.zeros(4, jnp.int32)), [3.25] * 4)
