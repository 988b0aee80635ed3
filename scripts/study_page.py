"""Writes docs/evidence.md and its plots from the rows of `study.py`; every figure is of a CSV.

python scripts/study_page.py
"""

import argparse
import pathlib

import matplotlib
from study import FOLDER, TRUTH
from study_cases import REGIMES
from study_tables import (
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


NAMED = {
    "cfg": "#7f7f7f",
    "kv_only": "#8c6bb1",
    "kvlock": "#c0392b",
    "kvlock_anchor": "#e08e0b",
    "hard_lock": "#1f5fa8",
    OURS: "#1a8a4a",
}
"""Colours of the arms that the plot names; the others are small and grey."""


def pareto(tables: dict[str, Table], path: pathlib.Path) -> None:
    """Foreground against background, of each regime."""
    columns = 2
    rows = -(-len(tables) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(11, 3.4 * rows), squeeze=False)
    for axis in axes.flat[len(tables) :]:
        axis.axis("off")
    for axis, (name, table) in zip(axes.flat, tables.items(), strict=False):
        found = {
            arm: [columns[key].mean() for key in ("background_psnr", "nearest_psnr")]
            for arm, columns in table.items()
            if arm != TRUTH
        }
        others = [place for arm, place in found.items() if arm not in NAMED]
        if others:
            axis.plot(*zip(*others, strict=True), "o", color="#c9c9c9", markersize=4)
        for arm, colour in NAMED.items():
            if arm in found:
                axis.plot(*found[arm], "o", color=colour, markersize=8, label=arm)
        axis.set_title(f"{name}: {REGIMES[name].about}", fontsize=9)
        axis.set_xlabel("background PSNR, dB", fontsize=8)
        axis.set_ylabel("foreground PSNR, dB", fontsize=8)
        axis.margins(0.1)
        axis.grid(alpha=0.3)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.4 / figure.get_figheight()))
    lines, names = axes.flat[0].get_legend_handles_labels()
    figure.legend(lines, names, loc="upper center", ncols=len(NAMED), frameon=False)
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
    lines = [introduction, "", "![Foreground against background](evidence/pareto.png)", ""]
    lines += ["Means over edits, foreground to the nearest valid render; the other arms are grey."]
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
