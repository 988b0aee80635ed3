"""Colours: untagged video by its size, HDR to SDR, transparency over white, interlacing."""

from fractions import Fraction

import av
import numpy as np
import PIL.Image
import pytest
from clips import psnr, smooth

from kvlock_jax.media import decode

BARS = np.array(
    [(255, 0, 0), (0, 255, 0), (0, 0, 255), (250, 240, 20), (128, 128, 128), (200, 120, 90)]
)
TO_BT2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])


def write(path, image, codec, pixels, tags=None, **reformat):
    """One frame, tagged as said: (matrix, primaries, transfer)."""
    with av.open(str(path), "w") as output:
        stream = output.add_stream(codec, rate=8)
        stream.height, stream.width, stream.pix_fmt = *image.shape[:2], pixels
        kind = "rgb48le" if image.dtype == np.uint16 else "rgb24"
        frame = av.VideoFrame.from_ndarray(image, format=kind)
        frame = frame.reformat(format=pixels, dst_color_range="MPEG", **reformat)
        if tags is not None:
            context = stream.codec_context
            context.colorspace, context.color_primaries, context.color_trc = tags
            context.color_range = 1
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path


def bars(height, width):
    return np.repeat(BARS.astype(np.uint8), width // 6, axis=0)[None].repeat(height, axis=0)


@pytest.mark.parametrize(
    ("size", "matrix"),
    [
        ((720, 1278), "ITU709"),
        ((544, 1284), "ITU709"),
        ((576, 720), "ITU601"),
        ((48, 96), "ITU601"),
    ],
)
@pytest.mark.parametrize("pixels", ["yuv444p", "yuv444p10le"])
def test_untagged_video_is_709_from_hd_on(tmp_path, size, matrix, pixels):
    expected = bars(*size)
    path = write(tmp_path / "a.mp4", expected, "libx264", pixels, dst_colorspace=matrix)
    found = decode.read_video(path).frames[0]
    assert np.abs(found.astype(int) - expected).mean() < 3


@pytest.mark.parametrize(("matrix", "code"), [("ITU709", 1), ("ITU601", 6)])
def test_tags_win_over_the_size(tmp_path, matrix, code):
    tags, expected = (code, code, code), bars(48, 96)
    path = write(tmp_path / "a.mp4", expected, "libx264", "yuv444p", tags, dst_colorspace=matrix)
    found = decode.read_video(path).frames[0]
    assert np.abs(found.astype(int) - expected).mean() < 3


def pq(light):
    """Code, 0 to 1, of light in cd/m2 (SMPTE ST 2084)."""
    power = (light / 10000) ** (2610 / 16384)
    return ((3424 / 4096 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)


def hlg(light):
    """Code, 0 to 1, of display light in cd/m2, of a display of 1000 cd/m2 (BT.2100)."""
    luma = light @ (0.2627, 0.6780, 0.0593)
    scene = light / 1000 * ((luma / 1000) ** (1 / 1.2 - 1))[..., None]
    scene = np.clip(scene, 1e-9, 1)
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(
        scene <= 1 / 12, np.sqrt(3 * scene), a * np.log(np.maximum(12 * scene - b, b)) + c
    )


def linear(colours):
    share = colours / 255
    return np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)


@pytest.mark.parametrize(("transfer", "code"), [(pq, 16), (hlg, 18)])
def test_hdr_is_brought_to_the_colours_it_shows(tmp_path, transfer, code):
    """SDR bars, shown on an HDR display with white at 203 cd/m2, come back."""
    light = np.maximum(203 * linear(bars(48, 96)) @ TO_BT2020.T, 1e-6)
    coded = np.round(65535 * transfer(light)).astype(np.uint16)
    tags = (9, 9, code)
    path = write(tmp_path / "a.mkv", coded, "ffv1", "yuv444p10le", tags, dst_colorspace=9)
    found = decode.read_video(path).frames[0].astype(int)
    assert np.abs(found - bars(48, 96)).max() <= 13  # of what is as bright as white
    assert np.abs(found - bars(48, 96))[:, 64:].max() <= 1


def test_highlights_are_compressed_and_keep_their_order_and_hue(tmp_path):
    nits = np.array([50, 100, 203, 400, 1000]).repeat(16)
    light = nits[None, :, None] * np.ones((16, 1, 3)) * (1, 0.5, 0.25)
    coded = np.round(65535 * pq(light)).astype(np.uint16)
    tags = (9, 9, 16)
    path = write(tmp_path / "a.mkv", coded, "ffv1", "yuv444p10le", tags, dst_colorspace=9)
    found = decode.read_video(path).frames[0, 8, 8::16].astype(int)
    assert (np.diff(found[:, 0]) > 0).all()
    assert (found[:, 0] > found[:, 1]).all() and (found[:, 1] > found[:, 2]).all()
    assert found[0, 0] < 240  # room is left above


def test_what_is_transparent_is_over_white(tmp_path):
    rgba = np.zeros((32, 48, 4), np.uint8)
    rgba[..., 0] = 200
    rgba[:, 16:, 3], rgba[:, 32:, 3] = 128, 255
    PIL.Image.fromarray(rgba).save(tmp_path / "a.png")
    found = decode.read_video(tmp_path / "a.png")
    columns = found.frames[0, 0, [0, 16, 32]]
    np.testing.assert_array_equal(columns, [(255, 255, 255), (227, 127, 127), (200, 0, 0)])
    np.testing.assert_array_equal(found.alpha[0], rgba[..., 3])


def test_what_is_opaque_has_no_alpha(tmp_path):
    PIL.Image.fromarray(smooth()[0]).convert("RGBA").save(tmp_path / "a.png")
    assert decode.read_video(tmp_path / "a.png").alpha is None


def moving(frames, height=64, width=96):
    """A vertical bar that moves two columns a frame."""
    x = np.arange(width)[None, None, :, None]
    left = 10 + 2 * np.arange(frames)[:, None, None, None]
    clip = np.where((x >= left) & (x < left + 20), 220, 40)
    return np.broadcast_to(clip, (frames, height, width, 3)).astype(np.uint8)


@pytest.mark.parametrize(
    ("name", "codec", "flags"),
    [
        ("a.mpg", "mpeg2video", {"flags": "+ildct+ilme"}),
        ("a.mkv", "libx264", {"x264-params": "interlaced=1"}),
    ],
)
@pytest.mark.parametrize("taken", [None, 3])
def test_interlaced_video_is_deinterlaced(tmp_path, name, codec, flags, taken):
    """Rows of a moving edge do not jump between two places."""
    fields = moving(20)
    woven = fields[::2].copy()
    woven[:, 1::2] = fields[1::2, 1::2]
    with av.open(str(tmp_path / name), "w") as output:
        stream = output.add_stream(codec, rate=25, options=flags | {"bf": "0"})
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        stream.bit_rate = 4_000_000
        graph = av.filter.Graph()
        mark = graph.add("setfield", "tff")
        source = graph.add_buffer(width=96, height=64, format="yuv420p", time_base=Fraction(1, 25))
        graph.link_nodes(source, mark, graph.add("buffersink")).configure()
        for n, image in enumerate(woven):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = n, Fraction(1, 25)
            graph.vpush(frame)
            output.mux(stream.encode(graph.vpull()))
        output.mux(stream.encode(None))
    found = decode.read_video(tmp_path / name, taken)
    assert len(found.frames) == (taken or 10) and found.fps == 25
    rows = found.frames[1:, 8:-8].astype(int)
    assert (
        np.abs(np.diff(rows, axis=1)).mean()
        < 0.5 * np.abs(np.diff(woven.astype(int), axis=1)).mean()
    )
    assert psnr(found.frames[2], fields[4]) > 22
