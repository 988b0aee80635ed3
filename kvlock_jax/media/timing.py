"""Frame rates and timestamps."""

import itertools
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

FASTEST = 480  # frames per second; a rate above this one is the tick of a clock, not a rate
_COMMON = tuple(Fraction(n * 1000, 1001) for n in (24, 30, 60, 120)) + tuple(
    Fraction(n) for n in (8, 10, 12, 15, 16, 24, 25, 30, 48, 50, 60, 90, 100, 120, 240)
)


def pace(
    stamps: Sequence[Fraction | None], declared: Sequence[Fraction | None], tick: Fraction
) -> tuple[Fraction | None, np.ndarray | None]:
    """The frame rate of timestamps, and the seconds of each frame where they are not even.

    Timestamps that a clock of `tick` seconds rounds still count as even, at the first rate that
    they fit: a declared one, a common one, or their mean.

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
    times = [stamp - stamps[0] for stamp in stamps]
    mean = (len(times) - 1) / times[-1]
    for rate in (*rates, *_COMMON, mean):
        if all(abs(time - n / rate) <= tick for n, time in enumerate(times)):
            return rate, None
    return mean, np.array([float(time) for time in times])


def _increasing(stamps: Sequence[Fraction | None]) -> bool:
    return None not in stamps and all(a < b for a, b in itertools.pairwise(stamps))
