"""A long clip is read, encoded, decoded, measured and written in pieces, and nothing changes."""

import contextlib
import dataclasses

import fresh
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from edits import CLIP, config_of, edit
from flax import nnx

import kvlock_jax as kvl
from kvlock_jax import lock
from kvlock_jax.errors import InputError
from kvlock_jax.evaluate.metrics import measure
from kvlock_jax.media import decode, encode, room
from kvlock_jax.media.masks import read_mask
from kvlock_jax.models.vae import autoencoder
from kvlock_jax.models.vae.config import VAEConfig
from kvlock_jax.parallel.mesh import make_mesh
from kvlock_jax.pipeline import pieces
from kvlock_jax.pipeline.report import compare
from kvlock_jax.runtime.compile_cache import Compiler, call

FRAMES = 25
SMALL = VAEConfig(
    4,
    4,
    dim_mult=(1, 1),
    temperal_downsample=(True,),
    num_res_blocks=1,
    latents_mean=(0.1,) * 4,
    latents_std=(1.5,) * 4,
)
RESIDUAL = dataclasses.replace(SMALL, is_residual=True, patch_size=2, decoder_base_dim=8)


@pytest.fixture
def spilled(monkeypatch):
    """Limits of a few frames, as 2 GB clips meet them."""
    monkeypatch.setattr(room, "LARGE", 4000)
    monkeypatch.setattr(room, "PIECE", 3 * 32 * 48 * 3)
    monkeypatch.setattr(pieces, "LATENT_FRAMES", 2)


def is_mapped(array):
    while isinstance(array, np.ndarray):
        array = array.base
    return array is not None and type(array).__name__ == "mmap"


def clip_and_mask(height=16, width=32):
    rng = np.random.default_rng(0)
    clip = rng.integers(0, 256, (FRAMES - 2, height, width, 3), np.uint8)
    return clip, rng.uniform(size=clip.shape[:3]) < 0.01


@pytest.mark.parametrize(
    ("config", "tiles", "mesh"),
    [(SMALL, 2, (2, 2, 1)), (RESIDUAL, 1, None)],
)
def test_pieces_through_the_vae_are_the_whole(config, tiles, mesh, monkeypatch):
    vae = fresh.module(lambda: autoencoder.WanVAE(config, rngs=nnx.Rngs(0)))
    vae.tiles = tiles
    rng = np.random.default_rng(0)
    clip = rng.integers(0, 256, (FRAMES, 16, 32 * tiles * 2, 3), np.uint8)
    mask = rng.uniform(size=clip.shape[:3]) < 0.5
    rows = 2 if mesh else 1
    with jax.set_mesh(make_mesh(*mesh)) if mesh else contextlib.nullcontext():
        compiler = Compiler()

        def through(run):
            latents = pieces.encode(vae, [clip] * rows, [mask] * rows, False, run)
            return latents, list(pieces.decode(vae, latents, run))

        whole, ((levels, finite),) = through(call)
        monkeypatch.setattr(pieces, "LATENT_FRAMES", 8)
        if mesh:
            through(compiler.compile)  # what it compiles is what runs
            assert len(compiler._made) == 7
        latents, parts = through(compiler.call)
        assert [p[0].shape[1] for p in parts] == [17, 16] and finite.all()
        np.testing.assert_allclose(latents, whole, rtol=1e-5, atol=1e-6)
        (video, *_) = pieces.gathered(iter(parts), FRAMES)
        assert np.abs(video.astype(int) - np.asarray(levels)[0]).max() <= 1
        broken = jnp.asarray(whole).at[:1, -1].set(np.nan)
        found = pieces.gathered(pieces.decode(vae, broken, compiler.call), FRAMES)
        assert [video is None for video in found] == [True, False][:rows]


def test_a_piece_that_is_not_finite_spoils_its_video():
    levels = np.zeros((2, 3, 4, 4, 3), np.uint8)
    parts = [(levels, np.array([False, True])), (levels, np.array([True, True]))]
    first, second = pieces.gathered(iter(parts), 5)
    assert first is None and second.shape == (5, 4, 4, 3)


@pytest.mark.parametrize("count", [FRAMES, FRAMES - 3])  # whole pieces, and a frame over
def test_a_mask_goes_to_cells_in_pieces(monkeypatch, count):
    rng = np.random.default_rng(0)
    mask = rng.uniform(size=(count, 16, 24)) < 0.005
    want = np.asarray(lock.to_latent_mask(mask))
    still = np.broadcast_to(mask[:1], mask.shape)
    for size in (1, 2, 4, 20):
        monkeypatch.setattr(pieces, "LATENT_FRAMES", size)
        np.testing.assert_array_equal(pieces.latent_mask(mask, (4, 8, 8)), want)
        np.testing.assert_array_equal(
            pieces.latent_mask(still, (4, 8, 8)), lock.to_latent_mask(still)
        )


def test_a_long_clip_reads_measures_and_compares_as_a_short_one(tmp_path, monkeypatch):
    frames, mask = clip_and_mask(32, 48)
    encode.write_video(tmp_path / "in.mkv", frames, 12, lossless=True)
    encode.write_video(tmp_path / "mask.mkv", tiny.mask(len(frames)), 12, lossless=True)
    files = tmp_path / "in.mkv", tmp_path / "mask.mkv"

    def everything():
        video = decode.read_video(files[0]).frames
        region = read_mask(files[1], *video.shape[:3])
        edited = room.mapped(lambda x: 255 - x, video)
        encode.write_video(tmp_path / "out.mkv", edited, 12, lossless=True)
        written = decode.read_video(tmp_path / "out.mkv").frames
        return (
            video,
            region,
            edited,
            written,
            compare(video, mask, edited),
            (measure(video, edited, mask, video).as_dict()),
        )

    want = everything()
    monkeypatch.setattr(room, "LARGE", 4000)
    monkeypatch.setattr(room, "PIECE", 3 * frames[0].nbytes)
    found = everything()
    for a, b in zip(found[:-1], want[:-1], strict=True):
        np.testing.assert_array_equal(a, b)
        assert is_mapped(a) and not is_mapped(b)
    assert found[-1] == pytest.approx(want[-1], rel=1e-12)


@pytest.mark.parametrize("kind", ["mask", "box", "vace"])
def test_a_long_edit_is_the_same(kind, model, tiny_vace_checkpoint, request, monkeypatch):
    network = kvl.load(tiny_vace_checkpoint) if kind == "vace" else model
    frames, mask = clip_and_mask(32, 44)  # to be padded in time and columns
    mask = (8, 8, 20, 20) if kind == "box" else mask
    config = config_of(composite=True, dilate=1, ceiling=True)
    config.edit.show_masked = True
    monkeypatch.setattr(autoencoder, "_CELLS", 1)  # chunks of one size, for the same bits
    want = edit(network, frames, mask, config=config)
    request.getfixturevalue("spilled")
    found = edit(network, frames, mask, config=config)
    assert is_mapped(found.video) and is_mapped(found.mask) == (kind != "box")
    np.testing.assert_array_equal(found.mask, want.mask)
    np.testing.assert_array_equal(found.video, want.video)
    assert found.metrics.as_dict() == pytest.approx(want.metrics.as_dict(), rel=1e-9)


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    encode.write_video(tmp_path / "in.mkv", CLIP, 12, lossless=True)
    monkeypatch.setattr(room, "LARGE", 1)
    usage = room.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(room.shutil, "disk_usage", lambda folder: usage._replace(free=100))
    message = r"in\.mkv: 5 frames take 2\.3e-05 GB of disk in .*, 1e-07 GB are free: .*--frame_num"
    with pytest.raises(InputError, match=message):
        decode.read_video(tmp_path / "in.mkv")
