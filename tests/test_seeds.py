"""Several seeds of one edit: the rows of their batch, and the statistic that they share."""

import dataclasses

import edits as one
import jax
import jax.numpy as jnp
import loops
import numpy as np
import pytest

import kvlock_jax as kvl
from kvlock_jax import lock
from kvlock_jax.evaluate import metrics
from kvlock_jax.parallel.mesh import make_mesh
from kvlock_jax.pipeline import stages
from kvlock_jax.pipeline.inputs import EditInputs
from kvlock_jax.pipeline.seeds import batch_rows, further_noise
from kvlock_jax.pipeline.settings import resolve_settings

SPACE = (2, 4, 6, 4)


def batch(edits, sources, seeds):
    """Inputs named by their number, settings, and noise."""
    config = one.config_of()
    config.kvlock.pool_seeds = seeds
    inputs = [EditInputs(one.CLIP, one.MASK, None, str(n)) for n in range(edits)]
    noise = np.random.default_rng(0).standard_normal((sources, *SPACE)).astype(np.float32)
    return inputs, [resolve_settings(config)] * edits, noise


def test_one_seed_changes_nothing():
    inputs, settings, noise = batch(3, 3, 1)
    rows = batch_rows(inputs, settings, noise, make_mesh(data=2, devices=jax.devices()[:2]))
    assert rows.inputs is inputs and rows.noise is noise and rows.pools is None
    assert list(rows.results) == [0, 1, 2]


@pytest.mark.parametrize("sources, each, seeds, data", [(1, 1, 3, 1), (2, 2, 3, 1), (2, 2, 3, 4)])
def test_every_edit_has_a_row_for_each_seed(sources, each, seeds, data):
    inputs, settings, noise = batch(sources * each, sources, seeds)
    mesh = make_mesh(data=data, devices=jax.devices()[:data]) if data > 1 else None
    rows = batch_rows(inputs, settings, noise, mesh)
    assert len(rows.inputs) == len(rows.settings) == len(rows.pools) == len(rows.noise) * each
    assert len(rows.noise) == -(-sources * seeds // data) * data
    for n, row in enumerate(rows.results):
        assert rows.inputs[row] is inputs[n]
        np.testing.assert_array_equal(rows.noise[row // each], noise[n // each])
        pool = np.flatnonzero(rows.pools == rows.pools[row])
        assert len(pool) == seeds and all(rows.inputs[r] is inputs[n] for r in pool)
        drawn = [rows.noise[r // each] for r in pool]
        for i, a in enumerate(drawn):
            assert all(np.abs(a - b).max() > 0.1 for b in drawn[:i])
    copies = len(rows.noise) - seeds * sources
    assert len(set(rows.pools.tolist())) == len(inputs) + each * copies


def test_further_noise_depends_on_the_noise_and_its_number_alone():
    noise = np.random.default_rng(0).standard_normal((2, 64, 50)).astype(np.float32)
    more = np.asarray(further_noise(noise, 1))
    np.testing.assert_array_equal(more[1:], further_noise(noise[1:], 1))
    np.testing.assert_array_equal(more, jax.jit(further_noise, static_argnums=1)(noise, 1))
    other = np.asarray(further_noise(noise, 2))
    assert abs(more.mean()) < 0.05 and abs(more.std() - 1) < 0.05
    for a, b in ((more[0], more[1]), (more[0], other[0]), (more[0], noise[0])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.06


def test_rows_of_one_pool_go_by_their_average():
    settings = lock.preset("cfg", loops.OMEGA)  # the statistic moves nothing
    model, edits = loops.make_fake(), loops.make_edits()
    latents, alone = loops.run(model, edits, settings)
    pooled = dataclasses.replace(edits, pools=np.zeros(loops.EDITS, np.int32))
    same, together = loops.run(model, pooled, settings)
    np.testing.assert_array_equal(same, latents)
    average = np.asarray(alone.sigma2, np.float64).mean(axis=1, keepdims=True)
    np.testing.assert_allclose(together.sigma2, np.repeat(average, 2, axis=1), rtol=1e-6)
    apart = dataclasses.replace(edits, pools=np.arange(loops.EDITS, dtype=np.int32))
    np.testing.assert_array_equal(loops.run(model, apart, settings)[1].sigma2, alone.sigma2)


def test_the_first_seed_is_the_edit_and_the_ceiling_is_the_round_trip(model):
    """Without lock or schedule the seeds share numbers, but no picture."""
    plain = one.edit(model, config=one.config_of("s_only"))
    config = one.config_of("s_only", ceiling=True)
    config.kvlock.pool_seeds = 2
    result = one.edit(model, config=config)
    # two programs, of one row and of two, which may order the terms of a sum differently
    assert np.abs(result.video.astype(int) - plain.video).max() <= 1
    assert result.trace.sigma2.shape == plain.trace.sigma2.shape
    assert (result.trace.sigma2[2:] != plain.trace.sigma2[2:]).all()
    trip = kvl.round_trip(model, one.CLIP)
    wanted = metrics.background_psnr(one.CLIP, trip, one.MASK)
    assert result.metrics.background_ceiling == wanted
    assert plain.metrics.background_ceiling is None


def test_the_shifted_start_does_not_see_padding():
    edits = loops.make_edits()
    longer = dataclasses.replace(loops.GRID, length=loops.LENGTH + 6)
    pad = {
        n: jnp.pad(getattr(edits, n), [(0, 0), (0, 6), (0, 0), (0, 0)]) for n in ("source", "noise")
    }
    mask = jnp.pad(edits.foreground, [(0, 0), (0, 6), (0, 0)])
    padded = dataclasses.replace(edits, **pad, foreground=mask, grid=longer)
    start = np.asarray(stages._shifted_start(edits, jnp.float32(0.25)))
    found = np.asarray(stages._shifted_start(padded, jnp.float32(0.25)))
    np.testing.assert_allclose(found[:, : loops.LENGTH], start, atol=1e-6)
    assert not found[:, loops.LENGTH :].any()
    moved = (start != np.asarray(edits.noise)).any(axis=-1)
    np.testing.assert_array_equal(moved, np.asarray(edits.foreground).reshape(moved.shape))
