"""The tables of docs/evidence.md, from the rows of `study.py` and `study_scale.py`."""

import csv
import pathlib
from collections.abc import Iterator

import numpy as np
from study import ARMS, SIGNALS, name_of
from study_measures import auroc_interval, interval

SHOWN = ("right", "truth_psnr", "nearest_psnr", "flicker", "background_psnr", "ring_error", "omega")
HEADS = ("right", "truth", "nearest", "flicker", "background", "ring", "omega")
AGAINST = ("cfg", "hard_lock", "kvlock")
COMPARED = ("right", "nearest_psnr", "background_psnr")
LEVELS = ("cfg", "cfg_half", "hard_lock", "hard_lock_half", "late_half", "late_one")
"""Arms whose guidance follows no statistic: the best of them is what a schedule must beat."""

PAIRS = (
    ("kvlock", "kvlock_other"),
    ("kvlock", "kvlock_mean"),
    ("kvlock", "kvlock_level"),
    ("late_direct", "late_half"),
    ("late_inverse", "late_half"),
)
"""Arms that adapt to an edit's own statistic, and controls that do not."""

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


def half(table: Table, odd: bool) -> Table:
    """The edits that settings are chosen by, or the odd ones, for reporting."""
    found = {}
    for arm, columns in table.items():
        keep = columns["edit"] % 2 == odd
        found[arm] = {name: column[keep] for name, column in columns.items()}
    return found


def paired(table: Table, arm: str, other: str, name: str) -> tuple[float, float, float]:
    """The difference of an arm to another one over the edits that both have."""
    one, two = table[arm], table[other]
    _, first, second = np.intersect1d(one["edit"], two["edit"], return_indices=True)
    return interval(one[name][first] - two[name][second])


def difference(table: Table, arm: str, other: str, name: str) -> str:
    """A paired difference with its interval; nothing where one of the arms was not run."""
    if arm not in table or other not in table:
        return ""
    scale = 100 if name == "right" else 1
    found = [scale * x for x in paired(table, arm, other, name)]
    return cell(*found, digits=0 if scale > 1 else 2)


def differences(table: Table) -> list[str]:
    """A table of paired differences to the baselines, with intervals."""
    heads = [f"{name.split('_')[0]} - {other}" for other in AGAINST for name in COMPARED]
    lines = ["| arm | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for arm in table:
        cells = []
        for other in AGAINST:
            for name in COMPARED:
                cells.append("" if arm == other else difference(table, arm, other, name))
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return lines


def detectors(table: Table) -> list[str]:
    """How well signals tell wrong edits from right ones, for arms in which both occur."""
    lines = ["| arm | wrong | " + " | ".join(SIGNALS) + " |", "|---" * (len(SIGNALS) + 2) + "|"]
    for arm, columns in table.items():
        wrong = columns["right"] < 0.5
        if 0.05 < wrong.mean() < 0.95:
            known = [np.isfinite(columns[name]).any() for name in SIGNALS]
            found = [
                cell(*auroc_interval(columns[name], wrong)) if is_known else ""
                for name, is_known in zip(SIGNALS, known, strict=True)
            ]
            lines.append(f"| {arm} | {100 * wrong.mean():.0f}% | " + " | ".join(found) + " |")
    return lines if len(lines) > 2 else ["No arm is wrong in 5 to 95% of these edits."]


def overview(tables: dict[str, Table], arm: str) -> list[str]:
    """An arm against the baselines in every regime, on the odd edits."""
    heads = [f"{name.split('_')[0]} - {other}" for other in AGAINST for name in COMPARED]
    lines = ["| regime | right | " + " | ".join(heads) + " |", "|---" * (len(heads) + 2) + "|"]
    for regime, table in tables.items():
        odd = half(table, odd=True)
        if arm not in odd:
            continue
        cells = [f"{100 * odd[arm]['right'].mean():.0f}%"]
        cells += [difference(odd, arm, other, name) for other in AGAINST for name in COMPARED]
        lines.append(f"| {regime} | " + " | ".join(cells) + " |")
    return lines


def adapting(tables: dict[str, Table]) -> list[str]:
    """Arms that adapt to an edit's own statistic less their controls, in every regime."""
    heads = [f"{one} - {two}" for one, two in PAIRS]
    lines = ["| regime | measure | " + " | ".join(heads) + " |", "|---" * (len(heads) + 2) + "|"]
    for regime, table in tables.items():
        for name in COMPARED[:2]:
            cells = [difference(table, one, two, name) for one, two in PAIRS]
            if any(cells):
                head = f"| {regime} | {name.split('_')[0]} | "
                lines.append(head + " | ".join(cells) + " |")
    return lines


def levels(tables: dict[str, Table]) -> list[str]:
    """The best guidance without a statistic, chosen by the even edits; others against it."""
    others = ("kvlock", "kvlock_scaled", "late_direct", "late_inverse")
    heads = [f"nearest of {other} - it" for other in others]
    lines = ["| regime | best | " + " | ".join(heads) + " |", "|---" * (len(heads) + 2) + "|"]
    for regime, table in tables.items():
        even, odd = half(table, odd=False), half(table, odd=True)
        known = [arm for arm in LEVELS if arm in even]
        if not known:
            continue
        best = max(known, key=lambda arm: even[arm]["nearest_psnr"].mean())
        cells = [difference(odd, other, best, "nearest_psnr") for other in others]
        lines.append(f"| {regime} | {best} | " + " | ".join(cells) + " |")
    return lines


def rows_of(path: pathlib.Path) -> Iterator[dict[str, str]]:
    """The rows of a CSV."""
    with path.open(newline="") as file:
        yield from csv.DictReader(file)


def scale(path: pathlib.Path) -> list[str]:
    """How sigma2 scales."""
    rows = list(rows_of(path))
    names = ("steps", "solver", "shift", "guidance", "window")
    base = next(float(row["median"]) for row in rows if not row["changed"])
    lines = ["| " + " | ".join(names) + " | median | quartiles | to the first row |"]
    lines.append("|---" * (len(names) + 3) + "|")
    for row in rows:
        cells = [f"**{row[name]}**" if row["changed"] == name else row[name] for name in names]
        cells += [row["median"], f"{row['low']} to {row['high']}"]
        lines.append("| " + " | ".join(cells) + f" | {float(row['median']) / base:.2f} |")
    return lines


def spread(path: pathlib.Path, tables: dict[str, Table]) -> list[str]:
    """The spread over seeds as a detector, beside sigma2 of the same edits."""
    rows, lines = list(rows_of(path)), ["| regime | wrong | spread over seeds | sigma2 |"]
    lines.append("|---" * 4 + "|")
    for regime in dict.fromkeys(row["regime"] for row in rows):
        own = [row for row in rows if row["regime"] == regime]
        wrong = np.array([row["right"] == "0" for row in own])
        found = cell(*auroc_interval(np.array([float(row["spread"]) for row in own]), wrong))
        plain = tables.get(regime, {}).get("cfg")
        same = "" if plain is None else cell(*auroc_interval(plain["sigma2"], plain["right"] < 0.5))
        lines.append(f"| {regime} | {100 * wrong.mean():.0f}% | {found} | {same} |")
    return lines
