"""Manifests: many edits in a file, one JSON object to a line.

A key is the name of a flag of `kvlock edit`, or an override such as `"config.kvlock.tau"`, and null
is as good as no key. Three more are a line's own:

- `id`: names the edit, and its noise is drawn from it. By default it is made of the line's content,
  so it does not change when lines are moved, or written with other blanks or in another order.
- `noise_id`: the noise is drawn from this, where it is there. Several prompts for one source that
  have it in common start from the same noise, and run with one pass over the source for all.
- `save_file`: the name of the result within the folder of all results; `ID.mp4` by default.

Nothing here opens a video, or any other file.
"""

import collections
import dataclasses
import hashlib
import json
import re
import unicodedata
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from kvlock_jax.errors import Error, InputError
from kvlock_jax.media import storage
from kvlock_jax.media.encode import CONTAINERS
from kvlock_jax.media.masks import Box
from kvlock_jax.pipeline.overrides import SETTINGS, check_key, near, update
from kvlock_jax.pipeline.settings import Settings, resolve_settings

KEYS = {
    "src_video": "src_video video",
    "src_mask": "src_mask mask",
    "bbox": "bbox",
    "src_ref_images": "src_ref_images",
    "prompt": "prompt",
    "lossless": "lossless",
    "id": "id",
    "noise_id": "noise_id",
    "save_file": "save_file output",
    **{names.split()[0]: names for _, _, names, _ in SETTINGS},
}
"""Keys of a line, by the first of their names."""

WHOLE = "ckpt_dir ckpt dtype config manifest save_dir".split()
"""Flags that are for all lines at once."""

_CALLED = {name: key for key, names in KEYS.items() for name in names.split()}
_SETTINGS = {names.split()[0]: (key, kind) for key, kind, names, _ in SETTINGS}
_KINDS = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}
_NAME_LIMIT = 200  # bytes; file systems take 255, and what is being written has a longer name


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """An edit that a line asks for, checked as far as that goes without its files.

    Attributes:
      id: names it; no other of the manifest has it.
      line: where it stands, from 1.
      noise_id: what its noise is drawn from, beside its seed: its id, or what several share.
      source: the video; a path of `remote.resolve`, as are all.
      mask: a file, a folder of images, or a box `x0, y0, x1, y1`.
      references: pictures for a VACE model.
      prompt: what the masked part should show.
      settings: checked.
      save_file: name of the result; no other has it, or its name without the suffix.
      lossless: whether every bit of the result is written.
      given: the line as it stands.
    """

    id: str
    line: int
    noise_id: str
    source: str
    mask: str | Box
    references: tuple[str, ...]
    prompt: str
    settings: Settings
    save_file: str
    lossless: bool
    given: Mapping[str, Any]

    @property
    def sidecar(self) -> str:
        """Name of the JSON beside the result."""
        return f"{_stem(self.save_file)}.json"

    @property
    def files(self) -> tuple[str, ...]:
        """All that it reads."""
        mask = (self.mask,) if isinstance(self.mask, str) else ()
        return (self.source, *mask, *self.references)

    @property
    def footage(self) -> tuple[Hashable, ...]:
        """Key of the frames that edits of one source share: the same part at the same size."""
        edit = self.settings.edit
        return self.source, edit.frame_num, edit.height_width, edit.fit, edit.fps


@dataclasses.dataclass(frozen=True)
class Failure:
    """A line that came to nothing, and why; the id is `None` where it has none that is sound."""

    line: int
    id: str | None
    reason: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The edits of a manifest, and the lines that are none."""

    requests: Sequence[Request]
    failures: Sequence[Failure]


@dataclasses.dataclass(frozen=True)
class Common:
    """What holds for every line that does not say otherwise.

    Attributes:
      run: settings, as in `settings.settle`.
      given: of `resolved`.
    """

    run: ConfigDict
    given: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def reason(error: Exception) -> str:
    """Why an edit failed, in one line."""
    told = " ".join(str(error).split())
    return told if isinstance(error, Error) else f"{type(error).__name__}: {told}"


def parse(content: bytes, folder: str, common: Common) -> Manifest:
    """Reads a manifest; what is wrong with a line is that line's failure, and no other's.

    Of two lines with one id, or with one name of a result, the second fails.

    Args:
      content: of the file, UTF-8. Empty lines are passed over.
      folder: that relative paths of the lines are relative to.
      common: what lines need not say.
    """
    requests, failures = [], []
    ids: dict[str, int] = {}
    names: dict[str, int] = {}
    # At "\n" alone: JSON's strings may hold what Python takes for the end of a line.
    for line, raw in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not raw.strip():
            continue
        edit_id = None
        try:
            given = _object(raw)
            edit_id = _given_id(given)
            values = _named(given)
            edit_id = edit_id or _derived_id(values)
            if ids.setdefault(edit_id, line) != line:
                hint = "" if "id" in values else " (equal lines need ids of their own)"
                raise InputError(f"id {edit_id!r} is that of line {ids[edit_id]} already{hint}")
            name = _save_file(values, edit_id)
            # Some file systems take two names for one that differ in case or in composition.
            stem = unicodedata.normalize("NFC", _stem(name)).casefold()
            if names.setdefault(stem, line) != line:
                taken = f"save_file {name!r} is that of line {names[stem]} already"
                raise InputError(f"{taken}, case and suffix apart")
            rest = _request(given, values, folder, common)
            drawn_by = _plain_id("noise_id", values.get("noise_id")) or edit_id
            names_ = {"id": edit_id, "noise_id": drawn_by, "save_file": name}
            requests.append(Request(line=line, **names_, **rest))
        except Exception as error:  # no line stops the others
            failures.append(Failure(line, edit_id, reason(error)))
    return Manifest(requests, failures)


# --- a line -------------------------------------------------------------------------------------


def _object(raw: bytes) -> dict[str, Any]:
    def unlike(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """An object whose keys are all different."""
        counts = collections.Counter(key for key, _ in pairs)
        if twice := [key for key, number in counts.items() if number > 1]:
            raise InputError(f"key {twice[0]!r} is there twice")
        return dict(pairs)

    try:
        found = json.loads(raw.decode("utf-8"), object_pairs_hook=unlike)
        json.dumps(found, ensure_ascii=False).encode("utf-8")  # half of a surrogate pair cannot be
    except json.JSONDecodeError as error:
        raise InputError(f"not JSON: {error.msg} at column {error.colno}") from error
    except UnicodeError as error:
        raise InputError(f"not UTF-8: {error.reason} at {error.start}") from error
    except (ValueError, RecursionError) as error:  # numbers and nesting beyond all reason
        raise InputError(f"not JSON that can be read: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"a line must be a JSON object, found {_short(found)}")
    return found


def _named(given: Mapping[str, Any]) -> dict[str, Any]:
    """The line with the first of the names of each key, without what is null."""
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name in WHOLE:
            raise InputError(f"{name} is for all lines: give it to the command, as --{name}")
        key = name if name.startswith("config.") else _CALLED.get(name)
        if key is None:
            raise InputError(f"unknown key {name!r}" + (near(name, _CALLED) or _all_keys()))
        if value is None:
            continue
        if key in values:
            raise InputError(f"{name!r} is given twice, under two of its names, {KEYS[key]}")
        values[key] = value
    return values


def _all_keys() -> str:
    return f"; a line has {', '.join(KEYS)}, or config.KEY"


def _given_id(given: Mapping[str, Any]) -> str | None:
    found = _plain_id("id", given.get("id"))
    return None if found is None else _file_name("id", found)


def _plain_id(name: str, found: Any) -> str | None:
    if found is None:
        return None
    if isinstance(found, bool) or not isinstance(found, (str, int)):
        raise InputError(f"{name} must be a string or a whole number, found {_short(found)}")
    return str(found)


def _derived_id(values: Mapping[str, Any]) -> str:
    content = json.dumps(values, sort_keys=True).encode()
    return f"edit-{hashlib.sha256(content).hexdigest()[:16]}"


def _save_file(values: Mapping[str, Any], edit_id: str) -> str:
    given = _typed(values, "save_file", str) if "save_file" in values else f"{edit_id}.mp4"
    name = _file_name("save_file", given)
    if not name.lower().endswith(tuple(CONTAINERS)) or not _stem(name):
        raise InputError(f"save_file {name!r} must end in {', '.join(CONTAINERS)}")
    return name


def _file_name(what: str, name: str) -> str:
    """The name, if it is one that any file system takes, and of nothing outside a folder."""
    if not name or name.startswith(".") or name != name.strip():
        raise InputError(f"{what} {name!r} must not be empty, or start with a dot or a blank")
    if found := re.search(r'[/\\*?\[\]:"<>|\x00-\x1f\x7f]', name):
        raise InputError(f"{what} {name!r} must be a plain name, without {found[0]!r}")
    if len(name.encode()) > _NAME_LIMIT:
        raise InputError(f"{what} {name!r} must have at most {_NAME_LIMIT} bytes")
    return name


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _request(
    given: Mapping[str, Any], values: Mapping[str, Any], folder: str, common: Common
) -> dict:
    """What a `Request` holds, but for its names and its place."""
    overrides = {k.partition(".")[2]: v for k, v in values.items() if k.startswith("config.")}
    for key, value in overrides.items():
        check_key(common.run, key)
        if not isinstance(value, (str, int, float)):
            raise InputError(f"config.{key} must be a setting's value, found {_short(value)}")
    named = {key: _typed(values, n, kind) for n, (key, kind) in _SETTINGS.items() if n in values}
    own, inherited = resolved(values, folder), common.given
    if "src_mask" in own or "bbox" in own:
        inherited = {k: v for k, v in inherited.items() if k not in ("src_mask", "bbox")}
    every = {**inherited, **own}
    if "src_video" not in every:
        raise InputError("src_video is missing")
    if "src_mask" not in every and "bbox" not in every:
        raise InputError("src_mask is missing, and so is bbox, a box in its place")
    if not every.get("prompt", "").strip():
        raise InputError("prompt is missing: say what the masked part should show")
    return {
        "source": every["src_video"],
        "mask": every["src_mask"] if "src_mask" in every else every["bbox"],
        "references": every.get("src_ref_images", ()),
        "prompt": every["prompt"],
        "settings": resolve_settings(update(common.run, overrides | named)),
        "lossless": every.get("lossless", False),
        "given": given,
    }


def resolved(values: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """The keys of a line that are neither settings nor names, checked, with resolved paths.

    Args:
      values: by the first names of `KEYS`; others are passed over.
      folder: that relative paths are relative to.

    Raises:
      InputError: a value is of the wrong type, or there is a box beside a mask.
    """
    found: dict[str, Any] = {}
    for key in ("src_video", "src_mask"):
        if values.get(key):
            found[key] = storage.resolve(_typed(values, key, str), folder)
    if "bbox" in values:
        found["bbox"] = _box(values["bbox"])
    if "src_mask" in found and "bbox" in found:
        raise InputError("give either src_mask or bbox, found both")
    if "src_ref_images" in values:
        names = values["src_ref_images"]
        names = names.split(",") if isinstance(names, str) else names
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            wanted = 'a list of files, or "a.png,b.png"'
            raise InputError(f"src_ref_images must be {wanted}, found {_short(names)}")
        pictures = [name.strip() for name in names if name.strip()]
        found["src_ref_images"] = tuple(storage.resolve(name, folder) for name in pictures)
    for key, kind in (("prompt", str), ("lossless", bool)):
        if key in values:
            found[key] = _typed(values, key, kind)
    return found


def _box(value: Any) -> Box:
    parts = value.split(",") if isinstance(value, str) else value
    try:
        x0, y0, x1, y1 = (int(part) if isinstance(part, str) else part for part in parts)
    except (ValueError, TypeError):
        x0 = y0 = x1 = y1 = None
    if not all(type(part) is int for part in (x0, y0, x1, y1)):
        raise InputError(f"bbox must be four whole numbers x0,y0,x1,y1, found {_short(value)}")
    return x0, y0, x1, y1


def _typed(values: Mapping[str, Any], name: str, kind: type) -> Any:
    value = values[name]
    fits = isinstance(value, (int, float) if kind is float else kind)
    if not fits or (isinstance(value, bool) and kind is not bool):  # to Python, a bool is an int
        raise InputError(f"{name} must be {_KINDS[kind]}, found {_short(value)}")
    return value


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
