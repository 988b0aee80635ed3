"""`kvlock app`: a local page to edit videos in."""

import argparse
import contextlib
import importlib
import ipaddress
import os
import pathlib
import tempfile
import time
from types import ModuleType
from typing import Any

from kvlock_jax.app.clips import examples
from kvlock_jax.app.edits import Editor
from kvlock_jax.checkpoints.files import PARTS, ROLES
from kvlock_jax.checkpoints.registry import family
from kvlock_jax.cli.flags import (
    add_devices,
    add_dtype,
    add_files,
    add_lora,
    add_settings,
    checkpoint,
    gather_files,
    gather_loras,
    gather_settings,
)
from kvlock_jax.cli.loading import compiler, dtype_name, join, load_model, place
from kvlock_jax.cli.terminal import say
from kvlock_jax.errors import InputError
from kvlock_jax.pipeline.load import describe
from kvlock_jax.pipeline.settings import config, default_config_name, resolve_settings

_MODEL_FLAGS = (
    *("ckpt_dir", *PARTS, "lora", *(f"lora_{role}" for role in ROLES), "dtype"),
    *("mesh", "attention", "spread_weights", "weights", "weights_on", "vae_tiles"),
)
"""Flags that `kvlock edit` needs too, to make the same video."""


def add(commands: Any) -> None:
    """Adds the command to the program's parser."""
    about = "Open a page to edit videos in, with a model that stays loaded."
    tail = (
        "The page is for this machine alone, at 127.0.0.1, unless --listen names another address. "
        "Settings given here are those that the page begins with."
    )
    parser = commands.add_parser("app", description=about, epilog=tail, allow_abbrev=False)
    parser.set_defaults(command=_command)
    add = parser.add_argument
    add("--ckpt_dir", "--ckpt", help="'demo' (default), or a checkpoint's folder")
    about = "address to listen at, such as 0.0.0.0; one that others reach needs --auth"
    add("--listen", default="127.0.0.1", metavar="ADDRESS", help=about)
    add("--port", type=int, default=7860, help="%(default)s by default; 0 takes a free one")
    add("--auth", metavar="USER:PASSWORD", help="asked for by the page")
    about = "folder to keep the edits in; by default they go when the command ends"
    add("--save_dir", metavar="DIR", help=about)
    about = "keep all networks in memory (default), or let each leave when its stage has ended"
    add("--keep_in_memory", action=argparse.BooleanOptionalAction, default=True, help=about)
    add("--open", action="store_true", help="open the page in a browser")
    add_files(parser)
    add_lora(parser)
    add_dtype(parser)
    add_devices(parser)
    add_settings(parser)


def check_access(listen: str, auth: str | None) -> tuple[str, str] | None:
    """The user and password of a page.

    Args:
      listen: address that it listens at.
      auth: `USER:PASSWORD`, or none for a page that this machine alone can reach.

    Raises:
      InputError: others can reach it and there is no password, or `auth` is no such pair.
    """
    if auth is None:
        if not _is_local(listen):
            raise InputError(
                f"--listen {listen}: others can reach this address, so --auth USER:PASSWORD "
                "must be given"
            )
        return None
    user, _, password = auth.partition(":")
    if not user or not password:
        raise InputError("--auth must be USER:PASSWORD, and neither may be empty")
    return user, password


def _is_local(address: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(address).is_loopback
    return address == "localhost"


def _page() -> ModuleType:
    """The page's module, which imports Gradio."""
    try:
        return importlib.import_module("kvlock_jax.app.page")
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise InputError("kvlock app needs Gradio: pip install '.[app]'") from error


def _command(args: argparse.Namespace, others: list[str]) -> None:
    start = time.perf_counter()
    access = check_access(args.listen, args.auth)
    if not 0 <= args.port < 2**16:
        raise InputError(f"--port must be between 0 and 65535, found {args.port}")
    page = _page()
    join(args)
    gather_loras(args)  # raises its errors before the work, not after
    folder = checkpoint(args)
    contents = describe(folder, gather_files(args))
    name = default_config_name(folder, contents.configs)
    base = gather_settings(args, others, name)
    resolve_settings(base)
    placed = place(args, contents, many=False)
    with contextlib.ExitStack() as stack:
        shown = _temporary(stack)
        os.environ["GRADIO_TEMP_DIR"] = str(shown / "gradio")  # of uploads, and copies of results
        if args.save_dir:
            kept = pathlib.Path(args.save_dir).expanduser()
            try:
                kept.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(f"--save_dir {args.save_dir}: {error.strerror}") from error
        else:
            kept = _temporary(stack)
        model = load_model(args, contents, placed, keep_in_memory=args.keep_in_memory)
        editor = Editor(
            model=model,
            own=config(name),
            arguments=model_arguments(args),
            compiler=compiler(args, placed),
            folder=kept.resolve(),
            about={"ckpt_dir": folder, "dtype": dtype_name(args)},
        )
        studio = page.Studio(
            editor=editor,
            base=base,
            configs=contents.configs,
            examples=examples(shown) if folder == "demo" else [],
            takes_references=family(contents.configs).conditioner.takes_references,
        )
        about = {"listen": args.listen, "port": args.port, "auth": access, "opened": args.open}
        url = page.serve(studio, **about)
        say("page", f"{url}, ready after {time.perf_counter() - start:.1f} s; Ctrl-C ends it")
        page.wait()


def _temporary(stack: contextlib.ExitStack) -> pathlib.Path:
    """A folder that goes when the command ends, even if an edit still writes into it."""
    folder = tempfile.TemporaryDirectory(prefix="kvlock-", ignore_cleanup_errors=True)
    return pathlib.Path(stack.enter_context(folder)).resolve()


def model_arguments(args: argparse.Namespace) -> list[str]:
    """The arguments of `kvlock edit` that load the same model, in the same place, from any folder.

    Only files of LoRAs keep relative names.
    """
    plain = {"attention": "auto", "weights_on": "device", "vae_tiles": 1}
    parts = []
    for name in _MODEL_FLAGS:
        value = checkpoint(args) if name == "ckpt_dir" else getattr(args, name)
        if isinstance(value, bool):
            parts.append(f"--{name}" if value else f"--no-{name}")
        elif value and value != plain.get(name):
            for one in value if isinstance(value, list) else [value]:
                is_path = name in PARTS or (name == "ckpt_dir" and one != "demo")
                given = os.path.abspath(os.path.expanduser(one)) if is_path else one
                parts.append(f"--{name}={one if is_path and '://' in one else given}")
    return parts
