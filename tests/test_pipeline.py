"""The whole way without a lock, from a prompt to frames: `kvl.edit` against Diffusers' pipeline."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

import kvlock_jax as kvl
from kvlock_jax.config import run_config

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


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """Random weights of a scale at which texts matter and frames are neither grey nor clipped."""
    pipeline = tiny.make_pipeline(tmp_path_factory.mktemp("tiny"))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae.register_to_config(latents_mean=[0.2, -0.1, 0.3, 0.0])
    pipeline.vae.register_to_config(latents_std=[1.5, 1.0, 0.7, 2.0])
    pipeline.text_encoder.eval()  # fresh from Transformers it drops out
    with torch.no_grad():
        for block in pipeline.transformer.blocks:
            block.attn2.to_out[0].weight *= 4
        pipeline.vae.decoder.conv_out.weight *= 2
    return pipeline


@pytest.fixture(scope="module")
def model(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scaled")
    pipeline.save_pretrained(folder)
    return kvl.load(folder)


def noise():
    shape = (1, 1 + FRAMES // 4, HEIGHT // 8, WIDTH // 8, 4)
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def theirs(pipeline, solver, prompt):
    pipeline.scheduler = SCHEDULERS[solver]
    frames = pipeline(
        prompt,
        NEGATIVE,
        height=HEIGHT,
        width=WIDTH,
        num_frames=FRAMES,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        latents=torch.from_numpy(noise()).permute(0, 4, 1, 2, 3),
        max_sequence_length=12,
        output_type="np",
    ).frames[0]
    return np.round(frames * 255).astype(np.uint8)


def ours(model, solver, prompt):
    config = run_config("cfg", steps=STEPS, shift=SHIFT, guidance_scale=GUIDANCE, solver=solver)
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
