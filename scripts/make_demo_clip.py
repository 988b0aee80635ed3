"""Renders the bundled clip and mask that `scripts/demo.sh` edits.

    python scripts/make_demo_clip.py

The mask is a box around the object, so that it does not tell the new shape.
"""

import dataclasses
import pathlib

import numpy as np
from eval_demo import box_mask

from kvlock_jax.demo.world import random_scene, render
from kvlock_jax.media.encode import write_video

FOLDER = pathlib.Path(__file__).parent.parent / "kvlock_jax" / "demo"
SEED = 920_000_007  # neither trained nor evaluated on


def main() -> None:
    """Writes the clip and its mask losslessly."""
    scene = random_scene(SEED, held_out=True)
    scene = dataclasses.replace(scene, shape="circle", colour="red")
    white = np.repeat(box_mask(scene)[..., None], 3, -1).astype(np.uint8) * 255
    write_video(FOLDER / "clip.mp4", render(scene).video, 8, lossless=True)
    write_video(FOLDER / "mask.mp4", white, 8, lossless=True)


if __name__ == "__main__":
    main()
