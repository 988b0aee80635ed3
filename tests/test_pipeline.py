"""The whole way without a lock, from files to frames: `kvl.edit` against Diffusers' pipelines."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from PIL import Image

import kvlock_jax as kvl
from kvlock_jax.errors import ConfigError
from kvlock_jax.parallel.mesh import make_mesh
from kvlock_jax.settings.schema import run_config

STEPS, SHIFT, GUIDANCE = 8, 3.0, 5.0
FRAMES, HEIGHT, WIDTH = 5, 32, 48
PROMPT, OTHER, NEGATIVE = "a red star on the circle", "blue", "the square"

SCHEDULERS = {
    "unipc": UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=SHIFT,
        num_train_timesteps=1000,
    ),
    "euler": FlowMatchEulerDiscreteScheduler(shift=SHIFT),
}


def scaled(pipeline):
    """Random weights of a scale at which texts matter and frames are neither grey nor clipped."""
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae.register_to_config(latents_mean=[0.2, -0.1, 0.3, 0.0])
    pipeline.vae.register_to_config(latents_std=[1.5, 1.0, 0.7, 2.0])
    pipeline.text_encoder.eval()  # fresh from Transformers it drops out
    with torch.no_grad():
        for transformer in (pipeline.transformer, pipeline.transformer_2):
            for block in transformer.blocks if transformer else ():
                block.attn2.to_out[0].weight *= 4
        pipeline.vae.decoder.conv_out.weight *= 2
    return pipeline


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return scaled(tiny.make_pipeline(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def vace_pipeline(tmp_path_factory):
    return scaled(tiny.make_vace_pipeline(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def model(pipeline, tmp_path_factory):
    return loaded(pipeline, tmp_path_factory.mktemp("scaled"))


@pytest.fixture(scope="module")
def vace_model(vace_pipeline, tmp_path_factory):
    return loaded(vace_pipeline, tmp_path_factory.mktemp("scaled"))


def loaded(pipeline, folder):
    pipeline.save_pretrained(folder)
    return kvl.load(folder)


def noise(references=0, stride=8):
    shape = (1, references + 1 + FRAMES // 4, HEIGHT // stride, WIDTH // stride, 4)
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def theirs(pipeline, solver, prompt, references=0, stride=8, **rest):
    pipeline.scheduler = SCHEDULERS[solver]
    frames = pipeline(
        prompt=prompt,
        negative_prompt=NEGATIVE,
        height=HEIGHT,
        width=WIDTH,
        num_frames=FRAMES,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        latents=torch.from_numpy(noise(references, stride)).permute(0, 4, 1, 2, 3),
        max_sequence_length=12,
        output_type="np",
        **rest,
    ).frames[0]
    return np.round(frames * 255).astype(np.uint8)


def ours(model, solver, prompt, **rest):
    sample = dict(steps=STEPS, shift=SHIFT, guidance_scale=GUIDANCE, solver=solver, **rest)
    config = run_config("cfg", **sample)
    config.edit.negative_prompt = NEGATIVE
    everything = np.ones((HEIGHT, WIDTH), bool)
    video = tiny.clip(FRAMES, HEIGHT, WIDTH)
    return kvl.edit(model, video, everything, prompt, config=config, noise=jnp.asarray(noise()))


def psnr(a, b):
    mse = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return np.inf if mse == 0 else 10 * np.log10(255**2 / mse)


@pytest.mark.parametrize("solver", SCHEDULERS)
def test_same_frames_as_diffusers(pipeline, model, solver, capsys):
    want, other = theirs(pipeline, solver, PROMPT), theirs(pipeline, solver, OTHER)
    got = ours(model, solver, PROMPT).video
    found, equal = psnr(got, want), (got == want).mean()
    with capsys.disabled():
        print(f"\n{solver}: {found:.1f} dB against Diffusers, {equal:.2%} of values equal")
    assert found > 50
    # frames with a picture in them, that another text would have made another
    assert want.std() > 20 and ((want > 0) & (want < 255)).mean() > 0.8
    assert psnr(other, want) < 35


def test_same_frames_as_diffusers_of_the_5b(tmp_path, monkeypatch, capsys):
    """Its text loop gives all tokens one timestep; sides are multiples of 32."""
    monkeypatch.setattr("test_pipeline.WIDTH", 64)
    pipeline = scaled(tiny.make_ti2v_pipeline(tmp_path))
    want = theirs(pipeline, "unipc", PROMPT, stride=16)
    model = loaded(pipeline, tmp_path / "wan")
    assert model.checkpoint.configs.unit == (4, 32, 32)
    assert ours.__globals__["WIDTH"] == 64
    sample = dict(steps=STEPS, shift=SHIFT, guidance_scale=GUIDANCE)
    config = run_config("cfg", **sample)
    config.edit.negative_prompt = NEGATIVE
    everything, video = np.ones((HEIGHT, 64), bool), tiny.clip(FRAMES, HEIGHT, 64)
    hand = dict(config=config, noise=jnp.asarray(noise(stride=16)))
    found = psnr(kvl.edit(model, video, everything, PROMPT, **hand).video, want)
    with capsys.disabled():
        print(f"\n5B: {found:.1f} dB against Diffusers")
    assert found > 50 and want.std() > 15

    config.preset = "clean"  # at an odd size
    box = (8, 8, 24, 24)
    result = kvl.edit(model, tiny.clip(4, 40, 50), box, PROMPT, config=config)
    assert result.video.shape == (4, 40, 50, 3) and result.trace.finite.all()


def test_a_mesh_shares_known_tokens(tmp_path):
    """Devices share the tokens, and the timestep of each."""
    tiny.make_ti2v_pipeline(tmp_path).save_pretrained(tmp_path / "wan")
    config, made = run_config("clean_anchor", steps=2), []
    for mesh in (None, make_mesh(frames=2, devices=jax.devices()[:2])):
        model = kvl.load(tmp_path / "wan", mesh=mesh)
        box = (8, 8, 24, 24)
        made.append(kvl.edit(model, tiny.clip(5, 64, 64), box, PROMPT, config=config).video)
    assert np.abs(made[0].astype(int) - made[1]).max() <= 1


def test_known_tokens_need_a_model_of_them(model):
    config = run_config("clean", steps=1)
    with pytest.raises(ConfigError, match=r"background 'clean' needs .*, this one is wan2"):
        kvl.edit(model, tiny.clip(5, 32, 48), (8, 8, 16, 16), PROMPT, config=config)


@pytest.mark.parametrize("solver", SCHEDULERS)
def test_same_frames_as_diffusers_over_two_experts(solver, tmp_path, capsys):
    pipeline = scaled(tiny.make_experts_pipeline(tmp_path))
    want = theirs(pipeline, solver, PROMPT, guidance_scale_2=3.0)
    pipeline.register_to_config(boundary_ratio=0.0)
    alone = theirs(pipeline, solver, PROMPT)
    pipeline.register_to_config(boundary_ratio=0.875)
    model = loaded(pipeline, tmp_path / "wan")
    assert model.checkpoint.configs.experts == ("high", "low")
    got = ours(model, solver, PROMPT, guidance_scale_low=3.0).video
    found = psnr(got, want)
    with capsys.disabled():
        print(f"\ntwo experts, {solver}: {found:.1f} dB against Diffusers")
    assert found > 50
    assert want.std() > 20 and psnr(alone, want) < 35


def test_same_frames_as_the_vace_pipeline_over_two_experts(tmp_path, capsys):
    """Diffusers' conditioning of VACE-Fun, which blanks nothing and reverses no pictures here."""
    pipeline = scaled(tiny.make_vace_experts_pipeline(tmp_path))
    clip, mask = tiny.clip(FRAMES, HEIGHT, WIDTH), tiny.mask(FRAMES, HEIGHT, WIDTH)
    shown = {
        "video": [Image.fromarray(frame) for frame in clip],
        "mask": [Image.fromarray(frame) for frame in mask],
    }
    want = theirs(pipeline, "unipc", PROMPT, **shown, guidance_scale_2=3.0)
    model = loaded(pipeline, tmp_path / "wan")
    sample = dict(steps=STEPS, shift=SHIFT, guidance_scale=GUIDANCE, guidance_scale_low=3.0)
    config = run_config("cfg", **sample)
    config.edit.update(negative_prompt=NEGATIVE, show_masked=True)
    start = jnp.asarray(noise())
    found = psnr(kvl.edit(model, clip, mask, PROMPT, config=config, noise=start).video, want)
    with capsys.disabled():
        print(f"\nVACE of two experts: {found:.1f} dB against Diffusers")
    assert found > 50 and want.std() > 20


@pytest.mark.parametrize("solver, references", [("unipc", 0), ("euler", 2)])
def test_same_frames_as_the_vace_pipeline(vace_pipeline, vace_model, solver, references, capsys):
    clip, mask = tiny.clip(FRAMES, HEIGHT, WIDTH), tiny.mask(FRAMES, HEIGHT, WIDTH)
    rng = np.random.default_rng(3)
    pictures = [rng.integers(0, 256, (24, 16, 3), np.uint8) for _ in range(references)]
    shown = {
        "video": [Image.fromarray(frame) for frame in clip],
        "mask": [Image.fromarray(frame) for frame in mask],
        "reference_images": [Image.fromarray(p) for p in pictures] or None,
    }
    scale = {"conditioning_scale": 0.7}
    want = theirs(vace_pipeline, solver, PROMPT, references, **shown, **scale)
    free = theirs(vace_pipeline, solver, PROMPT, references, **shown, conditioning_scale=0.0)

    config = run_config("cfg", steps=STEPS, shift=SHIFT, guidance_scale=GUIDANCE, solver=solver)
    config.edit.update(negative_prompt=NEGATIVE, context_scale=0.7, show_masked=True)
    start = jnp.asarray(noise(references))
    hand = dict(config=config, noise=start, references=pictures)
    got = kvl.edit(vace_model, clip, mask, PROMPT, **hand).video
    found = psnr(got, want)
    with capsys.disabled():
        print(f"\nVACE, {solver}, {references} references: {found:.1f} dB against Diffusers")
    assert found > 50
    assert want.std() > 20 and psnr(free, want) < 35  # a picture, and one that the context made


def test_devices_of_data_take_windows_of_one_clip(tmp_path):
    """A single clip does not divide over them, unless it runs over windows."""
    tiny.make_ti2v_pipeline(tmp_path).save_pretrained(tmp_path / "wan")
    config, made, mesh = (
        run_config("cfg", steps=2),
        [],
        make_mesh(data=2, devices=jax.devices()[:2]),
    )
    config.sample.update({"window": 9, "window_overlap": 4})
    args = tiny.clip(17, 64, 64), (8, 8, 24, 24), PROMPT
    for where in (None, mesh):
        model = kvl.load(tmp_path / "wan", mesh=where)
        made.append(kvl.edit(model, *args, config=config))
    assert made[1].windows == 2
    assert np.abs(made[0].video.astype(int) - made[1].video).max() <= 1
    config.sample.window = 17
    with pytest.raises(ConfigError, match="1 rows do not divide over the 2 devices"):
        kvl.edit(model, *args, config=config)
