"""Kinds of passes: with a cache or beside the source's, over all tokens or the foreground's."""

import dataclasses
import functools

import fresh
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvlock_jax import lock
from kvlock_jax.grid import Grid
from kvlock_jax.models.wan.config import WanConfig
from kvlock_jax.models.wan.vace import VACEContext, wan_transformer
from kvlock_jax.sampling import solvers
from kvlock_jax.sampling.edits import Edits, bucket
from kvlock_jax.sampling.loop import Program, sample
from kvlock_jax.settings.schema import LockConfig

T2V = WanConfig(2, 12, 3, 40, 4, 4, text_dim=16, freq_dim=8)
VACE = dataclasses.replace(T2V, vace_layers=(0, 2), vace_in_channels=6)
MODELS = {"t2v": T2V, "vace": VACE}
SPACE, SOURCES, STEPS, TEXT = (5, 8, 8), 2, 6, 7
GRID = Grid(SPACE, 80)
OMEGA, SHIFT = 3.0, 3.0


@functools.cache
def network(config):
    return fresh.module(lambda: wan_transformer(config, rngs=nnx.Rngs(0)))


def given(config, each=1, references=0) -> Edits:
    """Two sources with some edits each, whose foregrounds are of different sizes."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    source, noise = (GRID.split(normal(SOURCES, *SPACE, 4)) for _ in range(2))
    edits = SOURCES * each
    foreground = np.zeros((edits, *SPACE), bool)
    for n in range(edits):
        foreground[n, max(1, references) :, 1 : 3 + n, 3:6] = True
    texts, source_texts = normal(2 * edits, TEXT, 16), normal(SOURCES, TEXT, 16)
    if config.vace_layers:
        control = GRID.split(normal(SOURCES, *SPACE, 6))
        wide = jnp.repeat(control, each, axis=0)
        texts = VACEContext(texts, wide, jnp.linspace(0.5, 1, edits))
        source_texts = VACEContext(source_texts, control, jnp.ones(SOURCES))
    cells = GRID.split(jnp.asarray(foreground)[..., None])[..., 0]
    return Edits(source, noise, cells, texts, source_texts, GRID, references)


def run(config, edits, settings, tokens=None, omega=OMEGA, branches=2):
    program = Program.of(settings, tokens, branches=branches)
    start = jnp.array(edits.spread(edits.noise), copy=True)
    table, knobs = solvers.unipc(STEPS, SHIFT), lock.knobs(settings, omega)
    return sample(network(config), start, edits, table, knobs, program=program)


def preset(name, **changes):
    changes = {"tau": 0.5, "window": 3, "kappa": 4} | changes
    return dataclasses.replace(lock.preset(name, OMEGA), **changes)


def relative(found, wanted):
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


# Some combinations of a model, a preset and a number of edits to a source.
@pytest.mark.parametrize(
    "model, name, each",
    [
        ("t2v", "kvlock", 1),
        ("vace", "kvlock", 2),
        ("t2v", "kvlock_anchor", 2),
        ("vace", "kvlock_anchor", 1),
        ("t2v", "fixed_half", 1),
    ],
)
def test_fused_is_carried(model, name, each):
    config = MODELS[model]
    edits = given(config, each)
    wanted, trace = run(config, edits, preset(name, cache="carried"))
    found, steps_trace = run(config, edits, preset(name))
    assert relative(found, wanted) < 1e-6
    np.testing.assert_allclose(steps_trace.sigma2, trace.sigma2, rtol=1e-5)
    assert np.asarray(steps_trace.fusion_ratio).any()


# Each pair of two of these, but not each combination of all.
@pytest.mark.parametrize(
    "model, cache, name, each, references",
    [
        ("t2v", "fused", "hard_lock", 1, 0),
        ("t2v", "carried", "kvlock_anchor", 2, 1),
        ("vace", "fused", "kvlock_anchor", 2, 1),
        ("vace", "carried", "hard_lock", 2, 1),
        ("vace", "carried", "kvlock_anchor", 1, 0),
    ],
)
def test_the_foreground_alone_is_enough(model, cache, name, each, references):
    config = MODELS[model]
    edits = given(config, each, references)
    settings = preset(name, cache=cache)
    tokens = bucket(int(edits.own.sum(axis=1).max()), GRID)
    assert tokens < GRID.length
    wanted, trace = run(config, edits, settings)
    found, steps_trace = run(config, edits, settings, tokens)
    assert relative(found, wanted) < 1e-5
    np.testing.assert_allclose(steps_trace.sigma2, trace.sigma2, rtol=1e-4, atol=1e-7)
    if name == "kvlock_anchor":  # both kinds of steps were there
        locked = np.asarray((steps_trace.fusion_ratio == 1).all(axis=1))
        assert locked.any() and not locked.all()


@pytest.mark.parametrize("cache, references", [("fused", 0), ("carried", 1)])
def test_locked_contexts(cache, references):
    """Fused as carried, and over the foreground as over all tokens; unlocked ones differ."""
    edits = given(VACE, 2, references)
    settings = preset("kvlock_anchor", lock_contexts=True)
    tokens = bucket(int(edits.own.sum(axis=1).max()), GRID)
    wanted, _ = run(VACE, edits, settings)
    found, trace = run(VACE, edits, dataclasses.replace(settings, cache=cache), tokens)
    assert relative(found, wanted) < 1e-5
    locked = np.asarray((trace.fusion_ratio == 1).all(axis=1))
    assert locked.any() and not locked.all()
    others, _ = run(VACE, edits, dataclasses.replace(settings, lock_contexts=False))
    assert relative(others, wanted) > 1e-3


@pytest.mark.parametrize("model, cache", [("t2v", "fused"), ("vace", "carried")])
def test_a_step_without_guidance_leaves_out_the_unconditional_branch(model, cache):
    """Omega falls from 3 to its floor of 1, where both programs give the same."""
    config = MODELS[model]
    edits = given(config, 2)
    settings = preset("kvlock_anchor", tau=1e3, cache=cache)
    wanted, trace = run(config, edits, settings)
    found, steps_trace = run(config, edits, dataclasses.replace(settings, skip_guidance=True))
    omega = np.asarray(steps_trace.guidance_scale)
    assert (omega == 1).all(axis=1).any() and (omega == OMEGA).all(axis=1).any()
    np.testing.assert_array_equal(omega, np.where(np.abs(omega - 1) <= 0.02, 1, omega))
    np.testing.assert_allclose(trace.guidance_scale, omega, rtol=0, atol=0.02)
    assert relative(found, wanted) < 1e-5


@pytest.mark.parametrize("model, name", [("t2v", "kvlock_anchor"), ("vace", "kvlock")])
def test_without_guidance_every_step_computes_one_branch(model, name):
    """At omega 1 both programs give the same; the lock's ratio follows the statistic in both."""
    edits, settings = given(MODELS[model], 2), preset(name, adapt_guidance=False)
    wanted, wanted_trace = run(MODELS[model], edits, settings, omega=1.0)
    found, trace = run(MODELS[model], edits, preset(name), omega=1.0, branches=1)
    assert relative(found, wanted) < 1e-6
    assert (trace.guidance_scale == 1).all()
    np.testing.assert_allclose(trace.fusion_ratio, wanted_trace.fusion_ratio, atol=1e-6)
    assert len(np.unique(trace.fusion_ratio)) > 2


def test_background_that_is_not_computed_is_the_sources():
    edits = given(T2V)
    found, _ = run(T2V, edits, preset("hard_lock"), 40)
    outside = ~np.asarray(edits.foreground)
    np.testing.assert_array_equal(np.asarray(found)[outside], np.asarray(edits.source)[outside])


def test_one_program_serves_masks_of_a_bucket():
    settings = preset("hard_lock")
    edits, more = given(T2V), given(T2V)
    more = dataclasses.replace(more, foreground=jnp.roll(more.foreground, 16, axis=1))
    run(T2V, edits, settings, 40)
    size = sample._cache_size()
    run(T2V, more, settings, 40)
    assert sample._cache_size() == size


@pytest.mark.parametrize(
    "name, kinds",
    [
        ("kvlock", ("plain", "full")),
        ("fixed_half", ("plain", "full")),
        ("kvlock_anchor", ("full", "foreground")),
        ("hard_lock", ("foreground",)),
        ("cfg", ("plain",)),
        ("apg", ("plain",)),
    ],
)
def test_what_is_known_before_a_run_is_not_a_choice_in_it(name, kinds):
    assert lock.passes(lock.preset(name, 5.0)) == kinds


def test_injected_steps_that_keep_the_foreground_compute_it_alone():
    settings = dataclasses.replace(
        lock.preset("hard_lock", 5.0), warmup_fusion_ratio=0.0, fusion_ratio=0.0, injected_steps=2
    )
    injecting = dataclasses.replace(settings, foreground_ratio=0.0)
    assert lock.passes(injecting) == ("plain", "foreground")
    assert lock.passes(dataclasses.replace(settings, foreground_ratio=0.1)) == ("plain", "full")


@pytest.mark.parametrize(
    "changes", [{"background": "model"}, {"detection": "global"}, {"guidance": "apg"}]
)
def test_the_background_counts_for_more_than_its_keys(changes):
    settings = dataclasses.replace(lock.preset("hard_lock", 5.0), **changes)
    assert lock.passes(settings) == ("full",)


def test_without_tokens_all_are_computed():
    settings = lock.preset("kvlock_anchor", 5.0)
    assert Program.of(settings).passes == ("full",)
    assert Program.of(settings, 5).passes == ("full", "foreground")
    assert Program.of(lock.preset("kvlock", 5.0), 5).tokens is None
    assert Program.of(lock.preset("cfg", 5.0)) == Program(("plain",), "cfg", 10)
    assert Program.of(LockConfig(cache="carried")).carried
    assert not Program.of(LockConfig(cache="carried", enabled=False)).carried


@pytest.mark.parametrize("tokens, found", [(0, 2), (1, 2), (3, 4), (4, 4), (60, 60), (61, None)])
def test_tokens_are_bucketed(tokens, found):
    assert bucket(tokens, GRID) == found


def refreshed(needed, every):
    """In words: anew at the first of steps in a row, and at each `every`th after it."""
    found, since = [], None
    for step in needed:
        since = (0 if since is None else since + 1) if step else None
        found.append(since is not None and since % every == 0)
    return found


@pytest.mark.parametrize("every", [1, 2, 3, 20])
def test_a_cache_serves_some_steps(every):
    rng = np.random.default_rng(every)
    for needed in (rng.random(30) < 0.8, np.ones(30, bool), np.zeros(30, bool)):
        found = lock.refreshed(jnp.asarray(needed), every)
        assert found.tolist() == refreshed(needed, every)


def test_a_cache_that_serves_longer_changes_the_result():
    edits = given(T2V)
    once, twice = (
        run(T2V, edits, preset("fixed_half", cache="carried", cache_every=n))[0] for n in (1, 2)
    )
    assert 1e-5 < relative(twice, once) < 0.2
