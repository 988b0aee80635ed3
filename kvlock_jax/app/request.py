"""What is asked for in the page's fields: checked, as settings, and as the command that does it."""

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from kvlock_jax.errors import ConfigError, Error
from kvlock_jax.pipeline.inputs import check_prompt
from kvlock_jax.pipeline.overrides import SETTINGS, update
from kvlock_jax.pipeline.settings import resolve_settings
from kvlock_jax.shapes import Mask

FIELDS: Mapping[str, str] = {
    "negative_prompt": "edit.negative_prompt",
    "preset": "preset",
    "steps": "sample.steps",
    "guidance_scale": "sample.guidance_scale",
    "seed": "sample.seed",
    "size": "edit.size",
}
"""Keys of the settings that fields of the page set, by the field's name."""

_FLAGS = {key: names.split()[-1] for key, _, names, _ in SETTINGS}
_KINDS = {key: kind for key, kind, *_ in SETTINGS}


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """One edit that is asked for.

    Attributes:
      video: file of the clip.
      mask: mask of the clip's frames as they come, after all changes.
      prompt: text that describes the masked part.
      config: settings, which change no mask.
      references: files of pictures of the wanted content.
    """

    video: str
    mask: Mask
    prompt: str
    config: ConfigDict
    references: Sequence[str] = ()


def config_of(base: ConfigDict, fields: Mapping[str, Any], frames: int = 0) -> ConfigDict:
    """The settings of the page's fields over those that the page was started with.

    Masks are grown and turned round by the page, so these settings do neither.

    Args:
      base: settings that the page was started with.
      fields: values by the names of `FIELDS`.
      frames: number of frames to take from the start; 0 takes all.
    """
    values = {key: fields[name] for name, key in FIELDS.items() if name in fields}
    known = _flat(base.to_dict())
    changed = {key: value for key, value in values.items() if value != known[key]}
    if "preset" in changed:  # what it brings, the fields show and say again
        changed = values
    plain = {"edit.dilate": 0, "edit.invert_mask": False, "edit.frame_num": frames}
    return update(base, {**changed, **plain})


def problems(base: ConfigDict, prompt: str, fields: Mapping[str, Any]) -> dict[str, str]:
    """What is wrong with the page's fields, by the field's name; nothing where all are good."""
    found = {}
    try:
        check_prompt(prompt or "")  # a field that was never filled has none
    except Error as error:
        found["prompt"] = str(error)
    for name, key in FIELDS.items():
        value = fields.get(name)
        try:
            if value is None:
                raise ConfigError(f"{name} must be given")
            resolve_settings(update(base, {key: value}))
        except Error as error:
            found[name] = str(error)
    return found


def command(
    request: Request, own: ConfigDict, model: Sequence[str], names: Mapping[str, Any]
) -> str:
    """The `kvlock edit` that makes a request's video, for a shell.

    Args:
      request: the edit.
      own: the checkpoint's default settings, which the command starts from.
      model: arguments that name the model and its place.
      names: names of files by their flags.
    """
    flags = [*model, *(f"--{flag}={name}" for flag, name in names.items() if name)]
    flags += [f"--prompt={request.prompt}", *_settings(request.config, own)]
    return " \\\n  ".join(["kvlock edit", *map(shlex.quote, flags)])


def _settings(run: ConfigDict, own: ConfigDict) -> list[str]:
    """The flags that turn a checkpoint's default settings into those of a run."""
    flags = []
    if run.preset != own.preset:
        flags.append(f"--preset={run.preset}")
        own = update(own, {"preset": run.preset})
    wanted, known = _flat(run.to_dict()), _flat(own.to_dict())
    changed = {key: value for key, value in wanted.items() if value != known.get(key)}
    if "sample.guidance_scale" in changed:  # its flag alone would be that of all steps
        changed["sample.guidance_scale_low"] = wanted["sample.guidance_scale_low"]
    for key, value in changed.items():
        if _KINDS.get(key) is bool:
            flags.append(f"--{'' if value else 'no-'}{_FLAGS[key]}")
        else:
            flags.append(f"--{_FLAGS.get(key, f'config.{key}')}={value}")
    return flags


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted keys."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
