"""Where a step's time goes on a TPU, by the TPU's compiler, without a TPU; writes docs/tpu.md.

    python scripts/tpu_costs.py [--only "T2V 1.3B"] [--runs runs/costs] [--page docs/tpu.md]
    python scripts/tpu_costs.py --show "T2V 1.3B, 480x832x81, v6e-8, full"

libtpu compiles the sampling loop with one kind of pass; its optimised program carries
`estimated_cycles` on every fusion, product and copy. Pallas kernels have none: their time is that
of their inner block's instruction bundles, which libtpu dumps, without stalls, or that of their
bytes at the memory's rate where it is longer. `--show` lists a step's lines of code and its dearest
instructions. Programs and figures stay in `--runs`; a second run does the missing ones. `--only`
compiles some, and the page keeps its rows of the others. One process at a time, for libtpu's lock.
"""

import argparse
import collections
import dataclasses
import gzip
import json
import pathlib
import re
import tempfile

import hlo
from tpu_kernels import CLOCKS, bundles, kernel_cycles

ROOT = pathlib.Path(__file__).parents[1]
STEPS = 50
LINKS = {"v5e": 4, "v6e": 4, "v5p": 6}
"""Links of a chip, which share its published rate; a block of a ring takes one."""

KINDS = ("products", "elementwise", "reductions", "copies", "kernels")
FOREGROUND = 0.2


@dataclasses.dataclass(frozen=True)
class Case:
    """A step: model, size in pixels and frames, slice, and kind of pass."""

    model: str
    height: int
    width: int
    slice: str
    kind: str
    frames: int = 81

    @property
    def name(self) -> str:
        """Its row in the table."""
        size = f"{self.height}x{self.width}x{self.frames}"
        return f"{self.model}, {size}, {self.slice}, {self.kind}"

    @property
    def file(self) -> str:
        """The name of its files."""
        return re.sub(r"[^a-z0-9.]+", "_", self.name.lower())

    @property
    def chip(self) -> str:
        """The kind of its chips."""
        return self.slice.split("-")[0]


def cases() -> list[Case]:
    """Every step of the table."""
    return [
        Case(f"{family} {size}", *video, chips, kind)
        for size in ("1.3B", "14B")
        for family in ("T2V", "VACE")
        for video in ((480, 832), (720, 1280))
        for chips in ("v6e-8", "v5e-8")
        for kind in ("plain", "full", "foreground")
    ]


def compiled(case: Case, runs: pathlib.Path) -> tuple[str, dict]:
    """The program's text and facts; compiles it where `runs` does not have it."""
    text, facts = runs / f"{case.file}.txt.gz", runs / f"{case.file}.json"
    if not facts.exists():
        import jax
        import tpu_programs

        print(f"{case.name} ...", flush=True)
        row = tpu_programs.Row(case.model, case.height, case.width, case.frames, case.slice)
        mesh = tpu_programs.mesh_of(row)
        with jax.set_mesh(mesh):
            lowered = tpu_programs.loop(mesh, row, tpu_programs.spreads(row), case.kind, FOREGROUND)
            with tempfile.TemporaryDirectory() as folder:
                # dumped, since jaxlib cannot read all that a newer libtpu writes
                dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
                program = lowered.compile(compiler_options=dump)
                (dumped,) = pathlib.Path(folder).glob("*.after_codegen.txt")
                with gzip.open(text, "wt") as file:
                    file.write(dumped.read_text())
        size = program.memory_analysis().temp_size_in_bytes
        facts.write_text(json.dumps({"temporaries": size}))
    with gzip.open(text, "rt") as file:
        return file.read(), json.loads(facts.read_text())


# -- a step --------------------------------------------------------------------------------------


@dataclasses.dataclass
class Step:
    """Seconds of a step on each chip, by what takes them.

    Attributes:
      kinds: seconds of each of `KINDS`; of kernels, all but attention.
      attention: seconds of attention.
      lines: seconds by kind and line of code.
      uses: the dearest instructions: seconds, executions in a step, kind, instruction.
      sent: bytes of collectives in a step.
      hidden: the same of those that attention or products run beside.
      exposed: seconds of collectives at the rate of a link that no work beside them covers.
      flops: operations of matrix products, without attention's.
      unknown: operations without an estimate, and how often a step executes them.
      loops: loops whose trips the program does not tell.
    """

    kinds: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    attention: float = 0.0
    lines: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    uses: list = dataclasses.field(default_factory=list)
    sent: float = 0.0
    hidden: float = 0.0
    exposed: float = 0.0
    flops: float = 0.0
    unknown: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    loops: list[str] = dataclasses.field(default_factory=list)


def step(text: str, case: Case, runs: pathlib.Path) -> Step:
    """Adds up a step of a program whose loop over steps runs `STEPS` times."""
    from kvlock_jax.estimate import roofline

    module, clock = hlo.Module(text), CLOCKS[case.chip]
    link = roofline.CHIPS[case.chip].interconnect / LINKS[case.chip]
    uses = [use for use in module.uses() if use.loops and use.loops[0] == STEPS]
    found = Step(loops=module.unknown)
    shapes = {
        name: {one.name: one.shape for one in inside}
        for name, inside in module.computations.items()
    }
    seconds: dict[tuple[str, str], float] = {}
    for use in uses:
        one, kind = use.instruction, module.kind(use.instruction)
        cycles = one.cycles
        if kind == "kernel":
            name, cycles = kernel_cycles(use, shapes[use.computation], case.chip, runs)
            kind = "attention" if name == "flash_attention" else "kernels"
        if kind in ("free", "collective", "prefetch"):
            continue
        if cycles is None:
            found.unknown[one.op] += use.times / STEPS
            continue
        once = cycles / clock
        spent = once * use.times / STEPS
        seconds[use.computation, one.name] = once
        if kind == "attention":
            found.attention += spent
        else:
            found.kinds[kind] += spent
        found.flops += (module.flops(one) if kind == "products" else 0) * use.times / STEPS
        line = module.line(one, str(ROOT))
        found.lines[kind, line] += spent
        found.uses.append((spent, use.times / STEPS, kind, one, line))
    for use in uses:
        if module.kind(use.instruction) == "collective" and "done" not in use.instruction.op:
            sent = use.instruction.sent
            beside = _beside(module, use, seconds)
            found.sent += sent * use.times / STEPS
            found.hidden += sent * use.times / STEPS * (beside > 0)
            found.exposed += max(0.0, sent / link - beside) * use.times / STEPS
    return found


def _beside(module: hlo.Module, use: hlo.Use, seconds: dict[tuple[str, str], float]) -> float:
    """Seconds of the work between the start of a collective and its end; 0 where it waits."""
    inside = module.computations[use.computation]
    place = {one.name: number for number, one in enumerate(inside)}
    start = place[use.instruction.name]
    for end in range(start + 1, len(inside)):
        if use.instruction.name in inside[end].operands and inside[end].op.endswith("done"):
            between = inside[start + 1 : end]
            return sum(seconds.get((use.computation, one.name), 0.0) for one in between)
    return 0.0


# -- what is written -----------------------------------------------------------------------------

SECTION = "## A step on a TPU"
ABOUT = """{title}

Written by `python scripts/tpu_costs.py`. Milliseconds of one step per chip, of the loop compiled
with one kind of pass: `plain` without a source, `full` over all tokens, `foreground` over
{share:.0%} of them. They are the compiler's `estimated_cycles` times the executions, at {clocks}.
`products` are matrix products without attention; `at peak` is what their operations would take at
the published rate. `kernels` are the norms, and like `attention` Pallas: the instruction bundles of
their inner block as libtpu schedules it, without stalls, times the blocks, or their bytes at the
memory's rate where that is longer. `sum` has all but attention. `ring` is the share of the bytes
between chips that start before and end after other work, and `exposed` what is left of them at the
rate of one link. Copies that the compiler starts ahead of their use have no estimate, nor have
{unknown}. `roofline` is the bound of `kvlock info` for the same pass.

Attention's block of 1024 queries by 1024 keys has {bundles} bundles. The product of queries with
keys sums over a head's 128 numbers, of which v6e's units of 256 take 128 at once; that of weights
with values sums over keys and fills them.

{table}
"""


def table(found: list[tuple[Case, dict, Step]], page: str) -> str:
    """The table of steps: those found, and of the others the rows that a page has."""
    head = [*KINDS, "at peak", "sum", "attention", "ring", "exposed", "step", "roofline", "ratio"]
    lines = [
        "| step | temporaries, GB | " + " | ".join(head) + " |",
        "|---" * (len(head) + 2) + "|",
    ]
    rows = {line.split(" | ")[0]: line for line in page.splitlines()}
    for case, facts, spent in found:
        total = sum(spent.kinds.values())
        whole, bound = total + spent.attention + spent.exposed, roofline_of(case)
        cells = [f"{spent.kinds[kind] * 1e3:.1f}" for kind in KINDS]
        cells += [f"{spent.flops / rate(case) * 1e3:.1f}", f"{total * 1e3:.1f}"]
        hidden = spent.hidden / spent.sent if spent.sent else 1.0
        cells += [f"{spent.attention * 1e3:.0f}", f"{hidden:.2f}", f"{spent.exposed * 1e3:.0f}"]
        cells += [f"{whole * 1e3:.0f}", f"{bound * 1e3:.0f}", f"{whole / bound:.2f}"]
        row = f"| {case.name} | {facts['temporaries'] / 1e9:.2f} | {' | '.join(cells)} |"
        rows[f"| {case.name}"] = row
    known = [rows.get(f"| {case.name}") for case in cases()]
    return "\n".join(lines + [row for row in known if row])


def rate(case: Case) -> float:
    """Operations a second of a case's chips."""
    from kvlock_jax.estimate import roofline

    return roofline.CHIPS[case.chip].flops


def roofline_of(case: Case) -> float:
    """Seconds of the bound of a case's pass."""
    import tpu_programs

    from kvlock_jax.estimate import costs, roofline

    row = tpu_programs.Row(case.model, case.height, case.width, case.frames, case.slice)
    layout = costs.Layout.of(8, tpu_programs.spreads(row), row.workload.tokens)
    share, source = FOREGROUND if case.kind == "foreground" else 1.0, case.kind != "plain"
    cost = roofline.step_cost(row.workload, layout, source, source, computed=share)
    return roofline.roofline(cost, tpu_programs.chip_of(row)).seconds


def show(spent: Step, most: int = 40) -> None:
    """Prints a step's lines of code, and its dearest instructions."""
    for (kind, line), taken in spent.lines.most_common(most):
        print(f"{taken * 1e3:8.2f} ms  {kind:12} {line}")
    print()
    for taken, times, kind, one, line in sorted(spent.uses, key=lambda use: -use[0])[:most]:
        print(f"{taken * 1e3:8.2f} ms  {times:5.0f} x {kind:12} {one.name} {one.shape[:80]} {line}")
    print(f"\nwithout an estimate: {dict(spent.unknown)}; loops of unknown trips: {spent.loops}")


def section(page: str, title: str, text: str) -> str:
    """A page with a section of this title replaced, or added at its end."""
    start = page.find(f"{title}\n")
    if start < 0:
        return f"{page.rstrip()}\n\n{text.rstrip()}\n"
    end = page.find("\n## ", start + 1)
    rest = page[end + 1 :] if end >= 0 else ""
    return f"{page[:start]}{text.rstrip()}\n" + (f"\n{rest}" if rest else "")


def main() -> None:
    """Compiles what is missing, and writes the section."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="compile steps whose name contains this")
    parser.add_argument("--show", metavar="STEP", help="print where one step's time goes")
    parser.add_argument("--runs", type=pathlib.Path, default=ROOT / "runs" / "costs")
    parser.add_argument("--page", type=pathlib.Path, default=ROOT / "docs" / "tpu.md")
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    found = []
    for case in cases():
        wanted = case.name == args.show if args.show else args.only in case.name
        if wanted or (not args.show and (args.runs / f"{case.file}.json").exists()):
            text, facts = compiled(case, args.runs)
            found.append((case, facts, step(text, case, args.runs)))
    if args.show:
        return show(found[0][2])
    unknown = sorted({op for _, _, spent in found for op in spent.unknown})
    blocks = [
        f"{bundles('flash_attention', chip, (1024, 1024), args.runs):,} on {chip}"
        for chip in ("v6e", "v5e")
    ]
    clocks = " and ".join(f"{CLOCKS[chip] / 1e9:g} GHz on {chip}" for chip in ("v6e", "v5e"))
    text = ABOUT.format(
        title=SECTION,
        share=FOREGROUND,
        clocks=clocks,
        unknown=", ".join(unknown),
        bundles=" and ".join(blocks),
        table=table(found, args.page.read_text()),
    )
    args.page.write_text(section(args.page.read_text(), SECTION, text))


if __name__ == "__main__":
    main()
