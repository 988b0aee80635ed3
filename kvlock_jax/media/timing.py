"""Frame rates and timestamps."""

import itertools
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

FASTEST = 480  # frames per second; a rate above this one is the tick of a clock, not a rate
_MILLISECOND = Fraction(1, 1000)
_COMMON = tuple(Fraction(n * 1000, 1001) for n in (24, 30, 60, 120)) + tuple(
    Fraction(n) for n in (8, 10, 12, 15, 16, 24, 25, 30, 48, 50, 60, 90, 100, 120, 240)
)


def pace(
    stamps: Sequence[Fraction | None], declared: Sequence[Fraction | None], tick: Fraction
) -> tuple[Fraction | None, np.ndarray | None]:
    """The frame rate of timestamps, and the seconds of each frame where they are not even.

    Timestamps still count as even where a clock rounded them, to `tick` or to the milliseconds that
    they had in another container. Their rate is the first declared one that fits, the common one
    that fits best, or their mean.

    Args:
      stamps: seconds of each frame; None where the file has none.
      declared: rates that the container or the codec declares, best first.
      tick: seconds of the clock that the timestamps count.

    Returns:
      Frames per second, None where neither timestamps nor declarations have any; and `times` as in
      `Video`.
    """
    rates = [rate for rate in declared if rate and 0 < rate <= FASTEST]
    if len(stamps) < 2 or not _increasing(stamps):
        return (rates[0] if rates else None), None
    mean = (len(stamps) - 1) / (stamps[-1] - stamps[0])
    times = np.array([float(stamp - stamps[0]) for stamp in stamps])
    fits = float(max(tick, _MILLISECOND)) + 1e-9
    common = min(_COMMON, key=lambda rate: _error(times, rate))
    for rate in (*rates, common, mean):
        if _error(times, rate) <= fits:
            return rate, None
    return mean, times


def _error(times: np.ndarray, rate: Fraction) -> float:
    """Seconds by which the frames of a steady rate are off, at most."""
    return float(np.abs(times - np.arange(len(times)) / float(rate)).max())


def _increasing(stamps: Sequence[Fraction | None]) -> bool:
    return None not in stamps and all(a < b for a, b in itertools.pairwise(stamps))
