"""When does the lock help? Runs presets over regimes in which edits fail, on the demo model.

    python scripts/study.py --edits 96                       # all of it; resumes where it was
    python scripts/study.py --edits 96 --regimes few_steps --arms kvlock,cfg

An arm is a preset, or one with other settings: `NAME=PRESET:KEY=VALUE+KEY=VALUE`, where keys are
of `config.kvlock`, or `omega`, a multiple of the regime's guidance, or `sigma2`, what takes the
place of the statistic (`Arm`). Rows go to docs/evidence/REGIME.csv, one for each edit;
`study_page.py` makes the page of them. Two commands at once must not share a regime.
"""

import argparse
import csv
import dataclasses
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from study_cases import FIRST_SEED, REGIMES, Case, Regime, case_of
from study_loop import Rule, Watched, recorded, typical
from study_measures import Measures, measure

import kvlock_jax as kvl
from kvlock_jax import lock
from kvlock_jax.batch.runner import edit_key
from kvlock_jax.errors import SamplingError
from kvlock_jax.pipeline.api import run_batch
from kvlock_jax.pipeline.encode import draw_noise
from kvlock_jax.pipeline.inputs import read_inputs
from kvlock_jax.pipeline.overrides import apply_overrides
from kvlock_jax.pipeline.settings import Settings, resolve_settings

FOLDER = pathlib.Path(__file__).parent.parent / "docs" / "evidence"
BATCH = 16
TAU = 0.01  # published
LATE = 0.4  # of the steps, over which signals are averaged: kappa's share as published
_LATE = "eased:adapt_guidance=True"
ARMS = [
    *("cfg", "kvlock", "hard_lock", "kv_only", "omega_only", "s_only", "s_omega"),
    *("fixed_half", "global_detection", "kvlock_anchor", "cfg_zero_star", "apg", "fast"),
    # APG without its momentum, which has few steps to swing in.
    "apg_still=apg:apg_momentum=0",
    # Lower guidance without a lock, and with one: what a schedule must beat.
    *("cfg_half=cfg:omega=0.5", "hard_lock_half=hard_lock:omega=0.5"),
    "hard_lock_s=hard_lock:rescale_uncond=True",
    # Guidance that falls late, by no statistic: s*, a lock of the background, and a part of omega.
    "eased",
    *("late_one=eased:guidance_ratio=one", "late_one_long=eased:guidance_ratio=one+kappa=0.6"),
    # The published schedule over the same shares of any run.
    "kvlock_scaled=kvlock:kappa=0.4+window=0.2",
    # Does it matter which edit is adapted to, or the level alone? `_other`: that of another edit.
    *("kvlock_other=kvlock:sigma2=other", "kvlock_mean=kvlock:sigma2=mean"),
    "kvlock_level=kvlock:sigma2=level",
    *(f"kvlock_{kind}=kvlock:sigma2={kind}" for kind in ("direct", "direct_other")),
    *(
        f"late_{kind}={_LATE}+sigma2={kind}+tau=0.02+omega_floor=0.25+omega_ceiling=1.0"
        for kind in ("direct", "direct_other", "inverse", "inverse_other")
    ),
]
"""The arms: METHOD.md section 9's table, controls, and candidates."""

FIRST_READY = 2
"""The first step that has a statistic."""

SIGNALS = ("sigma2", "sigma2_max", "sigma2_global", "x0_change", "guidance_gap")
"""Signals of a run that may tell failed edits: of late steps, inside the mask but for the third.

The last is of the first late step, and costs a pass more, so some arms alone have it.
"""

TRUTH = "truth"
"""The arm that no model edits: the wanted clips through the VAE."""

GAPPED = ("cfg", "kvlock", "hard_lock")

_RATIOS = {"direct": (1, 0), "direct_other": (1, 1), "inverse": (-1, 0), "inverse_other": (-1, 1)}
_REPLAYS = ("other", "mean", "level", *_RATIOS)


@dataclasses.dataclass(frozen=True)
class Arm:
    """An arm, read from its text.

    Attributes:
      name: short name.
      preset: name of a preset.
      changes: settings of `config.kvlock` by name; shares of `kappa` and `window` become steps,
        and `one` the part of the guidance scale at which omega is 1.
      omega: multiple of the regime's guidance.
      sigma2: what takes the place of an edit's own statistic: `"other"`, the course that the next
        edit had in the arm `kvlock`; `"mean"`, the mean course there; `"level"`, none: alpha and
        omega are the means of that arm; `"direct"`, its ratio to what is usual in the batch, times
        0.01; `"inverse"`, one over that ratio; with `_other`, that of another edit. Empty for its
        own.
    """

    name: str
    preset: str
    changes: dict[str, str]
    omega: float = 1.0
    sigma2: str = ""

    @classmethod
    def of(cls, text: str) -> "Arm":
        """The arm of a text."""
        name = name_of(text)
        text = text[len(name) + 1 :] if "=" in text.partition(":")[0] else text
        preset, _, rest = text.partition(":")
        changes = dict(change.split("=", 1) for change in rest.split("+") if change)
        omega, sigma2 = float(changes.pop("omega", 1)), changes.pop("sigma2", "")
        if sigma2 not in ("", *_REPLAYS):
            raise ValueError(f"sigma2 must be one of {', '.join(_REPLAYS)}, found {sigma2!r}")
        return cls(name, preset, changes, omega, sigma2)


@dataclasses.dataclass(frozen=True)
class Row:
    """An edit of an arm: what was measured, what the run did, and signals of failure.

    Omega and alpha are means of the scheduled steps that have a statistic; `adapts` is the share of
    those in which the statistic is under 2 tau, so that the schedules do not take their bounds.
    """

    arm: str
    edit: int
    measures: Measures
    omega: float
    alpha: float
    adapts: float
    signals: tuple[float, ...]
    seconds: float

    def cells(self) -> dict[str, str]:
        """The row's values by their columns."""
        measured = dataclasses.asdict(self.measures)
        values = {"omega": self.omega, "alpha": self.alpha, "adapts": self.adapts}
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


def settings_of(regime: Regime, arm: Arm, past: "Past") -> Settings:
    """The settings of an arm in a regime."""
    config = kvl.config("demo")
    config.preset = arm.preset
    config.sample.steps = regime.steps
    scale = arm.omega * regime.guidance
    config.sample.guidance_scale = config.sample.guidance_scale_low = scale
    config.edit.context_scale = regime.context_scale
    config.kvlock.skip_background = False  # or every batch would compile a program of its own
    changes = dict(arm.changes)
    if arm.sigma2 == "level":
        alpha, omega = past.levels()
        changes |= {"adapt_fusion_ratio": False, "fusion_ratio": alpha}
        changes |= {"adapt_guidance": False, "guidance_ratio": omega / regime.guidance}
    changes = {key: 1 / scale if value == "one" else value for key, value in changes.items()}
    for key in {"kappa", "window"} & set(changes):
        changes[key] = str(max(2, round(float(changes[key]) * regime.steps)))
    if arm.sigma2 == "level":  # the steps of `kvlock` that have a statistic
        changes["kappa"] = min(lock.preset("kvlock", scale).kappa, regime.steps - FIRST_READY)
    flags = [f"--config.kvlock.{key}={value}" for key, value in changes.items()]
    return resolve_settings(apply_overrides(config, flags))


@dataclasses.dataclass(frozen=True)
class Past:
    """What the arm `kvlock` did in a regime: courses of sigma2 in `folder`, means in its rows."""

    folder: pathlib.Path
    rows: pathlib.Path

    def record(self, cases: list[Case], sigma2: np.ndarray) -> None:
        """Keeps the courses of a batch, steps x edits."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for case, course in zip(cases, sigma2.T, strict=True):
            np.save(self.folder / f"{case.number}.npy", course)

    def rule(self, kind: str, cases: list[Case]) -> Rule | None:
        """The rule of an arm's `sigma2`."""
        if kind in ("", "level"):
            return None
        if kind in _RATIOS:
            return typical(TAU, *_RATIOS[kind])
        courses = {int(path.stem): np.load(path) for path in self.folder.glob("*.npy")}
        if not courses or len(courses) < len(self._edits("kvlock")):
            raise ValueError("courses of the arm kvlock are gone: remove its rows, run it again")
        if kind == "mean":  # of what acts: the schedules take 2 tau for all above it
            mean = np.nanmean([np.minimum(c, 2 * TAU) for c in courses.values()], axis=0)
            return recorded(np.repeat(mean[:, None], len(cases), axis=1))
        numbers = sorted(courses)
        following = dict(zip(numbers, [*numbers[1:], numbers[0]], strict=True))
        return recorded(np.stack([courses[following[c.number]] for c in cases], axis=1))

    def levels(self) -> tuple[float, float]:
        """The arm's mean alpha and omega."""
        rows = self._edits("kvlock")
        return tuple(
            float(np.mean([float(row[key]) for row in rows])) for key in ("alpha", "omega")
        )

    def _edits(self, arm: str) -> list[dict[str, str]]:
        """The rows of an arm."""
        if not self.rows.exists():
            return []
        with self.rows.open(newline="") as file:
            return [row for row in csv.DictReader(file) if row["arm"] == arm]


class Signals:
    """Hears of the steps of a batch, and keeps what may tell failed edits."""

    def __init__(self, steps: int, window: int, masks: np.ndarray):
        self.first, self._window = steps - max(2, round(LATE * steps)), window
        self._masks = masks[..., None]  # edits T H W 1
        self._estimates: list[np.ndarray] = []
        self._rows: list[tuple[np.ndarray, ...]] = []

    def on_step(self, step) -> None:
        """Hears of a step."""
        before = self._estimates[-1] if self._estimates else None
        self._estimates = [*self._estimates, step.estimate()][-self._window :]
        if step.number < self.first or before is None:
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
        """The signals of each edit, in the order of `SIGNALS`, but for the last."""
        local, whole, change = (np.array(x) for x in zip(*self._rows, strict=True))
        columns = (local.mean(0), local.max(0), whole.mean(0), change.mean(0))
        return [tuple(map(float, row)) for row in zip(*columns, strict=True)]


def run_arm(model, regime: Regime, arm: Arm, cases: list[Case], past: Past) -> list[Row]:
    """Edits some cases as one batch."""
    settings = settings_of(regime, arm, past)
    inputs = [read_inputs(c.video, c.mask, c.prompt, settings.edit) for c in cases]
    keys = [edit_key(FIRST_SEED, str(c.number)) for c in cases]
    noise = np.concatenate([draw_noise(model, i, k) for i, k in zip(inputs, keys, strict=True)])
    strides = model.checkpoint.configs.vae.strides
    masks = np.stack([np.asarray(lock.to_latent_mask(jnp.asarray(c.mask), strides)) for c in cases])
    signals = Signals(settings.sample.steps, settings.lock.window, masks)
    start = time.perf_counter()
    at = signals.first if arm.name in GAPPED else None
    with Watched(past.rule(arm.sigma2, cases), at) as watched:
        results = run_batch(model, inputs, [settings] * len(cases), noise, on_step=signals.on_step)
    seconds = (time.perf_counter() - start) / len(cases)
    if arm.name == "kvlock":
        lost = np.full(regime.steps, np.nan)
        done = [lost if isinstance(one, SamplingError) else one.trace.sigma2 for one in results]
        past.record(cases, np.stack(done, axis=1))
    gaps = np.full(len(cases), np.nan) if watched.gap is None else watched.gap
    rows = []
    for case, result, found, gap in zip(cases, results, signals.of_edits(), gaps, strict=True):
        if isinstance(result, SamplingError):
            rows.append(Row(arm.name, case.number, LOST, *_nans(3), (*found, float(gap)), seconds))
            continue
        late = np.asarray(result.trace.scheduled) & (np.arange(regime.steps) >= FIRST_READY)
        omega, alpha, sigma2 = (
            np.asarray(values)[late]
            for values in (
                result.trace.guidance_scale,
                result.trace.fusion_ratio,
                result.trace.sigma2,
            )
        )
        did = (float(omega.mean()), float(alpha.mean()))
        adapts = float((sigma2 < 2 * settings.lock.tau).mean())
        signal = (*found, float(gap))
        done = measure(case, result.video)
        rows.append(Row(arm.name, case.number, done, *did, adapts, signal, seconds))
    return rows


def _nans(count: int) -> tuple[float, ...]:
    return (float("nan"),) * count


LOST = Measures(False, *_nans(6))
"""The measures of an edit that diverged."""


def truth_rows(model, cases: list[Case]) -> list[Row]:
    """The rows of the arm `truth`: the clips with their targets, through the VAE and back.

    No edit can be expected to come nearer to a valid render.
    """
    encode, decode = jax.jit(lambda vae, x: vae.encode(x)), jax.jit(lambda vae, z: vae.decode(z))
    vae, rows = model.checkpoint.vae, []
    for case in cases:
        video = jnp.asarray(case.truth[None], jnp.float32) / 127.5 - 1
        decoded = np.asarray(decode(vae, encode(vae, video)), np.float32)[0]
        video = np.clip(np.rint((decoded + 1) * 127.5), 0, 255).astype(np.uint8)
        rest = (*_nans(3), _nans(len(SIGNALS)), *_nans(1))
        rows.append(Row(TRUTH, case.number, measure(case, video), *rest))
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
    if not is_new:
        with path.open(newline="") as file:
            if next(csv.reader(file)) != list(cells[0]):
                raise ValueError(f"{path} has other columns: remove it")
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
    parser.add_argument("--dtype", default="bfloat16", help="to compute in (default bfloat16)")
    parser.add_argument("--folder", type=pathlib.Path, default=FOLDER)
    parser.add_argument("--courses", type=pathlib.Path, default=pathlib.Path("runs/courses"))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    model = kvl.load("demo", dtype=args.dtype)
    for name in args.regimes.split(","):
        regime, path = REGIMES[name], args.folder / f"{name}.csv"
        done, past = finished(path), Past(args.courses / name, path)
        cases = [case_of(regime, number) for number in range(args.edits)]
        if bare := [case for case in cases if (TRUTH, case.number) not in done]:
            append(path, truth_rows(model, bare))
        for arm in map(Arm.of, args.arms.split(",")):
            missing = [case for case in cases if (arm.name, case.number) not in done]
            right = []
            for first in range(0, len(missing), BATCH):
                rows = run_arm(model, regime, arm, missing[first : first + BATCH], past)
                append(path, rows)
                right += [row.right for row in rows]
            if right:
                print(f"{name} {arm.name}: {np.mean(right):.0%} right", flush=True)


if __name__ == "__main__":
    main()
