"""Compiles the real programs for TPUs without one, and writes its figures to docs/tpu.md.

    python scripts/tpu_report.py [--only v6e] [--runs runs/tpu] [--page docs/tpu.md]

`--runs` keeps the figures of each program (`tpu_programs.py`); a second run does the missing ones.
One process at a time: libtpu takes a lock.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import pathlib
import re

import jax
import tpu_programs
from tpu_programs import MODELS, PROGRAMS, STEPS, TOPOLOGIES, Row

from kvlock_jax.estimate import costs, roofline

ROOT = pathlib.Path(__file__).parents[1]


def rows() -> list[Row]:
    """The published sizes; 210 frames are 213 to the model."""
    sizes = ((480, 832, 81), (720, 1280, 81))
    found = [Row(m, *size, s) for s in TOPOLOGIES for size in sizes for m in MODELS]
    found += [Row(m, 480, 832, 213, s) for s in TOPOLOGIES for m in MODELS if "1.3B" in m]
    found += [Row(m, 480, 832, 81, "v6e-8", batch=4, mesh=(4, 2, 1)) for m in MODELS if "1.3B" in m]
    found += [Row(m, 720, 1280, 81, "v6e-8", gathered=True) for m in MODELS if "14B" in m]
    small = Row("T2V 1.3B", 480, 832, 81, "v6e-8")
    return [
        *found,
        dataclasses.replace(small, cache="carried"),
        dataclasses.replace(small, preset="cfg"),
    ]


def key(row: Row, program: str) -> str:
    """The name of a program's file; rows share programs that do not depend on the transformer."""
    same = {"model": "any", "gathered": False, "cache": "fused", "preset": ""}
    if program == "text":
        same |= {"height": 0, "width": 0, "frames": 0}
    shared = row if program == "loop" else dataclasses.replace(row, **same)
    return f"{program}_{shared.name}"


def compiled(row: Row, program: str, runs: pathlib.Path, only: str) -> dict | None:
    """The figures of a program; compiles it if it has none and its name contains `only`."""
    file = runs / f"{key(row, program)}.json"
    if not file.exists():
        if not re.search(only, file.stem):
            return None
        print(f"{file.stem} ...", flush=True)
        mesh = tpu_programs.mesh_of(row)
        with jax.set_mesh(mesh):
            facts = tpu_programs.measure(PROGRAMS[program](mesh, row))
        print(f"  {facts['seconds']:.0f} s, temporaries {gb(facts['temporaries'])} GB", flush=True)
        partial = file.with_suffix(".part")
        partial.write_text(json.dumps(facts))
        partial.replace(file)
    return json.loads(file.read_text())


PAGE = """# What the TPU's compiler says

Written by `python scripts/tpu_report.py`; do not edit. JAX {jax}, libtpu {libtpu}, no TPU: libtpu
compiles each program ahead of time from abstract weights of the published sizes, and the tables
give the compiler's own memory analysis, per chip. Loops have {steps} steps with the lock, preset
`kvlock` on VACE and `kvlock_anchor` on text-to-video, and compute every token in every step.

`weights` are the transformer's, in bfloat16; a `*` marks weights that are spread over the chips and
gathered layer by layer. `cache` holds the source's keys and values and is a part of the
temporaries: those of one block, or of all blocks where the cache is carried. `other` are the
weights that stay in memory meanwhile: the text encoder's, spread over all chips, and the VAE's.
`peak` is the largest of the programs with all weights in memory. Where the loop does not fit, the
compiler reports its temporaries and returns no program. A program that was not compiled has no
row. Gigabytes are decimal, as chips are sold.

## Memory

{memory}

## Memory of the lock

Temporaries of the loop per chip beside the same loop without a lock (`cfg`), {lock_case}: with one
pass for all branches, and with a cache of all blocks carried from step to step. The table above
includes both. `fused / carried` is the ratio of the memory that each adds.

{lock}

## The other programs

Temporaries of the text encoder over an edit's three texts and of the VAE's encoder and decoder, and
the seconds that each program took to compile, on two cores that had other work at times. `-` marks
a program that was not compiled.

{others}

## Collectives of the loop

The number of collectives in the compiled loop and the bytes of their results, per chip. The loops
over steps and layers count once.

{collectives}

## Roofline on paper

Arithmetic, memory traffic and interconnect traffic of a step, from the model's dimensions, divided
by each chip's published peaks (`kvlock_jax/estimate/roofline.py` names them and their sources). No
step that computes every token can be faster. `kvlock info` uses the same functions.

{roofline}
"""


def page(found: list[tuple[Row, dict]]) -> str:
    """The report."""
    memory, others, kinds, bounds = [], [], [], []
    by_row = {row: programs["loop"]["temporaries"] for row, programs in found}
    for row, programs in found:
        mesh, chip, spread = (
            tpu_programs.mesh_of(row),
            tpu_programs.chip_of(row),
            tpu_programs.spreads(row),
        )
        about = [*described(row)]
        weights = tpu_programs.held(mesh, spread, MODELS[row.model])
        group = dataclasses.replace(row.workload, batch=row.batch // mesh.shape["data"])
        plan = costs.Layout.of(mesh.size // mesh.shape["data"], spread, group.tokens)
        loop = programs["loop"]
        # of each program, whose weights lie there without being its arguments
        idle = {
            name: sum(weights.values()) - weights[{"loop": "transformer"}.get(name, "vae")]
            for name in programs
        }
        idle["text"] = weights["transformer"] + weights["vae"]
        if loop["refused"]:
            idle["loop"] = sum(weights.values())
        totals = {
            name: facts["arguments"] + facts["outputs"] + facts["temporaries"] + idle[name]
            for name, facts in programs.items()
            if facts
        }
        worst = max(totals, key=totals.get)
        memory.append(
            [
                *about,
                gb(weights["transformer"]) + ("\\*" if spread else ""),
                gb(costs.cache_bytes(group, plan, tpu_programs.settings_of(row))),
                gb(loop["temporaries"]),
                gb(weights["text_encoder"] + weights["vae"]),
                f"{gb(totals[worst])} ({worst})",
                gb(chip.memory),
                "yes" if totals[worst] <= chip.memory and not loop["refused"] else "**no**",
            ]
        )
        rest = [programs[name] for name in ("text", "encode", "decode")]
        others.append(
            [
                *about,
                *(gb(facts["temporaries"]) if facts else "-" for facts in rest),
                *(f"{facts['seconds']:.0f}" if facts else "-" for facts in (loop, *rest)),
            ]
        )
        if loop["collectives"]:
            counted = loop["collectives"].items()
            facts = [f"{n} {kind}, {gb(size)}" for kind, (n, size) in counted]
            kinds.append([*about, "; ".join(facts)])
        run = (tpu_programs.settings_of(row), STEPS)
        bound = roofline.roofline(roofline.step(group, plan, *run), chip)
        many = roofline.interconnect_binds_from(group, *run, chip, shard_weights=spread)
        bounds.append(
            [
                *about,
                *(f"{seconds:.2f}" for seconds in dataclasses.astuple(bound)),
                f"{bound.seconds:.2f} ({bound.binds})",
                f"{bound.seconds * STEPS:.0f}",
                f"{many}" if many else "-",
            ]
        )
    what = "model | size | slice | mesh"
    about, added = lock_adds(by_row)
    return PAGE.format(
        jax=jax.__version__,
        libtpu=importlib.metadata.version("libtpu"),
        steps=STEPS,
        memory=table(
            f"{what} | weights | cache | temporaries | other | peak | chip | fits", memory
        ),
        lock_case=about,
        lock=table("loop | temporaries, GB | over plain, GB | fused / carried", added),
        others=table(
            f"{what} | text | encode | decode | loop, s | text, s | encode, s | decode, s", others
        ),
        collectives=table(f"{what} | collectives", kinds),
        roofline=table(
            f"{what} | compute, s | memory, s | interconnect, s | step, s | {STEPS} steps, s | "
            "interconnect binds from, chips",
            bounds,
        ),
    )


def lock_adds(temporaries: dict[Row, int]) -> tuple[str, list[list[str]]]:
    """The memory that the lock adds to the loop, where the plain loop was compiled too."""
    plain = next(row for row in temporaries if row.preset == "cfg")
    ways = [dataclasses.replace(plain, preset="", cache=way) for way in ("fused", "carried")]
    fused, carried = (temporaries[way] - temporaries[plain] for way in ways)
    lines = [["plain", gb(temporaries[plain]), "", ""]]
    lines.append(["fused", gb(temporaries[ways[0]]), gb(fused), f"{fused / carried:.2f}"])
    lines.append(["carried", gb(temporaries[ways[1]]), gb(carried), ""])
    model, size, slice_, _ = described(dataclasses.replace(plain, preset=""))
    return f"{model} at {size} on {slice_}", lines


def table(head: str, lines: list[list[str]]) -> str:
    """A Markdown table."""
    rule = "|" + "---|" * (head.count("|") + 1)
    return "\n".join([f"| {head} |", rule, *(f"| {' | '.join(line)} |" for line in lines)])


def described(row: Row) -> tuple[str, ...]:
    """The first columns of a row."""
    mesh = "data {}, frames {}, model {}".format(*row.mesh) if row.mesh else "all on frames"
    more = f", {row.batch} edits" if row.batch > 1 else ""
    more += ", gathered" if row.gathered else ""
    more += f", {row.preset}" if row.preset else ", carried" * (row.cache == "carried")
    return row.model + more, f"{row.height}x{row.width}x{row.frames}", row.slice, mesh


def gb(size: float) -> str:
    """A number of bytes in decimal gigabytes."""
    return f"{size / 1e9:.2f}"


def main() -> None:
    """Compiles the missing programs and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="compiles what has such a name (a regex)")
    parser.add_argument("--runs", type=pathlib.Path, default=ROOT / "runs" / "tpu")
    parser.add_argument("--page", type=pathlib.Path, default=ROOT / "docs" / "tpu.md")
    flags = parser.parse_args()
    flags.runs.mkdir(parents=True, exist_ok=True)
    found = []
    for row in rows():
        programs = {name: compiled(row, name, flags.runs, flags.only) for name in PROGRAMS}
        if programs["loop"]:
            found.append((row, programs))
    written = page(found)
    before = flags.page.read_text() if flags.page.exists() else ""
    # the sections of tpu_costs.py and tpu_peer.py
    others = [
        part for part in before.split("\n## ")[1:] if f"## {part.splitlines()[0]}" not in written
    ]
    flags.page.write_text(written + "".join(f"\n## {part.rstrip()}\n" for part in others))
    print(f"{len(found)} of {len(rows())} rows in {flags.page}")


if __name__ == "__main__":
    main()
