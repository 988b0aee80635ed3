"""The flags that several commands share."""

import argparse
from collections.abc import Sequence

from jax import numpy as jnp
from ml_collections import ConfigDict

from kvlock_jax.checkpoints.files import PARTS, ROLES, Files, Loras, by_role
from kvlock_jax.errors import InputError
from kvlock_jax.models import small
from kvlock_jax.pipeline.overrides import SETTINGS, apply_overrides, read_config_file, update
from kvlock_jax.pipeline.placement import ATTENTION
from kvlock_jax.pipeline.settings import config
from kvlock_jax.runtime.compile_cache import cache_folder


def add_devices(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of devices and hosts to a command's parser."""
    group = parser.add_argument_group("devices and hosts")
    add = group.add_argument
    mesh = "devices by axis; all on frames for one edit, on data for many, by default"
    add("--mesh", metavar="data=1,frames=8,model=1", help=mesh)
    about = "between devices: keys and values gathered by each, or passed round a ring as TPUs do"
    add("--attention", choices=ATTENTION, default="auto", help=about)
    about = "spread the weights over frames and gather them layer by layer; by default where large"
    add("--spread_weights", action=argparse.BooleanOptionalAction, help=about)
    about = "keep the kernels of the transformer's blocks in 8 bits, with scales"
    add("--weights", choices=small.KINDS, help=about)
    about = "memory of those kernels: the device's (default), or the host's, as used"
    add("--weights_on", choices=("device", "host"), default="device", help=about)
    about = "tiles of columns that the VAE makes a frame in, for the memory of one: %(default)s"
    add("--vae_tiles", type=int, default=1, help=about)
    add("--distributed", action="store_true", help="several hosts, which Cloud TPU knows by itself")
    add("--coordinator", metavar="HOST:PORT", help="of the first host, where nothing else knows it")
    add("--num_processes", type=int, help="how many hosts there are, with --coordinator")
    add("--process_id", type=int, help="which of them this is, from 0")
    about = (
        "keeps compiled programs here for the next run, '' for nowhere; must be writable by you "
        f"alone: {cache_folder()}"
    )
    add("--jax_cache_dir", metavar="DIR", help=about)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for each of `SETTINGS`, and `--config FILE.py`, to a command's parser."""
    parser.add_argument("--config", metavar="FILE.py", help="settings: a file with get_config()")
    for key, kind, names, about in SETTINGS:
        flag = [f"--{name}" for name in names.split()]
        if kind is bool:
            action = argparse.BooleanOptionalAction
            parser.add_argument(*flag, dest=key, action=action, help=about)
        else:
            parser.add_argument(
                *flag, dest=key, type=kind, metavar=kind.__name__.upper(), help=about
            )


def gather_settings(args: argparse.Namespace, others: list[str], own: str) -> ConfigDict:
    """The settings of a command; named flags win over overrides, overrides over the file.

    Args:
      args: arguments that the command's parser knows.
      others: remaining arguments, such as `--config.kvlock.tau=0.02`.
      own: name of the checkpoint's default config, used without `--config FILE.py`.

    Raises:
      ConfigError: the file defines no config, or a flag is unknown or has an invalid value.
    """
    run = read_config_file(args.config) if args.config else config(own)
    values = {key: getattr(args, key) for key, *_ in SETTINGS}
    values = {key: value for key, value in values.items() if value is not None}
    if "preset" in values:  # overrides go over the sampling that it brings
        run = update(run, {"preset": values.pop("preset")})
    return update(apply_overrides(run, others), values)


DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

EDIT_INPUTS = {
    "src_video video": "a video, an image or a folder of images",
    "src_mask mask": "a video, an image, a folder of images or an .npy; white, or transparent "
    "where alpha varies, is edited",
    "bbox": "a box in pixels of the video, in place of a mask; or boxes by frame, between which it "
    "moves in a line: 0:X0,Y0,X1,Y1 40:...",
    "src_ref_images": "A.png,B.png: pictures of the wanted content; VACE models only",
    "prompt": "what the masked part should show",
}
"""Names and help of the flags for an edit's inputs, which are keys of manifests too."""


def add_shared(parser: argparse.ArgumentParser, required: Sequence[str] = ()) -> None:
    """Adds the flags that `kvlock edit` and `kvlock batch` share."""
    about = "'demo' (default), or a checkpoint's folder; none where files are given of all parts"
    parser.add_argument("--ckpt_dir", "--ckpt", help=about)
    add_files(parser)
    add_lora(parser)
    for names, about in EDIT_INPUTS.items():
        flag = [f"--{name}" for name in names.split()]
        several = {"nargs": "+", "metavar": "X0,Y0,X1,Y1"} if names == "bbox" else {}
        parser.add_argument(*flag, required=names.split()[0] in required, help=about, **several)
    about = "write every bit of the video; .mkv is smallest"
    parser.add_argument("--lossless", action="store_true", help=about)
    add_dtype(parser)
    add_devices(parser)
    add_settings(parser)


def add_files(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `Files` to a command's parser."""
    for name, part in PARTS.items():
        about = f"file of the {part}: safetensors, GGUF or .pth; in place of a published folder's"
        several = {}
        if name == "transformer":
            about += "; twice for two experts, if their names say high and low"
            several = {"action": "append"}
        parser.add_argument(f"--{name}", metavar="FILE", help=about, **several)


def gather_files(args: argparse.Namespace) -> Files:
    """The files of single parts that a command's flags name."""
    named = {name: getattr(args, name) for name in PARTS if name != "transformer"}
    for name, path in by_role(args.transformer or ()).items():
        if named.get(name):
            raise InputError(f"--transformer and --{name} both name the {PARTS[name]}")
        named[name] = path
    return Files(**named)


def checkpoint(args: argparse.Namespace) -> str | None:
    """The folder of `--ckpt_dir`; the demo where the flags name neither folder nor file."""
    return args.ckpt_dir or (None if gather_files(args).given else "demo")


def add_lora(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `Loras` to a command's parser."""
    about = "LoRA files that change the transformer; a strength is 1 by default"
    parser.add_argument("--lora", default="", metavar="FILE[:STRENGTH],...", help=about)
    for role in ROLES:
        about = f"the same of the {role}-noise expert alone"
        parser.add_argument(f"--lora_{role}", default="", metavar="FILE[:STRENGTH],...", help=about)


def gather_loras(args: argparse.Namespace) -> Loras:
    """The LoRA files that a command's flags name."""
    return Loras(args.lora, args.lora_high, args.lora_low)


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """Adds `--dtype` to a command's parser."""
    about = "dtype of matrix products and the cache: bfloat16 on TPUs and GPUs, float32 on CPUs"
    parser.add_argument("--dtype", choices=DTYPES, help=about)
