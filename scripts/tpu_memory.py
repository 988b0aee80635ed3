"""What 14B takes of one TPU chip, Wan 2.2 of eight, and a long clip, by the TPU's compiler.

    python scripts/tpu_memory.py [--only int8] [--runs runs/memory_tpu]

The sampling loop of text-to-video 14B at 81 frames of 480x832 (`kvlock_anchor`, every kind of pass)
is compiled for one chip with the transformer's weights in bfloat16, with its blocks' kernels in 8
bits, and with those in the host's memory. Wan 2.2's models are compiled for eight chips. One
process at a time: libtpu takes a lock. Figures stay in `--runs`; a second run does the missing
ones. A section of docs/tpu.md is written when all of its figures are there.
"""

import argparse
import json
import os
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
MODEL, HEIGHT, WIDTH, FRAMES = "T2V 14B", 480, 832, 81
CHIPS = {"v6e": 32e9, "v5e": 16e9}
WAYS = {
    "bfloat16": (None, "device"),
    "int8": ("int8", "device"),
    "float8": ("float8", "device"),
    "bfloat16, in the host's memory": (None, "host"),
    "int8, in the host's memory": ("int8", "host"),
}
SECTION = "## 14B on one chip"
ABOUT = """{title}

Written by `python scripts/tpu_memory.py`. GB on one chip in the sampling loop of {model} at {size},
compiled by libtpu {version}: `weights` are the transformer's on the device, `temporaries` the
compiler's own. `peak` is the loop's, once the text encoder has left, and `with it` adds the text
encoder's {encoder:.1f} GB in bfloat16, which a run that keeps all networks holds too. `compiler`
says that libtpu compiled the program into the chip's memory, or refused it: "Ran out of memory on
HBM", of which there are {limits}.

{table}

libtpu of its own accord copies kernels from the host's memory while it computes: the copies of a
layer begin in that layer, each ahead of the product that takes it. `copied` is what a layer copies
and `work` its time by the compiler's cycles, without attention and norms. A link of `needs` GB/s
copies the one in the other. `first` is the work that the layer's first copy lies behind, which is
little, since the layer before does not begin it: that copy is waited for. `others` is the least
work that one of the rest lies behind. `stacks` counts copies of all layers' kernels at once, which
must be none.

{copies}
"""


EIGHT = {
    "T2V-A14B": ("T2V 14B", 480, 832, 81, 2, "kvlock_anchor"),
    "VACE-Fun-A14B": ("VACE 14B", 480, 832, 81, 2, "kvlock"),
    "TI2V-5B, clean": ("TI2V 5B", 704, 1280, 121, 1, "clean"),
    "TI2V-5B, clean_anchor": ("TI2V 5B", 704, 1280, 121, 1, "clean_anchor"),
}
"""Model, its transformer, height, width, frames, number of transformers, preset."""
SLICE = "v6e-8"
SECTION_22 = "## Wan 2.2 on eight chips"
ABOUT_22 = """{title}

Written by `python scripts/tpu_memory.py`. GB on each chip of a {slice} in the sampling loop,
compiled by libtpu {version}; the experts of an A14B have the sizes of Wan 2.1's 14B, and one
program serves both. `one` is the peak with one expert's weights at a time, spread over the chips,
and `both` with both.

| model, preset | video | weights of one | temporaries | one | both |
|---|---|---|---|---|---|
{table}
"""


LONG = {
    "81 frames, whole": (81, None),
    "81 frames, one window": (81, (21, 5)),
    "213 frames in windows": (213, (21, 5)),
    "501 frames in windows": (501, (21, 5)),
    "213 frames, whole": (213, None),
}
"""Frames of the video, and latent frames of a window and of an overlap."""
SECTION_LONG = "## Clips longer than the model"
ABOUT_LONG = """{title}

Written by `python scripts/tpu_memory.py`. MB on each chip of a {slice} in the sampling loop of
VACE 1.3B (`kvlock`) at 480x832, compiled by libtpu {version}. `state` is what a step leaves to the
next: latents, solver's history and clean estimates, which grow with the clip. `rest` is what the
temporaries hold beside it; the bar for 501 frames is 1.1 of 81 frames'.

| video | arguments | temporaries | state | rest | of 81 frames, whole |
|---|---|---|---|---|---|
{table}
"""


def long_clip(name: str) -> dict:
    """The compiler's figures of a clip that runs whole or over windows."""
    import jax
    import tpu_programs

    frames, window = LONG[name]
    row = tpu_programs.Row("VACE 1.3B", 480, 832, frames, SLICE)
    mesh, spread = tpu_programs.mesh_of(row), tpu_programs.spreads(row)
    with jax.set_mesh(mesh):
        found = tpu_programs.measure(tpu_programs.loop(mesh, row, spread, window=window))
        state = tpu_programs.state_bytes(mesh, row)
    return {key: found[key] for key in ("arguments", "temporaries")} | {"state": state}


def on_eight(name: str) -> dict:
    """The compiler's figures of a model of Wan 2.2 on eight chips."""
    import jax
    import tpu_programs

    model, height, width, frames, _, preset = EIGHT[name]
    row = tpu_programs.Row(model, height, width, frames, SLICE, preset=preset)
    mesh, spread = tpu_programs.mesh_of(row), tpu_programs.spreads(row)
    with jax.set_mesh(mesh):
        found = tpu_programs.measure(tpu_programs.loop(mesh, row, spread))
    held = tpu_programs.held(mesh, spread, tpu_programs.MODELS[model])["transformer"]
    return {key: found[key] for key in ("arguments", "temporaries", "outputs")} | {"held": held}


def cells_of_eight(name: str, found: dict) -> str:
    """A row of the table of Wan 2.2."""
    _, height, width, frames, count, preset = EIGHT[name]
    peak = found["arguments"] + found["temporaries"] + found["outputs"]
    both = f"{(peak + found['held']) / 1e9:.1f}" if count == 2 else "-"
    label = name if preset in name else f"{name}, {preset}"
    numbers = [f"{found[key] / 1e9:.1f}" for key in ("held", "temporaries")]
    video = f"{frames} frames of {height}x{width}"
    return f"| {label} | {video} | {' | '.join(numbers)} | {peak / 1e9:.1f} | {both} |"


def program(chip: str, way: str):
    """The lowered loop on one chip, and bytes of weights on the device."""
    import jax
    import jax.numpy as jnp
    import tpu_programs
    from flax import nnx
    from jax.experimental import topologies

    from kvlock_jax.checkpoints import registry
    from kvlock_jax.models import small
    from kvlock_jax.parallel.mesh import make_mesh

    weights, where = WAYS[way]
    os.environ["TPU_ACCELERATOR_TYPE"] = f"{chip.replace('v5e', 'v5litepod')}-1"
    options = {"platform": "tpu", "chips_per_host_bounds": [1, 1, 1]}
    devices = topologies.get_topology_desc(f"{chip}:1x1", **options).devices
    mesh = make_mesh(1, 1, 1, devices=devices)
    row = tpu_programs.Row(MODEL, HEIGHT, WIDTH, FRAMES, f"{chip}-8")
    config = tpu_programs.MODELS[MODEL]
    rules, model = registry.network(config).parameters, registry.abstract(config, jnp.bfloat16)
    wide = tpu_programs.abstract(mesh, config, jnp.bfloat16, False)
    if weights:
        model = small.in_8_bits(model, rules, weights)
    found, near = {}, 0
    for path, leaf in nnx.to_flat_state(nnx.state(wide)):
        struct, name = leaf.get_value(), ".".join(map(str, path))
        if where == "host" and rules.is_large(name):
            place = struct.sharding.with_memory_kind(small.HOST)
            struct = jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=place)
        for part, one in small.parts(name, struct, rules, weights).items():
            found[part] = one
            if one.sharding.memory_kind != small.HOST:
                near += one.size * one.dtype.itemsize
    made = registry.fill(model, found)
    with jax.set_mesh(mesh):
        return tpu_programs.loop(mesh, row, False, model=made), near


def measured(chip: str, way: str) -> dict:
    """The compiler's figures, or its refusal."""
    lowered, near = program(chip, way)
    try:
        compiled = lowered.compile()
    except Exception as error:  # of any kind that libtpu raises
        return {"weights": near, "refused": " ".join(str(error).split())[:400]}
    memory = compiled.memory_analysis()
    found = {
        "weights": near,
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
    }
    on_host = WAYS[way][1] == "host"
    return found | ({"copies": copies(compiled.as_text(), chip)} if on_host else {})


def copies(text: str, chip: str) -> dict:
    """What the loop over layers copies from the host's memory, and the work that it lies behind."""
    import hlo
    from tpu_kernels import CLOCKS

    module, far = hlo.Module(text), "S(5)"
    starts = {
        name: [i for i, one in enumerate(body) if one.op == "dynamic-slice-start"]
        for name, body in module.computations.items()
    }
    layer = max((name for name in starts if starts[name]), key=module.total)
    body, size, behind = module.computations[layer], 0, {}
    for start in starts[layer]:
        (done,) = (i for i, one in enumerate(body) if body[start].name in one.operands)
        size += body[done].nbytes
        behind[done] = sum(map(module.work, body[start:done])) / CLOCKS[chip]
    first, *others = (behind[done] for done in sorted(behind))
    stacks = sum(one.op == "copy-start" and far in one.shape for one in body)
    work = module.total(layer) / CLOCKS[chip]
    return {"bytes": size, "work": work, "first": first, "others": min(others), "stacks": stacks}


def copy_cells(chip: str, way: str, found: dict) -> str:
    """A row of the table of copies."""
    rate = found["bytes"] / found["work"] / 1e9
    seconds = [f"{1e3 * found[key]:.1f} ms" for key in ("first", "others")]
    numbers = [f"{found['bytes'] / 1e6:.0f} MB", f"{1e3 * found['work']:.0f} ms", f"{rate:.1f}"]
    return f"| {chip} | {way} | {' | '.join([*numbers, *seconds, str(found['stacks'])])} |"


def cells(chip: str, way: str, found: dict, encoder: float) -> str:
    """A row of the table."""
    limit = CHIPS[chip]
    if "refused" in found:
        over = re.search(r"HLO temporaries \(([0-9.]+)G\)", found["refused"])  # arguments too
        peak = f"{float(over[1]) * 2**30 / 1e9:.1f}" if over else "-"
        why = f"refused: over {limit / 1e9:g} GB" if over else found["refused"]
        return f"| {chip} | {way} | {found['weights'] / 1e9:.1f} | - | {peak} | - | {why} |"
    peak = found["arguments"] + found["temporaries"] + found["outputs"]
    both = peak + encoder
    verdict = f"compiled; with it {'fits' if both <= limit else 'does not fit'} {limit / 1e9:g} GB"
    numbers = (found["weights"], found["temporaries"], peak, both)
    return f"| {chip} | {way} | {' | '.join(f'{n / 1e9:.1f}' for n in numbers)} | {verdict} |"


def main() -> None:
    """Compiles what is missing, and writes the section."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="compile ways whose name contains this")
    parser.add_argument("--runs", type=pathlib.Path, default=ROOT / "runs" / "memory_tpu")
    parser.add_argument("--page", type=pathlib.Path, default=ROOT / "docs" / "tpu.md")
    args = parser.parse_args()
    import importlib.metadata

    import tpu_programs
    from tpu_costs import section

    from kvlock_jax.checkpoints import registry

    args.runs.mkdir(parents=True, exist_ok=True)
    encoder = 2 * sum(
        leaf.size for leaf in jax_leaves(registry.abstract(tpu_programs.TEXT_ENCODER))
    )
    rows, copied, limits = [], [], set()
    for chip in CHIPS:
        for way in WAYS:
            file = args.runs / named(f"{chip} {way}")
            if not file.exists() and args.only in way:
                print(f"{chip}, {way} ...", flush=True)
                file.write_text(json.dumps(measured(chip, way)))
            if file.exists():
                found = json.loads(file.read_text())
                rows.append(cells(chip, way, found, encoder))
                print(rows[-1])
                if "copies" in found:
                    copied.append(copy_cells(chip, way, found["copies"]))
                if over := re.search(r"available HBM \(([0-9.]+)G\)", str(found)):
                    limits.add(f"{over[1]} GiB on {chip}")
    head = "| chip | weights of the blocks | weights | temporaries | peak | with it | compiler |"
    table = "\n".join([head, "|---" * 7 + "|", *rows])
    size = f"{FRAMES} frames of {HEIGHT}x{WIDTH}"
    version = importlib.metadata.version("libtpu")
    about = {"title": SECTION, "model": MODEL, "size": size, "version": version}
    head = "| chip | weights of the blocks | copied | work | needs | first | others | stacks |"
    facts = {"copies": "\n".join([head, "|---" * 8 + "|", *copied]), "table": table}
    text = ABOUT.format(
        **about, encoder=encoder / 1e9, limits=" and ".join(sorted(limits)), **facts
    )
    if len(rows) == len(CHIPS) * len(WAYS):  # or the page would lose the others
        args.page.write_text(section(args.page.read_text(), SECTION, text))
    rows = []
    for name in EIGHT:
        file = args.runs / named(name)
        if not file.exists() and args.only in name:
            print(f"{name} ...", flush=True)
            file.write_text(json.dumps(on_eight(name)))
        if file.exists():
            rows.append(cells_of_eight(name, json.loads(file.read_text())))
            print(rows[-1])
    facts = {"title": SECTION_22, "slice": SLICE, "version": version, "table": "\n".join(rows)}
    if len(rows) == len(EIGHT):
        page = section(args.page.read_text(), SECTION_22, ABOUT_22.format(**facts))
        args.page.write_text(page)
    rows, first = [], None
    for name in LONG:
        file = args.runs / named(name)
        if not file.exists() and args.only in name:
            print(f"{name} ...", flush=True)
            file.write_text(json.dumps(long_clip(name)))
        if file.exists():
            found = json.loads(file.read_text())
            rest = found["temporaries"] - found["state"]
            first = first or rest
            keys = ("arguments", "temporaries", "state")
            numbers = [f"{n / 1e6:.0f}" for n in (*(found[key] for key in keys), rest)]
            rows.append(f"| {name} | {' | '.join(numbers)} | {rest / first:.2f} |")
            print(rows[-1])
    facts = {"title": SECTION_LONG, "slice": SLICE, "version": version, "table": "\n".join(rows)}
    page = section(args.page.read_text(), SECTION_LONG, ABOUT_LONG.format(**facts))
    args.page.write_text(page)


def named(what: str) -> str:
    """The name of a figure's file."""
    return re.sub(r"[^a-z0-9]+", "_", what.lower()) + ".json"


def jax_leaves(model) -> list:
    """The shapes of a model's parameters."""
    import jax
    from flax import nnx

    return jax.tree.leaves(nnx.state(model))


if __name__ == "__main__":
    main()
