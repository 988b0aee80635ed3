"""What the study measures of an edit, and the statistics of what was measured."""

import dataclasses

import numpy as np
from study_cases import Case, Target

from kvlock_jax.demo.judge import judge
from kvlock_jax.demo.world import COLOURS, SIZE, shape_cover
from kvlock_jax.evaluate import metrics

_RADII = np.arange(-3.0, 3.5, 1.0)  # px from the target's radius, of the nearest valid render
_REACH = 3  # px from the target's centres, likewise
_DRAWS = 2000


@dataclasses.dataclass(frozen=True)
class Measures:
    """The measures of one edit; PSNR in dB, errors in levels of 255.

    Attributes:
      right: whether the judge sees every target in its part of the mask: its shape, and its colour
        where the prompt gives one.
      truth_psnr: inside the mask, to the clip with the targets rendered into it.
      nearest_psnr: inside the mask, to the nearest valid render: its radius and path are free, and
        its colour where the prompt leaves that open.
      flicker: mean change from frame to frame inside the object, which has one colour.
      background_psnr: off the mask and its ring.
      background_ssim: likewise.
      ring_error: within 8 px of the mask.
    """

    right: bool
    truth_psnr: float
    nearest_psnr: float
    flicker: float
    background_psnr: float
    background_ssim: float
    ring_error: float


def measure(case: Case, edited: np.ndarray) -> Measures:
    """Measures an edit."""
    fits = [_nearest(target, edited) for target in case.targets]
    wanted, found = (
        np.concatenate(pixels)
        for pixels in (
            [fit.wanted for fit in fits],
            [edited[target.mask] for target in case.targets],
        )
    )
    return Measures(
        right=all(_is_right(target, edited) for target in case.targets),
        truth_psnr=_psnr(case.truth[case.mask], edited[case.mask]),
        nearest_psnr=_psnr(wanted, found),
        flicker=float(np.nanmean([_flicker(edited, fit.cover) for fit in fits])),
        background_psnr=metrics.background_psnr(case.video, edited, case.mask),
        background_ssim=metrics.background_ssim(case.video, edited, case.mask),
        ring_error=metrics.ring_error(case.video, edited, case.mask),
    )


def _is_right(target: Target, edited: np.ndarray) -> bool:
    verdict = judge(_uncovered(edited, target.front > 0), target.mask)
    colour = target.open_colour or verdict.colour == target.thing.colour
    return bool(verdict.shape == target.thing.shape and colour)


def _psnr(wanted: np.ndarray, found: np.ndarray) -> float:
    error = ((wanted.astype(float) - found) ** 2).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-3)))


def _uncovered(video: np.ndarray, front: np.ndarray) -> np.ndarray:
    """The video with covered pixels blended from those on their left and right: a post is thin."""
    found, x = video.copy(), np.arange(video.shape[2])
    for frame, row in np.argwhere(front.any(-1) & ~front.all(-1)):
        known = ~front[frame, row]
        for channel in range(3):
            line = np.interp(x, x[known], video[frame, row, known, channel])
            found[frame, row, :, channel] = np.rint(line)
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class _Fit:
    """The valid render that is nearest inside a target's mask."""

    wanted: np.ndarray  # its pixels there
    cover: np.ndarray  # frames of the share of each pixel that its object covers


def _nearest(target: Target, edited: np.ndarray) -> _Fit:
    names = list(COLOURS) if target.open_colour else [target.thing.colour]
    middle = len(edited) // 2
    tried = [
        (_placed(target, edited, name, target.thing.radius + change, middle)[0], name, change)
        for name in names
        for change in _RADII
    ]
    _, name, change = min(tried)
    radius = target.thing.radius + change
    cover = np.stack(
        [_placed(target, edited, name, radius, number)[1] for number in range(len(edited))]
    )
    mixed = target.behind + cover[..., None] * (np.asarray(COLOURS[name]) - target.behind)
    return _Fit(np.clip(np.rint(mixed), 0, 255)[target.mask], cover)


def _placed(
    target: Target, edited: np.ndarray, name: str, radius: float, number: int
) -> tuple[float, np.ndarray]:
    """The error and the cover of an object of a colour and size where it fits a frame best."""
    mask = target.mask[number]
    back = target.behind[number][mask].astype(np.float32)
    found = edited[number][mask].astype(np.float32) - back
    change = np.asarray(COLOURS[name], np.float32) - back
    centre = target.centres[number] + _REACH
    wide = shape_cover(target.thing.shape, radius, centre, SIZE + 2 * _REACH)
    # All shifts of the object at once: windows of one picture of it.
    covers = np.lib.stride_tricks.sliding_window_view(wide, (SIZE, SIZE))
    covers = covers * (1 - target.front[number])
    inside = covers[:, :, mask]
    # mean |inside change - found|^2 multiplied out
    errors = inside**2 @ (change**2).sum(-1) - 2 * inside @ (change * found).sum(-1)
    errors = (errors + (found**2).sum()) / found.size
    best = np.unravel_index(errors.argmin(), errors.shape)
    return float(errors[best]), covers[best]


def _flicker(edited: np.ndarray, cover: np.ndarray) -> float:
    """The mean change of pixels that are inside the object in two frames that follow."""
    inside = np.minimum(cover[1:], cover[:-1]) > 0.99
    change = np.abs(np.diff(edited.astype(float), axis=0)).mean(-1)
    return float(change[inside].mean()) if inside.any() else float("nan")


# --- statistics ---------------------------------------------------------------------------------


def interval(values: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """A mean, and the interval of 95% of its bootstrap over edits."""
    known = np.asarray(values, float)
    known = known[np.isfinite(known)]
    if not len(known):
        return (float("nan"),) * 3
    draws = np.random.default_rng(seed).integers(0, len(known), (_DRAWS, len(known)))
    low, high = np.percentile(known[draws].mean(axis=1), [2.5, 97.5])
    return float(known.mean()), float(low), float(high)


def auroc(scores: np.ndarray, failed: np.ndarray) -> float:
    """The chance that a failed edit has a larger score than another one; ties count half."""
    bad, good = scores[failed], scores[~failed]
    if not len(bad) or not len(good):
        return float("nan")
    above = (bad[:, None] > good).mean() + 0.5 * (bad[:, None] == good).mean()
    return float(above)


def auroc_interval(scores: np.ndarray, failed: np.ndarray) -> tuple[float, float, float]:
    """An AUROC, and the interval of 95% of its bootstrap over edits."""
    keep = np.isfinite(scores)
    scores, failed = np.asarray(scores, float)[keep], np.asarray(failed, bool)[keep]
    draws = np.random.default_rng(0).integers(0, len(scores), (500, len(scores)))
    values = [auroc(scores[draw], failed[draw]) for draw in draws] if len(scores) else []
    known = [value for value in values if np.isfinite(value)]
    if not known:
        return (float("nan"),) * 3
    low, high = np.percentile(known, [2.5, 97.5])
    return auroc(scores, failed), float(low), float(high)
