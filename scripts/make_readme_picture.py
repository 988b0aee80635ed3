"""Draws `docs/demo.png` from the results of `scripts/demo.sh`: three frames and the run's curves.

python scripts/make_readme_picture.py
"""

import pathlib

import numpy as np

from kvlock_jax.media.decode import read_image, read_video
from kvlock_jax.media.encode import write_png

ROOT = pathlib.Path(__file__).parent.parent


def main() -> None:
    """Writes the picture."""
    frames = read_video(ROOT / "demo_out" / "side_by_side.mp4").frames
    chosen = frames[[0, len(frames) // 2, -1]].repeat(2, axis=1).repeat(2, axis=2)
    curves = read_image(ROOT / "demo_out" / "trace.png")
    rows = np.concatenate([np.pad(f, ((4, 4), (4, 4), (0, 0)), "edge") for f in chosen])
    picture = np.full(
        (max(len(rows), len(curves)), rows.shape[1] + curves.shape[1], 3), 255, np.uint8
    )
    picture[: len(rows), : rows.shape[1]] = rows
    picture[: len(curves), rows.shape[1] :] = curves
    write_png(ROOT / "docs" / "demo.png", picture)


if __name__ == "__main__":
    main()
