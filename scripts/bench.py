"""Measures speed and memory beside the peers, as ratios of one run, and writes docs/benchmarks.md.

    python scripts/bench.py [--only block] [--rounds 5] [--page docs/benchmarks.md]

Every row (`bench_rows.py`) runs two programs in turn, round by round, on this machine's CPU in
float32 and two threads: its clock drifts, the ratio of a round does not. A row reports the median
of the rounds' ratios, and their spread. Memory is the peak of a process that makes and runs one of
the two once. `--runs` keeps every measurement; the page's section of this machine is written from
all of them, and the sections of other machines stay as they are.
"""

import argparse
import functools
import importlib.metadata
import json
import pathlib
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import bench_parts
from bench_rows import GRIDS, ROWS, STEPS, THREADS, Row, Run

from kvlock_jax.grid import Grid
from kvlock_jax.sampling.edits import bucket

ROOT = pathlib.Path(__file__).parents[1]
SIDES = ("ours", "peer")


def measure(row: Row, rounds: int) -> dict:
    """Runs both sides in turn; returns medians in seconds and the ratio of each round."""
    both = [row.ours(), row.peer()]
    for run in both:
        run()
    seconds = [[timed(run) for run in both] for _ in range(rounds)]
    ratios = sorted(row.scale * (b / a if row.least else a / b) for a, b in seconds)
    found = {"seconds": [statistics.median(column) for column in zip(*seconds, strict=True)]}
    return found | {"ratio": statistics.median(ratios), "ratios": ratios}


def timed(run: Run) -> float:
    """The seconds that one run takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def peak(row: Row, side: str) -> int:
    """Peak resident size of a process that builds one side of a row and runs it once."""
    argv = [sys.executable, __file__, "--alone", row.name, side]
    facts = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True).stdout
    return int(facts.split()[-1])


def alone(name: str, side: str) -> None:
    """The process that `peak` starts."""
    (row,) = (row for row in ROWS if row.name == name)
    {"ours": row.ours, "peer": row.peer}[side]()()
    # not `ru_maxrss`, which starts from the parent's
    status = pathlib.Path("/proc/self/status").read_text()
    print(int(re.search(r"VmHWM:\s*(\d+)", status)[1]) * 1024)


# --- the page -----------------------------------------------------------------------------------

HEAD = """# Benchmarks

Written by `python scripts/bench.py`; do not edit. Each section names its machine and the commits
that were measured. Everything is float32 on a CPU, with {threads} threads on both sides; weights
are random except the demo model's; a loop has {steps} steps, or as many as its
row says.

Ratios compare two programs that ran in turn: `median (least to most)` over the given number of
rounds. Seconds are medians. They drift from row to row with the machine's clock, so read them as
the size of a case, no more. The lock is measured at 1.3B's width with two blocks, and VACE's with
one context block. Both loops run the whole source pass; in a model of 30 blocks the last block of
that pass costs almost nothing. A block's weights are read once for the source's rows and once for
the edit's, which weighs more with fewer tokens. Tokens to edit are rounded up to a sixty-fourth of
the video: a fifth becomes {share:.0%}, and counting rows of tokens alone predicts {floor:.2f}.

Memory is the peak resident size, in GB, of a process that builds one of the two programs and runs
it once.

"Where the time goes" divides operations counted by hand (`kvlock_jax/estimate/costs.py`) by
measured seconds, part by part, each part compiled by itself. `rate` is in billions of operations a
second; the last column is its share of the fastest bare product that the machine showed.
Convolutions are those of the VAE's decoder, with the features they return (frames, rows, columns,
channels). Their rates count the products of an unfiltered convolution, so ours may exceed what the
machine multiplies.
"""

SECTION = """
## {machine}

{versions}; {commits}.

### Beside the peers

{peers}
"""

MEMORY = """
### Memory

{memory}
"""

PARTS = """
### Where the time goes

The fastest bare product: {best}.

{parts}

{convolutions}
"""


def page(found: dict, before: str) -> str:
    """The page: this machine's section, and the sections of other machines from the old page."""
    share = bucket(round(0.2 * 1950), grid := Grid.of(GRIDS[1950])) / grid.length
    floor = (1 + 2 * share) / 2  # a source, and two branches, over two
    head = HEAD.format(threads=THREADS, steps=STEPS, share=share, floor=floor)
    sections = {machine(): section(found)}
    for kept in re.split(r"(?=\n## )", before)[1:]:
        sections.setdefault(kept.splitlines()[1].removeprefix("## "), kept)
    return head + "".join(sections[name] for name in sorted(sections))


def section(found: dict) -> str:
    """The section of this machine."""
    peers, memory = [], []
    for row in (row for row in ROWS if row.name in found):
        facts = found[row.name]
        ratio, low, high = facts["ratio"], facts["ratios"][0], facts["ratios"][-1]
        met = row.bar is None or (ratio >= row.bar if row.least else ratio <= row.bar)
        bar = "-" if row.bar is None else f"{'>=' if row.least else '<='} {row.bar}"
        verdict = "-" if row.bar is None else ("yes" if met else "**no**")
        ours, peer = (f"{s:.3g}" for s in facts["seconds"])
        spread = f"{ratio:.2f} ({low:.2f} to {high:.2f})"
        peers.append(
            [row.name, spread, bar, verdict, f"{len(facts['ratios'])}", f"{ours} / {peer}"]
        )
    for row in (row for row in ROWS if f"memory, {row.name}" in found):
        mine, theirs = found[f"memory, {row.name}"]["bytes"]
        verdict = "yes" if mine <= row.memory * theirs else "**no**"
        sizes = f"{mine / 1e9:.2f} / {theirs / 1e9:.2f}"
        memory.append([row.name, f"{mine / theirs:.2f}", f"<= {row.memory}", verdict, sizes])
    names = ("jax", "jaxlib", "torch", "diffusers")
    text = SECTION.format(
        machine=machine(),
        versions=", ".join(f"{name} {importlib.metadata.version(name)}" for name in names),
        commits=", ".join(sorted({facts["commit"] for facts in found.values()})),
        peers=table("what | ratio | bar | met | rounds | seconds", peers),
    )
    if memory:
        text += MEMORY.format(memory=table("what | ratio | bar | met | ours / peer", memory))
    if parts := found.get("parts"):
        shapes = "frames, rows, columns, channels"
        text += PARTS.format(
            best=f"{parts['best']:.0f}",
            parts=table("part | seconds | share | rate | of the best", parts["block"]),
            convolutions=table(f"{shapes} | ours | PyTorch", parts["convolutions"]),
        )
    return text


def commit() -> str:
    """The commit of the measured sources; a plus sign marks uncommitted changes."""
    git = ["git", "-C", str(ROOT)]
    name = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], text=True).strip()
    changed = subprocess.check_output([*git, "status", "--porcelain", "kvlock_jax", "scripts"])
    return name + "+" * bool(changed)


def machine() -> str:
    """The processor's name, cores and instruction set."""
    facts = pathlib.Path("/proc/cpuinfo").read_text()
    model = re.search(r"model name\s*: (.*)", facts)
    kinds = {"amx_tile": "AMX", "avx512f": "AVX-512", "avx2": "AVX2"}
    vectors = (kind for flag, kind in kinds.items() if re.search(rf"\b{flag}\b", facts))
    cores = len(re.findall(r"^processor", facts, re.MULTILINE))
    size = int(re.search(r"MemTotal:\s*(\d+)", pathlib.Path("/proc/meminfo").read_text())[1])
    name = model[1] if model else "an unnamed CPU"
    return f"{name}, {cores} cores, {next(vectors, 'no AVX2')}, {size / 2**20:.0f} GiB"


def table(head: str, lines: list[list[str]]) -> str:
    """A Markdown table."""
    rule = "|" + "---|" * (head.count("|") + 1)
    return "\n".join([f"| {head} |", rule, *(f"| {' | '.join(line)} |" for line in lines)])


def main() -> None:
    """Measures the rows, prints them and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="rows with such a name (a regex); or 'parts'")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--runs", type=pathlib.Path, default=ROOT / "runs" / "bench.json")
    parser.add_argument("--page", type=pathlib.Path, default=ROOT / "docs" / "benchmarks.md")
    parser.add_argument("--alone", nargs=2, metavar=("ROW", "SIDE"), help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.alone:
        alone(*flags.alone)
        return
    flags.runs.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(flags.runs.read_text()) if flags.runs.exists() else {}
    todo: dict[str, Callable[[], dict]] = {
        row.name: lambda row=row: measure(row, flags.rounds) for row in ROWS
    }
    for row in (row for row in ROWS if row.memory is not None):
        sizes = functools.partial(peak, row)
        todo[f"memory, {row.name}"] = lambda s=sizes: {"bytes": [s(side) for side in SIDES]}
    todo["parts"] = lambda: bench_parts.measure(flags.rounds)
    for name, run in todo.items():
        if not re.search(flags.only, name):
            continue
        facts = found[name] = run() | {"commit": commit()}
        print(f"{name}: {json.dumps(facts)}", flush=True)
        flags.runs.write_text(json.dumps(found, indent=1))
    before = flags.page.read_text() if flags.page.exists() else ""
    flags.page.write_text(page(found, before))


if __name__ == "__main__":
    main()
