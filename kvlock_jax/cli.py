"""The command line: `kvlock edit`, `kvlock batch`, `kvlock convert` and `kvlock info`."""

import argparse
import contextlib
import dataclasses
import functools
import importlib.metadata
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
from jax import numpy as jnp

from kvlock_jax import (
    batch,
    devices,
    hosts,
    info,
    lock,
    manifest,
    options,
    remote,
    report,
    roofline,
    video,
)
from kvlock_jax.checkpoint import Contents
from kvlock_jax.config import EditConfig
from kvlock_jax.convert import command as convert
from kvlock_jax.edit import Model, Result, describe, draw_noise, load
from kvlock_jax.edit import run as run_edit
from kvlock_jax.errors import Error, InputError
from kvlock_jax.inputs import read
from kvlock_jax.job import Job, identity, prepare
from kvlock_jax.manifest import Common, Failure, Request
from kvlock_jax.settings import config, config_name, settle
from kvlock_jax.stages import Ahead
from kvlock_jax.terminal import counting, interruptibly, say, ticking, warnings_as_lines

SOME_FAILED, FAILED, INTERRUPTED = 1, 2, 130
"""Exit status after failures among many edits, where the caller can mend it, and after Ctrl-C."""

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

_OF_AN_EDIT = {
    "src_video video": "a video, an image or a folder of images",
    "src_mask mask": "a video, an image, a folder of images or an .npy",
    "bbox": "X0,Y0,X1,Y1: a box of pixels in place of a mask",
    "src_ref_images": "A.png,B.png: pictures to keep to; VACE models only",
    "prompt": "what the masked part should show",
}
"""Flags that are no settings and that a manifest's line has too, and their help."""

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
    if status in (FAILED, INTERRUPTED):  # a thread may still compile or run, and be waited for
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def main(argv: Sequence[str]) -> int:
    """Runs one command.

    Args:
      argv: arguments without the program's name.

    Returns:
      0, 1 if some of many edits failed, 2 for an error that the caller can mend (one line on
      stderr, further ones indented), or 130 after Ctrl-C. Anything else that is wrong is a bug, and
      is raised.
    """
    try:
        args, others = _parser().parse_known_args(argv)
        return args.command(args, others) or 0
    except Error as error:
        first, *more = str(error).splitlines()
        print(f"error: {first}", *(f"  {line.strip()}" for line in more), sep="\n", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


# --- flags ------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Raises what it finds wrong."""

    def error(self, message: str) -> NoReturn:
        """Raises it as one line, with where help is."""
        raise InputError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("kvlock", description="Training-free video editing: KV-Lock on Wan 2.1.")
    version = importlib.metadata.version("kvlock-jax")
    parser.add_argument("--version", action="version", version=f"kvlock {version}")
    commands = parser.add_subparsers(required=True, metavar="edit|batch|convert|info")
    _add_edit(commands)
    _add_batch(commands)
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
    _add_shared(parser, required=("src_video", "prompt"))
    add = parser.add_argument
    add("--save_file", "--output", required=True, help=f"a video: {', '.join(video.CONTAINERS)}")
    add("--trace", metavar="FILE.json", help="write what each step did")
    add("--plot", metavar="FILE.png", help="draw what each step did")
    add("--compare", metavar="VIDEO", help="write source, mask and edit side by side")


def _add_batch(commands: Any) -> None:
    about = "Edit many videos: one JSON object to a line of a manifest, keys named as the flags."
    tail = (
        "Flags of an edit hold for every line that does not say otherwise; paths in lines are "
        "relative to the manifest. A line may have an id and a save_file of its own. Paths may be "
        "gs:// or of any scheme that fsspec knows. Run again, it does what is missing or changed. "
        "Exit status: 0, 1 if edits failed (DIR/failed.jsonl says which), 2 if none could start."
    )
    parser = commands.add_parser("batch", description=about, epilog=tail, allow_abbrev=False)
    parser.set_defaults(command=_batch)
    add = parser.add_argument
    add("--manifest", required=True, metavar="EDITS.jsonl", help="the edits")
    add("--save_dir", required=True, metavar="DIR", help="folder of videos, and a JSON beside each")
    about = "edits that run together, at most; by default one for each device of the mesh's data"
    add("--batch_size", type=int, help=about)
    add("--num_shards", type=int, default=1, help="machines that share the manifest")
    add("--shard_index", type=int, default=0, help="which of them this is, from 0")
    add("--overwrite", action="store_true", help="do finished edits again")
    _add_shared(parser)


def _add_shared(parser: argparse.ArgumentParser, required: Sequence[str] = ()) -> None:
    """Adds what one edit and many have in common."""
    about = "'demo' (default), or a checkpoint's folder"
    parser.add_argument("--ckpt_dir", "--ckpt", default="demo", help=about)
    for names, about in _OF_AN_EDIT.items():
        flag = [f"--{name}" for name in names.split()]
        parser.add_argument(*flag, required=names.split()[0] in required, help=about)
    about = "write every bit of the video; .mkv is smallest"
    parser.add_argument("--lossless", action="store_true", help=about)
    _add_dtype(parser)
    devices.add(parser)
    options.add(parser)


def _add_dtype(parser: argparse.ArgumentParser) -> None:
    about = "of matrix products and the cache"
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help=about)


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
    _add_dtype(parser)


# --- edit -------------------------------------------------------------------------------------


def _edit(args: argparse.Namespace, others: list[str]) -> None:
    if (args.src_mask is None) == (args.bbox is None):
        raise InputError("give either --src_mask FILE or --bbox x0,y0,x1,y1")
    _check_outputs(args)
    devices.join(args)
    contents = describe(args.ckpt_dir)
    own = config_name(args.ckpt_dir, contents.configs)
    settings = settle(options.gather(args, others, own))
    mask = args.src_mask if args.bbox is None else tuple(args.bbox.split(","))
    with warnings_as_lines(), contextlib.ExitStack() as copies:
        local = functools.partial(remote.at_hand, copies, suffixes=video.IMAGES)
        pictures = [local(name) for name in (args.src_ref_images or "").split(",") if name]
        mask = local(mask) if isinstance(mask, str) else mask
        inputs = read(local(args.src_video), mask, args.prompt, settings.edit, pictures)
    frames, height, width = inputs.mask.shape
    say("video", f"{frames} frames of {width}x{height} at {float(inputs.fps):g} per second")
    say("mask", f"{100 * inputs.mask.mean():.1f} % of the pixels are edited")
    say("preset", f"{settings.preset}: {lock.PRESETS[settings.preset]}")

    placed = devices.place(args, contents, many=False)
    start = time.perf_counter()
    compiling: list[Ahead] = []

    def compile_ahead(shapes: Model) -> None:
        """Begins to compile, before the weights are read."""
        noise = draw_noise(shapes, inputs, jax.random.key(settings.sample.seed))
        given = shapes, inputs, settings, noise
        compiling.append(Ahead(*given, by_step=True, programs=devices.programs(args, placed)))

    model = _load(args, contents, placed, compile_ahead)
    seconds = {"load": time.perf_counter() - start}
    with warnings_as_lines(), ticking(settings.sample.steps) as tick:
        result = interruptibly(
            lambda: run_edit(
                model, inputs, settings, on_step=tick, ahead=next(iter(compiling), None)
            )
        )

    seconds |= result.seconds
    say("times", ", ".join(f"{stage} {value:.1f} s" for stage, value in seconds.items()))
    say("kept", _kept(result))
    if hosts.is_writer():
        _write(args, result)


def _load(
    args: argparse.Namespace,
    contents: Contents,
    placed: devices.Placement,
    on_shapes: Callable[[Model], None] = lambda model: None,
) -> Model:
    dtype, where = _DTYPES[args.dtype], dataclasses.asdict(placed)
    model = load(args.ckpt_dir, dtype, **where, on_shapes=on_shapes)
    say("loaded", f"{args.ckpt_dir}: {_summary(contents)}, computing in {args.dtype}")
    say("on", str(placed))
    return model


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
    say("wrote", ", ".join(getattr(args, flag) for flag in _OUTPUTS if getattr(args, flag)))


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


# --- batch ------------------------------------------------------------------------------------


def _batch(args: argparse.Namespace, others: list[str]) -> int:
    devices.join(args)
    contents = describe(args.ckpt_dir)
    placed = devices.place(args, contents, many=True)
    size = args.batch_size
    if size is None:
        size = placed.mesh.shape["data"] if placed.mesh else 1
    settings = options.gather(args, others, config_name(args.ckpt_dir, contents.configs))
    settle(settings)  # what is wrong with the flags is wrong with every line
    names = [*(names.split()[0] for names in _OF_AN_EDIT), "lossless"]
    given = {name: value for name in names if (value := getattr(args, name))}
    job = Job(
        manifest=remote.resolve(args.manifest),
        save_dir=remote.resolve(args.save_dir),
        common=Common(settings, manifest.resolved(given, ".")),
        checkpoint=identity(args.ckpt_dir) | {"dtype": args.dtype},
        batch_size=size,
        shard=(args.shard_index, args.num_shards),
        overwrite=args.overwrite,
    )
    work = hosts.agreed(prepare(job))
    total, groups = len(work.missing), len(work.pending)
    edits = total + len(work.finished) + len(work.failures)
    say("edits", f"{edits}, of which {len(work.failures)} cannot run as they stand")
    say("skipped", f"{len(work.finished)} finished before, unchanged")
    say("to do", f"{total} in {groups} groups of up to {size}")

    def loaded() -> Model:
        """The model, read when the first group needs it."""
        return _load(args, contents, placed)

    def runner(*group: Any) -> Sequence[Result | Exception]:
        """Runs a group so that Ctrl-C is heeded."""
        return interruptibly(lambda: batch.run_group(*group))

    with warnings_as_lines(), counting(total) as tell:

        def on_end(request: Request, failure: Failure | None) -> None:
            """Tells what became of an edit."""
            tell(f"{request.id} failed: {failure.reason}" if failure else f"{request.id} done")

        if hosts.is_writer():
            summary = batch.run(work, loaded, runner, on_end)
        else:
            summary = batch.follow(work, loaded, runner)
    where = f": {summary.failures}" if summary.failures else ""
    done = f"{summary.done} done, {summary.skipped} skipped, {summary.failed} failed{where}"
    say("batch", done)
    return SOME_FAILED if summary.failed else 0


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
