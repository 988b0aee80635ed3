import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvlock_jax.lock import (
    PRESETS,
    detection_region,
    fusion_ratio,
    guidance_scale,
    in_window,
    inject,
    injected,
    knobs,
    preset,
    projection_region,
    source_needed,
    uncond_scale,
)
from kvlock_jax.settings.schema import LockConfig

OMEGA_0 = 5.0
SIGMA2 = (0.0, 0.0025, 0.01, 0.017, 0.04)


def alpha_by_hand(lock, sigma2, ready, inside):
    """METHOD.md section 6 as a person would follow it."""
    if not lock.enabled:
        return 0.0
    if not inside:
        return lock.warmup_fusion_ratio
    if not lock.adapt_fusion_ratio:
        return lock.fusion_ratio
    if not ready:
        return lock.warmup_fusion_ratio
    return min(1.0, sigma2 / lock.tau)


def omega_by_hand(lock, omega_0, sigma2, ready, inside):
    if inside and not lock.adapt_guidance:
        return omega_0 * lock.guidance_ratio
    if not (inside and ready):
        return omega_0
    return omega_0 * min(lock.omega_ceiling, max(lock.omega_floor, sigma2 / lock.tau))


LOCKS = [
    LockConfig(
        enabled=enabled,
        adapt_fusion_ratio=adapt_alpha,
        adapt_guidance=adapt_omega,
        warmup_fusion_ratio=warmup,
        fusion_ratio=0.5,
        guidance_ratio=0.75,
        omega_floor=floor,
        tau=tau,
    )
    for enabled, adapt_alpha, adapt_omega in itertools.product((False, True), repeat=3)
    for warmup, floor, tau in [(0.0, 0.0, 0.01), (0.75, 0.2, 0.02)]
]


@pytest.mark.parametrize("lock", LOCKS)
def test_schedules_are_the_rules_read_aloud(lock):
    traced = knobs(lock, OMEGA_0)
    sigma2 = jnp.asarray(SIGMA2)
    for ready, inside in itertools.product((False, True), repeat=2):
        now = (sigma2, jnp.asarray(ready), jnp.asarray(inside), traced)
        alpha, omega = fusion_ratio(*now), guidance_scale(*now)
        assert alpha.shape == omega.shape == sigma2.shape
        assert alpha.dtype == omega.dtype == jnp.float32
        expected = [alpha_by_hand(lock, s, ready, inside) for s in SIGMA2]
        np.testing.assert_allclose(alpha, expected, rtol=1e-6)
        expected = [omega_by_hand(lock, OMEGA_0, s, ready, inside) for s in SIGMA2]
        np.testing.assert_allclose(omega, expected, rtol=1e-6)


def test_the_published_schedule_worked_by_hand():
    now = (jnp.asarray([0.0, 0.005, 0.02, 0.05]), jnp.asarray(True), jnp.asarray(True))
    traced = knobs(LockConfig(), 6.0)
    np.testing.assert_allclose(fusion_ratio(*now, traced), [0, 0.5, 1, 1])
    np.testing.assert_allclose(guidance_scale(*now, traced), [0, 3, 12, 12])


def test_a_statistic_that_does_not_exist_is_not_read():
    nan = jnp.full(2, jnp.nan)
    traced = knobs(LockConfig(warmup_fusion_ratio=1.0), OMEGA_0)
    now = (nan, jnp.asarray(False), jnp.asarray(True), traced)
    np.testing.assert_array_equal(fusion_ratio(*now), [1, 1])
    np.testing.assert_array_equal(guidance_scale(*now), [OMEGA_0] * 2)


@pytest.mark.parametrize(
    ("steps", "kappa", "expected"),
    [(5, 2, "00011"), (5, 0, "00000"), (5, 5, "11111"), (5, 20, "11111"), (1, 1, "1")],
)
def test_window_is_the_last_kappa_steps(steps, kappa, expected):
    expected = [c == "1" for c in expected]
    np.testing.assert_array_equal(in_window(steps, kappa), expected)
    traced = jax.jit(in_window, static_argnums=0)(steps, jnp.int32(kappa))
    np.testing.assert_array_equal(traced, expected)


@pytest.mark.parametrize("lock", [*LOCKS, LockConfig(adapt_fusion_ratio=False, fusion_ratio=0.0)])
@pytest.mark.parametrize("kappa", [0, 2, 9])
@pytest.mark.parametrize("count", [0, 1])
def test_source_is_needed_exactly_where_alpha_can_be_positive(lock, kappa, count):
    traced = knobs(dataclasses.replace(lock, injected_steps=count), OMEGA_0)
    inside, first = in_window(4, kappa), injected(4, count)
    for k, needed in enumerate(source_needed(inside, traced)):
        possible = []
        for ready in (False, True):
            alpha = fusion_ratio(jnp.asarray(SIGMA2), jnp.asarray(ready), inside[k], traced)
            possible.append(inject(alpha, first[k], traced)[0].max())
        assert needed == (max(possible) > 0)


@pytest.mark.parametrize(
    ("steps", "count", "expected"), [(5, 2, "11000"), (5, 0, "00000"), (3, 9, "111")]
)
def test_injected_steps_are_the_first(steps, count, expected):
    np.testing.assert_array_equal(injected(steps, count), [c == "1" for c in expected])


@pytest.mark.parametrize("enabled", [True, False])
def test_injection_takes_the_source_and_mixes_the_foreground(enabled):
    traced = knobs(LockConfig(enabled=enabled, injected_steps=1, foreground_ratio=0.1), OMEGA_0)
    alpha = jnp.asarray([0.0, 0.4])
    for now in (True, False):
        background, foreground = inject(alpha, jnp.asarray(now), traced)
        active = now and enabled
        np.testing.assert_allclose(background, [1, 1] if active else alpha)
        np.testing.assert_allclose(foreground, 0.1 if active else 0)


def test_published_method_leaves_the_source_out_of_its_warm_up():
    needed = source_needed(in_window(50, 20), knobs(LockConfig(), OMEGA_0))
    assert needed.sum() == 20 and needed[30:].all()


def test_switches_choose_regions_and_scale():
    foreground = jnp.asarray([True, False]).reshape(1, 1, 1, 2)
    everything = jnp.ones_like(foreground)
    published = knobs(LockConfig(), OMEGA_0)
    np.testing.assert_array_equal(detection_region(foreground, published), foreground)
    np.testing.assert_array_equal(projection_region(foreground, published), everything)
    ours = knobs(LockConfig(detection="global", background="source"), OMEGA_0)
    np.testing.assert_array_equal(detection_region(foreground, ours), everything)
    np.testing.assert_array_equal(projection_region(foreground, ours), foreground)

    projection = jnp.asarray([0.8, 1.1])
    np.testing.assert_array_equal(uncond_scale(projection, published), projection)
    plain = knobs(LockConfig(rescale_uncond=False), OMEGA_0)
    np.testing.assert_array_equal(uncond_scale(projection, plain), [1, 1])


def test_no_setting_of_any_preset_compiles_again():
    traces = []

    @jax.jit
    def run(sigma2, ready, foreground, knobs):
        traces.append(None)
        inside = in_window(8, knobs.kappa)
        per_step = [
            (fusion_ratio(sigma2, ready, now, knobs), guidance_scale(sigma2, ready, now, knobs))
            for now in inside
        ]
        return (
            per_step,
            source_needed(inside, knobs),
            uncond_scale(sigma2, knobs),
            detection_region(foreground, knobs),
            projection_region(foreground, knobs),
        )

    foreground = jnp.ones((5, 1, 1, 1), bool)
    locks = [preset(name, OMEGA_0) for name in PRESETS]
    locks.append(LockConfig(tau=0.5, kappa=3, omega_floor=0.1, omega_ceiling=3.0))
    for i, lock in enumerate(locks):
        run(jnp.asarray(SIGMA2), jnp.asarray(i % 2 == 0), foreground, knobs(lock, 1.0 + i))
    assert len(traces) == 1


def test_knobs_carry_every_traced_setting():
    lock = LockConfig(apg_norm=float("inf"), apg_eta=0.3, apg_momentum=-0.5, zero_init_steps=2)
    traced = knobs(lock, 7.0)
    assert traced.guidance_scale == 7
    for field in dataclasses.fields(LockConfig):
        # Shapes, other programs, and two words that are switches here.
        untraced = "window guidance pool_seeds cache lock_contexts skip_background skip_guidance "
        untraced += "background detection"
        if field.name in untraced.split():
            continue
        value = getattr(traced, field.name)
        assert value.shape == () and not value.weak_type
        np.testing.assert_allclose(value, getattr(lock, field.name))


def test_schedules_map_and_differentiate():
    traced = knobs(LockConfig(), 6.0)
    sigma2 = jnp.asarray([0.004, 0.03])
    on = jnp.asarray(True)

    def alpha(sigma2, tau):
        return fusion_ratio(sigma2, on, on, dataclasses.replace(traced, tau=tau)).sum()

    # alpha = sigma2 / tau, until it saturates.
    d_sigma2, d_tau = jax.grad(alpha, argnums=(0, 1))(sigma2, jnp.float32(0.01))
    np.testing.assert_allclose(d_sigma2, [100, 0], rtol=1e-6)
    np.testing.assert_allclose(d_tau, -0.004 / 0.01**2, rtol=1e-5)

    taus = jnp.asarray([0.01, 0.02, 0.04])
    many = jax.vmap(lambda tau: dataclasses.replace(traced, tau=tau))(taus)
    omega = jax.vmap(lambda each: guidance_scale(sigma2, on, on, each))(many)
    np.testing.assert_allclose(omega, [[2.4, 12], [1.2, 9], [0.6, 4.5]], rtol=1e-6)
