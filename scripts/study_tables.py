"""The tables of docs/evidence.md, from the rows of `study.py` and `study_scale.py`."""

import csv
import pathlib
from collections.abc import Iterator

import numpy as np
from study import ARMS, SIGNALS, TRUTH, name_of
from study_cases import Regime
from study_measures import auroc, auroc_interval, interval, share_interval

SHOWN = (
    "right",
    "failed",
    "truth_psnr",
    "nearest_psnr",
    "flicker",
    "background_psnr",
    "background_ssim",
    "ring_error",
    "omega",
    "adapts",
)
HEADS = (
    *("right", "failed", "truth", "nearest", "flicker", "background"),
    *("SSIM", "ring", "omega", "adapts"),
)
DIGITS = (2, 2, 2, 2, 4, 2, 2, 2)
"""Digits of the columns after the shares."""

AGAINST = ("cfg", "hard_lock", "kvlock")
COMPARED = ("right", "nearest_psnr", "background_psnr")
LEVELS = (
    *("cfg", "cfg_half", "s_only", "cfg_zero_star", "apg", "apg_still"),
    *("hard_lock", "hard_lock_half", "hard_lock_s", "fast", "eased", "late_one", "late_one_long"),
)
"""Arms whose guidance follows no statistic: the best of them is what a schedule must beat."""

FLAW = 6.0
"""dB under the arm `truth`, twice its error, from which on an edit counts as failed."""

PAIRS = (
    ("kvlock", "kvlock_other"),
    ("kvlock", "kvlock_mean"),
    ("kvlock", "kvlock_level"),
    ("kvlock_direct", "kvlock_direct_other"),
    ("late_direct", "late_direct_other"),
    ("late_inverse", "late_inverse_other"),
)
"""Arms that adapt to an edit's own statistic, and controls that do not."""

Table = dict[str, dict[str, np.ndarray]]
"""Columns by name, of each arm, in the order of edits."""


def read(path: pathlib.Path, regime: Regime) -> Table:
    """The rows of a regime; the column `failed` is made of them (`FLAW`)."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    arms = [
        name for name in (TRUTH, *map(name_of, ARMS)) if any(row["arm"] == name for row in rows)
    ]
    table = {}
    for arm in arms:
        own = sorted((row for row in rows if row["arm"] == arm), key=lambda row: int(row["edit"]))
        names = [name for name in own[0] if name != "arm"]
        table[arm] = {name: np.array([float(row[name]) for row in own]) for name in names}
    best = table.get(TRUTH)
    if best is not None:  # without edits that the judge cannot see even in the truth
        unseen = best["edit"][best["right"] < 0.5]
        for arm, columns in table.items():
            keep = ~np.isin(columns["edit"], unseen)
            table[arm] = {name: column[keep] for name, column in columns.items()}
        best = table[TRUTH]
    for columns in table.values():
        columns["failed"] = columns["right"] < 0.5
        if best is not None and regime.context_scale > 0:  # a model without context sees no source
            at = np.searchsorted(best["edit"], columns["edit"])
            columns["failed"] |= columns["nearest_psnr"] < best["nearest_psnr"][at] - FLAW
    return table


def cell(mean: float, low: float, high: float, digits: int = 2) -> str:
    """A mean with its interval."""
    return f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def values(table: Table) -> list[str]:
    """A table of means by arm."""
    lines = ["| arm | " + " | ".join(HEADS) + " |", "|---" * (len(HEADS) + 1) + "|"]
    for arm, columns in table.items():
        cells = [f"{100 * columns[name].mean():.0f}%" for name in SHOWN[:2]]
        cells += ["" if np.isnan(columns[name]).all() else f"{np.nanmean(columns[name]):.{digits}f}"
                  for name, digits in zip(SHOWN[2:], DIGITS, strict=True)]  # fmt: skip
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
    if name == "right":
        return share_interval(one[name][first], two[name][second])
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
    for arm in (arm for arm in table if arm != TRUTH):
        cells = []
        for other in AGAINST:
            for name in COMPARED:
                cells.append("" if arm == other else difference(table, arm, other, name))
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return lines


def detectors(table: Table) -> list[str]:
    """How well signals tell failed edits from others, for arms in which both occur."""
    lines = ["| arm | failed | " + " | ".join(SIGNALS) + " |", "|---" * (len(SIGNALS) + 2) + "|"]
    for arm, columns in table.items():
        wrong = columns["failed"]
        if arm != TRUTH and 0.05 < wrong.mean() < 0.95:
            known = [np.isfinite(columns[name]).any() for name in SIGNALS]
            found = [
                cell(*auroc_interval(columns[name], wrong)) if is_known else ""
                for name, is_known in zip(SIGNALS, known, strict=True)
            ]
            lines.append(f"| {arm} | {100 * wrong.mean():.0f}% | " + " | ".join(found) + " |")
    return lines if len(lines) > 2 else ["No arm fails in 5 to 95% of these edits."]


def best_detectors(tables: dict[str, Table]) -> list[str]:
    """The signal that tells failed edits best, chosen on even edits, beside sigma2 on odd ones."""
    heads = ["regime", "arm", "failed", "sigma2", "best of the even edits", "it"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for regime, table in tables.items():
        even, odd = half(table, odd=False), half(table, odd=True)
        for arm in (arm for arm in ("cfg", "kvlock") if arm in table):
            one, other = even[arm], odd[arm]
            known = [name for name in SIGNALS if np.isfinite(one[name]).any()]
            found = {name: auroc(one[name], one["failed"]) for name in known}
            share = other["failed"].mean()
            if not 0.05 < share < 0.95 or np.isnan(list(found.values())).any():
                continue
            best = max(found, key=found.get)
            own, its = (cell(*auroc_interval(other[n], other["failed"])) for n in ("sigma2", best))
            lines.append(f"| {regime} | {arm} | {100 * share:.0f}% | {own} | {best} | {its} |")
    return lines


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


def verdicts(tables: dict[str, Table], arm: str) -> list[str]:
    """In how many regimes an arm is as good as it should be, on the odd edits."""
    odd = [half(table, odd=True) for table in tables.values()]
    odd = [table for table in odd if {arm, *AGAINST} <= set(table)]

    def against(other: str, name: str) -> list[tuple[float, float, float]]:
        return [paired(table, arm, other, name) for table in odd]

    def over(other: str, name: str) -> np.ndarray:
        return np.array([low > 0 for _, low, _ in against(other, name)], bool)

    right = np.array([high >= 0 for *_, high in against("cfg", "right")], bool)
    near = np.array([mean >= -0.2 for mean, *_ in against("hard_lock", "background_psnr")], bool)
    shown = over("cfg", "nearest_psnr")
    both = over("kvlock", "nearest_psnr") & over("kvlock", "background_psnr")
    said = {
        "judged right no less often than `cfg`: no interval under 0": right,
        "foreground better than `cfg`'s, interval over 0": shown,
        "background at most 0.2 dB under `hard_lock`'s": near,
        "foreground and background both better than `kvlock`'s, intervals over 0": both,
    }
    lines = [f"| `{arm}` is | in regimes |", "|---|---|"]
    return [*lines, *(f"| {what} | {held.sum()} of {len(odd)} |" for what, held in said.items())]


def adapting(tables: dict[str, Table]) -> list[str]:
    """Arms that adapt to an edit's own statistic less their controls, in every regime.

    A cell is empty where the published schedule takes its bounds in nearly all steps: then it and
    its replays are one and the same.
    """
    heads = [f"{one} - {two}" for one, two in PAIRS]
    lines = ["| regime | measure | " + " | ".join(heads) + " |", "|---" * (len(heads) + 2) + "|"]
    for regime, table in tables.items():
        for name in COMPARED[:2]:
            cells = [
                difference(table, one, two, name) if _differs(table, one, two) else ""
                for one, two in PAIRS
            ]
            if any(cells):
                head = f"| {regime} | {name.split('_')[0]} | "
                lines.append(head + " | ".join(cells) + " |")
    return lines


def _differs(table: Table, one: str, two: str) -> bool:
    """Whether an arm and its control can differ at all."""
    replays = two in ("kvlock_other", "kvlock_mean", "kvlock_level")
    return not replays or one not in table or table[one]["adapts"].mean() > 0.02


def levels(tables: dict[str, Table]) -> list[str]:
    """The best guidance without a statistic, chosen by the even edits; others against it."""
    others = ("kvlock", "kvlock_scaled", "kvlock_direct", "late_direct", "late_inverse")
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
    rows, lines = list(rows_of(path)), ["| regime | failed | spread over seeds | sigma2 |"]
    lines.append("|---" * 4 + "|")
    for regime in dict.fromkeys(row["regime"] for row in rows):
        plain = tables.get(regime, {}).get("cfg")
        if plain is None:
            continue
        found = {int(row["edit"]): float(row["spread"]) for row in rows if row["regime"] == regime}
        keep = np.isin(plain["edit"], list(found))
        wrong, sigma2 = plain["failed"][keep], plain["sigma2"][keep]
        values = np.array([found[int(edit)] for edit in plain["edit"][keep]])
        spread_cell, same = (cell(*auroc_interval(x, wrong)) for x in (values, sigma2))
        lines.append(f"| {regime} | {100 * wrong.mean():.0f}% | {spread_cell} | {same} |")
    return lines
