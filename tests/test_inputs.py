"""What an edit reads: sizes of another shape, rates of images, and memory."""

import numpy as np
import pytest
from clips import blob, noise, smooth

from kvlock_jax.errors import InputError
from kvlock_jax.media import encode
from kvlock_jax.media.fit import Resize, resize_mask
from kvlock_jax.media.memory import Gathered
from kvlock_jax.pipeline.inputs import read_clip, read_inputs
from kvlock_jax.settings.schema import EditConfig

WARNED = pytest.mark.filterwarnings("ignore:.*another shape:UserWarning")


def read(video, mask, **settings):
    return read_inputs(video, mask, "a star", EditConfig(**settings))


@pytest.fixture(params=["array", "video", "folder"])
def video(request, tmp_path):
    """A clip of 5 frames of 48x32, in each form in which it may be given."""
    if request.param == "array":
        return noise()
    if request.param == "video":
        encode.write_video(tmp_path / "in.mkv", noise(), 12, lossless=True)
        return tmp_path / "in.mkv"
    (tmp_path / "in").mkdir()
    for n, image in enumerate(noise()):
        encode.write_png(tmp_path / "in" / f"{n}.png", image)
    return tmp_path / "in"


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@WARNED
def test_clip_mask_and_box_go_one_way(video, fit):
    inputs = read(video, blob(), size="32*32", fit=fit)
    resize = Resize((32, 48), (32, 32), fit)
    np.testing.assert_array_equal(inputs.source, [resize.frame(frame) for frame in noise()])
    np.testing.assert_array_equal(inputs.mask, resize.mask(blob()))
    box = np.zeros((1, 32, 48), bool)
    box[:, 4:20, 9:30] = True
    inputs = read(video, (9, 4, 30, 20), size="32*32", fit=fit)  # in pixels of the clip
    np.testing.assert_array_equal(inputs.mask, np.repeat(resize.mask(box), 5, axis=0))


def test_the_middle_is_kept_by_default():
    with pytest.warns(UserWarning, match="48x32 .* size 32.32: cropped to the middle 32x32"):
        inputs = read(noise(), (20, 8, 28, 20), size="32*32")
    np.testing.assert_array_equal(inputs.source, noise()[:, :, 8:40])
    assert inputs.mask[0, 8:20, 12:20].all() and inputs.mask[0].sum() == 12 * 8


def test_one_shape_is_silent():
    inputs = read(noise(), blob(), size="96*64")
    np.testing.assert_array_equal(inputs.mask, resize_mask(blob(), 64, 96))


@WARNED
def test_a_mask_that_is_cropped_away():
    with pytest.raises(InputError, match="lies in the part that is cropped: give --fit pad"):
        read(noise(), (0, 0, 6, 32), size="32*32")
    with pytest.warns(UserWarning, match=r"50\.0 % of the mask is cropped with the picture"):
        read(noise(), (0, 0, 16, 32), size="32*32")
    assert read(noise(), (0, 0, 6, 32), size="32*32", fit="pad").mask.any()


@WARNED
def test_bars_are_no_foreground_of_an_inverted_mask():
    inputs = read(noise(), blob(), size="48*48", fit="pad", invert_mask=True, dilate=3)
    assert not inputs.mask[:, :8].any() and not inputs.mask[:, 40:].any()
    assert not inputs.source[:, :8].any() and inputs.mask.any()


def test_references_keep_their_shape():
    picture = smooth(1, 20, 50)[0]
    inputs = read_inputs(noise(), blob(), "a star", EditConfig(size="96*64"), references=picture)
    np.testing.assert_array_equal(inputs.references[0], picture)


def test_only_small_frames_stay_in_memory(tmp_path, monkeypatch):
    encode.write_video(tmp_path / "in.mkv", noise(9), 12, lossless=True)
    shapes = []
    add = Gathered.add

    def watched(self, *args):
        add(self, *args)
        shapes.append(self.frames.shape)

    monkeypatch.setattr(Gathered, "add", watched)
    clip = read_clip(tmp_path / "in.mkv", EditConfig(size="12*8"))
    assert clip.frames.shape == (9, 8, 12, 3) and clip.size == (32, 48)
    assert [s for s in shapes if s[1:3] == (32, 48)] == [(1, 32, 48, 3)]  # to learn the size


def test_a_box_takes_no_memory_at_the_size_of_the_clip(monkeypatch):
    """One frame of a mask stands for all until it is small."""
    grown = []
    mask = Resize.mask
    monkeypatch.setattr(Resize, "mask", lambda self, m: grown.append(m.shape) or mask(self, m))
    assert read(noise(), (0, 0, 9, 9), size="24*16").mask.shape == (5, 16, 24)
    assert grown == [(1, 32, 48)]


@pytest.mark.parametrize(("given", "fps"), [({}, 16), ({"fps": 12.5}, 12.5), ({"fps": 8.0}, 8)])
def test_images_take_the_rate_that_is_asked_for(tmp_path, given, fps):
    for n, image in enumerate(noise()):
        encode.write_png(tmp_path / f"{n}.png", image)
    for video in (tmp_path, noise(), tmp_path / "0.png"):
        assert read(video, (0, 0, 9, 9), **given).fps == fps


def test_a_video_keeps_its_own_rate(tmp_path):
    encode.write_video(tmp_path / "in.mkv", noise(), 12, lossless=True)
    with pytest.warns(UserWarning, match=r"in\.mkv: keeps its own 12 frames per second"):
        assert read(tmp_path / "in.mkv", (0, 0, 9, 9), fps=30.0).fps == 12
