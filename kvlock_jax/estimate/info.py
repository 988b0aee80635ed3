"""Describes, as text, a checkpoint's contents and the resources that an edit with it needs."""

import dataclasses
from collections.abc import Iterator, Mapping

from kvlock_jax.checkpoints.format import Contents
from kvlock_jax.estimate import costs, memory, roofline
from kvlock_jax.estimate.costs import Layout, Workload
from kvlock_jax.estimate.memory import Memory
from kvlock_jax.estimate.roofline import CHIPS
from kvlock_jax.media.fit import Fit
from kvlock_jax.parallel import sharding
from kvlock_jax.pipeline.settings import Settings


@dataclasses.dataclass(frozen=True)
class Plan:
    """The edit to estimate for.

    Attributes:
      video: frames, height and width, padded as `edit` pads them.
      devices: number of devices that share the edit's tokens, 1 or more.
      dtype: name of the dtype of matrix products and cache.
      dtype_bytes: bytes of a number of that dtype.
      chip: kind of the devices, one of `CHIPS`; `None` estimates memory alone.
      weights: kind of 8-bit values for the kernels of the blocks, if any.
    """

    video: Fit
    devices: int
    dtype: str
    dtype_bytes: int
    chip: str | None = None
    weights: str | None = None


def holds(contents: Contents) -> Iterator[str]:
    """Lines that describe a checkpoint's contents and, for a converted one, its source.

    `sha256sum --check` reads the lines with the SHA-256 of the source's files.
    """
    wan = contents.configs.transformer
    yield _line("family", contents.family)
    for name, model in contents.models.items():
        sizes = f"{model.parameters:,} parameters, {', '.join(model.dtypes)}, {_bytes(model.size)}"
        yield _line(name, sizes)
    heads = f"{wan.num_attention_heads} heads of {wan.attention_head_dim}"
    sizes = f"{wan.num_layers} layers, width {wan.dim}, {heads}, feed-forward {wan.ffn_dim}"
    if wan.vace_layers:
        sizes += f", context blocks at {', '.join(map(str, wan.vace_layers))}"
    yield _line("sizes", sizes)
    if contents.configs.experts:
        noise = " and ".join(contents.configs.experts)
        yield _line("experts", f"for {noise} noise")
    yield _line("weights", _bytes(_weights(contents)))
    if contents.source:
        yield from _origin(contents)


def _origin(contents: Contents) -> Iterator[str]:
    """Lines about a checkpoint's source, from metadata that anyone may have written."""
    source = contents.source if isinstance(contents.source, Mapping) else {}
    folder, layout = source.get("folder", "an unknown folder"), source.get("layout", "unknown")
    yield _line("converted", f"by kvlock_jax {contents.version} from {folder}, {layout} layout")
    files = source.get("files")
    for name, digest in files.items() if isinstance(files, Mapping) else ():
        yield f"  {digest}  {name}"


def needs(contents: Contents, settings: Settings, plan: Plan) -> Iterator[str]:
    """Lines with one edit's memory on each device, and a lower bound of its steps' time.

    Several devices hold the weights as `load` places them: each has the VAE's and a part of the
    text encoder's, and all of the transformer's, or a part where the chip is named and they would
    take much of its memory (`sharding.worth_spreading`).

    Args:
      contents: contents of the checkpoint.
      settings: settings of the edit; preset and steps set how often the source branch runs.
      plan: size and devices.
    """
    stored, shape = contents.models["transformer"], plan.video.model_shape
    workload = memory.workload(contents, settings, shape, dtype_bytes=plan.dtype_bytes)
    frames, height, width = workload.frames, *shape[1:]
    tokens = f"{workload.tokens:,} tokens of {frames} frames of {width}x{height}"
    if workload.windows > 1:
        yield _line("windows", f"{workload.windows} of {frames} frames, one after another")
    cache, lock = costs.cache_bytes(workload, Layout(), settings.lock), settings.lock
    of = "all blocks" if lock.cache == "carried" else "a block"
    yield _line("cache", f"{_bytes(cache)} in {plan.dtype}, of {of}: {tokens}")

    limit = CHIPS[plan.chip].memory if plan.chip else None
    several = plan.devices > 1
    spread = several and limit is not None and sharding.worth_spreading(stored.size, limit)
    layout = Layout.of(plan.devices, spread, workload.tokens)
    small = plan.weights is not None
    parts = memory.per_device(contents, workload, layout, lock, in_8_bits=small)
    yield ""
    yield from _table(parts, workload, layout, plan, limit)
    if plan.chip:
        yield ""
        yield from _bound(workload, layout, settings, plan)


def _weights(contents: Contents) -> int:
    return sum(model.size for model in contents.models.values())


def _table(
    parts: Memory, workload: Workload, layout: Layout, plan: Plan, limit: int | None
) -> Iterator[str]:
    local, several = layout.local(workload.tokens), layout.devices > 1
    part = f"1/{layout.devices} of it" if several else ""
    tokens = f"{local:,} tokens"
    if several:
        tokens += f" of {layout.devices * local:,}"
    if layout.devices * local > workload.tokens:
        tokens += ", padding and all"
    yield f"per device, of {plan.devices} {plan.chip or 'in all'}"
    yield _row("text", parts.text_encoder, f"encoder's weights{', ' + part if several else ''}")
    yield _row("VAE's", parts.vae, "weights")
    experts = " of each of two experts" if len(parts.transformers) > 1 else ""
    spread = f", {part}" if layout.shard_weights else ""
    yield _row("transformer", max(parts.transformers), f"weights{experts}{spread}")
    yield _row("cache", parts.cache, tokens)
    yield _row("activations", parts.activations, "of the sampling loop: an estimate")
    peaks = {
        "peak": (parts.leaving, "each network leaves when its stage has ended"),
        "kept": (parts.kept, "all stay, with --keep_in_memory and in a batch"),
        "host": (parts.on_host, "blocks come from the host's memory, with --weights_on host"),
    }
    for name, (size, note) in peaks.items():
        verdict = ""
        if limit:
            verdict = f"; {'fits in' if size <= limit else 'does not fit in'} {_short(limit)}"
        yield _row(name, size, f"{note}{verdict}")


def _bound(workload: Workload, layout: Layout, settings: Settings, plan: Plan) -> Iterator[str]:
    run, chip = (settings.lock, settings.sample.steps), CHIPS[plan.chip]
    bound = roofline.roofline(roofline.step(workload, layout, *run), chip)
    sources = round(costs.source_share(*run) * settings.sample.steps)
    share = f"{settings.preset}: {sources} of {settings.sample.steps} steps with a source pass"
    share += ", every token computed"
    step, each = bound.seconds * workload.windows, ""
    if workload.windows > 1:
        each = f", {bound.seconds:.3g} s of each window"
    yield _line("step", f"at least {step:.3g} s{each}, by {bound.binds} ({share})")
    for name, seconds in dataclasses.asdict(bound).items():
        yield _line(f"  {name}", f"{seconds:.3g} s")
    yield _line("all steps", f"at least {step * settings.sample.steps:.3g} s")
    devices = roofline.interconnect_binds_from(
        workload, *run, chip, shard_weights=layout.shard_weights
    )
    binds = f"from {devices} chips on" if devices else "at no number of chips"
    yield _line("scaling", f"the interconnect binds {binds}")


def _line(what: str, text: str) -> str:
    return f"{what:14} {text}"


def _row(what: str, size: int, note: str) -> str:
    return f"  {what:12} {_short(size):>10}  {note}".rstrip()


def _short(size: int) -> str:
    """A number of bytes in a readable unit."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 1 << power:
            return f"{size / (1 << power):.1f} {unit}"
    return f"{size:,} bytes"


def _bytes(size: int) -> str:
    """A number of bytes in a readable unit, followed by the exact number."""
    return f"{_short(size)} ({size:,} bytes)" if size >= 1 << 10 else _short(size)
