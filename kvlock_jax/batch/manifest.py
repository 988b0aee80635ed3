"""Manifests: text files with one edit to a line, each a JSON object.

Keys are the names of flags of `kvlock edit`, or overrides such as `"config.kvlock.tau"`; null means
that the key is absent. Three more keys belong to manifests alone:

- `id`: name of the edit, which seeds its noise. By default a hash of the line's content, so moving
  a line, or writing it with other blanks or in another order of keys, does not change it.
- `noise_id`: seeds the noise in place of `id`. Several prompts for one source with a `noise_id` in
  common start from the same noise and share one pass over the source.
- `save_file`: name of the result in the folder of results; `ID.mp4` by default.

This module opens no file.
"""

import dataclasses
import hashlib
import json
import re
import unicodedata
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from kvlock_jax.batch.lines import numbered_lines, read_object, short
from kvlock_jax.errors import Error, InputError
from kvlock_jax.masks.keyframes import Boxes, parse_boxes
from kvlock_jax.media import storage
from kvlock_jax.media.encode import CONTAINERS
from kvlock_jax.media.masks import Box
from kvlock_jax.pipeline.overrides import SETTINGS, check_key, file_names, near, update
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
"""Names of each key, by the first of them."""

WHOLE = "ckpt_dir ckpt dtype config manifest save_dir".split()
"""Flags of the command that no line may set."""

_KEY_OF = {name: key for key, names in KEYS.items() for name in names.split()}
_SETTINGS = {names.split()[0]: (key, kind) for key, kind, names, _ in SETTINGS}
_KINDS = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}
_NAME_LIMIT = 200  # bytes; file systems take 255, and temporary names are longer


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """An edit that a line asks for, checked as far as possible without its files.

    Attributes:
      id: name of the edit, unique in the manifest.
      line: number of the line, from 1.
      noise_id: text that seeds the noise together with `sample.seed`: `id`, or one that several
        edits share.
      source: path of the video; like all paths here, one of `storage.resolve`.
      mask: path of a file or a folder of images, a box `x0, y0, x1, y1`, or boxes by frame.
      references: paths of pictures for a VACE model.
      prompt: text that describes the masked part.
      settings: checked settings.
      save_file: name of the result, unique in the manifest even without its suffix.
      lossless: whether the result keeps every bit.
      given: the line's keys and values, unchanged.
    """

    id: str
    line: int
    noise_id: str
    source: str
    mask: str | Box | Boxes
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
        """Paths of all files and folders that the edit reads."""
        mask = (self.mask,) if isinstance(self.mask, str) else ()
        return (self.source, *mask, *self.references)

    @property
    def footage(self) -> tuple[Hashable, ...]:
        """Key of the frames that edits of one source share: the same part at the same size."""
        edit = self.settings.edit
        return self.source, edit.frame_num, edit.height_width, edit.fit, edit.fps


@dataclasses.dataclass(frozen=True)
class Failure:
    """A line that failed, and why; the id is `None` where the line has no valid one."""

    line: int
    id: str | None
    reason: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The edits of a manifest, and its invalid lines."""

    requests: Sequence[Request]
    failures: Sequence[Failure]


@dataclasses.dataclass(frozen=True)
class Common:
    """Defaults for every line.

    Attributes:
      run: settings, for `pipeline.settings.resolve_settings`.
      given: values of `resolved`, by key.
    """

    run: ConfigDict
    given: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def reason(error: Exception) -> str:
    """Why an edit failed, in one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, Error) else f"{type(error).__name__}: {text}"


def parse(content: bytes, folder: str, common: Common) -> Manifest:
    """Reads a manifest; a fault of one line is a failure of that line alone.

    Of two lines with one id, or with one name of a result, the second fails. Empty lines are
    passed over.

    Args:
      content: bytes of the file: UTF-8, or UTF-16 or UTF-32 that begins with a byte order mark.
      folder: folder that relative paths start from.
      common: defaults for every line.

    Raises:
      InputError: the file as a whole is no manifest, such as one JSON array of all edits.
    """
    requests, failures = [], []
    ids: dict[str, int] = {}
    names: dict[str, int] = {}
    for line, raw in numbered_lines(content):
        edit_id = None
        try:
            given = read_object(raw)
            edit_id = _given_id(given)
            values = _named(given)
            edit_id = edit_id or _derived_id(values)
            if ids.setdefault(edit_id, line) != line:
                hint = "" if "id" in values else " (equal lines need different ids)"
                raise InputError(f"id {edit_id!r} is that of line {ids[edit_id]} already{hint}")
            name = _save_file(values, edit_id)
            # Some file systems do not tell names apart by case or by Unicode composition.
            stem = unicodedata.normalize("NFC", _stem(name)).casefold()
            if names.setdefault(stem, line) != line:
                taken = f"save_file {name!r} is that of line {names[stem]} already"
                raise InputError(f"{taken}, case and suffix apart")
            rest = _request(given, values, folder, common)
            noise_id = _plain_id("noise_id", values.get("noise_id")) or edit_id
            own_names = {"id": edit_id, "noise_id": noise_id, "save_file": name}
            requests.append(Request(line=line, **own_names, **rest))
        except Exception as error:  # no line stops the others
            failures.append(Failure(line, edit_id, reason(error)))
    return Manifest(requests, failures)


# --- a line -------------------------------------------------------------------------------------


def _named(given: Mapping[str, Any]) -> dict[str, Any]:
    """The line's values by the first name of each key, without nulls."""
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name in WHOLE:
            raise InputError(f"{name} is for all lines: give the command --{name}")
        key = name if name.startswith("config.") else _KEY_OF.get(name)
        if key is None:
            raise InputError(f"unknown key {name!r}" + (near(name, _KEY_OF) or _all_keys()))
        if value is None:
            continue
        if key in values:
            raise InputError(f"{name!r} repeats a key under another of its names, {KEYS[key]}")
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
        raise InputError(f"{name} must be a string or a whole number, found {short(found)}")
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
    """The name, checked: every file system takes it, and it stays inside its folder."""
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
    """The fields of a `Request` except its names and its line."""
    overrides = {k.partition(".")[2]: v for k, v in values.items() if k.startswith("config.")}
    for key, value in overrides.items():
        check_key(common.run, key)
        if not isinstance(value, (str, int, float)):
            raise InputError(f"config.{key} must be a setting's value, found {short(value)}")
    named = {key: _typed(values, n, kind) for n, (key, kind) in _SETTINGS.items() if n in values}
    own, inherited = resolved(values, folder), common.given
    if "src_mask" in own or "bbox" in own:
        inherited = {k: v for k, v in inherited.items() if k not in ("src_mask", "bbox")}
    merged = {**inherited, **own}
    if "src_video" not in merged:
        raise InputError("src_video is missing")
    if "src_mask" not in merged and "bbox" not in merged:
        raise InputError("src_mask is missing, and so is bbox, a box in its place")
    if not merged.get("prompt", "").strip():
        raise InputError("prompt is missing: say what the masked part should show")
    return {
        "source": merged["src_video"],
        "mask": merged["src_mask"] if "src_mask" in merged else merged["bbox"],
        "references": merged.get("src_ref_images", ()),
        "prompt": merged["prompt"],
        "settings": resolve_settings(update(common.run, overrides | named)),
        "lossless": merged.get("lossless", False),
        "given": given,
    }


def resolved(values: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """Inputs of an edit by key, checked, with resolved paths; settings and names are left out.

    Blanks around paths are stripped.

    Args:
      values: values by the first names of `KEYS`.
      folder: folder that relative paths start from.

    Raises:
      InputError: a value is of the wrong type, or the line has both a mask and a box.
    """
    inputs: dict[str, Any] = {}
    for key in ("src_video", "src_mask"):
        if values.get(key) and (path := _typed(values, key, str).strip()):
            inputs[key] = storage.resolve(path, folder)
    if "bbox" in values:
        inputs["bbox"] = parse_boxes(values["bbox"])
    if "src_mask" in inputs and "bbox" in inputs:
        raise InputError("give either src_mask or bbox, found both")
    if "src_ref_images" in values:
        names = values["src_ref_images"]
        names = file_names(names) if isinstance(names, str) else names
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            wanted = 'a list of files, or "a.png, b.png"'
            raise InputError(f"src_ref_images must be {wanted}, found {short(names)}")
        pictures = [name.strip() for name in names if name.strip()]
        inputs["src_ref_images"] = tuple(storage.resolve(name, folder) for name in pictures)
    for key, kind in (("prompt", str), ("lossless", bool)):
        if key in values:
            inputs[key] = _typed(values, key, kind)
    return inputs


def _typed(values: Mapping[str, Any], name: str, kind: type) -> Any:
    value = values[name]
    is_kind = isinstance(value, (int, float) if kind is float else kind)
    if not is_kind or (isinstance(value, bool) and kind is not bool):  # to Python, a bool is an int
        raise InputError(f"{name} must be {_KINDS[kind]}, found {short(value)}")
    return value
