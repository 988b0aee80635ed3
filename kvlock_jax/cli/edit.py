"""`kvlock edit`: one edit."""

import argparse
import contextlib
import dataclasses
import functools
import os
import time
from typing import Any

import jax

from kvlock_jax import lock
from kvlock_jax.cli.flags import add_shared, gather_settings
from kvlock_jax.cli.loading import compiler, join, load_model, place
from kvlock_jax.cli.terminal import interruptibly, say, ticking, warnings_as_lines
from kvlock_jax.errors import InputError
from kvlock_jax.media import encode, storage
from kvlock_jax.media.folders import IMAGE_SUFFIXES
from kvlock_jax.media.masks import parse_box
from kvlock_jax.parallel import agreement
from kvlock_jax.pipeline import report
from kvlock_jax.pipeline.api import Result
from kvlock_jax.pipeline.api import run as run_edit
from kvlock_jax.pipeline.background import BackgroundCompiler
from kvlock_jax.pipeline.encode import draw_noise
from kvlock_jax.pipeline.inputs import read_inputs
from kvlock_jax.pipeline.load import Model, describe
from kvlock_jax.pipeline.overrides import file_names
from kvlock_jax.pipeline.settings import default_config_name, resolve_settings

_OUTPUTS = {
    "save_file": tuple(encode.CONTAINERS),
    "trace": (".json",),
    "plot": (".png",),
    "compare": tuple(encode.CONTAINERS),
}
"""Flags that name a file to write, and how its name may end."""


def add(commands: Any) -> None:
    """Adds the command to the program's parser."""
    about = "Edit the masked part of a video, and keep the rest."
    tail = (
        "--config.KEY=VALUE changes any setting of the config, such as --config.kvlock.tau=0.02; "
        "named flags go over it. White of the mask is edited."
    )
    # Without abbreviations: --config.x would pass for some.
    parser = commands.add_parser("edit", description=about, epilog=tail, allow_abbrev=False)
    parser.set_defaults(command=_command)
    add_shared(parser, required=("src_video", "prompt"))
    add = parser.add_argument
    add("--save_file", "--output", required=True, help=f"a video: {', '.join(encode.CONTAINERS)}")
    add("--trace", metavar="FILE.json", help="write what each step did")
    add("--plot", metavar="FILE.png", help="draw what each step did")
    add("--compare", metavar="VIDEO", help="write source, mask and edit side by side")


def _command(args: argparse.Namespace, others: list[str]) -> None:
    if (args.src_mask is None) == (args.bbox is None):
        raise InputError("give either --src_mask FILE or --bbox x0,y0,x1,y1")
    _check_outputs(args)
    join(args)
    contents = describe(args.ckpt_dir)
    own = default_config_name(args.ckpt_dir, contents.configs)
    settings = resolve_settings(gather_settings(args, others, own))
    mask = args.src_mask if args.bbox is None else parse_box(args.bbox)
    with warnings_as_lines(), contextlib.ExitStack() as copies:
        local = functools.partial(storage.at_hand, copies, suffixes=IMAGE_SUFFIXES)
        pictures = [local(name) for name in file_names(args.src_ref_images or "")]
        mask = local(mask) if isinstance(mask, str) else mask
        inputs = read_inputs(local(args.src_video), mask, args.prompt, settings.edit, pictures)
    frames, height, width = inputs.mask.shape
    say("video", f"{frames} frames of {width}x{height} at {float(inputs.fps):g} per second")
    say("mask", f"{100 * inputs.mask.mean():.1f} % of the pixels are edited")
    say("preset", f"{settings.preset}: {lock.PRESETS[settings.preset]}")

    placed = place(args, contents, many=False)
    start = time.perf_counter()
    compiling: list[BackgroundCompiler] = []

    def compile_ahead(shapes: Model) -> None:
        """Begins to compile, before the weights are read."""
        noise = draw_noise(shapes, inputs, jax.random.key(settings.sample.seed))
        given = shapes, inputs, settings, noise
        compiling.append(BackgroundCompiler(*given, by_step=True, compiler=compiler(args, placed)))

    model = load_model(args, contents, placed, compile_ahead)
    seconds = {"load": time.perf_counter() - start}
    with warnings_as_lines(), ticking(settings.sample.steps) as tick:
        result = interruptibly(
            lambda: run_edit(
                model, inputs, settings, on_step=tick, background=next(iter(compiling), None)
            )
        )

    seconds |= result.seconds
    say("times", ", ".join(f"{stage} {value:.1f} s" for stage, value in seconds.items()))
    say("kept", _kept(result))
    if agreement.is_writer():
        with warnings_as_lines():
            _write(args, result)


def _check_outputs(args: argparse.Namespace) -> None:
    """Finds what could not be written after all the work, or would overwrite what is needed."""
    taken = {}
    for flag in ("src_video", "src_mask", "src_ref_images"):
        given = getattr(args, flag) or ""
        for name in file_names(given) if flag == "src_ref_images" else [given]:
            taken[os.path.realpath(os.path.expanduser(name))] = flag
    for flag, suffixes in _OUTPUTS.items():
        if not getattr(args, flag):
            continue
        target = os.path.realpath(encode.check_output(getattr(args, flag), suffixes))
        if target in taken:
            raise InputError(f"--{flag} and --{taken[target]} are the same file, {target}")
        taken[target] = flag


def _write(args: argparse.Namespace, result: Result) -> None:
    encode.write_video(
        args.save_file,
        result.video,
        result.fps,
        lossless=args.lossless,
        footage=result.footage,
    )
    if args.compare:
        together = report.compare(result.source, result.mask, result.video)
        silent = dataclasses.replace(result.footage, audio=None)
        encode.write_video(args.compare, together, result.fps, footage=silent)
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
