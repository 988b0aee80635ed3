"""Folders whose names hold the characters of patterns: `a[1]` is a name, which matches itself."""

import jax
import numpy as np
import pytest
from etils import epath

from kvlock_jax.batch.fingerprint import checkpoint_identity
from kvlock_jax.checkpoints import store
from kvlock_jax.errors import CheckpointError
from kvlock_jax.media import decode, encode

ODD = ["a[1]", "b*", "c?", "{d,e}", "%03d"]


@pytest.mark.parametrize("name", ODD)
def test_a_checkpoint_is_written_and_read(tmp_path, name):
    folder = epath.Path(tmp_path) / name / "data" / "vae"
    folder.parent.mkdir(parents=True)
    values = np.arange(6, dtype=np.float32).reshape(3, 2)
    stored = store.Parameter(values.shape, values.dtype, 1, lambda first, last: values[first:last])
    store.write(folder, {"weight": stored})
    assert store.describe(folder)["weight"].shape == (3, 2)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.ShapeDtypeStruct((3, 2), np.float32, sharding=device)
    np.testing.assert_array_equal(dict(store.read(folder, {"weight": target}))["weight"], values)
    assert {path.name for path in tmp_path.iterdir()} == {name}


def test_a_remote_checkpoint_of_odd_name_is_refused():
    with pytest.raises(CheckpointError, match="must be without"):
        store.describe(epath.Path("gs://bucket/a[1]/vae"))


@pytest.mark.parametrize("name", ODD)
def test_the_identity_of_a_published_checkpoint_is_of_its_files(tmp_path, name):
    (tmp_path / name / "vae").mkdir(parents=True)
    empty = checkpoint_identity(str(tmp_path / name))["identity"]
    (tmp_path / name / "vae" / "model.safetensors").write_bytes(b"one")
    assert checkpoint_identity(str(tmp_path / name))["identity"] != empty


@pytest.mark.parametrize("name", ODD)
def test_videos_and_pictures_are_written_and_read(tmp_path, name):
    clip = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    (tmp_path / name).mkdir()
    encode.write_video(tmp_path / name / f"{name}.mkv", clip, 12, lossless=True)
    encode.write_png(tmp_path / name / f"{name}.png", clip[0])
    np.testing.assert_array_equal(decode.read_video(tmp_path / name / f"{name}.mkv").frames, clip)
    with pytest.warns(UserWarning, match="passed over"):
        frames = decode.read_video(tmp_path / name).frames
    np.testing.assert_array_equal(frames, clip[:1])
