import jax.numpy as jnp
import numpy as np
import pytest

from kvlock_jax.errors import ConfigError
from kvlock_jax.lock import (
    PRESETS,
    fusion_ratio,
    guidance_scale,
    in_window,
    knobs,
    preset,
    sampling,
    source_needed,
    uncond_scale,
)
from kvlock_jax.sampling import solvers
from kvlock_jax.settings.schema import SampleConfig

OMEGA_0 = 5.0

# METHOD.md section 9 as behaviour, for omega_0 = 5, tau = 0.01 and a projection s* = 0.8:
# alpha before the window, alpha and omega in it for sigma2 = 0.001 and 0.0025, s.
TABLE = {
    "kvlock": (0, [0.1, 0.25], [0.5, 1.25], 0.8),
    "kvlock_anchor": (1, [0.1, 0.25], [1.0, 1.25], 0.8),
    "hard_lock": (1, [1, 1], [5, 5], 1),
    "eased": (1, [1, 1], [2.5, 2.5], 0.8),
    "fast": (1, [1, 1], [5, 5], 1),
    "fixed_half": (0, [0.5, 0.5], [0.5, 1.25], 0.8),
    "kv_only": (0, [0.1, 0.25], [5, 5], 1),
    "omega_only": (0, [0, 0], [0.5, 1.25], 1),
    "s_only": (0, [0, 0], [5, 5], 0.8),
    "s_omega": (0, [0, 0], [0.5, 1.25], 0.8),
    "global_detection": (0, [0.1, 0.25], [0.5, 1.25], 0.8),
    "cfg": (0, [0, 0], [5, 5], 1),
    "cfg_zero_star": (0, [0, 0], [5, 5], 0.8),
    "apg": (0, [0, 0], [5, 5], 1),
    "clean": (0, [0, 0], [5, 5], 1),
    "clean_anchor": (1, [0.1, 0.25], [1.0, 1.25], 0.8),
    "distilled": (1, [0.1, 0.25], [1.0, 1.25], 0.8),
    "proedit": (0, [0, 0], [5, 5], 1),
}
CLEAN = {"clean", "clean_anchor"}
PINNED = {"kvlock_anchor", "hard_lock", "eased", "fast", "clean_anchor", "distilled"}
LOCKED = PINNED | {"kvlock", "fixed_half", "kv_only", "global_detection"}


def test_every_preset_is_listed_and_described():
    assert list(PRESETS) == list(TABLE)
    for description in PRESETS.values():
        assert description and "\n" not in description


@pytest.mark.parametrize("name", TABLE)
def test_presets_do_what_the_table_says(name):
    warmup, alphas, omegas, s = TABLE[name]
    lock = preset(name, OMEGA_0)
    traced = knobs(lock, OMEGA_0)
    sigma2, yes, no = jnp.asarray([0.001, 0.0025]), jnp.asarray(True), jnp.asarray(False)
    np.testing.assert_allclose(fusion_ratio(sigma2, yes, no, traced), [warmup] * 2)
    np.testing.assert_allclose(guidance_scale(sigma2, yes, no, traced), [OMEGA_0] * 2)
    np.testing.assert_allclose(fusion_ratio(sigma2, yes, yes, traced), alphas, rtol=1e-6)
    np.testing.assert_allclose(guidance_scale(sigma2, yes, yes, traced), omegas, rtol=1e-6)
    np.testing.assert_allclose(uncond_scale(jnp.asarray([0.8]), traced), [s])

    pinned = "source" if name in PINNED else "model"
    assert lock.background == ("clean" if name in CLEAN else pinned)
    assert lock.detection == ("global" if name == "global_detection" else "local")
    assert lock.zero_init_steps == (2 if name == "cfg_zero_star" else 0)
    assert lock.guidance == ("apg" if name == "apg" else "cfg")
    assert (lock.tau, lock.window, lock.kappa, lock.omega_ceiling) == (0.01, 10, 20, 2)


@pytest.mark.parametrize("name", TABLE)
def test_source_passes_of_a_run_of_fifty_steps(name):
    traced = knobs(preset(name, OMEGA_0), OMEGA_0)
    passes = source_needed(in_window(50, traced.kappa), traced).sum()
    counts = dict.fromkeys(PINNED, 50) | {"proedit": 17}
    assert passes == counts.get(name, 20 if name in LOCKED else 0)


@pytest.mark.parametrize(("steps", "late"), [(1, 1), (2, 1), (4, 2), (12, 5), (50, 20)])
def test_eased_guidance_falls_in_a_share_of_any_run(steps, late):
    lock = preset("eased", OMEGA_0, steps)
    assert (lock.kappa, lock.guidance_ratio) == (late, 0.5)


@pytest.mark.parametrize(
    ("omega_0", "lowest"),
    [(5.0, 2.5), (2.0, 1.0), (1.5, 1.0), (1.0, 1.0), (0.8, 0.8), (0.25, 0.25), (0.0, 0.0)],
)
def test_eased_guidance_never_lets_the_prompt_fade(omega_0, lowest):
    traced = knobs(preset("eased", omega_0), omega_0)
    yes = jnp.asarray(True)
    np.testing.assert_allclose(guidance_scale(jnp.zeros(1), yes, yes, traced), [lowest], rtol=1e-6)


@pytest.mark.parametrize(
    ("omega_0", "lowest"), [(5.0, 1.0), (1.0, 1.0), (0.8, 1.0), (0.25, 0.5), (0.0, 0.0)]
)
def test_anchor_never_lets_the_prompt_fade(omega_0, lowest):
    traced = knobs(preset("kvlock_anchor", omega_0), omega_0)
    yes = jnp.asarray(True)
    omega = guidance_scale(jnp.zeros(1), yes, yes, traced)
    np.testing.assert_allclose(omega, [lowest], rtol=1e-6)


def test_apg_follows_its_public_code_for_wan():
    lock = preset("apg", OMEGA_0)
    assert (lock.apg_eta, lock.apg_norm, lock.apg_momentum) == (0, 55, -0.75)


def test_proedit_follows_its_public_code():
    lock = preset("proedit", OMEGA_0)
    assert (lock.injected_steps, lock.foreground_ratio, lock.start_shift) == (17, 0.1, 0.25)
    others = [preset(name, OMEGA_0) for name in PRESETS if name != "proedit"]
    assert not any(p.injected_steps or p.foreground_ratio or p.start_shift for p in others)


def test_an_unknown_preset_is_an_error_that_lists_them():
    with pytest.raises(ConfigError, match="'kv_lock'") as caught:
        preset("kv_lock", OMEGA_0)
    for name in PRESETS:
        assert name in str(caught.value)


@pytest.mark.parametrize(("steps", "window", "kappa"), [(4, 2, 2), (8, 2, 3), (50, 10, 20)])
def test_the_distilled_lock_follows_the_number_of_steps(steps, window, kappa):
    lock = preset("distilled", 1.0, steps)
    assert (lock.window, lock.kappa) == (window, kappa)


def test_the_distilled_sampling_is_lightx2vs():
    sample = SampleConfig(**sampling("distilled"))
    table = solvers.table(sample.solver, sample.steps, sample.shift, sample.grid)
    table = table.with_experts(0.875)
    np.testing.assert_allclose(table.timestep, [1000, 937.5, 833.3333, 625], rtol=1e-6)
    assert table.expert.tolist() == [0, 0, 1, 1] and sample.branches == 1
    assert sampling("kvlock") == {}
