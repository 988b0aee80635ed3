"""Settings by the names that users know: flags, `--config.x.y=value`, keys of a manifest's lines.

Named flags are argparse's; `--config.x.y=value` is `config_flags`', over flags of its own. Absl's
bridge between the two does not serve: it copies absl's flags when a parser is built, and
`config_flags` knows its own only once it has read the config file and the command line, of which
the default config even depends on the checkpoint.
"""

import copy
import difflib
import os
import re
import runpy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from kvlock_jax import lock
from kvlock_jax.errors import ConfigError

SETTINGS = (
    ("preset", str, "preset", "the method or a baseline: " + ", ".join(lock.PRESETS)),
    ("sample.steps", int, "sample_steps steps", "solver steps"),
    ("sample.shift", float, "sample_shift shift", "more spends more steps on high noise"),
    ("sample.guidance_scale", float, "sample_guide_scale guidance_scale", "guidance, 1 is none"),
    ("sample.solver", str, "sample_solver solver", "unipc, dpm++ or euler"),
    ("sample.seed", int, "base_seed seed", "seed of the noise"),
    ("kvlock.cache", str, "cache", "of the source: fused, made block by block, or carried"),
    ("kvlock.cache_every", int, "cache_every", "steps that a carried cache serves"),
    ("kvlock.pool_seeds", int, "pool_seeds", "seeds of the edit that share one statistic"),
    ("edit.source_prompt", str, "src_prompt", "what the source shows"),
    ("edit.negative_prompt", str, "negative_prompt", "what to lead away from"),
    ("edit.size", str, "size", "WIDTH*HEIGHT to work and write at; the video's own by default"),
    ("edit.frame_num", int, "frame_num", "frames to take from the start; all by default"),
    ("edit.dilate", int, "dilate", "pixels by which the mask grows"),
    ("edit.invert_mask", bool, "invert_mask", "edit what is black"),
    ("edit.context_scale", float, "context_scale", "of a VACE model's hints; 1 as published"),
    ("edit.show_masked", bool, "show_masked", "show a VACE model what is under the mask"),
    ("edit.composite", bool, "composite", "take pixels outside the mask from the source"),
    ("edit.ceiling", bool, "ceiling", "measure the PSNR of a bare VAE round trip too"),
)
"""Key of the config, type, names, help."""


def update(run: ConfigDict, values: Mapping[str, Any]) -> ConfigDict:
    """A copy with values by dotted keys, such as `sample.steps`; `settle` checks them."""
    run = copy.deepcopy(run)
    with run.unlocked(), run.ignore_type():  # a file may write 3 for 3.0
        run.update_from_flattened_dict(values)
    return run


def check_key(run: ConfigDict, key: str, prefix: str = "config.") -> None:
    """Refuses a dotted key that is no setting's, and names those there are.

    Raises:
      ConfigError: there is no such key, or it is one of several settings.
    """
    at, where = run, "the config"
    for part in key.split("."):
        if not isinstance(at, ConfigDict) or part not in at:
            has = ", ".join(at) if isinstance(at, ConfigDict) else "no keys"
            raise ConfigError(f"unknown key {prefix}{key}: {where} has {has}")
        at, where = at[part], part
    if isinstance(at, ConfigDict):
        raise ConfigError(f"{prefix}{key} is no setting: name one of its {', '.join(at)}")


def near(name: str, known: Iterable[str]) -> str:
    """A hint of the names that a mistyped one may mean; empty where none is near."""
    close = difflib.get_close_matches(name, known, 3)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def read_config_file(path: str) -> ConfigDict:
    """The config that a Python file's `get_config()` returns; a `ConfigError` where it has none."""
    file = Path(path).expanduser()
    if file.suffix != ".py" or not file.is_file():
        raise ConfigError(f"--config {path}: no such file; it must be a .py with get_config()")
    # Not by `config_flags`, whose way of loading Python is deprecated; an import would leave a
    # __pycache__ beside the file.
    made = runpy.run_path(os.fspath(file)).get("get_config", lambda: None)()
    if not isinstance(made, ConfigDict):
        raise ConfigError(f"--config {path}: it must have a get_config() that gives a ConfigDict")
    return made


def apply_overrides(run: ConfigDict, arguments: list[str]) -> ConfigDict:
    """A config with `--config.x.y=value` applied."""
    for argument in arguments:
        if match := re.match(r"--?(?:no)?config\.([^=]*)", argument):
            check_key(run, match[1], "--config.")
        elif argument.startswith("-") and not re.match(r"-[\d.]", argument):
            raise ConfigError(f"unknown flag {argument.partition('=')[0]}; see --help")
    values, argv = flags.FlagValues(), ["kvlock", *arguments]
    try:
        config_flags.DEFINE_config_dict("config", run, flag_values=values, sys_argv=argv)
        _, *left = values(argv)
    except flags.Error as error:
        raise ConfigError(" ".join(str(error).split())) from error
    if left:
        raise ConfigError(f"unexpected argument {left[0]!r}; see --help")
    return values.config
