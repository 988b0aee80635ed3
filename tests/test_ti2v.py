"""Wan 2.2's 5B: timesteps per token and the clean background, against the publisher's own runs."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import loops
import numpy as np
import pytest
import torch
from peers import pair
from test_experts import CONFIG, arrays, expert, last, relative, texts
from test_wan import CASES, inputs

from kvlock_jax import lock
from kvlock_jax.grid import Grid
from kvlock_jax.models.wan import block
from kvlock_jax.sampling import solvers
from kvlock_jax.sampling.edits import Edits
from kvlock_jax.sampling.program import Program
from kvlock_jax.sampling.stepwise import stepwise


def given():
    return arrays("ti2v"), jnp.asarray(texts(arrays("ti2v"), CONFIG["ti2v"]["text_len"]))


def velocity(latents, time, text):
    model, grid = expert("ti2v", "ti2v"), Grid.of(latents.shape[1:])
    z = grid.split(jnp.asarray(last(latents)[None]))

    @jax.jit
    def run(model, z, time, text):
        return model(z, time(model), model.condition(text, grid))

    got = run(model, z, jax.tree_util.Partial(time), text[:1])
    return np.moveaxis(np.asarray(grid.join(got))[0], -1, 0)


def test_one_timestep_equals_the_publisher():
    data, text = given()
    timestep = jnp.asarray(data["timestep"], jnp.float32)
    got = velocity(data["latents"], lambda model: model.times(timestep), text)
    assert relative(got, data["velocity"]) < 1e-5


@pytest.mark.parametrize("name", ["video", "image", "any"])
@pytest.mark.parametrize("at_once", [4096, 7])
def test_timesteps_of_tokens_equal_the_publisher(name, at_once, monkeypatch):
    monkeypatch.setattr(block, "FEED_FORWARD_TOKENS", at_once)
    data, text = given()
    distinct, number = np.unique(data[f"timesteps_{name}"][0], return_inverse=True)
    assert len(distinct) == {"video": 1, "image": 2}.get(name, len(distinct))

    def time(model):
        times = jax.tree.map(lambda x: x[None], model.times(jnp.asarray(distinct)))
        return model.per_token(times, jnp.asarray(number, jnp.int32)[None])

    got = velocity(data["latents"], time, text)
    assert relative(got, data[f"velocity_{name}"]) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_timesteps_of_tokens_equal_diffusers(name):
    """Rows of tokens at two timesteps, as its image loop has them, and one of many."""
    peer, ours = pair(CASES[name].config, jnp.float32)
    latents, _, context = inputs(name)
    grid = Grid.of(latents.shape[1:4], ours.config.patch_size)
    rng, rows = np.random.default_rng(4), len(latents)
    distinct = np.sort(rng.uniform(0, 1000, (rows, 2 if rows > 1 else 5)), axis=1)
    number = rng.integers(0, distinct.shape[1], (rows, grid.length))
    timesteps = np.take_along_axis(distinct, number, axis=1).astype(np.float32)
    with torch.no_grad():
        arrays = [torch.tensor(np.asarray(a)) for a in (latents, timesteps, context)]
        want = peer(arrays[0].permute(0, 4, 1, 2, 3), *arrays[1:]).sample

    @jax.jit
    def run(model, z, distinct, number, context):
        times = model.times(distinct.reshape(-1))
        times = jax.tree.map(lambda x: x.reshape(*distinct.shape, *x.shape[1:]), times)
        return model(z, model.per_token(times, number), model.condition(context, grid))

    args = (jnp.asarray(distinct, jnp.float32), jnp.asarray(number, jnp.int32), context)
    got = np.asarray(grid.join(run(ours, grid.split(latents), *args)))
    assert relative(got, want.permute(0, 2, 3, 4, 1).numpy()) < 1e-5


@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
@pytest.mark.parametrize("kind", ["video", "image"])
def test_runs_equal_the_publisher(kind, solver):
    """Its image loop is an edit of all frames but the first, whose background is clean."""
    (data, text), settings = given(), CONFIG["ti2v_run"]
    table = solvers.table(solver, settings["steps"], settings["shift"], "plain")
    key = f"run_{kind}_{solver}"
    noise = last(data[f"{key}_x"][0])[None]
    grid, foreground = Grid.of(noise.shape[1:4]), np.ones(noise.shape[:4], bool)
    source = noise.copy()
    if kind == "image":
        source[:, :1] = last(data["image_latents"])
        foreground[:, 0] = False
    cells = [grid.split(jnp.asarray(x)) for x in (source, noise, foreground)]
    edits = Edits(*cells, text, text[1:], grid)
    plain = lock.preset("clean", settings["guide_scale"])
    edited, trace = stepwise(
        lambda number: contextlib.nullcontext(expert("ti2v", "ti2v")),
        *(jnp.array(cells[1]), edits, table, lock.knobs(plain, settings["guide_scale"])),
        program=Program.of(plain),
    )
    assert trace.finite.all()
    got = np.moveaxis(np.asarray(grid.join(edited))[0], -1, 0)
    assert relative(got, data[f"{key}_latents"]) < 1e-5


# -- the clean background on a model of a few lines ----------------------------------------------


def clean(**changes):
    return dataclasses.replace(lock.preset("clean_anchor", loops.OMEGA), **changes)


@pytest.mark.parametrize("by_step", [False, True])
def test_the_background_stays_clean(by_step):
    """Cells of background tokens are the source's, bit by bit; others are pinned at sigma 0 too."""
    edits = loops.make_edits()
    latents, trace = loops.run(
        loops.make_fake(), edits, clean(), on_step=loops.nobody if by_step else None
    )
    kept = ~np.asarray(edits.foreground)
    np.testing.assert_array_equal(np.asarray(latents)[kept], np.asarray(edits.source)[kept])
    assert (
        trace.finite.all() and (np.asarray(latents)[~kept] != np.asarray(edits.source)[~kept]).all()
    )


def test_a_foreground_pass_equals_one_over_all_tokens():
    """Of the 5B's transformer, whose computed tokens keep the timesteps that they have."""
    (data, text), model = given(), expert("ti2v", "ti2v")
    noise = last(data["run_image_unipc_x"][0])[None]
    source = np.random.default_rng(0).normal(size=noise.shape).astype(np.float32)
    foreground = np.zeros(noise.shape[:4], bool)
    foreground[:, 1:, 1:3, 2:5] = True
    grid = Grid.of(noise.shape[1:4])
    cells = [grid.split(jnp.asarray(x)) for x in (source, noise, foreground)]
    edits = Edits(*cells, text, text[1:], grid)
    firm = clean(adapt_fusion_ratio=False, fusion_ratio=1.0)
    table, knobs, made = solvers.unipc(3, 5.0), lock.knobs(firm, 5.0), {}
    for tokens in (None, 12):  # of which 8 are the foreground's
        program = Program.of(firm, tokens)
        args = (jnp.array(cells[1]), edits, table, knobs)
        edited, _ = stepwise(lambda number: contextlib.nullcontext(model), *args, program=program)
        made[program.passes] = np.asarray(grid.join(edited))
    want, got = made["full",], made["foreground",]
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_array_equal(got[~foreground], source[~foreground])
