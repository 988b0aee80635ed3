"""The command line: `kvlock edit`, `kvlock convert` and `kvlock info`.

Named flags are argparse's, with a parser per sub-command; `--config.x.y=value` is `config_flags`',
over flags of its own. Absl's bridge between the two does not serve: it copies absl's flags when a
parser is built, and `config_flags` knows its own only once it has read the config file and the
command line, of which the default config even depends on the checkpoint.

What a run is made of, each over the one before: the config file (or the checkpoint's own settings),
`--config.x.y=value`, named flags.
"""

import argparse
import concurrent.futures
import contextlib
import importlib.metadata
import os
import re
import runpy
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from absl import flags
from jax import numpy as jnp
from ml_collections import ConfigDict, config_flags
from rich import progress
from rich.console import Console

from kvlock_jax import info, lock, report, roofline, video
from kvlock_jax.checkpoint import Contents
from kvlock_jax.config import EditConfig
from kvlock_jax.convert import command as convert
from kvlock_jax.edit import Result, Settings, config, config_name, describe, load, settle
from kvlock_jax.edit import run as run_edit
from kvlock_jax.errors import ConfigError, Error, InputError
from kvlock_jax.inputs import read

FAILED, INTERRUPTED = 2, 130
"""Exit status where the caller can mend it, and after Ctrl-C."""

_T = TypeVar("_T")
_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

_SETTINGS = (
    ("preset", str, "preset", "the method or a baseline: " + ", ".join(lock.PRESETS)),
    ("sample.steps", int, "sample_steps steps", "solver steps"),
    ("sample.shift", float, "sample_shift shift", "more spends more steps on high noise"),
    ("sample.guidance_scale", float, "sample_guide_scale guidance_scale", "guidance, 1 is none"),
    ("sample.solver", str, "sample_solver solver", "unipc, dpm++ or euler"),
    ("sample.seed", int, "base_seed seed", "seed of the noise"),
    ("edit.source_prompt", str, "src_prompt", "what the source shows"),
    ("edit.negative_prompt", str, "negative_prompt", "what to lead away from"),
    ("edit.size", str, "size", "WIDTH*HEIGHT to work and write at; the video's own by default"),
    ("edit.frame_num", int, "frame_num", "frames to take from the start; all by default"),
    ("edit.dilate", int, "dilate", "pixels by which the mask grows"),
    ("edit.invert_mask", bool, "invert_mask", "edit what is black"),
    ("edit.context_scale", float, "context_scale", "of a VACE model's hints; 1 as published"),
    ("edit.show_masked", bool, "show_masked", "show a VACE model what is under the mask"),
    ("edit.composite", bool, "composite", "take pixels outside the mask from the source"),
)
"""Key of the config, type, names of the flag, help."""

_OUTPUTS = {
    "save_file": tuple(video.CONTAINERS),
    "trace": (".json",),
    "plot": (".png",),
    "compare": tuple(video.CONTAINERS),
}
"""Flags that name a file to write, and how its name may end."""


def run() -> NoReturn:
    """The program: `main` with its arguments, and its exit status."""
    status = main(sys.argv[1:])
    if status == INTERRUPTED:  # compiled code may still run in its thread, and would be waited for
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def main(argv: Sequence[str]) -> int:
    """Runs one command.

    Args:
      argv: arguments without the program's name.

    Returns:
      0, 2 for an error that the caller can mend (one line on stderr, further ones indented), or 130
      after Ctrl-C. Anything else that is wrong is a bug, and is raised.
    """
    try:
        args, others = _parser().parse_known_args(argv)
        args.command(args, others)
    except Error as error:
        first, *more = str(error).splitlines()
        print(f"error: {first}", *(f"  {line.strip()}" for line in more), sep="\n", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


# --- flags ------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Raises what it finds wrong."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("kvlock", description="Training-free video editing: KV-Lock on Wan 2.1.")
    version = importlib.metadata.version("kvlock-jax")
    parser.add_argument("--version", action="version", version=f"kvlock {version}")
    commands = parser.add_subparsers(required=True, metavar="edit|convert|info")
    _add_edit(commands)
    convert.add(commands)
    _add_info(commands)
    return parser


def _add_edit(commands: Any) -> None:
    about = "Edit the masked part of a video, and keep the rest."
    tail = (
        "--config.KEY=VALUE changes any setting of the config, such as --config.kvlock.tau=0.02; "
        "named flags go over it. White of the mask is edited."
    )
    # Without abbreviations: --config.x would pass for some.
    parser = commands.add_parser("edit", description=about, epilog=tail, allow_abbrev=False)
    parser.set_defaults(command=_edit)
    add = parser.add_argument
    add("--ckpt_dir", "--ckpt", default="demo", help="'demo' (default), or a checkpoint's folder")
    add("--src_video", "--video", required=True, help="a video, an image or a folder of images")
    add("--src_mask", "--mask", help="a video, an image, a folder of images or an .npy")
    add("--bbox", metavar="X0,Y0,X1,Y1", help="a box of pixels in place of a mask")
    add("--src_ref_images", metavar="A.png,B.png", help="pictures to keep to; VACE models only")
    add("--prompt", required=True, help="what the masked part should show")
    add("--save_file", "--output", required=True, help=f"a video: {', '.join(video.CONTAINERS)}")
    add("--lossless", action="store_true", help="write every bit of it; .mkv is smallest")
    add("--trace", metavar="FILE.json", help="write what each step did")
    add("--plot", metavar="FILE.png", help="draw what each step did")
    add("--compare", metavar="VIDEO", help="write source, mask and edit side by side")
    add("--config", metavar="FILE.py", help="settings: a file with get_config()")
    add("--dtype", choices=_DTYPES, default="float32", help="of matrix products and the cache")
    for key, kind, names, about in _SETTINGS:
        flag = [f"--{name}" for name in names.split()]
        if kind is bool:
            add(*flag, dest=key, action=argparse.BooleanOptionalAction, help=about)
        else:
            add(*flag, dest=key, type=kind, metavar=kind.__name__.upper(), help=about)


def _add_info(commands: Any) -> None:
    about = "Say what a checkpoint holds, and what an edit needs: memory, and time at least."
    parser = commands.add_parser("info", description=about, allow_abbrev=False)
    parser.set_defaults(command=_info)
    parser.add_argument("dir", help="'demo', or a checkpoint's folder")
    parser.add_argument("--size", default="832*480", help="WIDTH*HEIGHT of the video")
    parser.add_argument("--frame_num", type=int, default=81, help="frames of the video")
    parser.add_argument("--devices", type=int, default=1, help="that share the video")
    chips = ", ".join(roofline.CHIPS)
    parser.add_argument("--chip", choices=roofline.CHIPS, help=f"what they are: {chips}")
    about = "of matrix products and the cache"
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help=about)


def _settings(args: argparse.Namespace, overrides: list[str], own: str) -> Settings:
    """The run's settings; `own` names the checkpoint's, for where there is no config file."""
    run_config = _read_config(args.config) if args.config else config(own)
    run_config = _override(run_config, overrides)
    given = {key: getattr(args, key) for key, *_ in _SETTINGS}
    with run_config.unlocked(), run_config.ignore_type():  # a file may write 3 for 3.0
        run_config.update_from_flattened_dict({k: v for k, v in given.items() if v is not None})
    return settle(run_config)


def _read_config(path: str) -> ConfigDict:
    file = Path(path).expanduser()
    if file.suffix != ".py" or not file.is_file():
        raise ConfigError(f"--config {path}: no such file; it must be a .py with get_config()")
    # Not by `config_flags`, whose way of loading Python is deprecated; an import would leave a
    # __pycache__ beside the file.
    made = runpy.run_path(os.fspath(file)).get("get_config", lambda: None)()
    if not isinstance(made, ConfigDict):
        raise ConfigError(f"--config {path}: it must have a get_config() that gives a ConfigDict")
    return made


def _override(base: ConfigDict, arguments: list[str]) -> ConfigDict:
    """A config with `--config.x.y=value` applied."""
    for argument in arguments:
        if match := re.match(r"--?(?:no)?config\.([^=]*)", argument):
            _check_key(base, match[1])
        elif argument.startswith("-") and not re.match(r"-[\d.]", argument):
            raise ConfigError(f"unknown flag {argument.partition('=')[0]}; see kvlock edit --help")
    values, argv = flags.FlagValues(), ["kvlock", *arguments]
    try:
        config_flags.DEFINE_config_dict("config", base, flag_values=values, sys_argv=argv)
        _, *left = values(argv)
    except flags.Error as error:
        raise ConfigError(" ".join(str(error).split())) from error
    if left:
        raise ConfigError(f"unexpected argument {left[0]!r}; see kvlock edit --help")
    return values.config


def _check_key(base: ConfigDict, key: str) -> None:
    """Names what there is in place of an unknown key, as `config_flags` does not."""
    at, where = base, "the config"
    for part in key.split("."):
        if not isinstance(at, ConfigDict) or part not in at:
            has = ", ".join(at) if isinstance(at, ConfigDict) else "no keys"
            raise ConfigError(f"unknown key --config.{key}: {where} has {has}")
        at, where = at[part], part


# --- edit -------------------------------------------------------------------------------------


def _edit(args: argparse.Namespace, others: list[str]) -> None:
    if (args.src_mask is None) == (args.bbox is None):
        raise InputError("give either --src_mask FILE or --bbox x0,y0,x1,y1")
    _check_outputs(args)
    contents = describe(args.ckpt_dir)
    settings = _settings(args, others, config_name(args.ckpt_dir, contents.configs))
    mask = args.src_mask if args.bbox is None else tuple(args.bbox.split(","))
    with _warnings_as_lines():
        pictures = [name for name in (args.src_ref_images or "").split(",") if name]
        inputs = read(args.src_video, mask, args.prompt, settings.edit, pictures)
    frames, height, width = inputs.mask.shape
    _say("video", f"{frames} frames of {width}x{height} at {float(inputs.fps):g} per second")
    _say("mask", f"{100 * inputs.mask.mean():.1f} % of the pixels are edited")
    _say("preset", f"{settings.preset}: {lock.PRESETS[settings.preset]}")

    start = time.perf_counter()
    model = load(args.ckpt_dir, _DTYPES[args.dtype])
    seconds = {"load": time.perf_counter() - start}
    _say("loaded", f"{args.ckpt_dir}: {_summary(contents)}, computing in {args.dtype}")
    with _ticking(settings.sample.steps) as tick:
        result = _interruptibly(lambda: run_edit(model, inputs, settings, on_step=tick))

    seconds |= result.seconds
    _say("times", ", ".join(f"{stage} {value:.1f} s" for stage, value in seconds.items()))
    _say("kept", _kept(result))
    _write(args, result)


def _check_outputs(args: argparse.Namespace) -> None:
    """Finds what could not be written after all the work, or would overwrite what is needed."""
    taken = {}
    for flag in ("src_video", "src_mask", "src_ref_images"):
        given = getattr(args, flag) or ""
        for name in given.split(",") if flag == "src_ref_images" else [given]:
            taken[os.path.realpath(os.path.expanduser(name))] = flag
    for flag, suffixes in _OUTPUTS.items():
        if not getattr(args, flag):
            continue
        target = os.path.realpath(video.check_output(getattr(args, flag), suffixes))
        if target in taken:
            raise InputError(f"--{flag} and --{taken[target]} are the same file, {target}")
        taken[target] = flag


def _write(args: argparse.Namespace, result: Result) -> None:
    video.write_video(args.save_file, result.video, result.fps, lossless=args.lossless)
    if args.compare:
        together = report.compare(result.source, result.mask, result.video)
        video.write_video(args.compare, together, result.fps)
    if args.trace:
        names = "prompt ckpt_dir src_video src_mask src_ref_images bbox dtype".split()
        report.write_trace(args.trace, result, {name: getattr(args, name) for name in names})
    if args.plot:
        report.plot_trace(args.plot, result.trace, result.settings)
    _say("wrote", ", ".join(getattr(args, flag) for flag in _OUTPUTS if getattr(args, flag)))


def _kept(result: Result) -> str:
    measured = result.metrics
    parts = ["no background to measure"]
    if measured.background_psnr == measured.background_psnr:  # NaN where there is no background
        parts = [
            f"background PSNR {measured.background_psnr:.2f} dB",
            f"SSIM {measured.background_ssim:.4f}",
        ]
    if measured.ring_error == measured.ring_error:
        parts.append(f"ring around the mask: error {measured.ring_error:.1f} of 255")
    if measured.ring_flicker == measured.ring_flicker:
        parts.append(f"flicker {measured.ring_flicker:.1f}")
    return ", ".join(parts)


def _interruptibly(work: Callable[[], _T]) -> _T:
    """Does the work in another thread: Ctrl-C is for this one, and compiled code would hold it."""
    future = concurrent.futures.Future()

    def target() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=target, daemon=True).start()
    return future.result()


@contextlib.contextmanager
def _ticking(steps: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal, else a line at every tenth of the steps; both on stderr."""
    console = Console(stderr=True)
    if not console.is_interactive:
        lines = {-(-steps * tenth // 10) for tenth in range(1, 11)}
        yield lambda step: step + 1 in lines and _log(f"step {step + 1} of {steps}")
        return
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console) as bar:
        task = bar.add_task("compiling", total=steps)
        yield lambda step: bar.update(task, completed=step + 1, description="sampling")


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught:
        _log(f"warning: {warning.message}")


def _say(what: str, text: str) -> None:
    print(f"{what:8} {text}", flush=True)


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- info -------------------------------------------------------------------------------------


def _info(args: argparse.Namespace, others: list[str]) -> None:
    if others:
        raise InputError(f"unknown argument {others[0]}; see kvlock info --help")
    size = EditConfig(size=args.size, frame_num=args.frame_num)
    if not size.frame_num or not size.height_width:
        raise InputError("--frame_num must be 1 or more, and --size WIDTH*HEIGHT")
    if args.devices < 1:
        raise InputError(f"--devices must be 1 or more, found {args.devices}")
    contents = describe(args.dir)
    settings = settle(config(config_name(args.dir, contents.configs)))
    shape = video.Fit(size.frame_num, *size.height_width)
    number = jnp.dtype(_DTYPES[args.dtype]).itemsize
    plan = info.Plan(shape, args.devices, args.dtype, number, args.chip)
    for lines in (info.holds(contents), info.needs(contents, settings, plan)):
        print(*lines, sep="\n", flush=True)


def _summary(contents: Contents) -> str:
    parameters = sum(model.parameters for model in contents.models.values())
    dtypes = sorted({dtype for model in contents.models.values() for dtype in model.dtypes})
    return f"{contents.family}, {parameters:,} parameters in {', '.join(dtypes)}"


if __name__ == "__main__":
    run()
