"""Edits from end to end on tiny VACE weights."""

import numpy as np
import pytest
from edits import CLIP, FRAMES, MASK, config_of, edit

import kvlock_jax as kvl
from kvlock_jax.errors import InputError
from kvlock_jax.lock import PRESETS
from kvlock_jax.models.vae import autoencoder
from kvlock_jax.pipeline import stages
from kvlock_jax.sampling.loop import sample

PICTURE = np.random.default_rng(5).integers(0, 256, (20, 30, 3), np.uint8)


@pytest.fixture(scope="module")
def vace(tiny_vace_checkpoint):
    return kvl.load(tiny_vace_checkpoint)


def test_without_a_lock_no_source_is_encoded(model, vace, monkeypatch):
    seen, encode = [], autoencoder.encode
    monkeypatch.setattr(
        "kvlock_jax.models.vae.autoencoder.encode", lambda *a: seen.append(a) or encode(*a)
    )
    config = config_of("cfg")
    assert np.isfinite(edit(model, config=config).trace.sigma2).all() and not seen
    config.kvlock.background = "source"
    edit(model, config=config)
    assert len(seen) == 1
    edit(vace, config=config_of("cfg"))
    assert len(seen) > 1


@pytest.mark.parametrize("preset", [name for name in PRESETS if "clean" not in name])
def test_every_preset_runs_on_vace_weights(vace, preset):
    result = edit(vace, config=config_of(preset))
    assert result.video.shape == CLIP.shape and result.trace.finite.all()
    assert not np.array_equal(
        result.video, edit(vace, prompt="a red circle", config=config_of(preset)).video
    )


def test_references_change_the_edit_and_not_its_length(vace):
    config = config_of("kvlock")
    plain, shown = edit(vace, config=config), edit(vace, config=config, references=[PICTURE])
    assert shown.video.shape == CLIP.shape
    assert not np.array_equal(plain.video, shown.video)
    turned = edit(vace, config=config, references=[PICTURE[::-1]])
    assert not np.array_equal(turned.video, shown.video)


def test_a_pinned_background_is_the_sources_under_references(vace, monkeypatch):
    seen = {}
    plain = sample

    def spy(model, latents, edits, *rest, **program):
        seen["edits"], (out, trace) = edits, plain(model, latents, edits, *rest, **program)
        seen["out"] = np.asarray(out)
        return out, trace

    spy.lower = plain.lower
    monkeypatch.setattr(stages.loop, "sample", spy)
    edit(vace, config=config_of("kvlock_anchor"), references=[PICTURE, PICTURE])
    edits = seen["edits"]
    whole = (edits.grid.join(x) for x in (seen["out"], edits.source, edits.foreground[..., None]))
    out, source, foreground = map(np.asarray, whole)
    assert edits.references == 2 and out.shape[1] == 2 + (FRAMES + 3) // 4
    kept = ~foreground
    kept[:, :2] = False
    np.testing.assert_array_equal(np.where(kept, out, 0), np.where(kept, source, 0))
    assert not np.array_equal(out[:, :2], source[:, :2])


def test_what_is_masked_is_hidden_unless_it_is_to_be_shown(vace):
    other = CLIP.copy()
    other[MASK] = 255 - other[MASK]
    noise = np.random.default_rng(0).normal(size=(1, 2, 4, 6, 4)).astype(np.float32)

    def videos(**settings):
        config = config_of("cfg", **settings)
        return [edit(vace, clip, config=config, noise=noise).video for clip in (CLIP, other)]

    np.testing.assert_array_equal(*videos())
    assert not np.array_equal(*videos(show_masked=True))


def test_without_its_context_a_vace_model_is_blind_to_the_source(vace):
    config = config_of("cfg", context_scale=0.0)
    np.testing.assert_array_equal(
        edit(vace, config=config).video, edit(vace, CLIP[:, ::-1].copy(), config=config).video
    )


def test_references_need_vace(model):
    with pytest.raises(InputError, match="reference pictures need a VACE model"):
        edit(model, references=[PICTURE])


@pytest.mark.parametrize("picture", [PICTURE[..., 0], PICTURE / 255, "no such.png"])
def test_references_that_are_no_pictures(vace, picture):
    with pytest.raises(InputError, match=r"reference picture must be|no such file"):
        edit(vace, references=[picture])
