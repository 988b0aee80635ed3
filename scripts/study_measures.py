"""What the study measures of an edit, and the statistics of what was measured."""

import dataclasses

import numpy as np
from study_cases import Case

from kvlock_jax.demo.judge import judge
from kvlock_jax.demo.world import COLOURS, SIZE, render_background, shape_cover
from kvlock_jax.evaluate import metrics

_RADII = np.arange(-3.0, 3.5, 1.0)  # px from the target's radius, of the nearest valid render
_SHIFTS = [(x, y) for y in range(-3, 4) for x in range(-3, 4)]  # px from the target's centres
_DRAWS = 2000


@dataclasses.dataclass(frozen=True)
class Measures:
    """The measures of one edit; PSNR in dB, errors in levels of 255.

    Attributes:
      right: whether the judge sees the target inside the mask: its shape, and its colour where the
        prompt gives one.
      truth_psnr: inside the mask, to the clip with the target rendered into it.
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
    verdict = judge(edited, case.mask)
    colour = case.open_colour or verdict.colour == case.target.colour
    nearest, cover = _nearest(case, edited)
    return Measures(
        right=bool(verdict.shape == case.target.shape and colour),
        truth_psnr=_psnr(case.truth[case.mask], edited[case.mask]),
        nearest_psnr=_psnr(nearest[case.mask], edited[case.mask]),
        flicker=_flicker(edited, cover),
        background_psnr=metrics.background_psnr(case.video, edited, case.mask),
        background_ssim=metrics.background_ssim(case.video, edited, case.mask),
        ring_error=metrics.ring_error(case.video, edited, case.mask),
    )


def _psnr(wanted: np.ndarray, found: np.ndarray) -> float:
    error = ((wanted.astype(float) - found) ** 2).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-3)))


def _nearest(case: Case, edited: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The valid render that is nearest inside the mask, and the cover of its object."""
    names = list(COLOURS) if case.open_colour else [case.target.colour]
    behind = render_background(case.target).astype(np.float32)
    outside = ~case.mask[..., None]
    middle = len(edited) // 2
    best: tuple = (np.inf,)
    for name in names:
        colour = np.asarray(COLOURS[name], np.float32)
        for change in _RADII:
            radius = case.target.radius + change
            error, _, _ = _placed(case, edited, behind, colour, radius, middle)
            best = min(best, (error, name, radius))
    _, name, radius = best
    colour = np.asarray(COLOURS[name], np.float32)
    frames = range(len(edited))
    placed = [_placed(case, edited, behind, colour, radius, number) for number in frames]
    video = np.stack([frame for _, frame, _ in placed])
    return np.where(outside, edited, video), np.stack([cover for *_, cover in placed])


def _placed(case, edited, behind, colour, radius, number) -> tuple[float, np.ndarray, np.ndarray]:
    """The error, the frame and the cover of an object where it fits a frame best."""
    mask, found = case.mask[number], edited[number][case.mask[number]].astype(np.float32)
    x, y = case.target.centres[number]
    back = behind[number][mask]
    best: tuple = (np.inf, None)
    for shift in _SHIFTS:
        cover = shape_cover(case.target.shape, radius, (x + shift[0], y + shift[1]), SIZE)
        inside = cover[mask][:, None]
        error = float(((back + inside * (colour - back) - found) ** 2).mean())
        if error < best[0]:
            best = (error, cover)
    error, cover = best
    frame = behind[number] + cover[..., None] * (colour - behind[number])
    return error, np.clip(np.rint(frame), 0, 255).astype(np.uint8), cover


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
