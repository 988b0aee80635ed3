"""The loop with a model of a few lines, against a loop of plain NumPy in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loops import (
    EDITS,
    GRID,
    LAYERS,
    LENGTH,
    OMEGA,
    SHAPE,
    SHIFT,
    STEPS,
    WIDTH,
    WINDOW,
    Echo,
    Fake,
    H,
    T,
    W,
    make_edits,
    make_fake,
    nobody,
    one_edit,
    oracle,
    run,
    whole,
)

from kvlock_jax import lock
from kvlock_jax.grid import Grid
from kvlock_jax.lock import X0Window
from kvlock_jax.sampling import solvers
from kvlock_jax.sampling.edits import Edits
from kvlock_jax.sampling.loop import Program, Trace, advance, sample
from kvlock_jax.sampling.stepwise import _estimate

PRESETS = {
    "kvlock": {},
    "kvlock_anchor": {},
    "hard_lock": {},
    "fixed_half": {},
    "global_detection": {},
    "cfg": {},
    "cfg_zero_star": {},
    "apg": {"apg_norm": 2.0, "apg_eta": 0.25},  # a norm that binds in some steps only
}


def settings_of(preset, **changes):
    return dataclasses.replace(lock.preset(preset, OMEGA), **{"tau": 0.15, **changes})


@pytest.mark.parametrize("kappa, tau, references", [(9, 0.15, 0), (20, 0.03, 0), (9, 0.15, 1)])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_the_method(preset, kappa, tau, references):
    model, table = make_fake(), solvers.euler(STEPS, SHIFT)
    edits = make_edits(references=references)
    settings = settings_of(preset, kappa=kappa, tau=tau, **PRESETS[preset])
    latents, trace = run(model, edits, settings, table)
    for i in range(EDITS):
        want, rows = oracle(model, edits, i, settings, table, OMEGA)
        np.testing.assert_allclose(whole(latents)[i], want, rtol=2e-4, atol=2e-4)
        for field in dataclasses.fields(Trace):
            got = getattr(trace, field.name)
            got = got[:, i] if got.ndim > 1 else got
            expected = getattr(rows, field.name)
            np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-6, err_msg=field.name)
    alpha, omega = np.asarray(trace.fusion_ratio), np.asarray(trace.guidance_scale)
    if settings.enabled and settings.adapt_fusion_ratio:  # or no schedule was put to the test
        assert ((alpha > 0.02) & (alpha < 0.98)).sum() >= 4 if tau > 0.1 else (alpha == 1).any()
    if settings.adapt_guidance:
        middle = (omega > 1.01) & (omega < 5.9) & (omega != OMEGA)
        assert middle.sum() >= 4 if tau > 0.1 else (omega == 2 * OMEGA).any()


def test_the_lock_changes_the_edit():
    edits, table = make_edits(), solvers.euler(STEPS, SHIFT)
    outs = [run(make_fake(), edits, settings_of(n), table)[0] for n in ("hard_lock", "kv_only")]
    free = run(make_fake(), edits, settings_of("kv_only", kappa=0), table)[0]
    inside = np.asarray(edits.foreground)
    assert np.abs(outs[0] - free)[inside].max() > 0.05
    assert np.abs(outs[1] - free)[inside].max() > 0.01


# -- the source pass -----------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["euler", "unipc", "dpm++"])
def test_the_source_pass_is_at_the_level_of_the_step_with_the_noise_of_the_edit(solver):
    edits, table = make_edits(), solvers.table(solver, STEPS, SHIFT)
    edits = dataclasses.replace(edits, foreground=jnp.zeros_like(edits.foreground))
    settings = settings_of("hard_lock", background="model")
    got = run(Echo(), edits, settings, table)[0]
    # The velocity is the source branch's own latents, so the result is a sum that needs no model.
    state, z = solvers.init(edits.noise), edits.noise
    for k in range(STEPS):
        row = jax.tree.map(lambda column, k=k: column[k], table)
        at_level = (1 - row.sigma) * np.asarray(edits.source) + row.sigma * np.asarray(edits.noise)
        z, state = solvers.step(row, state, z, z - row.sigma * at_level)
    np.testing.assert_allclose(got, z, rtol=1e-5, atol=1e-5)


SOURCE_STEPS = {  # alpha over 0 is possible in these steps of 14
    "kvlock, the last kappa": (settings_of("kvlock", kappa=4), range(10, 14)),
    "kvlock, kappa over the steps": (settings_of("kvlock", kappa=99), range(14)),
    "kvlock, no window": (settings_of("kvlock", kappa=0), range(0)),
    "kvlock_anchor": (settings_of("kvlock_anchor", kappa=4), range(14)),
    "hard_lock": (settings_of("hard_lock"), range(14)),
    "only at first": (settings_of("hard_lock", kappa=11, fusion_ratio=0.0), range(3)),
    "fixed_half": (settings_of("fixed_half", kappa=5), range(9, 14)),
}
source_passes: list[float] = []


@pytest.mark.parametrize("case", SOURCE_STEPS)
def test_the_source_pass_runs_only_where_it_is_needed(case):
    settings, steps = SOURCE_STEPS[case]
    table = solvers.euler(STEPS, SHIFT)
    source_passes.clear()
    _, trace = run(make_fake(on_source=note_source_pass), make_edits(), settings, table)
    jax.block_until_ready(trace)
    jax.effects_barrier()
    assert sorted(source_passes, reverse=True) == [table.timestep[k] for k in steps]
    without = np.setdiff1d(np.arange(STEPS), np.array(steps))
    np.testing.assert_array_equal(np.asarray(trace.fusion_ratio)[without], 0)


def note_source_pass(timestep):
    source_passes.append(float(timestep))


def test_without_a_lock_there_is_no_source_branch():
    class Refusing(Fake):
        def keys_values(self, latents, timestep, conditioning):
            pytest.fail("a source pass")

    names = [field.name for field in dataclasses.fields(Fake)]
    jax.tree_util.register_dataclass(Refusing, names[:4], names[4:])
    model = Refusing(**{name: getattr(make_fake(), name) for name in names})
    plain = run(model, make_edits(), settings_of("cfg"))
    np.testing.assert_array_equal(plain[1].fusion_ratio, 0)
    # with a lock that is open all the way it is the same edit
    opened = run(make_fake(), make_edits(), settings_of("kv_only", kappa=0))
    np.testing.assert_allclose(plain[0], opened[0], rtol=1e-6, atol=1e-6)


# -- edits of a batch, and the state between steps -----------------------------------------------


@pytest.mark.parametrize("preset", ["kvlock", "kvlock_anchor", "apg"])
def test_edits_are_independent(preset):
    edits, settings = make_edits(), settings_of(preset, **PRESETS[preset])
    both, trace = run(make_fake(), edits, settings)
    for i in range(EDITS):
        alone, own = run(make_fake(), one_edit(edits, i), settings)
        np.testing.assert_allclose(both[i], alone[0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(trace.sigma2[:, i], own.sigma2[:, 0], rtol=1e-4, atol=1e-7)
    assert not np.allclose(trace.sigma2[2:, 0], trace.sigma2[2:, 1], rtol=0.05)

    # nothing of another edit gets in, not even what is no number
    spoiled = jax.tree.map(
        lambda x: x.at[len(x) // 2 :].set(jnp.nan) if x.dtype != bool else x, edits
    )
    got, broken = run(make_fake(), spoiled, settings)
    np.testing.assert_array_equal(got[0], both[0])
    np.testing.assert_array_equal(broken.sigma2[:, 0], trace.sigma2[:, 0])
    np.testing.assert_array_equal(broken.finite, [[True, False]] * STEPS)


@pytest.mark.parametrize("preset", ["kvlock", "kvlock_anchor", "cfg"])
def test_edits_of_one_source_share_its_branch(preset):
    edits, settings = make_edits(), settings_of(preset, kappa=9)
    shared = dataclasses.replace(
        edits,
        source=edits.source[:1],
        noise=edits.noise[:1],
        source_prompts=edits.source_prompts[:1],
    )
    table, model = solvers.euler(STEPS, SHIFT), make_fake()
    latents, trace = run(model, shared, settings, table)
    for i in range(EDITS):
        want, rows = oracle(model, shared, i, settings, table, OMEGA)
        np.testing.assert_allclose(whole(latents)[i], want, rtol=2e-4, atol=2e-4)
        np.testing.assert_allclose(trace.sigma2[:, i], rows.sigma2, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("preset", ["kvlock", "kvlock_anchor", "apg"])
def test_padding_changes_nothing(preset):
    edits, settings = make_edits(references=1), settings_of(preset, **PRESETS[preset])
    table = solvers.euler(STEPS, SHIFT)
    longer = Grid((T, H, W), LENGTH + 5)

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Padded:
        """Knows the padding as a transformer does, and answers anything there."""

        inner: Fake

        def condition(self, context, grid):
            assert grid == longer
            return self.inner.condition(context, GRID)

        def times(self, timestep):
            return timestep

        def __call__(self, latents, timestep, conditioning, lock=None):
            if lock is not None:
                cache = dataclasses.replace(lock.cache, latents=lock.cache.latents[:, :LENGTH])
                lock = dataclasses.replace(
                    lock, cache=cache, foreground=lock.foreground[:, :LENGTH]
                )
            velocity = self.inner(latents[:, :LENGTH], timestep, conditioning, lock)
            return jnp.pad(velocity, [(0, 0), (0, 5), (0, 0), (0, 0)], constant_values=7.0)

    cells = (longer.split(GRID.join(x)) for x in (edits.source, edits.noise))
    region = longer.split(whole(edits.foreground[..., None])[..., 0])
    padded = Edits(*cells, region, edits.prompts, edits.source_prompts, longer, 1)
    got, steps_trace = run(Padded(make_fake()), padded, settings, table)
    want, trace = run(make_fake(), edits, settings, table)
    np.testing.assert_allclose(longer.join(got), whole(want), rtol=1e-5, atol=1e-6)
    assert not got[:, LENGTH:].any()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), steps_trace, trace
    )


@pytest.mark.parametrize("solver", ["euler", "unipc", "dpm++"])
@pytest.mark.parametrize("preset", ["hard_lock", "kvlock_anchor"])
def test_a_pinned_background_is_the_source_bit_for_bit(preset, solver):
    edits = make_edits()
    latents, _ = run(
        make_fake(), edits, settings_of(preset), solvers.table(solver, STEPS, SHIFT), 7.5
    )
    outside = ~np.asarray(edits.foreground)
    np.testing.assert_array_equal(np.asarray(latents)[outside], np.asarray(edits.source)[outside])
    assert np.abs(latents - edits.source)[~outside].min() > 0


def test_sixteen_bits_in_float32_inside():
    edits = make_edits()
    short = dataclasses.replace(
        edits, source=edits.source.astype(jnp.bfloat16), noise=edits.noise.astype(jnp.bfloat16)
    )
    wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, short)
    table, knobs = solvers.euler(STEPS, SHIFT), lock.knobs(settings_of("kvlock_anchor"), OMEGA)
    program = Program.of(settings_of("kvlock_anchor"))
    start = jnp.array(wide.noise, copy=True)
    got, trace = sample(make_fake(), start, short, table, knobs, program=program)
    want, _ = run(make_fake(), wide, settings_of("kvlock_anchor"), table)
    assert got.dtype == trace.sigma2.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


# -- compilation, the carry, the trace -----------------------------------------------------------

traces: list[object] = []


def test_one_program_serves_every_setting():
    model = make_fake(on_trace=traces.append)
    run(model, make_edits(), settings_of("kvlock"))
    size, traced = sample._cache_size(), len(traces)
    assert traced > 0
    runs = [
        (make_edits(7), settings_of("kvlock"), None, OMEGA),  # prompts, masks, noise
        (make_edits(), settings_of("kvlock", tau=0.5, kappa=3, omega_floor=0.5), None, 1.5),
        (make_edits(), settings_of("kvlock", omega_ceiling=1.0), solvers.euler(STEPS, 9.0), 0.0),
        (make_edits(), settings_of("kvlock"), solvers.unipc(STEPS, 5.0), OMEGA),
        (make_edits(), settings_of("kvlock"), solvers.dpmpp_2m(STEPS, 5.0), OMEGA),
        *(
            (make_edits(), settings_of(name), None, OMEGA)
            for name in ("fixed_half", "kv_only", "global_detection")
        ),
    ]
    outs = [run(model, edits, *rest)[0] for edits, *rest in runs]
    run(make_fake(3, on_trace=traces.append), make_edits(), settings_of("kvlock"))  # weights
    assert (sample._cache_size(), len(traces)) == (size, traced)
    for i, out in enumerate(outs):  # each setting had its effect
        assert all(np.abs(out - other).max() > 1e-4 for other in outs[:i]), i

    run(model, make_edits(), settings_of("kvlock"), solvers.euler(STEPS + 1, SHIFT))
    assert sample._cache_size() == size + 1 and len(traces) > traced


@pytest.mark.parametrize("preset", ["kvlock", "carried", "apg"])
def test_step_by_step_is_the_loop(preset):
    settings, steps = settings_of("kvlock" if preset == "carried" else preset), []
    if preset == "carried":
        settings = dataclasses.replace(settings, cache="carried")
    whole = run(make_fake(), make_edits(), settings)
    parts = run(make_fake(), make_edits(), settings, on_step=steps.append)
    assert [step.number for step in steps] == list(range(STEPS))
    np.testing.assert_allclose(steps[-1].estimate(), GRID.join(parts[0]), rtol=1e-6, atol=1e-6)
    told = jax.tree.map(lambda *rows: np.stack(rows), *(step.trace for step in steps))
    jax.tree.map(np.testing.assert_array_equal, told, parts[1])
    for got, want in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)
    size = advance._cache_size()
    run(make_fake(), make_edits(), settings, solvers.euler(STEPS + 1, SHIFT), on_step=nobody)
    assert advance._cache_size() == size  # a step is the same program in a run of any length


def test_an_estimate_is_of_the_video_alone():
    cells = np.arange(GRID.tokens * 4, dtype=np.float32).reshape(1, *GRID.space, 1)
    window = lock.push(X0Window.zeros(3, GRID.split(cells).shape), GRID.split(cells + 1))
    window = lock.push(window, GRID.split(cells))
    np.testing.assert_array_equal(_estimate(window, GRID, 2), cells[:, 2:])


log: list[tuple[str, float]] = []


def note_step(step):
    log.append(("step", int(step.number)))


def note_model(timestep):
    log.append(("model", timestep))


def test_each_step_is_reported_after_it_is_done():
    log.clear()
    table = solvers.euler(STEPS, SHIFT)
    model = make_fake(on_model=note_model)
    out = run(model, make_edits(), settings_of("cfg"), table, on_step=note_step)
    jax.block_until_ready(out)
    jax.effects_barrier()
    steps = [(("model", float(table.timestep[k])), ("step", k)) for k in range(STEPS)]
    assert log == [entry for pair in steps for entry in pair]


def test_the_latents_are_donated():
    edits, settings = make_edits(), settings_of("kvlock")
    latents = jnp.array(edits.noise, copy=True)
    program = Program.of(settings)
    table = solvers.euler(STEPS, SHIFT)
    sample(make_fake(), latents, edits, table, lock.knobs(settings, OMEGA), program=program)
    assert latents.is_deleted()
    assert not edits.noise.is_deleted() and not edits.source.is_deleted()


@pytest.mark.parametrize("first", [0, 6, STEPS - 1])
def test_the_first_step_that_is_not_finite_is_told(first):
    table = solvers.euler(STEPS, SHIFT)
    limit = float(table.timestep[first]) + 1e-3  # this step and all after it are under it
    model = make_fake(limit=jnp.float32(limit))
    # at guidance 1 infinity comes through; else it may meet its own opposite
    latents, trace = run(model, make_edits(), settings_of("cfg"), table, omega=1.0)
    np.testing.assert_array_equal(trace.finite, [[k < first] * EDITS for k in range(STEPS)])
    assert not np.isfinite(latents).any()


@pytest.mark.parametrize("cache", ["fused", "carried"])
def test_the_carry_holds_one_step_and_the_trace_no_latents(cache):
    edits, settings = make_edits(), settings_of("kvlock", cache=cache)
    args = (make_fake(), jnp.array(edits.noise, copy=True), edits, solvers.euler(STEPS, SHIFT))
    knobs, program = lock.knobs(settings, OMEGA), Program.of(settings)
    latents, trace = jax.eval_shape(lambda *a: sample(*a, program=program), *args, knobs)
    assert (latents.shape, latents.dtype) == (edits.noise.shape, jnp.float32)
    per_step = {"sigma": (STEPS,), "scheduled": (STEPS,)}
    for field in dataclasses.fields(Trace):
        expected = per_step.get(field.name, (STEPS, EDITS))
        assert getattr(trace, field.name).shape == expected

    jaxpr = jax.make_jaxpr(lambda *a: sample(*a, program=program))(*args, knobs)
    (scan,) = scans(jaxpr.jaxpr, STEPS)
    outs = [variable.aval for variable in scan.outvars]
    carried, stacked = outs[: scan.params["num_carry"]], outs[scan.params["num_carry"] :]
    assert all(out.size <= STEPS * EDITS for out in stacked)
    # latents, the solver's sample and two estimates, the window; at most one of keys and values
    elements = int(np.prod(SHAPE)) * (1 + 3 + WINDOW)
    elements += (cache == "carried") * 2 * LAYERS * EDITS * LENGTH * WIDTH
    scalars = 1 + EDITS  # the window's count, the statistic
    assert sum(out.size for out in carried) in (elements + scalars, elements + scalars + 1)


def scans(jaxpr, length):
    """Every scan of this length, however deep in calls."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan" and equation.params["length"] == length:
            yield equation
        elif "jaxpr" in equation.params:
            inner = equation.params["jaxpr"]
            yield from scans(getattr(inner, "jaxpr", inner), length)
