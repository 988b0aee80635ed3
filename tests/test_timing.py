"""Frame rates and timestamps: of the frames taken, from file to file."""

from fractions import Fraction

import av
import numpy as np
import pytest
from clips import noise, write_stamps

from kvlock_jax.errors import InputError
from kvlock_jax.media import decode, encode, timing
from kvlock_jax.media.footage import Footage

PHONE = np.cumsum([0, 33, 34, 33, 200, 200, 33, 34, 33])  # milliseconds


@pytest.mark.parametrize(("name", "declared"), [("a.mkv", 1000), ("a.mp4", 30)])
@pytest.mark.parametrize("taken", [None, 4, 6])
def test_a_varying_rate_is_that_of_the_frames_taken(tmp_path, name, declared, taken):
    found = decode.read_video(write_stamps(tmp_path / name, PHONE, declared), taken)
    stamps = PHONE[:taken] / 1000
    assert float(found.fps) == pytest.approx((len(stamps) - 1) / stamps[-1], rel=0.01)
    if taken == 4:  # the steady part
        assert found.fps == 30 and found.times is None
    else:
        np.testing.assert_allclose(found.times, stamps, atol=1e-6)


@pytest.mark.parametrize("rate", [Fraction(24000, 1001), Fraction(30000, 1001), 25, 12.5, 8])
def test_rounded_timestamps_of_an_undeclared_rate_are_that_rate(tmp_path, rate):
    stamps = [round(1000 * n / rate) for n in range(12)]
    found = decode.read_video(write_stamps(tmp_path / "a.mkv", stamps, 1000))
    assert found.fps == Fraction(rate) and found.times is None


def test_the_first_frame_alone_has_the_declared_rate(tmp_path):
    found = decode.read_video(write_stamps(tmp_path / "a.mp4", PHONE[:3], 30), 1)
    assert float(found.fps) == pytest.approx(30, rel=0.02)


def test_a_clip_that_starts_late_keeps_its_rate(tmp_path):
    found = decode.read_video(write_stamps(tmp_path / "a.mkv", 5000 + 100 * np.arange(5), 10))
    assert found.fps == 10 and found.times is None


@pytest.mark.parametrize("stamps", [[None, None, None], [0, 0, 1], [1, 0, 2]])
def test_timestamps_that_are_none_leave_the_declared_rate(stamps):
    stamps = [stamp if stamp is None else Fraction(stamp) for stamp in stamps]
    declared = [None, Fraction(1000), Fraction(25)]
    assert timing.pace(stamps, declared, Fraction(1, 25)) == (25, None)
    assert timing.pace(stamps, [None], Fraction(1, 25)) == (None, None)


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
@pytest.mark.parametrize("lossless", [True, False])
def test_varying_timestamps_are_written(tmp_path, suffix, lossless):
    footage = Footage(times=PHONE / 1000)
    encode.write_video(tmp_path / f"a{suffix}", noise(9), 13, lossless=lossless, footage=footage)
    found = decode.read_video(tmp_path / f"a{suffix}")
    assert len(found.frames) == 9
    np.testing.assert_allclose(found.times, PHONE / 1000, atol=1e-3)


def test_timestamps_of_other_frames_are_refused(tmp_path):
    with pytest.raises(InputError, match="9 frames, but 8 timestamps"):
        encode.write_video(tmp_path / "a.mp4", noise(9), 8, footage=Footage(times=PHONE[:8] / 1000))


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
@pytest.mark.parametrize("aspect", [Fraction(4, 3), Fraction(8, 9), Fraction(1)])
@pytest.mark.parametrize("lossless", [True, False])
def test_the_shape_of_pixels_survives(tmp_path, suffix, aspect, lossless):
    path = tmp_path / f"a{suffix}"
    footage = Footage(pixel_aspect=aspect)
    encode.write_video(path, noise(2), 8, lossless=lossless, footage=footage)
    assert decode.read_video(path).pixel_aspect == aspect
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        next(container.decode(stream))
        assert (stream.codec_context.sample_aspect_ratio or 1) == aspect


def test_a_quarter_turn_turns_the_pixels_too(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as output:
        stream = output.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)
        stream.set_display_rotation(90)
        output.mux(stream.encode(av.VideoFrame.from_ndarray(noise()[0], format="rgb24")))
        output.mux(stream.encode(None))
    found = decode.read_video(tmp_path / "a.mp4")
    assert found.frames.shape == (1, 48, 32, 3) and found.pixel_aspect == Fraction(3, 4)


def test_the_default_of_several_videos_is_read(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as output:
        streams = [output.add_stream("ffv1", rate=8) for _ in range(3)]
        for n, stream in enumerate(streams):
            stream.height, stream.width, stream.pix_fmt = 32, 48, "bgr0"
            stream.disposition = av.stream.Disposition.default if n == 1 else 0
        for n, stream in enumerate(streams):
            frame = av.VideoFrame.from_ndarray(noise(seed=n)[0], format="rgb24")
            frame.pts = 0
            output.mux(stream.encode(frame))
            output.mux(stream.encode(None))
    np.testing.assert_array_equal(decode.read_video(tmp_path / "a.mkv").frames, noise(seed=1)[:1])
