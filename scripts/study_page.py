"""Writes docs/evidence.md and its plots from the rows of `study.py`; every figure is of a CSV.

python scripts/study_page.py
"""

import argparse
import pathlib

import matplotlib
from study import FOLDER
from study_cases import REGIMES
from study_tables import (
    AGAINST,
    Table,
    adapting,
    best_detectors,
    detectors,
    differences,
    levels,
    overview,
    read,
    scale,
    spread,
    values,
    verdicts,
)

matplotlib.use("agg")
from matplotlib import pyplot

OURS = "eased"
"""The arm that the overview compares with the baselines."""


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


def section(name: str, table: Table) -> list[str]:
    """The part of the page about one regime."""
    regime = REGIMES[name]
    counts = sorted({len(columns["edit"]) for columns in table.values()})
    count = " to ".join(dict.fromkeys(map(str, (counts[0], counts[-1]))))
    lines = [f"## {name}: {regime.about}", ""]
    lines += [f"{regime.steps} steps, guidance {regime.guidance:g}, {count} edits of each arm.", ""]
    lines += [*values(table), "", "Paired differences, with intervals of 95%:", ""]
    lines += [*differences(table), "", "AUROC of signals for failed edits:", ""]
    return lines + detectors(table)


def main() -> None:
    """Writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=pathlib.Path, default=FOLDER)
    parser.add_argument("--page", type=pathlib.Path, default=FOLDER.parent / "evidence.md")
    args = parser.parse_args()
    paths = {name: args.folder / f"{name}.csv" for name in REGIMES}
    tables = {name: read(path, REGIMES[name]) for name, path in paths.items() if path.exists()}
    introduction = (args.folder / "intro.md").read_text(encoding="utf-8").rstrip()
    lines = [introduction, "", "![Foreground against background](evidence/pareto.png)"]
    lines += ["", f"## {OURS} against the baselines", "", "Odd edits alone.", ""]
    lines += [*overview(tables, OURS), "", *verdicts(tables, OURS)]
    lines += ["", "## Adapting, or the level?", "", *adapting(tables)]
    lines += ["", "## Against the best guidance without a statistic", "", *levels(tables)]
    lines += ["", "## Which signal tells failed edits?", "", *best_detectors(tables)]
    extra = {"scale": "How sigma2 scales", "spread": "Seeds that disagree"}
    for name, head in extra.items():
        if (path := args.folder / f"{name}.csv").exists():
            found = scale(path) if name == "scale" else spread(path, tables)
            lines += ["", f"## {head}", "", *found]
    for name, table in tables.items():
        lines += ["", *section(name, table)]
    pareto(tables, args.folder / "pareto.png")
    args.page.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
