"""What an edited video keeps of its source beside the pixels."""

import dataclasses
from fractions import Fraction

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Sound:
    """Sound as it was compressed, in memory; `media.sound` reads and writes it.

    Attributes:
      data: a file of packets, untouched, in a container that holds any codec.
      lead: seconds by which the first sound comes before the first frame; 0 where it does not.
      shift: seconds to add to the file's times for time zero to be the first frame.
    """

    data: bytes
    lead: Fraction = Fraction(0)
    shift: Fraction = Fraction(0)


@dataclasses.dataclass(frozen=True, eq=False)
class Footage:
    """What an edited video keeps of its source beside the pixels.

    Attributes:
      times: seconds of each frame from the first one, float64; None where they are evenly spaced.
      audio: the sound of the frames, if any.
      pixel_aspect: width over height of a pixel; 1 is square.
    """

    times: np.ndarray | None = None
    audio: Sound | None = None
    pixel_aspect: Fraction = Fraction(1)
