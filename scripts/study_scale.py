"""How the statistic scales, and whether seeds that disagree tell failed edits.

    python scripts/study_scale.py             # writes docs/evidence/scale.csv and spread.csv

`scale.csv`: quartiles over edits of sigma2, averaged over the last 0.4 of the steps, in plain
guidance without a lock, as one of steps, solver, shift, guidance and window changes. The ratio of
two medians is the factor by which tau would have to move between the two.

`spread.csv`: each edit of some regimes is run from several seeds; the variance of their clean
estimates inside the mask, at the first late step, is a rival of sigma2 at several times its price.
"""

import argparse
import csv
import dataclasses
import pathlib

import jax.numpy as jnp
import numpy as np
from study import BATCH, FOLDER, LATE, Arm, Signals, settings_of
from study_cases import FIRST_SEED, REGIMES, Case, Regime, case_of

import kvlock_jax as kvl
from kvlock_jax import lock
from kvlock_jax.batch.runner import edit_key
from kvlock_jax.pipeline.api import run_batch
from kvlock_jax.pipeline.encode import draw_noise
from kvlock_jax.pipeline.inputs import read_inputs
from kvlock_jax.pipeline.settings import Settings

SEEDS = 4
SPREAD = ("open_prompt", "post", "both")
BASE = {"steps": 25, "solver": "unipc", "shift": 3.0, "guidance": 4.0, "window": 10}
CHANGES = {
    "steps": (6, 12, 50, 100),
    "solver": ("euler", "dpm++"),
    "shift": (1.0, 5.0, 8.0),
    "guidance": (1.0, 1.5, 2.0, 8.0),
    "window": (2, 5, 20),
}


def settings(changes: dict) -> Settings:
    """The settings of plain guidance with some of `BASE` changed."""
    values = BASE | changes
    regime = Regime("", values["steps"], values["guidance"])
    found = settings_of(regime, Arm.of(f"cfg:window={values['window'] / values['steps']}"), None)
    sample = dataclasses.replace(found.sample, solver=values["solver"], shift=values["shift"])
    return dataclasses.replace(found, sample=sample)


def batches(items: list) -> list[list]:
    """Lists of at most `BATCH`."""
    return [items[first : first + BATCH] for first in range(0, len(items), BATCH)]


def run(model, cases: list[Case], how: Settings, seed: int = 0, on_step=None):
    """Results of some edits from a seed."""
    inputs = [read_inputs(c.video, c.mask, c.prompt, how.edit) for c in cases]
    keys = [edit_key(FIRST_SEED + seed, str(c.number)) for c in cases]
    noise = np.concatenate([draw_noise(model, i, k) for i, k in zip(inputs, keys, strict=True)])
    return run_batch(model, inputs, [how] * len(cases), noise, on_step=on_step)


def scale(model, edits: int) -> list[dict]:
    """The rows of `scale.csv`."""
    cases = [case_of(REGIMES["plain"], number) for number in range(edits)]
    asked = [{}, *({key: value} for key, values in CHANGES.items() for value in values)]
    rows = []
    for change in asked:
        how = settings(change)
        steps = how.sample.steps
        late = slice(steps - max(2, round(LATE * steps)), None)
        results = [result for batch in batches(cases) for result in run(model, batch, how)]
        found = [float(np.mean(result.trace.sigma2[late])) for result in results]
        low, middle, high = np.percentile(found, [25, 50, 75])
        quartiles = {"low": low, "median": middle, "high": high}
        row = BASE | change | {name: f"{value:.4g}" for name, value in quartiles.items()}
        rows.append({"changed": next(iter(change), ""), **row, "edits": edits})
        print(row, flush=True)
    return rows


class First:
    """Hears of steps, and keeps the clean estimates of one."""

    def __init__(self, number: int):
        self._number, self.estimate = number, None

    def __call__(self, step) -> None:
        """Hears of a step."""
        if step.number == self._number:
            self.estimate = step.estimate()


def spread(model, edits: int) -> list[dict]:
    """The rows of `spread.csv`."""
    rows, strides = [], model.checkpoint.configs.vae.strides
    for name in SPREAD:
        regime = REGIMES[name]
        how = settings_of(regime, Arm.of("cfg"), None)
        for batch in batches([case_of(regime, number) for number in range(edits)]):
            masks = [lock.to_latent_mask(jnp.asarray(c.mask), strides) for c in batch]
            masks = np.stack(masks)[..., None]
            first = Signals(regime.steps, how.lock.window, masks[..., 0]).first
            heard = []
            for seed in range(SEEDS):
                hear = First(first)
                run(model, batch, how, seed, hear)
                heard.append(hear.estimate)
            variance = np.var(heard, axis=0, ddof=1)
            weights = np.broadcast_to(masks, variance.shape)
            found = np.average(variance, axis=(1, 2, 3, 4), weights=weights)
            for case, value in zip(batch, found, strict=True):
                rows.append({"regime": name, "edit": case.number, "spread": f"{value:.5g}"})
        print(f"spread over seeds: {name}", flush=True)
    return rows


def write(path: pathlib.Path, rows: list[dict]) -> None:
    """Writes rows to a CSV."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    """Writes the tables that are missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--edits", type=int, default=32, help="of scale.csv (default 32)")
    parser.add_argument("--spread_edits", type=int, default=48)
    parser.add_argument("--folder", type=pathlib.Path, default=FOLDER)
    args = parser.parse_args()
    model = kvl.load("demo", dtype="bfloat16")
    for name, make, edits in (("scale", scale, args.edits), ("spread", spread, args.spread_edits)):
        path = args.folder / f"{name}.csv"
        if not path.exists():
            write(path, make(model, edits))


if __name__ == "__main__":
    main()
