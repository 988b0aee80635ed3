"""`kvlock edit`: one edit."""

import argparse
import contextlib
import functools
import time
from collections.abc import Mapping
from typing import Any

import jax

from kvlock_jax import lock
from kvlock_jax.checkpoints.files import PARTS
from kvlock_jax.cli.flags import add_shared, checkpoint, gather_files, gather_loras, gather_settings
from kvlock_jax.cli.loading import (
    compiler,
    dtype_name,
    fit_memory,
    join,
    load_model,
    place,
    windows_line,
)
from kvlock_jax.cli.terminal import interruptibly, say, ticking, warnings_as_lines
from kvlock_jax.errors import InputError
from kvlock_jax.masks.keyframes import parse_boxes
from kvlock_jax.media import encode, room, storage
from kvlock_jax.media.folders import IMAGE_SUFFIXES
from kvlock_jax.parallel import agreement
from kvlock_jax.pipeline.api import Result
from kvlock_jax.pipeline.api import run as run_edit
from kvlock_jax.pipeline.background import BackgroundCompiler
from kvlock_jax.pipeline.encode import draw_noise
from kvlock_jax.pipeline.inputs import read_inputs
from kvlock_jax.pipeline.load import Model, describe
from kvlock_jax.pipeline.outputs import (
    SUFFIXES,
    Outputs,
    check_outputs,
    probe_outputs,
    summarize_metrics,
    write_outputs,
)
from kvlock_jax.pipeline.overrides import file_names
from kvlock_jax.pipeline.settings import default_config_name, resolve_settings


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
    about = f"a video: {', '.join(encode.CONTAINERS)}; outputs may be remote, such as gs://"
    add("--save_file", "--output", required=True, help=about)
    add("--trace", metavar="FILE.json", help="write what each step did")
    add("--plot", metavar="FILE.png", help="draw what each step did")
    about = "keep all networks in memory; by default each leaves when its stage has ended"
    add("--keep_in_memory", action="store_true", help=about)
    add("--compare", metavar="VIDEO", help="write source, mask and edit side by side")


def _command(args: argparse.Namespace, others: list[str]) -> None:
    if (args.src_mask is None) == (args.bbox is None):
        raise InputError("give either --src_mask FILE or --bbox x0,y0,x1,y1")
    outputs = Outputs(**{name: getattr(args, name) for name in (*SUFFIXES, "lossless")})
    pictures = file_names(args.src_ref_images or "")
    read = {"src_video": [args.src_video], "src_mask": [args.src_mask], "src_ref_images": pictures}
    check_outputs(outputs, read)
    join(args)
    if agreement.is_writer():
        probe_outputs(outputs)
    gather_loras(args)  # raises its errors before the work, not after
    folder = checkpoint(args)
    contents = describe(folder, gather_files(args))
    name = default_config_name(folder, contents.configs)
    settings = resolve_settings(gather_settings(args, others, name))
    mask = args.src_mask if args.bbox is None else parse_boxes(args.bbox)
    with warnings_as_lines(), contextlib.ExitStack() as copies:
        local = functools.partial(storage.at_hand, copies, suffixes=IMAGE_SUFFIXES)
        pictures = [local(name) for name in pictures]
        mask = local(mask) if isinstance(mask, str) else mask
        inputs = read_inputs(local(args.src_video), mask, args.prompt, settings.edit, pictures)
    frames, height, width = inputs.mask.shape
    say("video", f"{frames} frames of {width}x{height} at {float(inputs.fps):g} per second")
    say("mask", f"{100 * room.share(inputs.mask):.1f} % of the pixels are edited")
    say("preset", f"{settings.preset}: {lock.PRESETS[settings.preset]}")
    if line := windows_line(settings, frames, contents.configs):
        say("windows", line)

    kept = {"keep_in_memory": args.keep_in_memory}
    placed = fit_memory(place(args, contents, many=False), contents, inputs, settings, **kept)
    start = time.perf_counter()
    compiling: list[BackgroundCompiler] = []

    def compile_ahead(shapes: Model) -> None:
        """Starts to compile before the weights are read."""
        noise = draw_noise(shapes, inputs, jax.random.key(settings.sample.seed))
        compiling.append(
            BackgroundCompiler(
                shapes, inputs, settings, noise, by_step=True, compiler=compiler(args, placed)
            )
        )

    model = load_model(args, contents, placed, compile_ahead, **kept)
    seconds = {"load": time.perf_counter() - start}
    with warnings_as_lines(), ticking(settings.sample.steps) as tick:
        result = interruptibly(
            lambda: run_edit(
                model, inputs, settings, on_step=tick, background=next(iter(compiling), None)
            )
        )

    seconds |= result.seconds
    say("times", ", ".join(f"{stage} {value:.1f} s" for stage, value in seconds.items()))
    say("kept", summarize_metrics(result.metrics))
    names = "prompt lora lora_high lora_low src_video src_mask src_ref_images bbox".split()
    about = {name: getattr(args, name) for name in (*names, *PARTS)}
    about |= {"ckpt_dir": folder, "dtype": dtype_name(args)}
    about["bbox"] = args.bbox and " ".join(args.bbox)
    agreement.together("writing the results", lambda: _write(outputs, result, about))


def _write(outputs: Outputs, result: Result, about: Mapping[str, Any]) -> None:
    """Writes the results on the first host, and prints what was written."""
    if not agreement.is_writer():
        return
    with warnings_as_lines():
        written = write_outputs(outputs, result, about)
    if written.paths:
        say("wrote", ", ".join(written.paths))
    if written.errors:
        raise InputError("\n".join(map(str, written.errors)))
