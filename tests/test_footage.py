"""Commands carry timestamps, sound and pixel aspect from the source to the result."""

from fractions import Fraction

import av
import batches
import numpy as np
import pytest
import tiny
from clips import packets
from manifests import write as write_manifest

from kvlock_jax.media import decode, encode
from kvlock_jax.media.footage import Footage
from kvlock_jax.media.sound import read_sound

STAMPS = np.array([0, 0.1, 0.2, 0.5, 0.6])


def write(path):
    """The tiny clip at a varying rate, with a second of sound and pixels wider than high."""
    with av.open(f"{path}.flac", "w") as output:
        stream = output.add_stream("flac", rate=48000, layout="mono")
        tone = np.int16(9000 * np.sin(np.arange(48000) / 20))[None]
        frame = av.AudioFrame.from_ndarray(tone, "s16", "mono")
        frame.rate, frame.pts = 48000, 0
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    with av.open(f"{path}.flac") as container:
        audio = read_sound(path, container, Fraction(0), None)
    footage = Footage(STAMPS, audio, Fraction(4, 3))
    encode.write_video(path, tiny.clip(), 12, lossless=True, footage=footage)


@pytest.mark.parametrize("taken", [5, 3])
def test_an_edit_keeps_what_is_not_pixels(kvlock, taken):
    write("in.mkv")
    flags = f"--frame_num={taken}", "--compare=c.mkv"
    assert kvlock(*flags, src_mask=None, bbox="8,8,16,16", save_file="out.mp4")[0] == 0
    for name in ("out.mp4", "c.mkv"):
        found = decode.read_video(name)
        if taken == 3:
            assert found.fps == 10 and found.times is None
        else:
            np.testing.assert_allclose(found.times, STAMPS, atol=1e-3)
        assert found.pixel_aspect == Fraction(4, 3)
    assert decode.read_video("c.mkv").audio is None
    before, (after, times) = packets("in.mkv")[0], packets("out.mp4")
    assert 0 < len(after) < len(before) and after == before[: len(after)]
    end = 0.5 if taken == 3 else 0.7  # the fourth frame, or 0.1 after the last
    assert end - 0.1 < times[-1] < end + 0.05


def test_no_audio_leaves_the_sound_out(kvlock):
    write("in.mkv")
    flags = dict(src_mask=None, bbox="8,8,16,16", save_file="out.mp4")
    assert kvlock("--no_audio", **flags)[0] == 0
    found = decode.read_video("out.mp4")
    assert found.audio is None and found.times is not None


def test_edits_of_a_batch_keep_it_too(tmp_path):
    write(tmp_path / "0.mkv")
    manifest = write_manifest(tmp_path, {}, {"no_audio": True}, {"save_file": "2.mp4"})
    assert batches.do(manifest, tmp_path / "out").done == 3
    one, silent, other = (
        decode.read_video(tmp_path / "out" / n) for n in ("0.mkv", "1.mkv", "2.mp4")
    )
    for found in (one, silent, other):
        np.testing.assert_allclose(found.times, STAMPS, atol=1e-3)
        assert found.pixel_aspect == Fraction(4, 3)
    assert silent.audio is None
    before = packets(tmp_path / "0.mkv")[0]
    for name in ("0.mkv", "2.mp4"):
        after = packets(tmp_path / "out" / name)[0]
        assert after and after == before[: len(after)]
