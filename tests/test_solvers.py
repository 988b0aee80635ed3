import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from kvlock_jax.errors import ConfigError
from kvlock_jax.sampling import solvers
from kvlock_jax.settings.schema import SampleConfig

NAMES = ("euler", "unipc", "dpm++")
STEPS = (4, 5, 8, 20, 50)
SHAPE = (2, 2, 3, 2, 4)

rng = np.random.default_rng(0)
NOISE = rng.standard_normal(SHAPE).astype(np.float32)
CLEAN = rng.standard_normal(SHAPE).astype(np.float32)
MIX = rng.standard_normal((4, 4)).astype(np.float32)


# Of Diffusers' DPM++ under NumPy 2: it hands a torch tensor to np.array.
quiet_peer = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def peer(name, shift):
    """Diffusers' scheduler, in the settings of Wan's published scheduler_config.json."""
    if name == "euler":
        return FlowMatchEulerDiscreteScheduler(shift=shift)
    kind = UniPCMultistepScheduler if name == "unipc" else DPMSolverMultistepScheduler
    return kind(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=shift,
        num_train_timesteps=1000,
    )


def scanned(velocity):
    """A jitted run that returns the latents after every step of `velocity(latents, row)`."""

    def body(carry, row):
        latents, state = carry
        x0 = latents - row.sigma * velocity(latents, row)
        carry = solvers.step(row, state, latents, x0)
        return carry, carry[0]

    @jax.jit
    def run(latents, table):
        return jax.lax.scan(body, (latents, solvers.init(latents)), table)[1]

    return run


run_tanh = scanned(lambda z, row: jnp.tanh(z @ MIX + row.timestep / 1000))


@quiet_peer
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0, 16.0])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", NAMES)
def test_every_latent_matches_diffusers(name, steps, shift):
    scheduler = peer(name, shift)
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)
    z, expected = torch.from_numpy(NOISE), []
    for t in scheduler.timesteps:
        v = torch.tanh(z @ torch.from_numpy(MIX) + t / 1000)
        z = scheduler.step(v, t, z, return_dict=False)[0]
        expected.append(z.numpy())
    found = np.asarray(run_tanh(NOISE, solvers.table(name, steps, shift)))
    assert found.shape == (steps, *SHAPE)
    for ours, theirs in zip(found, expected, strict=True):
        assert np.linalg.norm(ours - theirs) < 1e-5 * np.linalg.norm(theirs)


@quiet_peer
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 5.0, 8.0, 16.0])
@pytest.mark.parametrize("name", NAMES)
def test_levels_and_timesteps_equal_diffusers(name, shift):
    scheduler = peer(name, shift)
    for steps in (*range(1, 31), 40, 50, 100):
        scheduler.set_timesteps(steps)
        table = solvers.table(name, steps, shift)
        np.testing.assert_array_equal(table.sigma, scheduler.sigmas[:-1].numpy())
        np.testing.assert_array_equal(table.sigma_next, scheduler.sigmas[1:].numpy())
        np.testing.assert_array_equal(table.timestep, scheduler.timesteps.numpy())
        kinds = {jnp.dtype(column.dtype).name for column in jax.tree.leaves(table)}
        assert kinds == {"float32", "int32"} and not table.expert.any()


@pytest.mark.parametrize("steps", [1, 2, 3, 9])
@pytest.mark.parametrize("name", NAMES)
def test_constant_estimate_stays_on_the_straight_path(name, steps):
    table = solvers.table(name, steps, 3.0)
    start = (1 - table.sigma[0]) * CLEAN + table.sigma[0] * NOISE
    found = scanned(lambda z, row: (z - CLEAN) / row.sigma)(start, table)
    for latents, sigma in zip(found, table.sigma_next, strict=True):
        np.testing.assert_allclose(latents, (1 - sigma) * CLEAN + sigma * NOISE, atol=3e-6)


@pytest.mark.parametrize("name", NAMES)
def test_last_step_returns_its_estimate(name):
    table = solvers.table(name, 6, 5.0)
    row = jax.tree.map(lambda column: column[-1], table)
    state = solvers.SolverState(NOISE, np.stack([NOISE, 2 * NOISE]))
    np.testing.assert_array_equal(solvers.step(row, state, 3 * NOISE, CLEAN)[0], CLEAN)


def test_euler_on_a_linear_flow_is_the_plain_loop():
    table = solvers.euler(12, 3.0)
    found = scanned(lambda z, row: z @ MIX)(NOISE, table)
    z, mix = NOISE.astype(np.float64), MIX.astype(np.float64)
    for ours, sigma, following in zip(found, table.sigma, table.sigma_next, strict=True):
        z = z + (np.float64(following) - np.float64(sigma)) * (z @ mix)
        assert np.linalg.norm(ours - z) < 1e-6 * np.linalg.norm(z)


def test_solvers_reach_the_exact_flow_of_a_gaussian_at_their_order():
    """Of x ~ N(2, 0.3^2) the estimate and the flow's solution are known in closed form."""

    def velocity(z, row):
        spread = jnp.square(0.3 * (1 - row.sigma)) + jnp.square(row.sigma)
        x0 = 2 + 0.09 * (1 - row.sigma) / spread * (z - 2 * (1 - row.sigma))
        return (z - x0) / row.sigma

    def exact(sigma):
        sigma = np.float64(sigma)
        return 2 * (1 - sigma) + NOISE * np.hypot(0.3 * (1 - sigma), sigma)

    run = scanned(velocity)

    def error(name, steps):
        table = solvers.table(name, steps, 1.0)
        found = run(exact(table.sigma[0]).astype(np.float32), table)[steps // 2]
        return np.abs(found - exact(table.sigma_next[steps // 2])).max()

    # Half the step leaves 2^-order of the error: 1 for Euler, 2 for 2M, 3 for 2M with UniC on top.
    for name, order in (("euler", 1), ("dpm++", 2), ("unipc", 3)):
        assert error(name, 20) > 0.9 * 2**order * error(name, 40) > 0


def test_unipc_rows_worked_by_hand():
    """Levels 1/2, 1/3, 1/5 lie ln 2 apart in lambda, so r is -1 and B is -1/2."""
    sigma = np.array([1 / 2, 1 / 3, 1 / 5, 0])
    predictor = [[2 / 3, 1 / 3, 0], [3 / 5, 3 / 5, -1 / 5], [0, 1, 0]]
    np.testing.assert_allclose(solvers._second_order(sigma), predictor, atol=1e-15)
    n = 1 / np.log(2)
    now, old = 2 - 5 / 2 * n + n**2, n**2 - 3 / 2 * n
    corrector = [
        [1, 0, 0, 0, 0],
        [0, 2 / 3, 1 / 6, 1 / 6, 0],
        [0, 3 / 5, 2 / 5 * now, 2 / 5 * (1 - now - old), 2 / 5 * old],
    ]
    np.testing.assert_allclose(solvers._unic(sigma), corrector, atol=1e-14)


@pytest.mark.parametrize("steps, shift", [(5, 1.0), (8, 3.0), (50, 5.0)])
def test_unipc_corrector_integrates_the_parabola_through_three_estimates(steps, shift):
    """z' = (s'/s) z + s' int e^lambda m(lambda) dlambda, the integral by Gauss-Legendre."""
    table = solvers.unipc(steps, shift)
    sigma = table.sigma.astype(np.float64)
    lam = np.log((1 - sigma) / sigma)
    nodes, weights = np.polynomial.legendre.leggauss(40)
    for k in range(2, steps):
        places = [lam[k], lam[k - 1], lam[k - 2]]
        half = (lam[k] - lam[k - 1]) / 2
        at = lam[k - 1] + half * (nodes + 1)
        expected = [0, sigma[k] / sigma[k - 1]]
        for i, place in enumerate(places):
            basis = np.prod([(at - q) / (place - q) for q in places[:i] + places[i + 1 :]], axis=0)
            expected.append(sigma[k] * half * np.sum(weights * np.exp(at) * basis))
        np.testing.assert_allclose(table.corrector[k], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_overwriting_some_latents_leaves_the_others_alone(name):
    table = solvers.table(name, 8, 3.0)
    background = np.arange(SHAPE[3])[:, None] == 0
    z, pinned = jnp.asarray(NOISE), jnp.asarray(NOISE)
    state, pinned_state = solvers.init(z), solvers.init(z)
    for k in range(8):
        row = jax.tree.map(lambda column, k=k: column[k], table)
        z, state = solvers.step(row, state, z, jnp.sin(z))
        pinned, pinned_state = solvers.step(row, pinned_state, pinned, jnp.sin(pinned))
        source = (1 - row.sigma_next) * CLEAN + row.sigma_next * NOISE
        pinned = jnp.where(background, source, pinned)
        np.testing.assert_array_equal(pinned[..., 1:, :], z[..., 1:, :])
    np.testing.assert_array_equal(pinned[..., :1, :], CLEAN[..., :1, :])


def test_shift_and_solver_do_not_compile_again():
    traces = []

    def velocity(z, row):
        traces.append(row.sigma.shape)
        return jnp.tanh(z)

    run = scanned(velocity)
    for name in NAMES:
        for shift in (1.0, 2.5, 5.0):
            run(NOISE, solvers.table(name, 7, shift))
    assert traces == [()]


def test_step_computes_in_float32_whatever_it_is_given():
    row = jax.tree.map(lambda column: column[3], solvers.unipc(8, 3.0))
    low = jnp.asarray(NOISE, jnp.bfloat16)
    latents, state = solvers.step(row, solvers.init(low), low, low)
    assert {leaf.dtype for leaf in jax.tree.leaves((latents, state))} == {jnp.dtype("float32")}
    wide = low.astype(jnp.float32)
    np.testing.assert_array_equal(solvers.step(row, solvers.init(wide), wide, wide)[0], latents)


def test_flow_sigmas_by_hand():
    np.testing.assert_allclose(
        solvers.flow_sigmas(np.array([1.0, 0.5, 0.25, 0.0]), 3.0), [1, 3 / 4, 1 / 2, 0], rtol=1e-15
    )


def test_a_huge_shift_gives_finite_rows_or_says_so():
    table = solvers.dpmpp_2m(4, 1e5)
    assert table.sigma[0] == 1 and np.isfinite(table.predictor).all()
    with pytest.raises(ConfigError, match=r"shift must leave 50 steps apart .* found 1000000\.0"):
        solvers.unipc(50, 1e6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "steps, shift, message",
    [
        (0, 3.0, "steps must be at least 1, found 0"),
        (4, 0.0, "shift must be over 0 and finite, found 0.0"),
        (4, float("nan"), "shift must be over 0 and finite, found nan"),
        (4, float("inf"), "shift must be over 0 and finite, found inf"),
    ],
)
def test_bad_settings_are_named(name, steps, shift, message):
    with pytest.raises(ConfigError, match=message):
        solvers.table(name, steps, shift)


def test_solver_names_are_those_of_the_config():
    for name in NAMES:
        assert SampleConfig(solver=name).solver == name
    with pytest.raises(ConfigError, match=r"one of unipc, euler, dpm\+\+, found 'heun'"):
        solvers.table("heun", 4, 3.0)
