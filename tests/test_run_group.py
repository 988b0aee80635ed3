"""Edits that run together on a tiny model: what they share, and that nothing of it shows."""

import dataclasses
from fractions import Fraction

import jax
import numpy as np
import pytest
import tiny

import kvlock_jax as kvl
from kvlock_jax.batch import runner
from kvlock_jax.errors import SamplingError
from kvlock_jax.models.vae import autoencoder
from kvlock_jax.parallel.mesh import make_mesh
from kvlock_jax.pipeline import stages
from kvlock_jax.pipeline.api import run_batch
from kvlock_jax.pipeline.encode import draw_noise
from kvlock_jax.pipeline.inputs import EditInputs
from kvlock_jax.pipeline.settings import resolve_settings
from kvlock_jax.settings.schema import run_config

OTHER = tiny.clip()[:, ::-1].copy()
MASK = tiny.mask()[..., 0] > 127
BELOW = MASK[:, ::-1]


@pytest.fixture(scope="module")
def model(tiny_vace_checkpoint):
    return kvl.load(tiny_vace_checkpoint)


def given(prompt="a blue star", clip=OTHER, mask=MASK):
    return EditInputs(clip, mask, Fraction(16), prompt)


def settings(**edit_settings):
    config = run_config("kvlock_anchor", steps=2, shift=3.0, guidance_scale=4.0)
    config.edit.update(edit_settings)
    return resolve_settings(config)


def key(name):
    return runner.edit_key(0, name)


@pytest.fixture
def seen(monkeypatch):
    """How many clips were encoded, and sources and edits of each loop."""
    found = {"encoded": [], "loops": []}
    encode, loop_of = autoencoder.encode, stages.Loop.of

    def counted(network, video, *rest):
        found["encoded"].append(len(video))
        return encode(network, video, *rest)

    def recorded(network, settings, edits, *rest):
        found["loops"].append((len(edits.source), len(edits.foreground)))
        return loop_of(network, settings, edits, *rest)

    monkeypatch.setattr("kvlock_jax.models.vae.autoencoder.encode", counted)
    monkeypatch.setattr(stages.Loop, "of", recorded)
    return found


def alone(model, one, own, k):
    (result,) = runner.run_group(model, [one], [own], [k])
    return result


def same(one, other):
    np.testing.assert_array_equal(one.source, other.source)
    assert np.abs(one.video.astype(int) - other.video).max() <= 1
    np.testing.assert_allclose(one.trace.sigma2, other.trace.sigma2, rtol=1e-4, atol=1e-8)


def test_edits_of_a_source_and_a_noise_share_its_branch_and_encodings(model, seen):
    clip = tiny.clip()
    edits = [
        given("a blue star", clip),
        given("a red circle"),
        given("a red square", clip),
        given("a red star", mask=BELOW),
    ]
    keys = [key("a"), key("b"), key("a"), key("b")]
    results = runner.run_group(model, edits, [settings()] * 4, keys)
    # two sources; the first under one mask, the second under two; one clip that is blank
    assert seen == {"encoded": [1] * 6, "loops": [(2, 4)]}
    for one, k, result in zip(edits, keys, results, strict=True):
        same(result, alone(model, one, settings(), k))


def test_what_differs_has_a_branch_of_its_own(model, seen):
    clip = tiny.clip()
    edits = [given("a blue star", clip), given("a red circle", clip)]
    for keys, own in (
        ([key("a"), key("b")], [settings()] * 2),
        ([key("a")] * 2, [settings(), settings(source_prompt="a red star")]),
    ):
        results = runner.run_group(model, edits, own, keys)
        for one, s, k, result in zip(edits, own, keys, results, strict=True):
            same(result, alone(model, one, s, k))
    assert [loop for loop in seen["loops"] if loop != (1, 1)] == [(2, 2)] * 2


def test_sources_have_as_many_edits_as_all_can(model, monkeypatch):
    clip, prompts = tiny.clip(), ["a star", "a circle", "a square", "red"]
    edits = [given(p, clip) for p in prompts] + [given(p) for p in prompts[:2]]
    batches = []

    def recorded(model, inputs, settings, noise):
        batches.append((len(noise), [edit.prompt for edit in inputs]))
        return list(inputs)

    monkeypatch.setattr(runner, "run_batch", recorded)
    assert runner.run_group(model, edits, [settings()] * 6, [key("a")] * 6) == edits
    assert batches == [(3, [*prompts, *prompts[:2]])]


def test_over_devices_no_source_is_split_unevenly(tiny_vace_checkpoint, model, seen):
    mesh = make_mesh(2, 4, 1)
    spread = kvl.load(tiny_vace_checkpoint, mesh=mesh)
    clip = tiny.clip()
    edits = [given("a star", clip), given("a circle", clip), given("a square", clip)]
    keys = [key("a")] * 3
    results = runner.run_group(spread, edits, [settings()] * 3, keys)
    assert seen["loops"] == [(4, 4)] and len(results) == 3  # the last is there twice
    assert set(seen["encoded"]) == {2}  # one for each of the mesh's data
    for one, k, result in zip(edits, keys, results, strict=True):
        same(result, alone(model, one, settings(), k))


def test_sizes_that_are_one_to_the_model(model):
    """Each is padded and cut by itself."""
    clip = tiny.clip()
    edits = [given(clip=clip), given(clip=clip[:, :-3], mask=MASK[:, :-3])]
    keys = [key("a"), key("b")]
    results = runner.run_group(model, edits, [settings()] * 2, keys)
    for one, k, result in zip(edits, keys, results, strict=True):
        assert result.video.shape == one.source.shape
        same(result, alone(model, one, settings(), k))


def test_an_edit_that_diverges_takes_no_other_along(model):
    edits, own = [given(), given("a red circle")], [settings()] * 2
    noise = np.concatenate([draw_noise(model, one, key("a")) for one in edits])
    noise[0, 0, 0, 0, 0] = np.nan
    results = run_batch(model, edits, own, noise)
    assert isinstance(results[0], SamplingError) and "after step 1 of 2" in str(results[0])
    same(results[1], alone(model, edits[1], own[1], key("a")))


def test_composites_are_of_each_edit(model):
    own = [settings(composite=True), settings()]
    results = runner.run_group(model, [given(), given()], own, [key("a")] * 2)
    kept = [np.array_equal(r.video[~MASK], OTHER[~MASK]) for r in results]
    assert kept == [True, False]
    assert dataclasses.asdict(results[0].settings.edit)["composite"]
    assert jax.tree.all(jax.tree.map(np.isfinite, results[0].metrics.psnr))
