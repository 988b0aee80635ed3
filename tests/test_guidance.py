import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvlock_jax.lock import apg, guide, projection_scale, zero_init

SHAPE = (2, 3, 4, 5, 2)
ONES = jnp.ones(SHAPE[0])


def velocities(seed=0):
    rng = np.random.default_rng(seed)
    cond, uncond = rng.standard_normal((2, *SHAPE)).astype(np.float32)
    return cond, (uncond + 0.7 * cond).astype(np.float32)


def orthogonal(seed=0):
    """A pair whose supports do not meet, so that their inner product is 0 exactly."""
    cond, uncond = velocities(seed)
    cond[..., 0], uncond[..., 1] = 0, 0
    return cond, uncond


def projection_by_hand(cond, uncond, chosen):
    out = []
    for edit in range(SHAPE[0]):
        pairs = [
            (float(c), float(u))
            for index in np.argwhere(chosen[edit])
            for c, u in zip(cond[edit][tuple(index)], uncond[edit][tuple(index)], strict=True)
        ]
        out.append(sum(c * u for c, u in pairs) / (sum(u * u for _, u in pairs) + 1e-8))
    return out


def test_projection_is_the_loop():
    cond, uncond = velocities()
    everywhere = np.ones(SHAPE[:-1], bool)
    expected = projection_by_hand(cond, uncond, everywhere)
    np.testing.assert_allclose(projection_scale(cond, uncond), expected, rtol=1e-5)
    np.testing.assert_allclose(
        projection_scale(cond, uncond, jnp.asarray(everywhere)), expected, rtol=1e-5
    )


def test_projection_over_a_region_reads_nothing_else():
    cond, uncond = velocities()
    chosen = np.random.default_rng(5).random(SHAPE[:-1]) < 0.3
    expected = projection_by_hand(cond, uncond, chosen)
    cond[~chosen], uncond[~chosen] = np.nan, np.inf
    scale = projection_scale(jnp.asarray(cond), jnp.asarray(uncond), jnp.asarray(chosen))
    np.testing.assert_allclose(scale, expected, rtol=1e-5)


def test_projection_on_almost_nothing_is_damped():
    # ||v_uncond||^2 = 1e-8 equals the constant beside it, and halves s* = 3.
    uncond = jnp.zeros(SHAPE).at[:, 0, 0, 0, 0].set(1e-4)
    np.testing.assert_allclose(projection_scale(3 * uncond, uncond), [1.5, 1.5], rtol=1e-5)


def test_projection_of_nothing_is_zero():
    cond, _ = velocities()
    np.testing.assert_array_equal(projection_scale(cond, jnp.zeros(SHAPE)), [0, 0])
    empty = jnp.zeros(SHAPE[:-1], bool)
    np.testing.assert_array_equal(projection_scale(cond, jnp.asarray(cond), empty), [0, 0])


@pytest.mark.parametrize("a", [-2.0, 0.5, 3.0])
@pytest.mark.parametrize("omega", [0.0, 1.0, 5.0, 12.0])
def test_parallel_velocities_are_left_as_they_are(a, omega):
    _, uncond = velocities()
    cond = np.float32(a) * uncond
    scale = projection_scale(cond, jnp.asarray(uncond))
    np.testing.assert_allclose(scale, [a, a], rtol=1e-6)
    v = guide(cond, uncond, omega * ONES, scale)
    np.testing.assert_allclose(v, cond, rtol=1e-5)


@pytest.mark.parametrize("omega", [0.0, 1.0, 5.0])
def test_orthogonal_velocities_drop_the_unconditional_one(omega):
    cond, uncond = orthogonal()
    scale = projection_scale(jnp.asarray(cond), jnp.asarray(uncond))
    np.testing.assert_array_equal(scale, [0, 0])
    np.testing.assert_allclose(guide(cond, uncond, omega * ONES, scale), omega * cond, rtol=1e-6)


def test_guidance_is_per_edit_and_exact_at_its_ends():
    cond, uncond = velocities()
    v = guide(cond, uncond, jnp.asarray([1.0, 0.0]), jnp.asarray([0.3, 2.0]))
    np.testing.assert_array_equal(v[0], cond[0])
    np.testing.assert_array_equal(v[1], 2 * uncond[1])
    # By hand: (1 - 3) 0.5 4 + 3 10 = 26.
    v = guide(jnp.full(SHAPE, 10.0), jnp.full(SHAPE, 4.0), 3 * ONES, 0.5 * ONES)
    np.testing.assert_array_equal(v, np.full(SHAPE, 26))


def test_bfloat16_velocities_are_guided_in_float32():
    cond, uncond = (jnp.asarray(v, jnp.bfloat16) for v in velocities())
    exact = [np.asarray(v, np.float64) for v in (cond, uncond)]
    everywhere = np.ones(SHAPE[:-1], bool)
    scale = projection_scale(cond, uncond)
    assert scale.dtype == jnp.float32
    np.testing.assert_allclose(scale, projection_by_hand(*exact, everywhere), rtol=1e-5)
    v = guide(cond, uncond, 5 * ONES, ONES)
    assert v.dtype == jnp.float32
    np.testing.assert_allclose(v, exact[1] + 5 * (exact[0] - exact[1]), rtol=1e-5, atol=1e-5)
    update, buffer = apg(cond, uncond, 5 * ONES, jnp.zeros(SHAPE), 0.0, 3.0, -0.5)
    assert update.dtype == buffer.dtype == jnp.float32


def test_apg_with_nothing_adapted_is_plain_guidance():
    cond, uncond = velocities()
    omega = jnp.asarray([5.0, 2.5])
    v, buffer = apg(cond, uncond, omega, jnp.zeros(SHAPE), 1.0, jnp.inf, 0.0)
    np.testing.assert_allclose(v, guide(cond, uncond, omega, ONES), atol=1e-5)
    np.testing.assert_array_equal(buffer, cond - uncond)


@pytest.mark.parametrize(("eta", "norm"), [(0.0, 3.0), (0.4, 1e9), (1.0, 0.5)])
def test_apg_over_three_steps_is_diffusers(eta, norm):
    torch = pytest.importorskip("torch")
    from diffusers.guiders import adaptive_projected_guidance as peer

    theirs, buffer = peer.MomentumBuffer(-0.6), jnp.zeros(SHAPE)
    for step in range(3):
        cond, uncond = velocities(step)
        v, buffer = apg(cond, uncond, 4 * ONES, buffer, eta, norm, -0.6)
        expected = peer.normalized_guidance(
            torch.from_numpy(cond),
            torch.from_numpy(uncond),
            guidance_scale=4.0 - 1.0,
            momentum_buffer=theirs,
            eta=eta,
            norm_threshold=norm,
            # Around v_cond, as in the paper, where omega counts one less; the default is v_uncond.
            use_original_formulation=True,
        )
        np.testing.assert_allclose(v, expected.numpy(), rtol=1e-4, atol=2e-5)
        np.testing.assert_allclose(buffer, theirs.running_average.numpy(), atol=1e-5)


def test_apg_without_its_parallel_part_moves_at_right_angles():
    cond, uncond = velocities()
    v, _ = apg(cond, uncond, 3 * ONES, jnp.zeros(SHAPE), 0.0, jnp.inf, 0.0)
    update = np.asarray(v, np.float64) - cond
    inner = (update * cond).sum(axis=(1, 2, 3, 4))
    np.testing.assert_allclose(
        inner / (cond.astype(np.float64) ** 2).sum((1, 2, 3, 4)), 0, atol=1e-6
    )


def test_apg_bounds_the_difference_of_each_edit_by_itself():
    cond, uncond = velocities()
    uncond[1] = cond[1] + 1e-3
    v, _ = apg(cond, uncond, 2 * ONES, jnp.zeros(SHAPE), 1.0, 2.0, 0.0)
    lengths = np.linalg.norm((np.asarray(v) - cond).reshape(2, -1), axis=1)
    np.testing.assert_allclose(lengths, [2.0, 1e-3 * np.sqrt(120)], rtol=1e-3)


def test_apg_momentum_worked_by_hand():
    shape = (1, 1, 1, 1, 2)
    cond = jnp.asarray([1.0, 0.0]).reshape(shape)
    uncond = jnp.asarray([0.0, -2.0]).reshape(shape)
    buffer = jnp.asarray([4.0, 6.0]).reshape(shape)
    # d = (1, 2) - 0.5 (4, 6) = (-1, -1); along v_cond (-1, 0), across (0, -1).
    v, buffer = apg(cond, uncond, jnp.asarray([3.0]), buffer, 0.25, 10.0, -0.5)
    np.testing.assert_array_equal(buffer.ravel(), [-1, -1])
    np.testing.assert_allclose(v.ravel(), [1 + 2 * 0.25 * -1, 2 * -1])


@pytest.mark.parametrize("norm", [jnp.inf, 1.0])
def test_apg_has_gradients_where_roots_and_quotients_have_none(norm):
    cond, _ = velocities()

    def loss(cond, uncond, omega, norm):
        v, buffer = apg(cond, uncond, omega, jnp.zeros(SHAPE), 0.3, norm, 0.1)
        return (v * v).sum() + buffer.sum()

    for pair in (cond, cond), (np.zeros_like(cond), cond), (np.zeros_like(cond),) * 2:
        args = (*(jnp.asarray(v) for v in pair), 3 * ONES, jnp.float32(norm))
        for gradient in jax.grad(loss, argnums=(0, 1, 2, 3))(*args):
            assert np.isfinite(gradient).all()


def test_guidance_gradients_are_the_closed_form():
    cond, uncond = velocities()
    omega, scale = jnp.asarray([5.0, 2.0]), jnp.asarray([0.9, 1.2])

    def total(*args):
        return guide(*args).sum()

    grads = jax.grad(total, argnums=(0, 1, 2, 3))(cond, uncond, omega, scale)
    np.testing.assert_allclose(grads[0][:, 0, 0, 0, 0], [5, 2])
    np.testing.assert_allclose(grads[1][:, 0, 0, 0, 0], [(1 - 5) * 0.9, (1 - 2) * 1.2], rtol=1e-6)
    sums = [v.astype(np.float64).sum(axis=(1, 2, 3, 4)) for v in (cond, uncond)]
    np.testing.assert_allclose(grads[2], sums[0] - np.array([0.9, 1.2]) * sums[1], rtol=1e-4)
    np.testing.assert_allclose(grads[3], np.array([-4, -1]) * sums[1], rtol=1e-4)


def test_projection_brings_the_velocities_nearest():
    cond, uncond = velocities()

    def distance(scale):
        return ((cond - scale[:, None, None, None, None] * uncond) ** 2).sum()

    best = projection_scale(cond, jnp.asarray(uncond))
    np.testing.assert_allclose(jax.grad(distance)(best), [0, 0], atol=1e-3)
    assert (jax.grad(distance)(best + 0.1) > 1).all()


def test_zero_init_stops_the_first_steps():
    cond, _ = velocities()
    run = jax.jit(zero_init)
    for step in range(4):
        v = run(cond, jnp.int32(step), jnp.int32(2))
        np.testing.assert_array_equal(v, np.zeros(SHAPE) if step < 2 else cond)
    np.testing.assert_array_equal(run(cond, jnp.int32(0), jnp.int32(0)), cond)
    assert zero_init(jnp.asarray(cond, jnp.bfloat16), 0, 1).dtype == jnp.bfloat16


def test_jitted_and_mapped_guidance_agree_with_plain_calls():
    runs = [velocities(s) for s in range(3)]
    cond, uncond = (jnp.stack([r[i] for r in runs]) for i in (0, 1))
    region = jnp.asarray(np.random.default_rng(2).random(SHAPE[:-1]) < 0.5)

    def step(cond, uncond, omega, buffer, eta, norm, momentum):
        v = guide(cond, uncond, omega, projection_scale(cond, uncond, region))
        return v, *apg(cond, uncond, omega, buffer, eta, norm, momentum)

    settings = [jnp.float32(x) for x in (0.2, 5.0, -0.75)]
    rest = (jnp.asarray([5.0, 3.0]), jnp.ones(SHAPE), *settings)
    mapped = jax.jit(jax.vmap(step, in_axes=(0, 0, *[None] * 5)))(cond, uncond, *rest)
    for i in range(3):
        for together, alone in zip(mapped, step(cond[i], uncond[i], *rest), strict=True):
            np.testing.assert_allclose(together[i], alone, rtol=1e-5, atol=1e-5)
