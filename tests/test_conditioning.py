"""VACE's conditioning against Diffusers' pipeline, and by hand."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from kvlock_jax import lock
from kvlock_jax.convert import diffusers as layout
from kvlock_jax.models.vae import autoencoder
from kvlock_jax.models.wan.conditioning import (
    VACEConditioner,
    control,
    fold_mask,
    on_canvas,
    on_canvas_of_fun,
)
from kvlock_jax.models.wan.families import VACE, VACE_FUN

FRAMES, HEIGHT, WIDTH = 9, 32, 48
MASKS = ("box", "one frame", "first frame", "one pixel", "everything", "nothing", "odd")
PICTURES = ((32, 48), (16, 40), (64, 24))  # none needs resampling to a multiple of 8


def mask_of(kind: str) -> np.ndarray:
    mask = np.zeros((FRAMES, HEIGHT, WIDTH), bool)
    if kind == "box":
        mask[:, 8:20, 11:30] = True
    elif kind == "one frame":
        mask[6, 3:9, :] = True
    elif kind == "first frame":
        mask[0] = True
    elif kind == "one pixel":
        mask[4, 17, 33] = True
    elif kind == "everything":
        mask[:] = True
    elif kind == "odd":
        mask = np.random.default_rng(1).random(mask.shape) > 0.7
    return mask


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    pipeline = tiny.make_vace_pipeline(tmp_path_factory.mktemp("tiny"))
    pipeline.vae.register_to_config(latents_mean=[0.2, -0.1, 0.3, 0.0])
    pipeline.vae.register_to_config(latents_std=[1.5, 1.0, 0.7, 2.0])
    return pipeline


@pytest.fixture(scope="module")
def encode(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    pipeline.vae.save_pretrained(folder)
    return functools.partial(autoencoder.encode, layout.load_model(folder, layout.AUTOENCODER))


def theirs(pipeline, clip, mask, pictures) -> np.ndarray:
    """The channels as `WanVACEPipeline.__call__` makes them, from images, channels last."""
    as_images = [Image.fromarray(frame) for frame in clip]
    as_masks = [Image.fromarray(np.uint8(255) * frame).convert("RGB") for frame in mask]
    references = [Image.fromarray(picture) for picture in pictures] or None
    with torch.no_grad():
        video, seen, prepared = pipeline.preprocess_conditions(
            as_images, as_masks, references, 1, HEIGHT, WIDTH, FRAMES, torch.float32, "cpu"
        )
        latents = pipeline.prepare_video_latents(video, seen, prepared)
        folded = pipeline.prepare_masks(seen, prepared)
    return torch.cat([latents, folded], dim=1).permute(0, 2, 3, 4, 1).numpy()


def channels(encode, video, mask, pictures):
    under = [encode(video, shown) for shown in (~mask, mask)]
    return control(*under, fold_mask(mask), [encode(picture[:, None]) for picture in pictures])


@pytest.mark.parametrize("references", [0, 1, 3])
@pytest.mark.parametrize("kind", MASKS)
def test_channels_are_those_of_diffusers(pipeline, encode, kind, references):
    rng = np.random.default_rng(0)
    clip, mask = tiny.clip(FRAMES, HEIGHT, WIDTH), mask_of(kind)
    pictures = [rng.integers(0, 256, (*s, 3), np.uint8) for s in PICTURES[:references]]
    want = theirs(pipeline, clip, mask, pictures)
    video = jnp.asarray(clip, jnp.float32)[None] / 127.5 - 1.0
    canvases = VACEConditioner().canvases(pictures, HEIGHT, WIDTH)
    canvases = [canvas[None] for canvas in canvases]
    got = np.asarray(channels(encode, video, jnp.asarray(mask)[None], canvases))
    assert got.shape == want.shape == (1, 3 + references, 4, 6, 4 + 4 + 64)
    np.testing.assert_array_equal(got[..., 8:], want[..., 8:])
    difference = np.linalg.norm(got[..., :8] - want[..., :8]) / np.linalg.norm(want[..., :8])
    assert difference < 1e-5
    # the model sees a reference and generates no part of it
    assert np.abs(got[:, :references, ..., :4]).min(initial=1.0) > 0
    assert not got[:, :references, ..., 4:].any()


@pytest.mark.parametrize(
    ("conditioner", "first"), [(VACE.conditioner, 1), (VACE_FUN.conditioner, 0)]
)
def test_pictures_stand_in_the_publishers_order(conditioner, first):
    pictures = [np.full((16, 16, 3), level, np.uint8) for level in (50, 200)]
    canvases = conditioner.canvases(pictures, 16, 16)
    np.testing.assert_allclose(canvases[0], pictures[first] / 127.5 - 1.0, rtol=1e-6)


@pytest.mark.parametrize("size", [(64, 40), (20, 30)])
def test_vace_fun_scales_pictures_by_pillow(size):
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    canvas = on_canvas_of_fun(picture, HEIGHT, WIDTH)
    fitted = (20, 32) if size == (64, 40) else (48, 32)
    want = np.asarray(Image.fromarray(picture).resize(fitted), np.float32) / 127.5 - 1
    left = (WIDTH - fitted[0]) // 2
    np.testing.assert_array_equal(canvas[:, left : left + fitted[0]], want)
    assert (np.delete(canvas, range(left, left + fitted[0]), axis=1) == 1).all()


def test_folding_by_hand():
    mask = np.zeros((1, 9, 16, 24), bool)
    mask[0, 4, 8 + 3, 16 + 5] = True  # frame 4 is the one that latent frame 1 of 3 takes
    folded = np.asarray(fold_mask(jnp.asarray(mask)))
    assert folded.shape == (1, 3, 2, 3, 64)
    assert folded.sum() == 1 and folded[0, 1, 1, 2, 8 * 3 + 5] == 1


def test_a_mask_of_one_frame_may_vanish_here_and_stays_in_the_lock():
    mask = jnp.asarray(mask_of("one frame"))
    assert not np.asarray(fold_mask(mask[None])).any()
    assert np.asarray(lock.to_latent_mask(mask)).any()


@pytest.mark.parametrize("size", [(7, 100), (100, 7), (1, 1), (33, 47)])
def test_a_picture_of_any_size_fits_its_canvas(size):
    canvas = np.asarray(on_canvas(np.zeros((*size, 3), np.uint8), HEIGHT, WIDTH))
    dark = canvas[..., 0] < 0
    rows, columns = np.nonzero(dark.any(1))[0], np.nonzero(dark.any(0))[0]
    assert canvas.shape == (HEIGHT, WIDTH, 3) and canvas.max() <= 1
    # one side is filled, the other centred
    assert len(rows) == HEIGHT or len(columns) == WIDTH
    assert abs(rows[0] - (HEIGHT - 1 - rows[-1])) <= 1
    assert abs(columns[0] - (WIDTH - 1 - columns[-1])) <= 1
