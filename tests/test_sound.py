"""Sound: packets copied bit for bit, cut to the frames taken."""

import warnings
from fractions import Fraction

import av
import numpy as np
import pytest
from clips import noise, packets

from kvlock_jax.media import decode, encode

FPS, SECONDS = 8, 1.0

PAIRS = [
    ("aac", "mp4", ".mp4"),
    ("libmp3lame", "mp4", ".mp4"),
    ("alac", "mov", ".mov"),
    ("pcm_s16le", "mov", ".mp4"),
    ("eac3", "mp4", ".mp4"),
    ("flac", "matroska", ".mkv"),
    ("libopus", "matroska", ".mkv"),
    ("libopus", "webm", ".mp4"),
    ("vorbis", "matroska", ".mkv"),
    ("ac3", "matroska", ".mov"),
    ("mp2", "mpegts", ".mkv"),
    ("aac", "flv", ".mp4"),
    ("pcm_s16le", "avi", ".mp4"),
    ("wavpack", "matroska", ".mkv"),
]


def write(path, codec, container, streams=1, late=0.0):
    """A clip of a second with sound, two tones, as long."""
    rate = 48000
    with av.open(str(path), "w", format=container) as output:
        video = output.add_stream("libvpx" if container == "webm" else "libx264", rate=FPS)
        video.height, video.width, video.pix_fmt = 32, 48, "yuv420p"
        options = {"strict": "experimental"}
        sounds = [
            output.add_stream(codec, rate=rate, options=options, layout="stereo")
            for _ in range(streams)
        ]
        for n, image in enumerate(noise(FPS)):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = n, Fraction(1, FPS)
            output.mux(video.encode(frame))
        output.mux(video.encode(None))
        for n, sound in enumerate(sounds):
            phase = 6.2832 * np.arange(int(rate * SECONDS)) / rate
            tones = [np.sin(phase * pitch * (n + 1)) for pitch in (440, 660)]
            samples = np.int16(9000 * np.stack(tones)).T.reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), "s16", "stereo")
            frame.rate, frame.pts, frame.time_base = rate, int(late * rate), Fraction(1, rate)
            output.mux(sound.encode(frame))
            output.mux(sound.encode(None))
    return path


def heard(path):
    """The decoded samples, and their start in seconds from the first frame."""
    with av.open(str(path)) as container:
        frames = list(container.decode(audio=0))
    with av.open(str(path)) as container:
        picture = next(container.decode(video=0))
    samples = [f.to_ndarray().reshape(-1 if f.format.is_packed else (2, -1)) for f in frames]
    start = frames[0].pts * frames[0].time_base - picture.pts * picture.time_base
    return np.concatenate(samples, axis=-1), float(start)


@pytest.mark.parametrize(("codec", "container", "suffix"), PAIRS)
@pytest.mark.parametrize("taken", [None, 4])
def test_sound_is_kept_bit_for_bit_and_cut_to_the_frames(tmp_path, codec, container, suffix, taken):
    source = write(tmp_path / "source", codec, container)
    video = decode.read_video(source, taken)
    edited = tmp_path / f"edited{suffix}"
    encode.write_video(edited, video.frames, video.fps, footage=video.footage)
    (before, times), (after, _) = packets(source), packets(edited)
    assert after == before[: len(after)]
    lasts = (taken or FPS) / FPS
    last = times[-1] - times[-2]
    assert times[0] + lasts - last <= times[len(after) - 1] <= times[0] + lasts + 2 * last + 0.13
    (whole, start), (part, moved) = heard(source), heard(edited)
    assert moved == pytest.approx(start, abs=0.002)
    assert part.shape[-1] > 0.8 * lasts * 48000
    length = part.shape[-1] if taken else min(part.shape[-1], whole.shape[-1])
    np.testing.assert_array_equal(part[..., :length], whole[..., :length])


@pytest.mark.parametrize("codec", ["pcm_s16le", "pcm_s24le", "pcm_f32le"])
def test_one_long_packet_of_pcm_is_cut(tmp_path, codec):
    source = write(tmp_path / "a.mkv", codec, "matroska")
    assert len(packets(source)[0]) == 1
    video = decode.read_video(source, 4)
    encode.write_video(tmp_path / "b.mkv", video.frames, video.fps, footage=video.footage)
    (before,), (after,) = packets(source)[0], packets(tmp_path / "b.mkv")[0]
    assert len(after) == len(before) // 2 and before.startswith(after)


def test_every_track_is_kept(tmp_path):
    source = write(tmp_path / "a.mkv", "flac", "matroska", streams=2)
    video = decode.read_video(source)
    encode.write_video(tmp_path / "b.mp4", video.frames, video.fps, footage=video.footage)
    for index in range(2):
        assert packets(tmp_path / "b.mp4", index)[0] == packets(source, index)[0]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_sound_that_starts_late_starts_as_late(tmp_path, suffix):
    source = write(tmp_path / "a.mkv", "pcm_s16le", "matroska", late=0.5)
    video = decode.read_video(source)
    encode.write_video(tmp_path / f"b{suffix}", video.frames, video.fps, footage=video.footage)
    assert packets(tmp_path / f"b{suffix}")[1][0] == pytest.approx(0.5, abs=0.01)


def test_a_container_that_cannot_hold_the_codec_says_so_once(tmp_path):
    video = decode.read_video(write(tmp_path / "a.mkv", "libopus", "matroska"))
    with pytest.warns(UserWarning, match=r"b\.mov: .*cannot hold opus, \.mkv can") as caught:
        encode.write_video(tmp_path / "b.mov", video.frames, video.fps, footage=video.footage)
    assert len(caught) == 1
    found = decode.read_video(tmp_path / "b.mov")
    assert len(found.frames) == FPS and found.audio is None


def test_no_sound_is_no_sound(tmp_path):
    encode.write_video(tmp_path / "a.mp4", noise(), 8)
    with warnings.catch_warnings():
        assert decode.read_video(tmp_path / "a.mp4").audio is None
