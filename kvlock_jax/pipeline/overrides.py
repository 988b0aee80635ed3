"""Maps the names that users write to settings: flags, `--config.x.y=value`, keys of manifests.

Argparse parses named flags; `config_flags` parses `--config.x.y=value`, with absl flags of its own.
Absl's bridge to argparse copies absl's flags when a parser is built, which is too early here:
`config_flags` defines its flags after it has read the config file and the command line, and the
default config depends on the checkpoint.
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
    ("sample.guidance_scale_low", float, "sample_guide_scale_low", "of a low-noise expert's steps"),
    ("sample.boundary", float, "boundary", "timestep / 1000 from which the high-noise expert runs"),
    ("sample.solver", str, "sample_solver solver", "unipc, dpm++ or euler"),
    ("sample.grid", str, "sample_grid", "noise levels: Diffusers' (diffusers) or plain"),
    ("sample.seed", int, "base_seed seed", "seed of the noise"),
    ("sample.long", str, "long", "clips over a window: auto and windows cut them, or whole"),
    ("sample.window", int, "window", "frames of a window, as the model was trained"),
    ("sample.window_overlap", int, "window_overlap", "frames that neighbouring windows share"),
    ("sample.window_shift", bool, "window_shift", "move the windows from step to step"),
    ("kvlock.cache", str, "cache", "keys and values of the source: fused (default) or carried"),
    ("kvlock.cache_every", int, "cache_every", "steps for which a carried cache is reused"),
    ("kvlock.pool_seeds", int, "pool_seeds", "seeds of the edit that share one statistic"),
    ("edit.source_prompt", str, "src_prompt", "what the source shows"),
    ("edit.negative_prompt", str, "negative_prompt", "what to lead away from"),
    ("edit.size", str, "size", "WIDTH*HEIGHT to work and write at; by default the video's"),
    ("edit.fit", str, "fit", "crop (default), pad or stretch, where --size has another shape"),
    ("edit.frame_num", int, "frame_num", "number of frames to take from the start; by default all"),
    ("edit.fps", float, "fps", "frames per second of a folder of images; 16 by default"),
    ("edit.no_audio", bool, "no_audio", "leave the source's sound out"),
    ("edit.dilate", int, "dilate", "pixels by which the mask grows"),
    ("edit.invert_mask", bool, "invert_mask", "edit black instead of white"),
    (
        "edit.context_scale",
        float,
        "context_scale",
        "weight of a VACE model's hints; 1 by default",
    ),
    ("edit.show_masked", bool, "show_masked", "show a VACE model the pixels under the mask"),
    ("edit.composite", bool, "composite", "copy pixels outside the mask from the source"),
    ("edit.ceiling", bool, "ceiling", "measure the PSNR of a bare VAE round trip too"),
)
"""Key in the config, type, names of the flag, and help of each setting with a flag."""


def file_names(text: str) -> list[str]:
    """The names of a list such as `"a.png, b.png"`, without blanks around them and empty ones."""
    return [name.strip() for name in text.split(",") if name.strip()]


def update(run: ConfigDict, values: Mapping[str, Any]) -> ConfigDict:
    """A copy with the values of dotted keys such as `sample.steps`, which are not checked here.

    A guidance scale is that of all steps, unless the low-noise expert's is given beside it. A
    preset brings the sampling that it sets, which other values change.
    """
    run, values = copy.deepcopy(run), dict(values)
    if "sample.guidance_scale" in values:
        values = {"sample.guidance_scale_low": 0.0} | values
    brought = lock.sampling(str(values.get("preset")))
    values = {f"sample.{name}": value for name, value in brought.items()} | values
    with run.unlocked(), run.ignore_type():  # a file may write 3 for 3.0
        run.update_from_flattened_dict(values)
    return run


def check_key(run: ConfigDict, key: str, prefix: str = "config.") -> None:
    """Refuses a dotted key that names no setting, and lists those that exist.

    Raises:
      ConfigError: the key is unknown, or names a group of settings.
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
    """A hint of known names that resemble a mistyped one; empty where none does."""
    close = difflib.get_close_matches(name, known, 3)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def read_config_file(path: str) -> ConfigDict:
    """The result of a Python file's `get_config()`; a `ConfigError` where the file has none."""
    file = Path(path).expanduser()
    if file.suffix != ".py" or not file.is_file():
        raise ConfigError(f"--config {path}: no such file; it must be a .py with get_config()")
    # `config_flags` loads Python in a deprecated way; an import would leave a __pycache__ behind.
    run = runpy.run_path(os.fspath(file)).get("get_config", lambda: None)()
    if not isinstance(run, ConfigDict):
        raise ConfigError(f"--config {path}: must define get_config() that returns a ConfigDict")
    return run


def apply_overrides(run: ConfigDict, arguments: list[str]) -> ConfigDict:
    """A config with `--config.x.y=value` applied."""
    for argument in arguments:
        if match := re.match(r"--?(?:no)?config\.([^=]*)", argument):
            check_key(run, match[1], "--config.")
        elif argument.startswith("-") and not re.match(r"-[\d.]", argument):
            raise ConfigError(f"unknown flag {argument.partition('=')[0]}; see --help")
    for argument in arguments:
        if match := re.fullmatch(r"--?config\.preset=(.*)", argument):
            run = update(run, {"preset": match[1]})
    values, argv = flags.FlagValues(), ["kvlock", *arguments]
    try:
        config_flags.DEFINE_config_dict("config", run, flag_values=values, sys_argv=argv)
        _, *left = values(argv)
    except flags.Error as error:
        raise ConfigError(" ".join(str(error).split())) from error
    if left:
        raise ConfigError(f"unexpected argument {left[0]!r}; see --help")
    return values.config
