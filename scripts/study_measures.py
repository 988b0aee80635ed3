"""What the study measures of an edit, and the statistics of what was measured."""

import dataclasses
import itertools

import numpy as np
from study_cases import Case, Target

from kvlock_jax.demo.judge import judge
from kvlock_jax.demo.world import COLOURS, SIZE, shape_cover
from kvlock_jax.evaluate import metrics

_RADII = np.arange(-3.0, 3.5, 1.0)  # px from the target's radius, of the nearest valid render
_FINER = (1.0, 0.5, 0.25)  # px by which places and sizes are refined, after each other
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
        flicker=float(np.max([_flicker(edited, fit.cover) for fit in fits])),
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
        _Frame(target, edited, name, middle).coarse(float(target.thing.radius + change))
        for name in names
        for change in _RADII
    ]
    best = min(tried, key=lambda placed: placed.error)
    radius = best.frame.refined(best, sizes=True).radius
    frames = [_Frame(target, edited, best.frame.name, number) for number in range(len(edited))]
    placed = [frame.refined(frame.coarse(radius)) for frame in frames]
    cover = np.stack([one.frame.whole_cover(one) for one in placed])
    mixed = target.behind + cover[..., None] * (
        np.asarray(COLOURS[best.frame.name]) - target.behind
    )
    return _Fit(np.clip(np.rint(mixed), 0, 255)[target.mask], cover)


@dataclasses.dataclass(frozen=True, eq=False)
class _Placed:
    """An object of a radius at a centre (x, y) in a frame; the mean square error in the mask."""

    frame: "_Frame"
    error: float
    radius: float
    centre: tuple[float, float]


class _Frame:
    """A frame of an edit, and how well objects of a colour fit into it."""

    def __init__(self, target: Target, edited: np.ndarray, name: str, number: int):
        self.name, self._reach, self._shape = name, target.reach, target.thing.shape
        self._centre = tuple(map(float, target.centres[number]))
        self._front, mask = target.front[number], target.mask[number]
        y, x = np.nonzero(mask)
        # A square round the mask, all that is looked at.
        self._low = (int(x.min()), int(y.min()))
        self._side = int(max(x.max() - x.min(), y.max() - y.min())) + 1
        self._inside = (y - self._low[1], x - self._low[0])
        self._clear = np.float32(1 - self._front[mask])
        back = target.behind[number][mask].astype(np.float32)
        found = edited[number][mask].astype(np.float32) - back
        change = np.asarray(COLOURS[name], np.float32) - back
        count = len(back)  # means over the mask, of sums over channels
        self._squares = np.square(change).sum(-1) / count
        self._products = (change * found).sum(-1) / count
        self._rest = float(np.square(found).mean())

    def whole_cover(self, placed: _Placed) -> np.ndarray:
        """The share of each pixel of the frame that an object covers, 0-1."""
        return shape_cover(self._shape, placed.radius, placed.centre, SIZE) * (1 - self._front)

    def at(self, radii: np.ndarray, centres: np.ndarray) -> _Placed:
        """The object that fits best among radii and their centres, N and N 2."""
        near = np.moveaxis(centres - np.asarray(self._low), -1, 0)[..., None, None]
        pictures = shape_cover(self._shape, radii[:, None, None], tuple(near), self._side)
        errors = self._errors(pictures[:, *self._inside] * self._clear)
        best = int(errors.argmin())
        x, y = map(float, centres[best])
        return _Placed(self, float(errors[best]), float(radii[best]), (x, y))

    def _errors(self, covers: np.ndarray) -> np.ndarray:
        """The mean of |cover change - found|^2 over the mask, multiplied out."""
        return (covers**2 @ self._squares - 2 * covers @ self._products) / 3 + self._rest

    def coarse(self, radius: float) -> _Placed:
        """The object that fits best among centres at every second pixel."""
        reach = self._reach + self._reach % 2
        wide = tuple(c - low + reach for c, low in zip(self._centre, self._low, strict=True))
        # All shifts of the object at once: windows of one picture of it.
        picture = shape_cover(self._shape, radius, wide, self._side + 2 * reach)
        side = self._side + 2 * reach
        corners = np.arange(0, 2 * reach + 1, 2)
        corners = (corners[:, None] * side + corners).reshape(-1, 1)
        pixels = self._inside[0] * side + self._inside[1]
        errors = self._errors(picture.reshape(-1).take(corners + pixels) * self._clear)
        errors = errors.reshape(reach + 1, reach + 1)
        y, x = np.unravel_index(errors.argmin(), errors.shape)
        # The window at 0 shows the object `reach` px to the right.
        x, y = (c + reach - 2 * float(at) for c, at in zip(self._centre, (x, y), strict=True))
        return self.at(np.array([radius]), np.array([[x, y]]))

    def refined(self, placed: _Placed, sizes: bool = False) -> _Placed:
        """The object moved, and with `sizes` grown, to where it fits best."""
        for step in _FINER:
            shifts = (-step, 0.0, step)
            sized = (0.0,) if not sizes or step == 1 else shifts
            moves = np.array(list(itertools.product(sized, shifts, shifts)))
            centres = np.asarray(placed.centre) + moves[:, 1:]
            placed = min(
                [placed, self.at(placed.radius + moves[:, 0], centres)], key=lambda one: one.error
            )
        return placed


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


def share_interval(ones: np.ndarray, others: np.ndarray) -> tuple[float, float, float]:
    """The difference of two paired shares, and its interval of 95% (Agresti and Min, 2005).

    Unlike a bootstrap's, it has a width where all pairs are equal.
    """
    gains, losses = int((ones > others).sum()), int((ones < others).sum())
    count = len(ones) + 2
    middle = (gains - losses) / count
    width = 1.96 * np.sqrt(gains + losses + 1 - (gains - losses) ** 2 / count) / count
    return (gains - losses) / len(ones), middle - width, middle + width


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
