"""Loads the settings of a run by name and checks them."""

import dataclasses
import importlib
import os
from pathlib import Path

from ml_collections import ConfigDict

from kvlock_jax import lock
from kvlock_jax.checkpoints.registry import Configs, family
from kvlock_jax.errors import ConfigError
from kvlock_jax.settings.fields import from_config_dict
from kvlock_jax.settings.schema import EditConfig, LockConfig, SampleConfig


@dataclasses.dataclass(frozen=True)
class Settings:
    """The checked settings of a run, made of a `ConfigDict` by `resolve_settings`."""

    preset: str
    sample: SampleConfig
    lock: LockConfig
    edit: EditConfig


def config(name: str, preset: str | None = None) -> ConfigDict:
    """The settings in `configs/NAME.py`, as a copy to change.

    Args:
      name: name of the file.
      preset: a preset to take in place of the file's, with the sampling that it sets.

    Raises:
      ConfigError: the file does not exist.
    """
    try:
        module = importlib.import_module(f"kvlock_jax.configs.{name}")
    except ModuleNotFoundError as error:
        folder = Path(importlib.import_module("kvlock_jax.configs").__path__[0])
        known = sorted(p.stem for p in folder.glob("*.py") if p.stem != "__init__")
        raise ConfigError(f"no config {name!r}; there are {', '.join(known)}") from error
    run = module.get_config()
    if preset is not None:
        run.preset = preset
        run.sample.update(lock.sampling(preset))
    return run


def default_config_name(source: str | os.PathLike | None, configs: Configs) -> str:
    """The name for `config` of a checkpoint's default settings.

    They do not depend on the video's size: 14B gets the settings for 720p, which the publisher's
    `generate.py` uses at 480p too; `config("t2v_14b_480p")` has the lower shift of its README.
    """
    if source is not None and os.fspath(source) == "demo":
        return "demo"
    return family(configs).settings(configs)


def resolve_settings(run: ConfigDict) -> Settings:
    """Checks a run's settings and fills the lock's from the preset.

    Raises:
      ConfigError: a key is unknown, missing, of the wrong type, or out of range.
    """
    parts = ("preset", "sample", "edit", "kvlock")
    for key in run:
        if key not in parts:
            raise ConfigError(f"unknown key {key!r} of the config; it has {', '.join(parts)}")
    if absent := [part for part in parts if part not in run]:
        raise ConfigError(f"the config has no {', '.join(absent)}; it must have {', '.join(parts)}")
    sampling = from_config_dict(SampleConfig, run.sample)
    scale = min(sampling.guidance_scales.values())  # so `kvlock_anchor` keeps omega at 1 in both
    preset = dataclasses.asdict(lock.preset(run.preset, scale, sampling.steps))
    changed = {name: value for name, value in run.kvlock.items() if value is not None}
    return Settings(
        preset=run.preset,
        sample=sampling,
        lock=from_config_dict(LockConfig, preset | changed),
        edit=from_config_dict(EditConfig, run.edit),
    )
