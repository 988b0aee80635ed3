"""Writes docs/evidence.md and its plots from the rows of `study.py`; every figure is of a CSV.

python scripts/study_page.py
"""

import argparse
import csv
import pathlib

import matplotlib
import numpy as np
from study import ARMS, FOLDER, SIGNALS, name_of
from study_cases import REGIMES
from study_measures import auroc_interval, interval

matplotlib.use("agg")
from matplotlib import pyplot

DOCS = FOLDER.parent
SHOWN = ("right", "truth_psnr", "nearest_psnr", "flicker", "background_psnr", "ring_error", "omega")
HEADS = ("right", "truth", "nearest", "flicker", "background", "ring", "omega")
AGAINST = ("cfg", "hard_lock", "kvlock")
COMPARED = ("right", "nearest_psnr", "background_psnr")

Table = dict[str, dict[str, np.ndarray]]
"""Columns by name, of each arm, in the order of edits."""


def read(path: pathlib.Path) -> Table:
    """The rows of a regime."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    arms = [name for name in map(name_of, ARMS) if any(row["arm"] == name for row in rows)]
    table = {}
    for arm in arms:
        own = sorted((row for row in rows if row["arm"] == arm), key=lambda row: int(row["edit"]))
        names = [name for name in own[0] if name != "arm"]
        table[arm] = {name: np.array([float(row[name]) for row in own]) for name in names}
    return table


def cell(mean: float, low: float, high: float, digits: int = 2) -> str:
    """A mean with its interval."""
    return f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def values(table: Table) -> list[str]:
    """A table of means by arm."""
    lines = ["| arm | " + " | ".join(HEADS) + " |", "|---" * (len(HEADS) + 1) + "|"]
    for arm, columns in table.items():
        cells = [f"{100 * columns['right'].mean():.0f}%"]
        cells += [f"{np.nanmean(columns[name]):.2f}" for name in SHOWN[1:]]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return lines


def paired(table: Table, arm: str, other: str, name: str) -> tuple[float, float, float]:
    """The difference of an arm to another one over the edits that both have."""
    one, two = table[arm], table[other]
    _, first, second = np.intersect1d(one["edit"], two["edit"], return_indices=True)
    return interval(one[name][first] - two[name][second])


def differences(table: Table) -> list[str]:
    """A table of paired differences to the baselines, with intervals."""
    heads = [f"{name.split('_')[0]} - {other}" for other in AGAINST for name in COMPARED]
    lines = ["| arm | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for arm in table:
        cells = []
        for other in AGAINST:
            for name in COMPARED:
                scale = 100 if name == "right" else 1
                found = [scale * x for x in paired(table, arm, other, name)]
                cells.append("" if arm == other else cell(*found, digits=0 if scale > 1 else 2))
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return lines


def detectors(table: Table) -> list[str]:
    """How well signals tell wrong edits from right ones, for arms in which both occur."""
    lines = ["| arm | wrong | " + " | ".join(SIGNALS) + " |", "|---" * (len(SIGNALS) + 2) + "|"]
    for arm, columns in table.items():
        wrong = columns["right"] < 0.5
        if 0.05 < wrong.mean() < 0.95:
            found = [cell(*auroc_interval(columns[name], wrong)) for name in SIGNALS]
            lines.append(f"| {arm} | {100 * wrong.mean():.0f}% | " + " | ".join(found) + " |")
    return lines if len(lines) > 2 else ["No arm is wrong in 5 to 95% of these edits."]


def pareto(tables: dict[str, Table], path: pathlib.Path) -> None:
    """Foreground against background, of each regime."""
    columns = 2
    rows = -(-len(tables) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(11, 4 * rows), squeeze=False)
    for axis in axes.flat[len(tables) :]:
        axis.axis("off")
    for axis, (name, table) in zip(axes.flat, tables.items(), strict=False):
        for arm, found in table.items():
            x, y = found["background_psnr"].mean(), found["nearest_psnr"].mean()
            axis.plot(x, y, "o", color="#c0392b" if arm in AGAINST else "#1f5fa8", markersize=4)
            axis.annotate(arm, (x, y), fontsize=7, xytext=(3, 2), textcoords="offset points")
        axis.set_title(f"{name}: {REGIMES[name].about}", fontsize=9)
        axis.set_xlabel("background PSNR, dB", fontsize=8)
        axis.set_ylabel("foreground PSNR to the nearest render, dB", fontsize=8)
        axis.margins(0.15)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=pathlib.Path, default=FOLDER)
    args = parser.parse_args()
    paths = {name: args.folder / f"{name}.csv" for name in REGIMES}
    tables = {name: read(path) for name, path in paths.items() if path.exists()}
    introduction = (args.folder / "intro.md").read_text(encoding="utf-8").rstrip()
    lines = [introduction, "", "![Foreground against background](evidence/pareto.png)"]
    for name, table in tables.items():
        regime = REGIMES[name]
        counts = sorted({len(columns["edit"]) for columns in table.values()})
        count = " to ".join(dict.fromkeys(map(str, (counts[0], counts[-1]))))
        lines += ["", f"## {name}: {regime.about}", ""]
        lines += [f"Guidance {regime.guidance:g}, {count} edits in each arm.", ""]
        lines += [*values(table), "", "Paired differences, with intervals of 95%:", ""]
        lines += [*differences(table), "", "AUROC of signals for wrong edits:", ""]
        lines += detectors(table)
    pareto(tables, args.folder / "pareto.png")
    (DOCS / "evidence.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
