"""Folders of images: dot files, mixed formats, natural order, and files that are passed over."""

import os
import warnings

import numpy as np
import PIL.Image
import pytest
from clips import noise
from etils import epath

from kvlock_jax.errors import InputError
from kvlock_jax.media import decode, storage
from kvlock_jax.media.folders import IMAGE_SUFFIXES, list_frames

LOSSLESS = [".png", ".tiff", ".TIF", ".bmp", ".ppm"]


def fill(folder, names, images=None) -> np.ndarray:
    images = noise(len(names)) if images is None else images
    for name, image in zip(names, images, strict=True):
        PIL.Image.fromarray(image).save(folder / name)
    return images


def test_every_image_is_read_in_natural_order_whatever_its_format(tmp_path):
    names = [f"frame{n}{LOSSLESS[n % len(LOSSLESS)]}" for n in range(12)]
    images = fill(tmp_path, names)
    np.testing.assert_array_equal(decode.read_video(tmp_path).frames, images)
    np.testing.assert_array_equal(decode.read_video(tmp_path, 3).frames, images[:3])


def test_names_that_differ_in_case_are_in_order(tmp_path):
    names = ["a1.png", "A2.PNG", "a3.png"]
    np.testing.assert_array_equal(fill(tmp_path, names), decode.read_video(tmp_path).frames)


def test_dot_files_are_no_frames(tmp_path):
    images = fill(tmp_path, ["0001.png", "0002.png"])
    for name in ("._0001.png", "._0002.png", ".DS_Store", ".hidden.png"):
        (tmp_path / name).write_bytes(b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X")
    np.testing.assert_array_equal(decode.read_video(tmp_path).frames, images)  # and no warning
    files = storage.files(os.fspath(tmp_path), IMAGE_SUFFIXES)
    assert [os.path.basename(file) for file in files] == ["0001.png", "0002.png"]


def test_what_is_passed_over_is_named_once(tmp_path):
    images = fill(tmp_path, ["1.png", "2.png"])
    for name in ("notes.txt", "Thumbs.db", "3.exr", "a.json", "b.json", "c.json", "d.json"):
        (tmp_path / name).write_text("no frame")
    (tmp_path / "more.png").mkdir()
    with pytest.warns(UserWarning) as caught:
        np.testing.assert_array_equal(decode.read_video(tmp_path).frames, images)
    (text,) = {str(warning.message) for warning in caught}
    assert text.startswith(f"{tmp_path}: 2 images are read, passed over: 3.exr, a.json")
    assert text.endswith("and 3 more")


def test_previews_beside_frames_are_named(tmp_path):
    images = fill(tmp_path, ["1.bmp", "1.png", "2.png"])
    with pytest.warns(UserWarning, match=r"differ in their endings alone .*: 1\.bmp, 1\.png$"):
        np.testing.assert_array_equal(decode.read_video(tmp_path).frames, images)


def test_a_folder_without_images_says_what_it_holds(tmp_path):
    (tmp_path / "clip.mp4").write_text("")
    (tmp_path / "._0001.png").write_text("")
    with pytest.raises(InputError, match=r"holds no images \(\.png, .*\), only clip\.mp4$"):
        decode.read_video(tmp_path)


def test_frames_are_listed_without_being_opened(tmp_path):
    (tmp_path / "1.tiff").write_text("")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [file.name for file in list_frames(epath.Path(tmp_path))] == ["1.tiff"]
