"""Files, masks and sizes: bit-exact round trips, other libraries' readings, and every bad input."""

import dataclasses
import signal
import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kvlock_jax import video
from kvlock_jax.errors import InputError

quick = settings(max_examples=40, deadline=None, database=None)


def noise(frames: int = 5, height: int = 32, width: int = 48, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def smooth(frames: int = 5, height: int = 32, width: int = 48) -> np.ndarray:
    t, y, x = np.mgrid[:frames, :height, :width]
    return np.stack([60 + 3 * y + t, 200 - 2 * x + t, 40 + y + x + 0 * t], -1).astype(np.uint8)


def quadrants(height: int = 32, width: int = 48) -> np.ndarray:
    """A picture that every quarter turn changes."""
    image = np.zeros((height, width, 3), np.uint8)
    image[: height // 2, : width // 2] = (250, 20, 20)
    image[: height // 2, width // 2 :] = (20, 250, 20)
    image[height // 2 :, : width // 2] = (20, 20, 250)
    return image


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * np.log10(255**2 / max(1e-9, np.square(a.astype(float) - b.astype(float)).mean()))


def encode(path, frames, codec, pixels, *, options=None, container=None, rotation=None):
    """Writes with nothing but PyAV's own defaults."""
    with av.open(str(path), "w", options=container or {}) as output:
        stream = output.add_stream(codec, rate=24, options=options or {})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for index, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = index
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path


def only(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- round trips ------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".mkv", ".mp4", ".mov"])
@pytest.mark.parametrize("size", [(1, 32, 48), (5, 31, 47)])
def test_lossless_keeps_every_bit(tmp_path, suffix, size):
    frames = noise(*size)
    video.write_video(tmp_path / f"a{suffix}", frames, 24, lossless=True)
    found = video.read_video(tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(found.frames, frames)
    assert found.frames.dtype == np.uint8
    assert only(tmp_path) == [f"a{suffix}"]


@pytest.mark.parametrize("fps", [24, 16.0, 12.5, Fraction(30000, 1001), 30000 / 1001, 29.97])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_the_frame_rate_survives(tmp_path, fps, suffix):
    path = str(tmp_path / f"a{suffix}")
    video.write_video(path, noise(7), fps)
    found = video.read_video(path).fps
    assert isinstance(found, Fraction)
    assert float(found) == pytest.approx(float(fps), rel=1e-5)
    if suffix == ".mp4" and fps != 29.97:
        assert found == Fraction(fps).limit_denominator(1001)


def test_default_output_is_what_browsers_play(tmp_path):
    path = tmp_path / "a.mp4"
    video.write_video(path, smooth(), 24)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        codec = stream.codec_context
        assert (codec.name, stream.pix_fmt, stream.frames) == ("h264", "yuv420p", 5)
        assert (codec.colorspace, codec.color_primaries, codec.color_trc) == (1, 1, 1)
        assert codec.color_range == 1
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    assert psnr(video.read_video(path).frames, smooth()) > 38


@pytest.mark.parametrize("colour", [(200, 40, 90), (10, 220, 60), (30, 30, 240)])
def test_colours_are_bt709_as_tagged_and_come_back(tmp_path, colour):
    frames = np.broadcast_to(np.array(colour, np.uint8), (3, 32, 32, 3))
    video.write_video(tmp_path / "a.mp4", frames, 24)
    with av.open(str(tmp_path / "a.mp4")) as container:
        luma = next(container.decode(video=0)).to_ndarray()[:32]
    red, green, blue = colour
    expected = 16 + 219 * (0.2126 * red + 0.7152 * green + 0.0722 * blue) / 255
    assert abs(luma.mean() - expected) < 1.5
    found = video.read_video(tmp_path / "a.mp4").frames.astype(int)
    assert np.abs(found - frames).max() <= 4


@pytest.mark.parametrize("size", [(31, 48), (32, 47), (31, 47)])
def test_odd_sizes_are_kept_in_444(tmp_path, size):
    video.write_video(tmp_path / "a.mp4", smooth(3, *size), 24)
    found = video.read_video(tmp_path / "a.mp4").frames
    assert found.shape == (3, *size, 3)
    assert psnr(found, smooth(3, *size)) > 38
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].pix_fmt == "yuv444p"


def test_lower_crf_is_closer(tmp_path):
    frames = np.repeat(noise(2)[..., :1], 3, -1)  # grey: 4:2:0 blurs colours
    for crf in (5, 40):
        video.write_video(tmp_path / f"{crf}.mp4", frames, 24, crf=crf)
    near, far = (psnr(video.read_video(tmp_path / f"{c}.mp4").frames, frames) for c in (5, 40))
    assert near > far + 10


def test_names_with_colons_and_percents_are_only_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    video.write_video("a:b%02d.mkv", noise(), 24, lossless=True)
    np.testing.assert_array_equal(video.read_video("a:b%02d.mkv").frames, noise())
    video.write_png("a:b%02d.png", noise()[0])
    np.testing.assert_array_equal(video.read_image("a:b%02d.png"), noise()[0])


@pytest.mark.parametrize("size", [(32, 48), (1, 1), (7, 13)])
def test_png_is_exact_by_pillow_too(tmp_path, size):
    image = noise(1, *size)[0]
    video.write_png(tmp_path / "a.png", image)
    np.testing.assert_array_equal(np.asarray(PIL.Image.open(tmp_path / "a.png")), image)
    np.testing.assert_array_equal(video.read_image(tmp_path / "a.png"), image)
    assert only(tmp_path) == ["a.png"]


# --- what else can be read --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "codec", "pixels", "close"),
    [
        ("a.webm", "libvpx-vp9", "yuv420p", 30),
        ("a.gif", "gif", "rgb8", 12),
        ("a.mp4", "libx264", "yuv420p10le", 32),
        ("a.mkv", "libx264", "yuv422p", 32),
        ("a.mkv", "ffv1", "yuv444p16le", 45),
        ("a.avi", "mpeg4", "yuv420p", 28),
        ("a.mp4", "libx264", "yuv420p", 32),
    ],
)
def test_formats_and_pixel_formats(tmp_path, name, codec, pixels, close):
    found = video.read_video(encode(tmp_path / name, smooth(), codec, pixels))
    assert found.frames.shape == smooth().shape
    assert psnr(found.frames, smooth()) > close
    assert float(found.fps) == pytest.approx(24 if name != "a.gif" else 25, rel=0.03)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "I;16", "1"])
def test_images_of_other_modes_are_read_as_pillow_reads_them(tmp_path, mode):
    if mode == "I;16":
        grey = np.arange(32 * 48, dtype=np.uint16).reshape(32, 48) * 40
        PIL.Image.fromarray(grey).save(tmp_path / "a.png")
        expected = np.repeat((grey / 257)[..., None], 3, -1)
    else:
        image = PIL.Image.fromarray(noise()[0]).convert(mode)
        image.save(tmp_path / "a.png")
        expected = np.asarray(image.convert("RGB"), float)
    found = video.read_image(tmp_path / "a.png")
    assert np.abs(found - expected).max() <= 2


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_photos_orientation_is_applied_as_by_pillow(tmp_path, orientation):
    exif = PIL.Image.Exif()
    exif[0x112] = orientation
    PIL.Image.fromarray(quadrants()).save(tmp_path / "a.jpg", exif=exif, quality=95)
    expected = np.asarray(PIL.ImageOps.exif_transpose(PIL.Image.open(tmp_path / "a.jpg")))
    found = video.read_image(tmp_path / "a.jpg")
    assert found.shape == expected.shape
    assert psnr(found, expected) > 25


@pytest.mark.parametrize("degrees", [90, 180, -90])
def test_a_videos_rotation_is_applied_counter_clockwise(tmp_path, degrees):
    frames = np.stack([quadrants()] * 2)
    encode(tmp_path / "a.mp4", frames, "libx264", "yuv420p", rotation=degrees)
    expected = np.stack([np.asarray(PIL.Image.fromarray(quadrants()).rotate(degrees, expand=True))])
    found = video.read_video(tmp_path / "a.mp4").frames
    assert found.shape[1:] == expected.shape[1:]
    assert psnr(found, np.repeat(expected, 2, 0)) > 25


def test_a_folder_is_read_in_natural_order(tmp_path):
    frames = noise(12)
    for index, image in enumerate(frames):
        video.write_png(tmp_path / f"frame{index}.png", image)
    (tmp_path / "notes.txt").write_text("not a frame")
    found = video.read_video(tmp_path)
    np.testing.assert_array_equal(found.frames, frames)
    assert found.fps == 16
    np.testing.assert_array_equal(video.read_video(tmp_path, 3).frames, frames[:3])


def test_one_image_is_a_video_of_one_frame(tmp_path):
    video.write_png(tmp_path / "a.png", noise()[0])
    found = video.read_video(tmp_path / "a.png")
    np.testing.assert_array_equal(found.frames, noise()[:1])
    assert found.fps == 16
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.fps = Fraction(1)


def test_max_frames_stops_early(tmp_path):
    video.write_video(tmp_path / "a.mkv", noise(9), 24, lossless=True)
    np.testing.assert_array_equal(video.read_video(tmp_path / "a.mkv", 4).frames, noise(9)[:4])
    np.testing.assert_array_equal(video.read_image(tmp_path / "a.mkv"), noise(9)[0])


# --- what cannot ------------------------------------------------------------------------------


def sound(path):
    with av.open(str(path), "w") as output:
        stream = output.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        frame.rate = 8000
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))


def song_with_cover(path):
    with av.open(str(path), "w") as output:
        audio = output.add_stream("libmp3lame", rate=44100)
        cover = output.add_stream("png", rate=1)
        cover.height, cover.width, cover.pix_fmt = 32, 32, "rgb24"
        cover.disposition = av.stream.Disposition.attached_pic
        picture = av.VideoFrame.from_ndarray(noise(1, 32, 32)[0], format="rgb24")
        picture.pts = 0
        output.mux(cover.encode(picture))
        output.mux(cover.encode(None))
        silence = av.AudioFrame(format="s16p", layout="stereo", samples=1152)
        silence.rate, silence.pts = 44100, 0
        for plane in silence.planes:
            plane.update(bytes(plane.buffer_size))
        output.mux(audio.encode(silence))
        output.mux(audio.encode(None))


def no_frames(path):
    with av.open(str(path), "w") as output:
        stream = output.add_stream("mpeg4", rate=24)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        output.start_encoding()


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("missing.mp4", lambda path: None, "no such file or folder"),
        ("empty.mp4", lambda path: path.write_bytes(b""), "the file is empty"),
        ("text.mp4", lambda path: path.write_text("hello\n" * 99), "not a readable video"),
        ("text.txt", lambda path: path.write_text("\x1b[1mhello\n" * 99), "not a readable video"),
        ("random.mkv", lambda path: path.write_bytes(noise().tobytes()), "not a readable video"),
        ("sound.wav", sound, "no video stream, only audio"),
        ("song.mp3", song_with_cover, "no video stream, only audio"),
        ("none.avi", no_frames, "the video has no frames"),
        ("folder", lambda path: path.mkdir(), "the folder holds no images"),
    ],
)
def test_what_is_no_video_is_named(tmp_path, name, make, message):
    make(tmp_path / name)
    for read in (video.read_video, video.read_image):
        with pytest.raises(InputError, match=message) as caught:
            read(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "codec", "pixels", "container"),
    [
        ("a.mp4", "libx264", "yuv420p", {"movflags": "faststart"}),
        ("a.mp4", "libx264", "yuv420p", {}),
        ("a.mkv", "ffv1", "bgr0", {}),
        ("a.mkv", "libx264", "yuv420p", {}),
        ("a.webm", "libvpx-vp9", "yuv420p", {}),
        ("a.png", "png", "rgb24", {"update": "1"}),
        ("a.jpg", "mjpeg", "yuvj420p", {"update": "1"}),
    ],
)
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_cut_file_is_never_taken_for_a_whole_one(tmp_path, name, codec, pixels, container, share):
    frames = noise(1 if "update" in container else 12)
    if codec == "mjpeg":
        PIL.Image.fromarray(frames[0]).save(tmp_path / name)
    else:
        encode(tmp_path / name, frames, codec, pixels, container=container)
    whole = (tmp_path / name).read_bytes()
    assert len(video.read_video(tmp_path / name).frames) == len(frames)
    (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(InputError, match=r"truncated|not a readable video or image"):
        video.read_video(tmp_path / name)


def test_damage_inside_is_an_error_that_says_where(tmp_path):
    encode(tmp_path / "a.mp4", noise(30), "libx264", "yuv420p")
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    middle = len(data) // 2
    data[middle : middle + 4000] = bytes(4000)
    (tmp_path / "a.mp4").write_bytes(data)
    with pytest.raises(InputError, match=r"a\.mp4: damaged after frame \d+"):
        video.read_video(tmp_path / "a.mp4")


def test_a_live_recording_that_promises_no_length_is_read(tmp_path):
    encode(tmp_path / "a.mkv", noise(), "ffv1", "bgr0", container={"live": "1"})
    np.testing.assert_array_equal(video.read_video(tmp_path / "a.mkv").frames, noise())


def test_images_of_different_sizes_are_named(tmp_path):
    video.write_png(tmp_path / "1.png", noise()[0])
    video.write_png(tmp_path / "2.png", noise()[0, 1:])
    with pytest.raises(InputError, match="frame 1 has 48x31 pixels, frame 0 has 48x32"):
        video.read_video(tmp_path)


# --- masks ------------------------------------------------------------------------------------

SHAPE = (5, 32, 48)


def blob(frames: int = 5) -> np.ndarray:
    mask = np.zeros((frames, 32, 48), bool)
    for t in range(frames):
        mask[t, 8:20, 10 + 2 * t : 26 + 2 * t] = True
    return mask


def white(mask: np.ndarray) -> np.ndarray:
    return np.repeat(mask[..., None] * np.uint8(255), 3, -1)


def test_masks_from_every_kind_of_source(tmp_path):
    video.write_video(tmp_path / "m.mkv", white(blob()), 24, lossless=True)
    video.write_video(tmp_path / "m.mp4", white(blob()), 24)
    np.save(tmp_path / "m.npy", blob())
    (tmp_path / "m").mkdir()
    for t, image in enumerate(white(blob())):
        video.write_png(tmp_path / "m" / f"{t}.png", image)
    for name in ("m.mkv", "m.mp4", "m.npy", "m"):
        np.testing.assert_array_equal(video.read_mask(tmp_path / name, *SHAPE), blob(), name)
    np.testing.assert_array_equal(video.read_mask(str(tmp_path / "m.mkv"), *SHAPE), blob())


def test_a_one_frame_mask_stands_for_all(tmp_path):
    video.write_png(tmp_path / "m.png", white(blob())[2])
    np.save(tmp_path / "m.npy", blob()[2])
    expected = np.stack([blob()[2]] * 5)
    for mask in (tmp_path / "m.png", tmp_path / "m.npy", blob()[2], blob()[2:3]):
        found = video.read_mask(mask, *SHAPE)
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == bool and found.flags.writeable


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 127, 128, 255]], np.uint8), [0, 0, 1, 1]),
        (np.array([[0, 1, 1, 0]], np.uint8), [0, 1, 1, 0]),
        (np.array([[0, 1, 1, 0]], np.int64), [0, 1, 1, 0]),
        (np.array([[0.0, 0.5, 0.51, 1.0]]), [0, 0, 1, 1]),
        (np.array([[0.0, 127.5, 127.6, 255.0]], np.float32), [0, 0, 1, 1]),
        (np.array([[False, True, True, False]]), [0, 1, 1, 0]),
        (np.array([[[[0, 0, 255], [128, 0, 0], [127, 127, 127], [0, 0, 0]]]]), [1, 1, 0, 0]),
    ],
)
def test_over_half_of_the_brightest_channel_is_one(values, expected):
    found = video.read_mask(values, 1, 1, 4)
    np.testing.assert_array_equal(found, np.array(expected, bool)[None, None])


def test_files_count_by_the_brightest_channel_and_over_half_too(tmp_path):
    image = np.array([[[0, 0, 255], [128, 0, 0], [127, 127, 127], [1, 1, 1]]], np.uint8)
    video.write_png(tmp_path / "m.png", image)
    found = video.read_mask(tmp_path / "m.png", 1, 1, 4)
    np.testing.assert_array_equal(found, [[[True, True, False, False]]])


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (blob(4), "mask: 4 frames, but the video has 5"),
        (blob()[:, :30], "mask: 48x30 pixels, but the video has 48x32"),
        (blob()[:1, :, :47], "mask: 47x32 pixels, but the video has 48x32"),
        (np.zeros((0, 32, 48), bool), r"found bool of shape \(0, 32, 48\)"),
        (np.zeros(5), r"frames height width, found float64 of shape \(5,\)"),
        (np.full((32, 48), "x"), "must be numbers"),
        (np.full((32, 48), np.nan), r"in 0\.\.1 or in 0\.\.255, found nan to nan"),
        (np.full((32, 48), -1.0), "found -1.0 to -1.0"),
        (np.full((32, 48), 256), "found 256 to 256"),
    ],
)
def test_a_mask_that_does_not_fit_is_named(mask, message):
    with pytest.raises(InputError, match=message):
        video.read_mask(mask, *SHAPE)


def test_mask_files_that_do_not_fit_are_named(tmp_path):
    video.write_video(tmp_path / "short.mkv", white(blob(3)), 24, lossless=True)
    with pytest.raises(InputError, match=r"short\.mkv: 3 frames, but the video has 5"):
        video.read_mask(tmp_path / "short.mkv", *SHAPE)
    with pytest.raises(InputError, match=r"short\.mkv: 48x32 pixels, but the video has 50x32"):
        video.read_mask(tmp_path / "short.mkv", 3, 32, 50)
    np.save(tmp_path / "object.npy", np.array([{}], object), allow_pickle=True)
    (tmp_path / "empty.npy").write_bytes(b"")
    (tmp_path / "text.npy").write_text("hello")
    for name in ("object.npy", "empty.npy", "text.npy", "missing.npy", "missing.mp4"):
        with pytest.raises(InputError, match=name):
            video.read_mask(tmp_path / name, *SHAPE)


@quick
@given(st.data())
def test_a_box_is_its_pixels(data):
    height, width = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    x0, y0 = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    x1, y1 = data.draw(st.integers(x0 + 1, width)), data.draw(st.integers(y0 + 1, height))
    expected = [[x0 <= x < x1 and y0 <= y < y1 for x in range(width)] for y in range(height)]
    for box in (f"{x0}, {y0},{x1},{y1}", (x0, y0, x1, y1), np.array([x0, y0, x1, y1])):
        np.testing.assert_array_equal(video.bbox_mask(box, 2, height, width), [expected] * 2)


@pytest.mark.parametrize(
    "box",
    [
        *("1,2,3", "1,2,3,4,5", "a,b,c,d", "", "1.5,2,3,4", (1.5, 2, 3, 4), 7, None),
        *("3,0,3,9", "4,0,3,9", "0,5,3,5", "-1,0,3,3", "0,0,49,3", "0,0,3,33"),
    ],
)
def test_what_is_no_box_is_named(box):
    with pytest.raises(InputError, match="bbox"):
        video.bbox_mask(box, *SHAPE)


def test_coverage_and_the_empty_mask():
    assert video.check_mask(np.ones(SHAPE, bool)) == 1.0
    mask = np.zeros(SHAPE, bool)
    mask[0, 0, :24] = True
    assert video.check_mask(mask) == pytest.approx(24 / (5 * 32 * 48))
    with pytest.raises(InputError, match="nothing to edit"):
        video.check_mask(np.zeros(SHAPE, bool))


# --- bad output, interruptions ----------------------------------------------------------------


def test_output_is_checked_before_the_work(tmp_path):
    assert video.check_output(str(tmp_path / "a.MP4")).name == "a.MP4"
    assert video.check_output(tmp_path / "trace.json", (".json",)).name == "trace.json"
    (tmp_path / "folder.mp4").mkdir()
    for name, message in (
        ("missing/a.mp4", "output folder .*missing does not exist"),
        ("a.txt", r"must end in \.mp4, \.m4v, \.mov, \.mkv"),
        ("a", "must end in"),
        ("folder.mp4", "is a folder"),
    ):
        with pytest.raises(InputError, match=message):
            video.check_output(tmp_path / name)
        with pytest.raises(InputError, match=message):
            video.write_video(tmp_path / name, noise(), 24)
    with pytest.raises(InputError, match="must end in"):
        video.write_png(tmp_path / "a.jpg", noise()[0])
    assert only(tmp_path) == ["folder.mp4"]


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf")])
def test_a_rate_that_is_none_is_named(tmp_path, fps):
    with pytest.raises(InputError, match="frame rate must be over 0"):
        video.write_video(tmp_path / "a.mp4", noise(), fps)


@pytest.mark.parametrize(
    "frames", [noise() / 255, noise()[0], noise()[..., :2], noise()[:0], noise()[:, :0]]
)
def test_frames_that_are_none_are_named(tmp_path, frames):
    with pytest.raises(InputError, match="must be uint8 of shape frames height width 3, found"):
        video.write_video(tmp_path / "a.mp4", frames, 24)
    assert only(tmp_path) == []


@pytest.mark.parametrize(
    ("raised", "caught"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (RuntimeError("a bug"), RuntimeError),
        (OSError(28, "No space left on device"), InputError),
    ],
)
@pytest.mark.parametrize("existing", [False, True])
def test_an_interrupted_write_leaves_nothing_behind(
    tmp_path, monkeypatch, raised, caught, existing
):
    if existing:
        (tmp_path / "a.mkv").write_bytes(b"the last run")
    to_frame, seen = video._frame, []

    def interrupted(image):
        seen.append(only(tmp_path))
        if len(seen) == 8:
            raise raised
        return to_frame(image)

    monkeypatch.setattr(video, "_frame", interrupted)
    with pytest.raises(caught, match=str(raised.args[1]) if caught is InputError else None):
        video.write_video(tmp_path / "a.mkv", noise(9, 96, 96), 24, lossless=True)
    assert any(name.endswith(".part") for name in seen[-1])  # it was half-way, beside the target
    assert only(tmp_path) == (["a.mkv"] if existing else [])
    if existing:
        assert (tmp_path / "a.mkv").read_bytes() == b"the last run"


def test_a_killed_write_leaves_the_target_alone(tmp_path):
    (tmp_path / "a.mkv").write_bytes(b"the last run")
    script = """
import os, signal, sys
import numpy as np
from kvlock_jax import video
to_frame, count = video._frame, iter(range(99))
def killed(image):
    if next(count) == 30:
        os.kill(os.getpid(), signal.SIGKILL)
    return to_frame(image)
video._frame = killed
frames = np.random.default_rng(0).integers(0, 256, (40, 96, 96, 3), np.uint8)
video.write_video(sys.argv[1], frames, 24, lossless=True)
"""
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path / "a.mkv")], check=False)
    assert run.returncode == -signal.SIGKILL
    assert (tmp_path / "a.mkv").read_bytes() == b"the last run"
    assert len(only(tmp_path)) == 2  # and the temporary file, which nobody could remove


# --- sizes ------------------------------------------------------------------------------------

sizes = st.tuples(st.integers(1, 12), st.integers(1, 40), st.integers(1, 40))


@quick
@given(sizes, st.integers(0, 99))
def test_fit_pads_to_the_models_sizes_by_the_nearest_pixel_and_back(size, seed):
    frames = noise(*size, seed=seed)
    fit = video.Fit(*frames.shape[:3])
    padded = fit.apply(frames)
    assert padded.shape[:3] == fit.model_shape
    assert padded.shape[0] % 4 == 1 and padded.shape[1] % 16 == padded.shape[2] % 16 == 0
    for grown, was, step in zip(padded.shape, size, (4, 16, 16), strict=False):
        assert was <= grown < was + step
    t, y, x = (np.minimum(np.arange(n), m - 1) for n, m in zip(padded.shape, size, strict=False))
    np.testing.assert_array_equal(padded, frames[t][:, y][:, :, x])
    np.testing.assert_array_equal(fit.undo(padded), frames)


@quick
@given(hnp.arrays(bool, sizes))
def test_a_padded_mask_edits_no_added_pixel_and_no_added_latent_frame(mask):
    fit = video.Fit(*mask.shape)
    padded = fit.apply_mask(mask)
    assert padded.shape == fit.model_shape and padded.dtype == bool
    frames, height, width = mask.shape
    np.testing.assert_array_equal(fit.undo(padded), mask)
    assert not padded[:, height:].any() and not padded[:, :, width:].any()
    # A latent frame holds pixel frame 0, or four more: no frame after the first is alone in one.
    latent_frame = -(-np.arange(len(padded)) // 4)
    for t in range(frames, len(padded)):
        assert latent_frame[t] == latent_frame[frames - 1]
        np.testing.assert_array_equal(padded[t, :height, :width], mask[-1])


def test_fit_names_what_does_not_fit():
    fit = video.Fit(6, 30, 40)
    assert fit.model_shape == (9, 32, 48)
    for apply in (fit.apply, fit.undo):
        with pytest.raises(InputError, match="must be"):
            apply(noise(5))
    with pytest.raises(InputError, match=r"must be \(6, 30, 40\), found \(5, 32, 48\)"):
        fit.apply_mask(blob())


@pytest.mark.parametrize("size", [(16, 24), (20, 33), (7, 5), (64, 96), (40, 20)])
def test_resize_is_pillows_antialiased_triangle(size):
    frames = noise(2)
    found = video.resize(frames, *size)
    expected = [
        np.asarray(PIL.Image.fromarray(f).resize(size[::-1], PIL.Image.Resampling.BILINEAR))
        for f in frames
    ]
    assert found.dtype == np.uint8
    assert np.abs(found.astype(int) - np.stack(expected)).max() <= 1


def test_resizing_to_the_same_size_changes_nothing():
    np.testing.assert_array_equal(video.resize(noise(), 32, 48), noise())


@quick
@given(hnp.arrays(bool, st.tuples(st.just(2), st.integers(1, 9), st.integers(1, 9))), sizes)
def test_a_resized_mask_loses_no_edited_pixel(mask, size):
    _, height, width = size
    found = video.resize_mask(mask, height, width)

    def overlapping(old, new):  # pairs of old and new pixels that share some of [0, 1]
        return [
            (i, j)
            for i in range(old)
            for j in range(new)
            if Fraction(i, old) < Fraction(j + 1, new) and Fraction(j, new) < Fraction(i + 1, old)
        ]

    expected = np.zeros((2, height, width), bool)
    columns = overlapping(mask.shape[2], width)
    for y, row in overlapping(mask.shape[1], height):
        for x, column in columns:
            expected[:, row, column] |= mask[:, y, x]
    np.testing.assert_array_equal(found, expected)
