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
_PACK = b"\x00\x00\x01\xba"  # begins each pack of a program stream
_TAIL = 1 << 17  # bytes, over the longest pack of a program stream and page of Ogg
_FLV_FILESIZE = re.compile(rb"\x00\x08filesize\x00(.{8})", re.DOTALL)


def check_whole(name: object, file: IO[bytes]) -> None:
    """Refuses a file that ends before its Matroska, RIFF, GIF, FLV or Ogg container does.

    Transport and program streams may be cut anywhere, as recordings are: it is a warning there.

    Raises:
      InputError: the file is truncated.
    """
    length = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(4096)
    if _is_cut_recording(file, head, length):
        warnings.warn(f"{name}: the recording was cut, its end is missing", stacklevel=2)
    elif _is_cut(file, head, length):
        raise InputError(f"{name}: the video is truncated")


def _is_cut_recording(file: IO[bytes], head: bytes, length: int) -> bool:
    if head[:1] == b"G" and head[_TS_PACKET : _TS_PACKET + 1] == b"G":
        return length % _TS_PACKET != 0
    return head[:4] == _PACK and _program_stream_is_cut(_tail(file, length))


def _is_cut(file: IO[bytes], head: bytes, length: int) -> bool:
    if head[:4] == b"RIFF":  # AVI, WebP
        return 8 + int.from_bytes(head[4:8], "little") > length
    if head[:6] in (b"GIF87a", b"GIF89a"):
        return _gif_is_cut(file)
    if head[:3] == b"FLV":
        return _flv_is_cut(file, head, length)
    if head[:4] == b"OggS":
        return _ogg_is_cut(_tail(file, length))
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


def _tail(file: IO[bytes], length: int) -> bytes:
    file.seek(max(0, length - _TAIL))
    return file.read()


def _program_stream_is_cut(tail: bytes) -> bool:
    """Whether the packets of the last pack go on past the end."""
    place = max(tail.rfind(_PACK), 0)
    while tail[place : place + 3] == _PACK[:3]:
        kind = tail[place + 3 : place + 4]
        if kind == _PACK[3:]:
            is_mpeg2 = tail[place + 4 : place + 5] >= b"\x40"
            stuffing = tail[place + 13 : place + 14]
            place += 14 + (stuffing[0] & 7 if stuffing else 0) if is_mpeg2 else 12
        elif kind == b"\xb9":  # the end
            place += 4
        else:
            place += 6 + int.from_bytes(tail[place + 4 : place + 6], "big")
    return place > len(tail) or 0 < len(tail) - place < 4


def _ogg_is_cut(tail: bytes) -> bool:
    """Whether the last page goes on past the end."""
    page = tail[max(tail.rfind(b"OggS"), 0) :]
    segments = page[26] if len(page) > 26 else 255
    return 27 + segments + sum(page[27 : 27 + segments]) > len(page)
