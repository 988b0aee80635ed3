"""Assembles HEIC pictures from the tiles that phones store.

The format is ISO/IEC 23008-12 (HEIF) over the boxes of ISO/IEC 14496-12. FFmpeg decodes each item
as a stream, whose id is the item's number; PyAV does not expose how they make up the picture.
"""

import dataclasses
import os
import struct
from collections.abc import Iterator, Mapping
from typing import IO

import numpy as np

from kvlock_jax.shapes import Image, NewImage

_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"mif1")


@dataclasses.dataclass(frozen=True)
class Picture:
    """Layout of the primary picture of a file.

    Attributes:
      tiles: numbers of its items, row by row.
      columns: number of tiles in a row.
      size: width and height before turns, to which the tiles are cropped; None for a single item.
      turns: quarter turns (`"turn"`, counter-clockwise) and mirrors (`"upside down"`,
        `"left to right"`), in the order to apply them.
    """

    tiles: tuple[int, ...]
    columns: int
    size: tuple[int, int] | None
    turns: tuple[str, ...]

    def assemble(self, items: Mapping[int, Image]) -> NewImage:
        """Assembles the picture from its decoded items by number.

        Raises:
          KeyError, ValueError: an item is missing, or tiles do not fit together.
        """
        tiles = [items[number] for number in self.tiles]
        starts = range(0, len(tiles), self.columns)
        rows = [np.concatenate(tiles[n : n + self.columns], axis=1) for n in starts]
        image = np.concatenate(rows, axis=0)
        if self.size is not None:
            width, height = self.size
            if image.shape[0] < height or image.shape[1] < width:
                raise ValueError("tiles do not cover the picture")
            image = image[:height, :width]
        for turn in self.turns:
            image = _TURNS[turn](image)
        return image


_TURNS = {
    "turn": np.rot90,
    "upside down": lambda image: image[::-1],
    "left to right": lambda image: image[:, ::-1],
}


def is_heic(head: bytes) -> bool:
    """Whether a file whose first bytes are `head`, 12 or more, is a HEIC picture."""
    return head[4:8] == b"ftyp" and head[8:12] in _BRANDS


def read_layout(file: IO[bytes]) -> Picture:
    """Reads the layout of the primary picture.

    Raises:
      ValueError: the boxes are missing, damaged, or of a kind that this module does not know.
    """
    try:
        return _layout(file)
    except (struct.error, KeyError, IndexError, StopIteration) as error:
        raise ValueError("its boxes are damaged") from error


def _layout(file: IO[bytes]) -> Picture:
    file.seek(0)
    meta = dict(_boxes(_find(file, b"meta")[4:]))  # after version and flags
    primary = _number(meta[b"pitm"], 4, 2 if meta[b"pitm"][0] == 0 else 4)
    turns = tuple(_turns(meta[b"iprp"], primary))
    kind = _kinds(meta[b"iinf"])[primary]
    if kind == b"hvc1":
        return Picture((primary,), 1, None, turns)
    if kind != b"grid":
        raise ValueError(f"its primary item is of the kind {kind.decode('latin-1')}")
    tiles = next(
        to for name, item, to in _references(meta[b"iref"]) if (name, item) == (b"dimg", primary)
    )
    grid = _item_data(file, meta, primary)
    rows, columns = grid[2] + 1, grid[3] + 1
    size = struct.unpack(">II" if grid[1] & 1 else ">HH", grid[4 : 12 if grid[1] & 1 else 8])
    if len(tiles) != rows * columns:
        raise ValueError(f"{rows} rows of {columns} tiles, but {len(tiles)} tiles")
    return Picture(tuple(tiles), columns, size, turns)


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yields the name and content of each box."""
    place = 0
    while place + 8 <= len(data):
        size, name = struct.unpack_from(">I4s", data, place)
        start = 8
        if size == 1:
            (size,), start = struct.unpack_from(">Q", data, place + 8), 16
        size = size or len(data) - place
        if size < start:
            raise ValueError("its boxes are damaged")
        yield name, data[place + start : place + size]
        place += size


def _find(file: IO[bytes], wanted: bytes) -> bytes:
    """Reads the content of a box at the top level of the file, and skips the others."""
    while len(head := file.read(8)) == 8:
        size, name = struct.unpack(">I4s", head)
        start = 8
        if size == 1:
            (size,), start = struct.unpack(">Q", file.read(8)), 16
        if name == wanted:
            return file.read(size - start if size else -1)
        if not size:
            break
        file.seek(size - start, os.SEEK_CUR)
    raise ValueError(f"it has no box {wanted.decode()}")


def _number(data: bytes, place: int, size: int) -> int:
    return int.from_bytes(data[place : place + size], "big")


def _kinds(iinf: bytes) -> dict[int, bytes]:
    """The kind of each item, such as `hvc1`."""
    start = 6 if iinf[0] == 0 else 8
    kinds = {}
    for name, entry in _boxes(iinf[start:]):
        if name == b"infe" and entry[0] >= 2:
            wide = 2 if entry[0] == 2 else 4
            kinds[_number(entry, 4, wide)] = entry[6 + wide : 10 + wide]
    return kinds


def _references(iref: bytes) -> Iterator[tuple[bytes, int, list[int]]]:
    """Yields the name, origin and targets of each reference between items."""
    wide = 2 if iref[0] == 0 else 4
    for name, entry in _boxes(iref[4:]):
        count = _number(entry, wide, 2)
        places = range(wide + 2, wide + 2 + count * wide, wide)
        yield name, _number(entry, 0, wide), [_number(entry, place, wide) for place in places]


def _turns(iprp: bytes, item: int) -> Iterator[str]:
    """Yields the quarter turns and mirrors among an item's properties."""
    parts = dict(_boxes(iprp))
    properties, ipma = list(_boxes(parts[b"ipco"])), parts[b"ipma"]
    wide, long = 2 if ipma[0] == 0 else 4, ipma[3] & 1
    place = 8
    for _ in range(_number(ipma, 4, 4)):
        owner, count = _number(ipma, place, wide), ipma[place + wide]
        place += wide + 1
        for _ in range(count):
            index = _number(ipma, place, 1 + long) & (0x7FFF if long else 0x7F)
            place += 1 + long
            if owner == item and index:
                name, content = properties[index - 1]
                if name == b"irot":
                    yield from ["turn"] * (content[0] & 3)
                elif name == b"imir":
                    yield "left to right" if content[0] & 1 else "upside down"


def _item_data(file: IO[bytes], meta: Mapping[bytes, bytes], item: int) -> bytes:
    """The bytes of an item, from `idat` or from the file."""
    iloc = meta[b"iloc"]
    version, sizes = iloc[0], _number(iloc, 4, 2)
    offset_size, length_size, base_size = sizes >> 12, sizes >> 8 & 15, sizes >> 4 & 15
    index_size = sizes & 15 if version else 0
    wide = 4 if version == 2 else 2
    count, place = _number(iloc, 6, wide), 6 + wide
    for _ in range(count):
        number, place = _number(iloc, place, wide), place + wide
        method, place = (_number(iloc, place, 2) & 15, place + 2) if version else (0, place)
        base, place = _number(iloc, place + 2, base_size), place + 2 + base_size
        extents, place = _number(iloc, place, 2), place + 2
        data = b""
        for _ in range(extents):
            place += index_size
            start = base + _number(iloc, place, offset_size)
            length = _number(iloc, place + offset_size, length_size)
            place += offset_size + length_size
            if number == item and method == 1:
                data += meta[b"idat"][start : start + length]
            elif number == item and method == 0:
                file.seek(start)
                data += file.read(length)
        if number == item:
            return data
    raise KeyError(item)
