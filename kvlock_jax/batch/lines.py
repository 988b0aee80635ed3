"""Splits the text of a manifest into its lines, and refuses files that are no manifest."""

import codecs
import collections
import json
from typing import Any

from kvlock_jax.errors import InputError

EXAMPLE = '{"src_video": "in.mp4", "src_mask": "mask.mp4", "prompt": "a blue square"}'
"""A line of a manifest."""

_ENCODINGS = (  # UTF-32 first: its mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def numbered_lines(content: bytes) -> list[tuple[int, bytes]]:
    """The lines of a manifest that are not empty, in UTF-8, with their numbers from 1.

    Args:
      content: bytes of the file: UTF-8, or UTF-16 or UTF-32 that begins with a byte order mark.

    Raises:
      InputError: the file as a whole is no manifest, such as one JSON array of all edits.
    """
    # At "\n" alone: JSON's strings may hold what Python takes for the end of a line.
    lines = enumerate(_utf8(content).split(b"\n"), start=1)
    numbered = [(number, raw.strip()) for number, raw in lines if raw.strip()]
    if not numbered:
        return []
    first = numbered[0][1]
    if first.startswith(b"["):
        problem = "the manifest is a JSON array"
    elif any(raw.startswith(b"{") and raw.endswith(b"}") for _, raw in numbered):
        return numbered
    elif first == b"{":
        problem = "the manifest spreads a JSON object over several lines"
    else:
        problem = "no line of the manifest is a JSON object"
    raise InputError(f"{problem}: it must have one object on each line, such as {EXAMPLE}")


def _utf8(content: bytes) -> bytes:
    """The file in UTF-8, without a byte order mark."""
    for mark, encoding in _ENCODINGS:
        if content.startswith(mark):
            try:
                return content.removeprefix(mark).decode(encoding).encode()
            except UnicodeError as error:
                name = encoding[:6].upper()
                raise InputError(f"the manifest is not {name}, as it says: {error}") from error
    if b"\x00" in content:
        raise InputError("the manifest is not a text in UTF-8, it has zero bytes: save it as UTF-8")
    return content.removeprefix(codecs.BOM_UTF8)


def read_object(raw: bytes) -> dict[str, Any]:
    """The JSON object of a line.

    Raises:
      InputError: the line is not UTF-8, not JSON, no object, or repeats a key.
    """

    def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """An object whose keys are all different."""
        counts = collections.Counter(key for key, _ in pairs)
        if twice := [key for key, number in counts.items() if number > 1]:
            raise InputError(f"key {twice[0]!r} appears twice")
        return dict(pairs)

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=without_repeats)
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # half of a surrogate pair cannot be
    except json.JSONDecodeError as error:
        raise InputError(f"not JSON: {error.msg} at column {error.colno}") from error
    except UnicodeError as error:
        raise InputError(f"not UTF-8: {error.reason} at {error.start}") from error
    except (ValueError, RecursionError) as error:  # numbers or nesting beyond Python's limits
        raise InputError(f"not JSON that can be read: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"a line must be a JSON object, found {short(value)}")
    return value


def short(value: Any) -> str:
    """A JSON value for a message, its end left out where it is long."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
