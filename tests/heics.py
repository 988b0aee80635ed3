"""HEIC files of tiles, as phones write them."""

import struct
from fractions import Fraction

import av
import numpy as np


def _box(name: str, *content: bytes) -> bytes:
    body = b"".join(content)
    return struct.pack(">I4s", 8 + len(body), name.encode()) + body


def _full(name: str, *content: bytes, version: int = 0, flags: int = 0) -> bytes:
    return _box(name, struct.pack(">I", version << 24 | flags), *content)


def _tile(image: np.ndarray) -> tuple[bytes, bytes]:
    """The `hvcC` property and the data of a picture, H.265 lossless."""
    codec = av.CodecContext.create("libx265", "w")
    codec.height, codec.width, codec.pix_fmt = *image.shape[:2], "yuv444p"
    codec.time_base, codec.options = (
        Fraction(1),
        {"x265-params": "lossless=1:info=0:log-level=none:range=full"},
    )
    frame = av.VideoFrame.from_ndarray(image, format="rgb24")
    frame = frame.reformat(format="yuv444p", dst_colorspace="ITU601", dst_color_range="JPEG")
    frame.pts = 0
    stream = b"".join(bytes(packet) for packet in [*codec.encode(frame), *codec.encode(None)])
    units = [unit.rstrip(b"\0") for unit in stream.split(b"\0\0\1") if unit.strip(b"\0")]
    kinds = [unit[0] >> 1 & 63 for unit in units]
    arrays = b"".join(
        struct.pack(">BHH", 0x80 | kind, 1, len(unit)) + unit
        for kind, unit in zip(kinds, units, strict=True)
        if kind in (32, 33, 34)  # the three sets of parameters
    )
    # level 3.0, main 4:4:4, 4:4:4 of eight bits, lengths of four bytes
    head = struct.pack(">BBIIHB", 1, 4, 0x08000000, 0x9E080000, 0, 90)
    head += bytes([0xF0, 0, 0xFC, 0xFC | 3, 0xF8, 0xF8, 0, 0, 0x0F, 3])
    data = [unit for kind, unit in zip(kinds, units, strict=True) if kind < 32]
    return head + arrays, b"".join(struct.pack(">I", len(unit)) + unit for unit in data)


def heic(tiles: list[np.ndarray], columns: int, size: tuple[int, int], turns: tuple = ()) -> bytes:
    """A picture of tiles, row by row; of one tile where `columns` is 0.

    Args:
      tiles: RGB, of one size.
      columns: tiles in a row.
      size: width and height of the picture, at most those of the tiles.
      turns: properties `("irot", quarter turns)` and `("imir", axis)`.
    """
    count = len(tiles)
    coded = [_tile(tile) for tile in tiles]
    grid = (
        struct.pack(">BBBBHH", 0, 0, count // columns - 1, columns - 1, *size) if columns else b""
    )
    height, width = tiles[0].shape[:2]
    properties = [_box("hvcC", coded[0][0]), _full("ispe", struct.pack(">II", width, height))]
    properties += [_full("ispe", struct.pack(">II", *size))]
    colour = _box("colr", b"nclx", struct.pack(">HHHB", 1, 13, 6, 0x80))
    properties += [colour, *(_box(name, bytes([value])) for name, value in turns)]
    turned = [0x80 | 5 + n for n in range(len(turns))]
    primary = 1 if not columns else count + 1
    owned = {n + 1: [0x81, 2, 4] for n in range(count)}
    if columns:
        owned[primary] = [3]
    owned[primary] = owned[primary] + turned
    items = [(n + 1, b"hvc1") for n in range(count)] + [(primary, b"grid")] * bool(columns)

    def meta(start: int) -> bytes:
        place, extents = start, []
        for number, (_, data) in enumerate(coded, 1):
            extents.append((number, 0, place, len(data)))
            place += len(data)
        if columns:
            extents.append((primary, 1, 0, len(grid)))
        entries = [
            _full("infe", struct.pack(">HH", n, 0), kind, b"\0", version=2) for n, kind in items
        ]
        places = [struct.pack(">HHHHII", n, how, 0, 1, at, long) for n, how, at, long in extents]
        rows = [struct.pack(">HB", n, len(own)) + bytes(own) for n, own in owned.items()]
        parts = [
            _full("hdlr", struct.pack(">I4s", 0, b"pict"), bytes(13)),
            _full("pitm", struct.pack(">H", primary)),
            _full("iinf", struct.pack(">H", len(entries)), *entries),
            _full("iloc", struct.pack(">BBH", 0x44, 0, len(places)), *places, version=1),
            _box(
                "iprp",
                _box("ipco", *properties),
                _full("ipma", struct.pack(">I", len(rows)), *rows),
            ),
        ]
        if columns:
            to = struct.pack(f">HH{count}H", primary, count, *range(1, count + 1))
            parts += [_full("iref", _box("dimg", to)), _box("idat", grid)]
        return _full("meta", *parts)

    head = _box("ftyp", b"heic", struct.pack(">I", 0), b"mif1heic")
    start = len(head) + len(meta(0)) + 8
    return head + meta(start) + _box("mdat", *(data for _, data in coded))
