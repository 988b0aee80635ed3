"""When does the lock help? Runs presets over regimes in which edits fail, on the demo model.

    python scripts/study.py --edits 96                       # all of it; resumes where it was
    python scripts/study.py --edits 96 --regimes few_steps --arms kvlock,cfg

An arm is a preset, or one with other settings: `NAME=PRESET:KEY=VALUE+KEY=VALUE`, where keys are
of `config.kvlock`, or `omega`, a multiple of the regime's guidance. Rows go to
docs/evidence/REGIME.csv, one for each edit; `study_page.py` makes the page of them.
"""

import argparse
import csv
import dataclasses
import pathlib
import time

import jax.numpy as jnp
import numpy as np
from study_cases import FIRST_SEED, REGIMES, Case, Regime, case_of
from study_measures import Measures, measure

import kvlock_jax as kvl
from kvlock_jax import lock
from kvlock_jax.batch.runner import edit_key
from kvlock_jax.pipeline.api import run_batch
from kvlock_jax.pipeline.encode import draw_noise
from kvlock_jax.pipeline.inputs import read_inputs
from kvlock_jax.pipeline.overrides import apply_overrides
from kvlock_jax.pipeline.settings import resolve_settings

FOLDER = pathlib.Path(__file__).parent.parent / "docs" / "evidence"
BATCH = 16
LATE = 0.4  # of the steps, over which signals are averaged: kappa's share as published
ARMS = [
    *("cfg", "kvlock", "hard_lock", "kv_only", "omega_only", "s_only", "s_omega"),
    *("fixed_half", "global_detection", "kvlock_anchor", "cfg_zero_star", "apg", "fast"),
    # Lower guidance without a lock, and with one: what a schedule must beat.
    *("cfg_half=cfg:omega=0.5", "hard_lock_half=hard_lock:omega=0.5"),
    # The published schedule over the same shares of any run, and one with tau of 50 steps raised.
    "kvlock_scaled=kvlock:kappa=0.4+window=0.2",
    # Guidance that falls late, by no statistic: s*, a lock of the background, half of omega.
    "late_half=hard_lock:rescale_uncond=True+adapt_guidance=True+omega_floor=0.5"
    "+omega_ceiling=0.5+kappa=0.4",
]
"""The arms: METHOD.md section 9's table, controls, and candidates."""

SIGNALS = ("sigma2", "sigma2_max", "sigma2_global", "x0_change")
"""Signals of a run that may tell failed edits: of late steps, inside the mask but for the third."""


@dataclasses.dataclass(frozen=True)
class Row:
    """An edit of an arm: what was measured, what the run did, and signals of failure."""

    arm: str
    edit: int
    measures: Measures
    omega: float
    alpha: float
    signals: tuple[float, ...]
    seconds: float

    def cells(self) -> dict[str, str]:
        """The row's values by their columns."""
        measured = dataclasses.asdict(self.measures)
        values = {"omega": self.omega, "alpha": self.alpha}
        values |= dict(zip(SIGNALS, self.signals, strict=True)) | {"seconds": self.seconds}
        numbers = {name: f"{value:.5g}" for name, value in (measured | values).items()}
        return {"arm": self.arm, "edit": str(self.edit), **numbers, "right": str(int(self.right))}

    @property
    def right(self) -> bool:
        """Whether the judge found what was asked for."""
        return self.measures.right


def name_of(arm: str) -> str:
    """The name of an arm."""
    return arm.partition("=")[0] if "=" in arm.partition(":")[0] else arm


def settings_of(regime: Regime, arm: str):
    """The settings of an arm in a regime; shares of `kappa` and `window` become steps."""
    text = arm.partition("=")[2] if "=" in arm.partition(":")[0] else arm
    preset, _, changes = text.partition(":")
    config = kvl.config("demo")
    config.preset = preset
    config.sample.steps = regime.steps
    config.sample.guidance_scale = config.sample.guidance_scale_low = regime.guidance
    config.edit.context_scale = regime.context_scale
    flags = []
    for change in filter(None, changes.split("+")):
        key, _, value = change.partition("=")
        if key == "omega":
            scale = float(value) * regime.guidance
            config.sample.guidance_scale = config.sample.guidance_scale_low = scale
            continue
        if key in ("kappa", "window"):
            value = str(max(2, round(float(value) * regime.steps)))
        flags.append(f"--config.kvlock.{key}={value}")
    return resolve_settings(apply_overrides(config, flags))


class Signals:
    """Hears of the steps of a batch, and keeps what may tell failed edits."""

    def __init__(self, steps: int, window: int, masks: np.ndarray):
        self._first, self._window = steps - max(2, round(LATE * steps)), window
        self._masks = masks[..., None]  # edits T H W 1
        self._estimates: list[np.ndarray] = []
        self._rows: list[tuple[np.ndarray, ...]] = []

    def on_step(self, step) -> None:
        """Hears of a step."""
        before = self._estimates[-1] if self._estimates else None
        self._estimates = [*self._estimates, step.estimate()][-self._window :]
        if step.number < self._first or before is None:
            return
        variance = np.var(self._estimates, axis=0, ddof=1)
        change = (self._estimates[-1] - before) ** 2
        axes = (1, 2, 3, 4)
        everywhere = np.ones_like(self._masks)
        means = [
            np.average(x, axis=axes, weights=np.broadcast_to(w, x.shape))
            for x, w in ((variance, self._masks), (variance, everywhere), (change, self._masks))
        ]
        self._rows.append(tuple(means))

    def of_edits(self) -> list[tuple[float, ...]]:
        """The signals of each edit, in the order of `SIGNALS`."""
        local, whole, change = (np.array(x) for x in zip(*self._rows, strict=True))
        columns = (local.mean(0), local.max(0), whole.mean(0), change.mean(0))
        return [tuple(map(float, row)) for row in zip(*columns, strict=True)]


def run_arm(model, regime: Regime, arm: str, cases: list[Case]) -> list[Row]:
    """Edits some cases as one batch."""
    settings = settings_of(regime, arm)
    inputs = [read_inputs(c.video, c.mask, c.prompt, settings.edit) for c in cases]
    keys = [edit_key(FIRST_SEED, str(c.number)) for c in cases]
    noise = np.concatenate([draw_noise(model, i, k) for i, k in zip(inputs, keys, strict=True)])
    strides = model.checkpoint.configs.vae.strides
    masks = np.stack([np.asarray(lock.to_latent_mask(jnp.asarray(c.mask), strides)) for c in cases])
    signals = Signals(settings.sample.steps, settings.lock.window, masks)
    start = time.perf_counter()
    results = run_batch(model, inputs, [settings] * len(cases), noise, on_step=signals.on_step)
    seconds = (time.perf_counter() - start) / len(cases)
    rows = []
    for case, result, found in zip(cases, results, signals.of_edits(), strict=True):
        late = np.asarray(result.trace.scheduled)
        omega = float(np.asarray(result.trace.guidance_scale)[late].mean())
        alpha = float(np.asarray(result.trace.fusion_ratio)[late].mean())
        done = measure(case, result.video)
        rows.append(Row(name_of(arm), case.number, done, omega, alpha, found, seconds))
    return rows


def finished(path: pathlib.Path) -> set[tuple[str, int]]:
    """The arms and edits of a file."""
    if not path.exists():
        return set()
    with path.open(newline="") as file:
        return {(row["arm"], int(row["edit"])) for row in csv.DictReader(file)}


def append(path: pathlib.Path, rows: list[Row]) -> None:
    """Adds rows to a file, all or none of them."""
    cells = [row.cells() for row in rows]
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(cells[0]), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(cells)


def main() -> None:
    """Runs what is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--edits", type=int, default=96)
    parser.add_argument("--regimes", default=",".join(REGIMES))
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--folder", type=pathlib.Path, default=FOLDER)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    model = kvl.load("demo")
    for name in args.regimes.split(","):
        regime, path = REGIMES[name], args.folder / f"{name}.csv"
        done = finished(path)
        cases = [case_of(regime, number) for number in range(args.edits)]
        for arm in args.arms.split(","):
            missing = [case for case in cases if (name_of(arm), case.number) not in done]
            right = []
            for first in range(0, len(missing), BATCH):
                rows = run_arm(model, regime, arm, missing[first : first + BATCH])
                append(path, rows)
                right += [row.right for row in rows]
            if right:
                print(f"{name} {name_of(arm)}: {np.mean(right):.0%} right", flush=True)


if __name__ == "__main__":
    main()
