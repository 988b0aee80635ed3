"""Edits from end to end on a tiny Diffusers folder: forms of input, sizes, settings."""

import dataclasses
import json
from fractions import Fraction

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from edits import BOX, CLIP, MASK, STEPS, config_of, edit
from etils import epath
from flax import nnx

import kvlock_jax as kvl
from kvlock_jax.checkpoints import format
from kvlock_jax.convert.converter import convert
from kvlock_jax.errors import CheckpointError, ConfigError
from kvlock_jax.evaluate import metrics
from kvlock_jax.media import encode
from kvlock_jax.media.fit import Resize, resize_mask
from kvlock_jax.models.vae import autoencoder
from kvlock_jax.pipeline import report, stages
from kvlock_jax.sampling.loop import Trace, sample


@pytest.fixture(scope="module")
def plain(model):
    """The edit that others are compared with."""
    return edit(model)


# -- what goes in and what comes out -------------------------------------------------------------


def test_words_that_the_model_does_not_know_are_told(model):
    with pytest.warns(UserWarning, match="'a blurred star' has words .* not know: blurred"):
        edit(model, prompt="a blurred star")


def test_a_result_tells_everything(model, plain):
    assert plain.video.dtype == np.uint8 and plain.video.shape == CLIP.shape
    np.testing.assert_array_equal(plain.source, CLIP)
    np.testing.assert_array_equal(plain.mask, MASK)
    assert plain.fps == 16
    assert set(plain.seconds) == {
        "encode text",
        "encode video",
        "compile",
        "sample",
        "decode video",
    }
    for field in dataclasses.fields(plain.trace):
        value = getattr(plain.trace, field.name)
        assert isinstance(value, np.ndarray) and value.shape == (STEPS,), field.name
    np.testing.assert_array_equal(plain.trace.fusion_ratio[:2], 1)
    assert plain.trace.sigma2[2] > 0 and plain.trace.finite.all()
    assert plain.metrics == metrics.measure(CLIP, plain.video, MASK)
    assert plain.settings.lock.omega_floor == 0.25 and plain.settings.sample.steps == STEPS


@pytest.mark.parametrize("form", ["box", "one frame", "files", "folder and .npy", "0 to 255"])
def test_every_form_of_input_gives_the_same(model, plain, form, tmp_path):
    clip, mask, fps = CLIP, MASK, Fraction(16)
    if form == "box":
        mask = BOX
    elif form == "one frame":
        mask = MASK[0]
    elif form == "0 to 255":
        mask = tiny.mask()
    elif form == "files":
        clip, mask, fps = tmp_path / "clip.mkv", tmp_path / "mask.mkv", Fraction(24)
        encode.write_video(clip, CLIP, fps, lossless=True)
        encode.write_video(mask, tiny.mask(), fps, lossless=True)
    else:
        clip, mask = str(tmp_path / "frames"), str(tmp_path / "mask.npy")
        (tmp_path / "frames").mkdir()
        for i, frame in enumerate(CLIP):
            encode.write_png(tmp_path / "frames" / f"{i}.png", frame)
        np.save(mask, MASK)
    result = edit(model, clip, mask)
    np.testing.assert_array_equal(result.video, plain.video)
    np.testing.assert_array_equal(result.mask, MASK)
    assert result.fps == fps


@pytest.mark.parametrize("size", [(1, 20, 34), (4, 32, 48), (6, 31, 33), (9, 17, 48)])
def test_as_many_frames_of_the_same_size_come_out(model, size):
    clip, mask = tiny.clip(*size), tiny.mask(*size)
    result = edit(model, clip, mask)
    assert result.video.shape == clip.shape
    np.testing.assert_array_equal(result.source, clip)
    np.testing.assert_array_equal(result.mask, mask[..., 0] > 127)
    assert kvl.round_trip(model, clip).shape == clip.shape


def test_frames_and_size_of_ones_choice(model):
    clip, mask = tiny.clip(7, 40, 60), tiny.mask(7, 40, 60)
    result = edit(model, clip, mask, config=config_of(frame_num=5, size="48*32"))
    assert result.video.shape == result.source.shape == (5, 32, 48, 3)
    resized = [Resize((40, 60), (32, 48)).frame(frame) for frame in clip[:5]]
    np.testing.assert_array_equal(result.source, resized)
    np.testing.assert_array_equal(result.mask, resize_mask(mask[:5, ..., 0] > 0, 32, 48))


def test_inverted_and_grown_masks(model):
    grown = np.zeros_like(MASK)
    grown[:, 5:19, 5:19] = True
    np.testing.assert_array_equal(edit(model, config=config_of(dilate=3)).mask, grown)
    inverted = edit(model, config=config_of(invert_mask=True))
    np.testing.assert_array_equal(inverted.mask, ~MASK)
    # white is what is edited, so growing follows inverting
    both = edit(model, config=config_of(invert_mask=True, dilate=3))
    shrunk = np.ones_like(MASK)
    shrunk[:, 11:13, 11:13] = False
    np.testing.assert_array_equal(both.mask, shrunk)


def test_composite_takes_the_rest_from_the_source(model, plain):
    result = edit(model, config=config_of(composite=True))
    np.testing.assert_array_equal(result.video[~MASK], CLIP[~MASK])
    np.testing.assert_array_equal(result.video[MASK], plain.video[MASK])
    assert (plain.video[~MASK] != CLIP[~MASK]).any()


# -- what decides the result ---------------------------------------------------------------------


def test_a_seed_is_one_edit(model, plain):
    again = edit(model)
    np.testing.assert_array_equal(again.video, plain.video)
    np.testing.assert_array_equal(again.trace.sigma2, plain.trace.sigma2)
    config = config_of()
    config.sample.seed = 1
    assert (edit(model, config=config).video[MASK] != plain.video[MASK]).mean() > 0.2


@pytest.mark.parametrize("kind", [jnp.asarray, np.asarray, lambda x: np.asarray(x, np.float64)])
def test_noise_handed_in(model, plain, kind):
    shape = (1, 2, 4, 6, 4)
    noise = kind(jax.random.normal(jax.random.key(0), shape))  # what seed 0 draws
    np.testing.assert_array_equal(edit(model, noise=noise).video, plain.video)
    assert (edit(model, noise=noise[:, ::-1]).video != plain.video).any()


@pytest.mark.parametrize("preset", ["hard_lock", "kvlock_anchor"])
def test_background_latents_are_those_of_the_source(model, preset, monkeypatch):
    seen, frames = [], stages.decode_latents
    monkeypatch.setattr(
        stages,
        "decode_latents",
        lambda model, made, *run: seen.append(made) or frames(model, made, *run),
    )
    result = edit(model, config=config_of(preset))
    (source,) = np.asarray(autoencoder.encode(model.checkpoint.vae, jnp.asarray(CLIP)[None]))
    cells = np.zeros((2, 4, 6), bool)
    cells[:, 1, 1] = True  # the box is one cell of 8x8 pixels
    ((latents,),) = np.asarray(seen[0])
    np.testing.assert_array_equal(latents[~cells], source[~cells])
    assert np.abs(latents - source)[cells].max() > 0.1
    # so far from the box the edit is the VAE's round trip
    trip = kvl.round_trip(model, CLIP)
    without = edit(model, config=config_of("cfg"))
    kept, lost = (metrics.background_psnr(trip, r.video, MASK) for r in (result, without))
    assert kept > lost + 6


def test_each_step_is_heard_once(model, plain):
    steps: list[int] = []
    traces: list[Trace] = []

    def on_step(step):
        steps.append(step.number)
        traces.append(step.trace)

    heard = edit(model, on_step=on_step)
    assert steps == [0, 1, 2]
    for name in ("sigma2", "fusion_ratio", "guidance_scale", "scheduled"):
        rows = [getattr(trace, name) for trace in traces]
        np.testing.assert_array_equal(rows, getattr(heard.trace, name))
    edit(model)  # nobody listens any more
    assert steps == [0, 1, 2]
    np.testing.assert_array_equal(heard.video, plain.video)


def test_a_transformer_in_bfloat16(tiny_checkpoint, model, plain):
    short = kvl.load(tiny_checkpoint, dtype=jnp.bfloat16).checkpoint.transformer
    mixed = dataclasses.replace(model.checkpoint, transformer=short)
    result = edit(dataclasses.replace(model, checkpoint=mixed))
    assert 0 < np.abs(result.video.astype(float) - plain.video).mean() < 4
    assert result.trace.sigma2.dtype == np.float32


def test_five_edits_are_compiled_once(model, monkeypatch, capsys):
    compiled: list[str] = []

    def listener(event, seconds, **about):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(about.get("fun_name", "?"))

    config = config_of(steps=4)  # of no other test
    before = sample._cache_size()
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        first = edit(model, config=config)
        loops = [name for name in compiled if "sample" in name]
        compiled.clear()
        results = [first]
        config.sample.update(seed=5, guidance_scale=7.5)
        results.append(edit(model, CLIP[::-1], prompt="a red circle", config=config))
        config.sample.update(shift=8.0, solver="euler")
        results.append(edit(model, mask=MASK[:, ::-1], config=config))
        config.kvlock.update(tau=0.5, kappa=2, omega_floor=0.5)
        config.edit.update(negative_prompt="square", source_prompt="the circle")
        results.append(edit(model, config=config))
        config.kvlock.update(adapt_guidance=False, warmup_fusion_ratio=0.7)
        results.append(edit(model, config=config, noise=np.ones((1, 2, 4, 6, 4))))
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    with capsys.disabled():
        count = sample._cache_size() - before
        print(f"\n5 edits of one shape: {len(loops)} compilation of the loop, then {compiled}")
    assert count == 1 and len(loops) == 1 and not compiled
    for i, one in enumerate(results):
        assert all((one.video != other.video).any() for other in results[:i])


# -- loading, settings ---------------------------------------------------------------------------


def test_a_converted_checkpoint_loads(model, tiny_checkpoint, tmp_path):
    convert(tiny_checkpoint, tmp_path)
    loaded = kvl.load(str(tmp_path))
    assert loaded.name == str(tmp_path)
    assert loaded.checkpoint.configs == model.checkpoint.configs
    got, want = (jax.tree.leaves(nnx.state(m.checkpoint.transformer)) for m in (loaded, model))
    assert len(got) == len(want) > 0
    assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))


def test_default_settings(model):
    assert kvl.default_config(model).sample.shift == 8.0
    demo = dataclasses.replace(model, name="demo")
    assert kvl.default_config(demo).sample.to_dict() == kvl.config("demo").sample.to_dict()
    configs = model.checkpoint.configs
    wide = dataclasses.replace(configs.transformer, num_attention_heads=40, attention_head_dim=128)
    big = dataclasses.replace(
        model.checkpoint, configs=dataclasses.replace(configs, transformer=wide)
    )
    assert kvl.default_config(dataclasses.replace(model, checkpoint=big)).sample.shift == 5.0


def test_folders_in_a_bucket(monkeypatch):
    """With memory in place of the network, then without what reads a bucket."""

    def buckets(filesystem):
        backend = type(epath.backend.fsspec_backend)
        monkeypatch.setattr(backend, "_get_filesystem", lambda self, name: filesystem())

    def not_installed():
        raise ImportError("Please install gcsfs")

    buckets(lambda: fsspec.filesystem("memory"))
    with pytest.raises(CheckpointError, match="gs://bucket/none: no such folder"):
        kvl.load("gs://bucket/none")
    folder = epath.Path("gs://bucket/damaged")
    folder.mkdir(parents=True)
    (folder / format.METADATA).write_text("{")
    with pytest.raises(CheckpointError, match=r"gs://bucket/damaged/kvlock\.json"):
        kvl.load("gs://bucket/damaged")
    buckets(not_installed)
    with pytest.raises(CheckpointError, match="gs://bucket/none: Please install gcsfs"):
        kvl.load("gs://bucket/none")


def test_a_clip_longer_than_a_window(model, plain, tmp_path):
    """A window of as many frames is the whole clip; one that runs whole is warned of."""

    def in_windows(long, clip=CLIP, mask=MASK, **lock_settings):
        config = config_of()
        config.sample.update({"long": long, "window": 5, "window_overlap": 4})
        config.sample.window_shift = bool(lock_settings)
        config.kvlock.update(lock_settings)
        return edit(model, clip, mask, config=config)

    np.testing.assert_array_equal(in_windows("windows").video, plain.video)
    longer = [np.concatenate([x, x[::-1]]) for x in (CLIP, MASK)]
    result = in_windows("auto", *longer)
    assert (result.windows, plain.windows) == (3, 1) and result.video.shape == longer[0].shape
    report.write_trace(tmp_path / "trace.json", result)
    assert json.loads((tmp_path / "trace.json").read_text())["windows"] == 3
    with pytest.warns(UserWarning, match="10 frames run whole: the model was trained on 5"):
        whole = in_windows("whole", *longer)
    assert whole.windows == 1 and (whole.video != result.video).any()
    with pytest.raises(ConfigError, match="cache_every must be 1"):
        in_windows("auto", *longer, cache="carried", cache_every=2)
