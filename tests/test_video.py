"""Files: bit-exact round trips, other libraries' readings, and every bad input."""

import dataclasses
from fractions import Fraction

import av
import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
from clips import encode as encode_by
from clips import noise, only, psnr, quadrants, smooth

from kvlock_jax.errors import InputError
from kvlock_jax.media import decode, encode

# --- round trips ------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".mkv", ".mp4", ".mov"])
@pytest.mark.parametrize("size", [(1, 32, 48), (5, 31, 47)])
def test_lossless_keeps_every_bit(tmp_path, suffix, size):
    frames = noise(*size)
    encode.write_video(tmp_path / f"a{suffix}", frames, 24, lossless=True)
    found = decode.read_video(tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(found.frames, frames)
    assert found.frames.dtype == np.uint8
    assert only(tmp_path) == [f"a{suffix}"]


@pytest.mark.parametrize("fps", [24, 16.0, 12.5, Fraction(30000, 1001), 30000 / 1001, 29.97])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_the_frame_rate_survives(tmp_path, fps, suffix):
    path = str(tmp_path / f"a{suffix}")
    encode.write_video(path, noise(7), fps)
    found = decode.read_video(path).fps
    assert isinstance(found, Fraction)
    assert float(found) == pytest.approx(float(fps), rel=1e-5)
    if suffix == ".mp4" and fps != 29.97:
        assert found == Fraction(fps).limit_denominator(1001)


def test_default_output_is_what_browsers_play(tmp_path):
    path = tmp_path / "a.mp4"
    encode.write_video(path, smooth(), 24)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        codec = stream.codec_context
        assert (codec.name, stream.pix_fmt, stream.frames) == ("h264", "yuv420p", 5)
        assert (codec.colorspace, codec.color_primaries, codec.color_trc) == (1, 1, 1)
        assert codec.color_range == 1
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    assert psnr(decode.read_video(path).frames, smooth()) > 38


@pytest.mark.parametrize("colour", [(200, 40, 90), (10, 220, 60), (30, 30, 240)])
def test_colours_are_bt709_as_tagged_and_come_back(tmp_path, colour):
    frames = np.broadcast_to(np.array(colour, np.uint8), (3, 32, 32, 3))
    encode.write_video(tmp_path / "a.mp4", frames, 24)
    with av.open(str(tmp_path / "a.mp4")) as container:
        luma = next(container.decode(video=0)).to_ndarray()[:32]
    red, green, blue = colour
    expected = 16 + 219 * (0.2126 * red + 0.7152 * green + 0.0722 * blue) / 255
    assert abs(luma.mean() - expected) < 1.5
    found = decode.read_video(tmp_path / "a.mp4").frames.astype(int)
    assert np.abs(found - frames).max() <= 4


@pytest.mark.parametrize("size", [(31, 48), (32, 47), (31, 47)])
def test_odd_sizes_are_kept_in_444(tmp_path, size):
    encode.write_video(tmp_path / "a.mp4", smooth(3, *size), 24)
    found = decode.read_video(tmp_path / "a.mp4").frames
    assert found.shape == (3, *size, 3)
    assert psnr(found, smooth(3, *size)) > 38
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].pix_fmt == "yuv444p"


def test_lower_crf_is_closer(tmp_path):
    frames = np.repeat(noise(2)[..., :1], 3, -1)  # grey: 4:2:0 blurs colours
    for crf in (5, 40):
        encode.write_video(tmp_path / f"{crf}.mp4", frames, 24, crf=crf)
    near, far = (psnr(decode.read_video(tmp_path / f"{c}.mp4").frames, frames) for c in (5, 40))
    assert near > far + 10


def test_names_with_colons_and_percents_are_only_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    encode.write_video("a:b%02d.mkv", noise(), 24, lossless=True)
    np.testing.assert_array_equal(decode.read_video("a:b%02d.mkv").frames, noise())
    encode.write_png("a:b%02d.png", noise()[0])
    np.testing.assert_array_equal(decode.read_image("a:b%02d.png"), noise()[0])


@pytest.mark.parametrize("size", [(32, 48), (1, 1), (7, 13)])
def test_png_is_exact_by_pillow_too(tmp_path, size):
    image = noise(1, *size)[0]
    encode.write_png(tmp_path / "a.png", image)
    np.testing.assert_array_equal(np.asarray(PIL.Image.open(tmp_path / "a.png")), image)
    np.testing.assert_array_equal(decode.read_image(tmp_path / "a.png"), image)
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
        ("a.mjpeg", "mjpeg", "yuvj420p", 28),
        ("a.mp4", "libx264", "yuv420p", 32),
    ],
)
def test_formats_and_pixel_formats(tmp_path, name, codec, pixels, close):
    found = decode.read_video(encode_by(tmp_path / name, smooth(), codec, pixels))
    assert found.frames.shape == smooth().shape
    assert psnr(found.frames, smooth()) > close
    assert float(found.fps) == pytest.approx(24, rel=0.05)


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
    found = decode.read_image(tmp_path / "a.png")
    assert np.abs(found - expected).max() <= 2


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_photos_orientation_is_applied_as_by_pillow(tmp_path, orientation):
    exif = PIL.Image.Exif()
    exif[0x112] = orientation
    PIL.Image.fromarray(quadrants()).save(tmp_path / "a.jpg", exif=exif, quality=95)
    expected = np.asarray(PIL.ImageOps.exif_transpose(PIL.Image.open(tmp_path / "a.jpg")))
    found = decode.read_image(tmp_path / "a.jpg")
    assert found.shape == expected.shape
    assert psnr(found, expected) > 25


@pytest.mark.parametrize("degrees", [90, 180, -90])
def test_a_videos_rotation_is_applied_counter_clockwise(tmp_path, degrees):
    frames = np.stack([quadrants()] * 2)
    encode_by(tmp_path / "a.mp4", frames, "libx264", "yuv420p", rotation=degrees)
    expected = np.stack([np.asarray(PIL.Image.fromarray(quadrants()).rotate(degrees, expand=True))])
    found = decode.read_video(tmp_path / "a.mp4").frames
    assert found.shape[1:] == expected.shape[1:]
    assert psnr(found, np.repeat(expected, 2, 0)) > 25


def test_a_folder_is_read_in_natural_order(tmp_path):
    frames = noise(12)
    for index, image in enumerate(frames):
        encode.write_png(tmp_path / f"frame{index}.png", image)
    (tmp_path / "notes.txt").write_text("not a frame")
    with pytest.warns(UserWarning, match=r"passed over: notes\.txt$"):
        found = decode.read_video(tmp_path)
    np.testing.assert_array_equal(found.frames, frames)
    assert found.fps == 16
    (tmp_path / "notes.txt").unlink()
    np.testing.assert_array_equal(decode.read_video(tmp_path, 3).frames, frames[:3])


def test_one_image_is_a_video_of_one_frame(tmp_path):
    encode.write_png(tmp_path / "a.png", noise()[0])
    found = decode.read_video(tmp_path / "a.png")
    np.testing.assert_array_equal(found.frames, noise()[:1])
    assert found.fps == 16
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.fps = Fraction(1)


def test_max_frames_stops_early(tmp_path):
    encode.write_video(tmp_path / "a.mkv", noise(9), 24, lossless=True)
    np.testing.assert_array_equal(decode.read_video(tmp_path / "a.mkv", 4).frames, noise(9)[:4])
    np.testing.assert_array_equal(decode.read_image(tmp_path / "a.mkv"), noise(9)[0])


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
    for read in (decode.read_video, decode.read_image):
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
        encode_by(tmp_path / name, frames, codec, pixels, container=container)
    whole = (tmp_path / name).read_bytes()
    assert len(decode.read_video(tmp_path / name).frames) == len(frames)
    (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(InputError, match=r"truncated|not a readable video or image"):
        decode.read_video(tmp_path / name)


def test_damage_inside_is_an_error_that_says_where(tmp_path):
    encode_by(tmp_path / "a.mp4", noise(30), "libx264", "yuv420p")
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    middle = len(data) // 2
    data[middle : middle + 4000] = bytes(4000)
    (tmp_path / "a.mp4").write_bytes(data)
    with pytest.raises(InputError, match=r"a\.mp4: damaged after frame \d+"):
        decode.read_video(tmp_path / "a.mp4")


def test_a_live_recording_that_promises_no_length_is_read(tmp_path):
    encode_by(tmp_path / "a.mkv", noise(), "ffv1", "bgr0", container={"live": "1"})
    np.testing.assert_array_equal(decode.read_video(tmp_path / "a.mkv").frames, noise())


def test_images_of_different_sizes_are_named(tmp_path):
    encode.write_png(tmp_path / "1.png", noise()[0])
    encode.write_png(tmp_path / "2.png", noise()[0, 1:])
    with pytest.raises(InputError, match="frame 1 has 48x31 pixels, frame 0 has 48x32"):
        decode.read_video(tmp_path)
