"""Timestamps, sound and pixel aspect, which an edited video keeps of its source."""

import dataclasses
from fractions import Fraction

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Sound:
    """Compressed sound in memory; `media.sound` reads and writes it.

    Attributes:
      data: file of the packets, bit for bit, in a container that holds their codec.
      lead: seconds from the first sound to the first frame; 0 where the frame comes first.
      shift: seconds to add to the times of `data` so that the first frame is at zero.
    """

    data: bytes
    lead: Fraction = Fraction(0)
    shift: Fraction = Fraction(0)


@dataclasses.dataclass(frozen=True, eq=False)
class Footage:
    """Properties of a source, other than its pixels, that an edited video keeps.

    Attributes:
      times: seconds from the first frame to each, float64; None where they are evenly spaced.
      audio: sound of the frames, if any.
      pixel_aspect: width over height of a pixel; 1 is square.
    """

    times: np.ndarray | None = None
    audio: Sound | None = None
    pixel_aspect: Fraction = Fraction(1)
