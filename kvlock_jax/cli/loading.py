"""Joins hosts, places and loads the model as the flags of a command say."""

import argparse
import dataclasses
from collections.abc import Callable

import jax

from kvlock_jax.checkpoints.files import PARTS
from kvlock_jax.checkpoints.format import Contents
from kvlock_jax.checkpoints.registry import Configs
from kvlock_jax.cli.flags import DTYPES, checkpoint, gather_files, gather_loras
from kvlock_jax.cli.terminal import say
from kvlock_jax.estimate import memory
from kvlock_jax.estimate.costs import Layout
from kvlock_jax.media.fit import Fit
from kvlock_jax.models.wan.config import WanConfig
from kvlock_jax.parallel.processes import join_hosts
from kvlock_jax.pipeline.inputs import EditInputs
from kvlock_jax.pipeline.load import Model, default_dtype, load
from kvlock_jax.pipeline.placement import (
    Placement,
    choose_placement,
    compiler_for,
)
from kvlock_jax.pipeline.settings import Settings, config, default_config_name
from kvlock_jax.runtime.compile_cache import Compiler, keep_programs
from kvlock_jax.sampling import windows


def join(args: argparse.Namespace) -> None:
    """Joins the other hosts, if any, and keeps compiled programs where the flags say."""
    keep_programs(args.jax_cache_dir)
    join_hosts(args.distributed, args.coordinator, args.num_processes, args.process_id)


def dtype_name(args: argparse.Namespace) -> str:
    """The name of the compute dtype, by default that of the devices; call it after `join`."""
    return args.dtype or default_dtype().name


def place(args: argparse.Namespace, contents: Contents, *, many: bool) -> Placement:
    """The placement that the flags ask for, for one edit or for many."""
    return choose_placement(
        contents,
        many=many,
        mesh=args.mesh,
        spread=args.spread_weights,
        attention=args.attention,
        vae_tiles=args.vae_tiles,
        weights=args.weights,
        weights_on=args.weights_on,
    )


def fit_memory(
    placed: Placement,
    contents: Contents,
    inputs: EditInputs,
    settings: Settings,
    *,
    keep_in_memory: bool,
) -> Placement:
    """The placement with which an edit fits the devices, and a line about it, if they tell."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" not in stats or not isinstance(contents.configs.transformer, WanConfig):
        return placed
    configs = contents.configs
    shape = Fit(*inputs.source.shape[:3], configs.unit).model_shape
    workload = memory.workload(contents, settings, shape, references=len(inputs.references))
    devices = placed.mesh.shape["frames"] if placed.mesh else 1
    layout = Layout.of(devices, placed.spread, workload.tokens)
    small = placed.weights is not None
    need = memory.per_device(contents, workload, layout, settings.lock, in_8_bits=small)
    placed, line = memory.fitted(placed, need, stats["bytes_limit"], keep_in_memory=keep_in_memory)
    if line:
        say("memory", line)
    return placed


def windows_line(settings: Settings, frames: int, configs: Configs) -> str:
    """A line about the windows that a clip's steps run over; empty where they run it whole."""
    sample, time = settings.sample, configs.vae.strides[0]
    whole = -(-(frames - 1) // time) + 1
    if (found := windows.asked(sample, whole, time)) is None:
        return ""
    count = windows.number(whole, *found)
    shared = f", which share about {sample.window_overlap}" if count > 1 else ""
    return f"{count} of {min(sample.window, frames)} frames{shared}"


def compiler(args: argparse.Namespace, placed: Placement) -> Compiler:
    """The compiler of a command's programs."""
    return compiler_for(placed, args.jax_cache_dir)


def load_model(
    args: argparse.Namespace,
    contents: Contents,
    placed: Placement,
    on_shapes: Callable[[Model], None] = lambda model: None,
    *,
    keep_in_memory: bool = True,
) -> Model:
    """Loads the model that the flags name and prints what was loaded.

    Hosts compare the values of what they have in memory, so that several keep all of it.
    """
    name, where = dtype_name(args), dataclasses.asdict(placed)
    files, folder = gather_files(args), checkpoint(args)
    beside = {"files": files, "loras": gather_loras(args)}
    beside["keep_in_memory"] = keep_in_memory or jax.process_count() > 1
    model = load(folder, DTYPES[name], **where, **beside, on_shapes=on_shapes)
    say("loaded", f"{folder or 'files'}: {summary(contents)}, computing in {name}")
    for part, path in files.given.items():
        say("of it", f"the {PARTS[part]} is {path}")
    for names, what in ((args.lora, ""), (args.lora_high, "high"), (args.lora_low, "low")):
        if names:
            say("changed", f"by {names}" + (f", the {what}-noise expert alone" if what else ""))
    if line := shift_note(folder, contents):
        say("shift", line)
    say("on", str(placed))
    return model


def shift_note(folder: str | None, contents: Contents) -> str:
    """A line where a folder's scheduler has another shift than the publisher, of two experts.

    Diffusers' conversion writes 3 where the publisher of Wan 2.2's A14B has 12, which halves the
    high-noise expert's steps.
    """
    configs = contents.configs
    shift = config(default_config_name(folder, configs)).sample.shift
    found = configs.scheduler.get("flow_shift", shift)
    if not configs.experts or found == shift:
        return ""
    return f"{shift:g} by default, as the publisher has it; the folder's scheduler says {found}"


def summary(contents: Contents) -> str:
    """Family, size and dtypes of a checkpoint in a few words."""
    parameters = sum(model.parameters for model in contents.models.values())
    dtypes = sorted({dtype for model in contents.models.values() for dtype in model.dtypes})
    return f"{contents.family}, {parameters:,} parameters in {', '.join(dtypes)}"
