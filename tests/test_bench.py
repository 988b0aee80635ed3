"""What the benchmarks' page says of measured numbers."""

import importlib
import json
import sys
from pathlib import Path

import pytest

ROWS = {
    "fast": {"seconds": [1.0, 4.0], "ratios": [0.2, 0.25, 0.3], "ratio": 0.25},
    "slow": {"seconds": [4.0, 5.0], "ratios": [0.8], "ratio": 0.8},
    "rate": {"seconds": [2.0, 1.8], "ratios": [0.9], "ratio": 0.9},
    "low rate": {"seconds": [2.0, 1.0], "ratios": [0.5], "ratio": 0.5},
    "without a bar": {"seconds": [1.0, 1.0], "ratios": [1.0], "ratio": 1.0},
}
MEMORY = {"memory, fast": {"bytes": [2e9, 1e9]}, "memory, slow": {"bytes": [1e9, 1e9]}}


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))
    module = importlib.import_module("bench")
    row = sys.modules["bench_rows"].Row
    no = {"ours": None, "peer": None}
    rows = [
        row("fast", 0.35, **no, memory=1.1),
        row("slow", 0.75, **no, memory=1.1),
        row("rate", 0.8, **no, least=True),
        row("low rate", 0.8, **no, least=True),
        row("without a bar", None, **no),
        row("not run", 0.5, **no),
    ]
    monkeypatch.setattr(module, "ROWS", rows)
    monkeypatch.setattr(module, "machine", lambda: "machine B")
    return module


def lines(page, name):
    return [line for line in page.splitlines() if line.startswith(f"| {name} |")]


def found(commit="abc"):
    return {name: facts | {"commit": commit} for name, facts in (ROWS | MEMORY).items()}


def test_a_bar_is_met_or_not(bench):
    page = bench.page(found(), "")
    assert lines(page, "fast") == [
        "| fast | 0.25 (0.20 to 0.30) | <= 0.35 | yes | 3 | 1 / 4 |",
        "| fast | 2.00 | <= 1.1 | **no** | 2.00 / 1.00 |",
    ]
    assert ["**no**" in line for line in lines(page, "slow")] == [True, False]
    assert "| >= 0.8 | yes |" in lines(page, "rate")[0]
    assert "| >= 0.8 | **no** |" in lines(page, "low rate")[0]
    assert "| - | - |" in lines(page, "without a bar")[0]
    assert not lines(page, "not run")


def test_sections_of_other_machines_stay(bench, monkeypatch):
    first = bench.page(found("of-b"), "")
    monkeypatch.setattr(bench, "machine", lambda: "machine A")
    both = bench.page(found("of-a"), first)
    assert both.index("## machine A") < both.index("of-a")
    assert both.index("of-a") < both.index("## machine B") < both.index("of-b")
    assert bench.page(found("of-a"), both) == both
    again = bench.page(found("newer"), both)
    assert "of-a" not in again and "of-b" in again


@pytest.mark.parametrize(("least", "ratio"), [(False, 0.5), (True, 2.0)])
def test_a_ratio_is_ours_over_the_peer_s_time_or_of_rates(bench, monkeypatch, least, ratio):
    ran = []
    seconds = iter([2.0, 4.0, 3.0, 6.0])
    monkeypatch.setattr(bench, "timed", lambda run: run() or next(seconds))
    row = sys.modules["bench_rows"].Row
    sides = {side: lambda side=side: lambda: ran.append(side) for side in bench.SIDES}
    facts = bench.measure(row("one", 1.0, **sides, least=least, scale=1.0), 2)
    assert ran == ["ours", "peer"] * 3  # once to warm up, then in turn
    assert facts == {"seconds": [2.5, 5.0], "ratio": ratio, "ratios": [ratio] * 2}


def test_only_some_rows_run_and_what_was_found_is_kept(bench, monkeypatch, tmp_path):
    runs, page = tmp_path / "runs" / "bench.json", tmp_path / "page.md"
    monkeypatch.setattr(bench, "measure", lambda row, rounds: ROWS[row.name])
    for only in ("slow", "^rate"):
        flags = ["--only", only, "--runs", str(runs), "--page", str(page)]
        monkeypatch.setattr(sys, "argv", ["bench.py", *flags])
        monkeypatch.setattr(bench, "peak", lambda row, side: 10**9)
        bench.main()
    assert set(json.loads(runs.read_text())) == {"slow", "memory, slow", "rate"}
    assert len(lines(page.read_text(), "slow")) == 2
