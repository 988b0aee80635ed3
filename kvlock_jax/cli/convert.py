"""`kvlock convert`: converts a published checkpoint to this package's own format."""

import argparse
import contextlib
import time
from typing import Any

from rich import progress
from rich.console import Console

from kvlock_jax.checkpoints import registry
from kvlock_jax.checkpoints.store import OnBytes
from kvlock_jax.cli.flags import add_files, add_lora, gather_files, gather_loras
from kvlock_jax.convert.converter import DTYPES, convert
from kvlock_jax.convert.published import Published
from kvlock_jax.errors import InputError


def add(commands: Any) -> None:
    """Adds the command to the program's parser."""
    about = "Convert a published checkpoint of Wan 2.1 or 2.2: text-to-video, VACE, or the 5B."
    tail = (
        "The source is a folder as on the Hub: Diffusers' (model_index.json), or the publisher's "
        "own (diffusion_pytorch_model*.safetensors, of two experts in high_noise_model and "
        "low_noise_model; Wan2.1_VAE.pth or Wan2.2_VAE.pth; models_t5_umt5-xxl-enc-bf16.pth; "
        "google/umt5-xxl)."
    )
    parser = commands.add_parser("convert", description=about, epilog=tail, allow_abbrev=False)
    parser.set_defaults(command=_command)
    about = "the published checkpoint; none where files are given of all parts"
    parser.add_argument("--src", metavar="DIR", help=about)
    parser.add_argument("--dst", required=True, metavar="DIR", help="folder to write, or gs://...")
    about = "dtype of the weights; the source's by default"
    parser.add_argument("--dtype", choices=DTYPES, help=about)
    add_files(parser)
    add_lora(parser)


def _command(args: argparse.Namespace, others: list[str]) -> None:
    if others:
        raise InputError(f"unknown argument {others[0]}; see kvlock convert --help")
    start = time.perf_counter()
    with contextlib.ExitStack() as bar:
        contents = convert(
            args.src,
            args.dst,
            DTYPES.get(args.dtype),
            lambda published, total: _begin(bar, published, total),
            gather_loras(args),
            gather_files(args),
        )
    seconds = time.perf_counter() - start
    size = sum(model.size for model in contents.models.values())
    dtypes = sorted({dtype for model in contents.models.values() for dtype in model.dtypes})
    print(f"wrote    {args.dst}: {size / 1e9:.2f} GB in {', '.join(dtypes)}, {seconds:.1f} s")


def _begin(bar: contextlib.ExitStack, published: Published, total: int) -> OnBytes:
    """Prints the source; on a terminal, also shows a progress bar."""
    kind = registry.family(published.configs).name
    where = published.folder or ", ".join(map(str, published.apart.values()))
    print(f"source   {where}: {kind}, {published.layout} layout", flush=True)
    shown = bar.enter_context(
        progress.Progress(
            progress.TextColumn("converting"),
            progress.BarColumn(),
            progress.DownloadColumn(),
            progress.TransferSpeedColumn(),
            progress.TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not Console(stderr=True).is_interactive,
        )
    )
    task = shown.add_task("", total=total)
    return lambda count: shown.advance(task, count)
