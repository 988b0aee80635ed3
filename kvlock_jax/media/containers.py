"""Whether a file ends where its container says.

FFmpeg stops at the end of a cut file without a word.
"""

import os
import re
import struct
import warnings
from collections.abc import Iterator
from typing import IO

from kvlock_jax.errors import InputError

# A Matroska or WebM head up to the size of its one segment, seven bytes in what FFmpeg writes.
_SEGMENT = re.compile(rb"\x1a\x45\xdf\xa3.{0,200}?\x18\x53\x80\x67\x01(.{7})", re.DOTALL)
_TS_PACKET = 188
_FLV_FILESIZE = re.compile(rb"\x00\x08filesize\x00(.{8})", re.DOTALL)


def check_whole(name: object, file: IO[bytes]) -> None:
    """Refuses a file that ends before its Matroska, RIFF, GIF or FLV container does.

    A transport stream may be cut anywhere, as recordings are: it is a warning there.

    Raises:
      InputError: the file is truncated.
    """
    length = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(4096)
    if head[:1] == b"G" and head[_TS_PACKET : _TS_PACKET + 1] == b"G":
        if length % _TS_PACKET:
            warnings.warn(f"{name}: the recording was cut, its end is missing", stacklevel=2)
    elif _is_cut(file, head, length):
        raise InputError(f"{name}: the video is truncated")


def _is_cut(file: IO[bytes], head: bytes, length: int) -> bool:
    if head[:4] == b"RIFF":  # AVI, WebP
        return 8 + int.from_bytes(head[4:8], "little") > length
    if head[:6] in (b"GIF87a", b"GIF89a"):
        return _gif_is_cut(file)
    if head[:3] == b"FLV":
        return _flv_is_cut(file, head, length)
    return _matroska_end(head) > length


def _matroska_end(head: bytes) -> int:
    """The byte where a Matroska or WebM file ends by its own header; 0 where it does not say."""
    match = _SEGMENT.match(head)
    if match is None or match[1] == b"\xff" * 7:  # all ones: a live recording
        return 0
    return match.end() + int.from_bytes(match[1], "big")


def _gif_is_cut(file: IO[bytes]) -> bool:
    """Whether the blocks of a GIF end before its trailer."""
    file.seek(10)
    flags = file.read(3)[:1]
    file.seek(_palette(flags), os.SEEK_CUR)
    while kind := file.read(1):
        if kind == b";":
            return False
        if kind == b"!":  # an extension: its label
            file.seek(1, os.SEEK_CUR)
        elif kind == b",":  # an image: its place and size, flags, palette, code size
            place = file.read(9)
            file.seek(_palette(place[8:]) + 1, os.SEEK_CUR)
        else:  # damage, which decoding finds
            return False
        for size in _blocks(file):
            file.seek(size, os.SEEK_CUR)
    return True


def _palette(flags: bytes) -> int:
    """Bytes of the palette that a GIF's flags announce."""
    return 3 << ((flags[0] & 7) + 1) if flags and flags[0] & 0x80 else 0


def _blocks(file: IO[bytes]) -> Iterator[int]:
    while size := file.read(1):
        if size == b"\x00":
            return
        yield size[0]


def _flv_is_cut(file: IO[bytes], head: bytes, length: int) -> bool:
    """Whether the last tag of an FLV, or the size in its metadata, is past the file's end."""
    if match := _FLV_FILESIZE.search(head):
        if int(_double(match[1])) > length:
            return True
    place = int.from_bytes(head[5:9], "big") + 4
    while place < length:
        file.seek(place)
        tag = file.read(11)
        place += 11 + int.from_bytes(tag[1:4], "big") + 4  # and the size of the tag, again
    return place > length


def _double(data: bytes) -> float:
    (value,) = struct.unpack(">d", data)
    return value if value == value and abs(value) < 2**63 else 0.0
