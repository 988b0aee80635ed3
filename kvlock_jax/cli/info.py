"""`kvlock info`: describes a checkpoint, and the memory and time that an edit with it needs."""

import argparse
from typing import Any

from jax import numpy as jnp

from kvlock_jax.cli.flags import DTYPES, add_dtype, add_files, gather_files
from kvlock_jax.errors import InputError
from kvlock_jax.estimate import info, roofline
from kvlock_jax.media.fit import Fit
from kvlock_jax.models import small
from kvlock_jax.pipeline.load import default_dtype, describe
from kvlock_jax.pipeline.settings import config, default_config_name, resolve_settings
from kvlock_jax.settings.schema import EditConfig


def add(commands: Any) -> None:
    """Adds the command to the program's parser."""
    about = "Describe a checkpoint, and the memory and least time that an edit with it needs."
    parser = commands.add_parser("info", description=about, allow_abbrev=False)
    parser.set_defaults(command=_command)
    about = "'demo', or a checkpoint's folder; none where files are given of all parts"
    parser.add_argument("dir", nargs="?", help=about)
    add_files(parser)
    parser.add_argument("--size", default="832*480", help="WIDTH*HEIGHT of the video")
    parser.add_argument("--frame_num", type=int, default=81, help="frames of the video")
    parser.add_argument("--devices", type=int, default=1, help="devices that share the video")
    chips = ", ".join(roofline.CHIPS)
    about = "of the kernels of the transformer's blocks: 8 bits each"
    parser.add_argument("--weights", choices=small.KINDS, help=about)
    parser.add_argument("--chip", choices=roofline.CHIPS, help=f"kind of the devices: {chips}")
    add_dtype(parser)


def _command(args: argparse.Namespace, others: list[str]) -> None:
    if others:
        raise InputError(f"unknown argument {others[0]}; see kvlock info --help")
    size = EditConfig(size=args.size, frame_num=args.frame_num)
    if not size.frame_num or not size.height_width:
        raise InputError("--frame_num must be 1 or more, and --size WIDTH*HEIGHT")
    if args.devices < 1:
        raise InputError(f"--devices must be 1 or more, found {args.devices}")
    contents = describe(args.dir, gather_files(args))
    settings = resolve_settings(config(default_config_name(args.dir, contents.configs)))
    shape = Fit(size.frame_num, *size.height_width, contents.configs.unit)
    dtype = args.dtype or ("bfloat16" if args.chip else default_dtype().name)
    number = jnp.dtype(DTYPES[dtype]).itemsize
    plan = info.Plan(shape, args.devices, dtype, number, args.chip, args.weights)
    for lines in (info.holds(contents), info.needs(contents, settings, plan)):
        print(*lines, sep="\n", flush=True)
