"""What commands are given, and what they left in their folder."""

import json
from pathlib import Path

import numpy as np

from kvlock_jax.media import decode

FILES = ["in.mkv", "mask.mkv"]


def edited(path: str = "out.mkv") -> np.ndarray:
    return decode.read_video(path).frames


def settings_of(path: str = "t.json") -> dict:
    return json.loads(Path(path).read_text())["settings"]


def interrupt(*_, **__):
    raise KeyboardInterrupt
