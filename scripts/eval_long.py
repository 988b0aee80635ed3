"""Edits long clips of the demo's world in four ways, and prints how they drift.

    python scripts/eval_long.py [--edits 24] [--preset hard_lock] [--steps 12] [--png DIR]
    python scripts/eval_long.py --ways windows,moving --csv docs/long_clips.csv

Held-out clips of 33 and 65 frames, each edited to another colour and shape inside a box around the
object:

- `windows`: one run over overlapping windows of 9 frames; `moving` moves them from step to step.
- `whole`: one run over the clip as it is.
- `chunks`: runs over parts of 9 frames that know nothing of each other.
- `from_last`: the same, where each part begins with the last frame of the edit before, decoded and
  encoded again and kept, as VACE's users do it.
- `vae`: no edit at all, but the clip with the wanted object through the VAE: what is left to the
  others where they decode a clip in one piece.

`right` is the share of clips in which every nine frames show the wanted colour and shape.
Foreground and background PSNR are against the clip with the wanted object rendered into it. `drift`
is the slope of the colour error over time: of the mean colour of background and object against the
truth's, in levels of 255 per 100 frames, the size of the least-squares slope of its distance; its
interval holds 95% of means over clips drawn again. `seams` is the change from frame to frame at the
borders of windows or parts, beside that elsewhere, over the same ratio of the truth.
"""

import argparse
import csv
import pathlib
import time

import numpy as np
from eval_demo import FIRST_SEED, another, box_mask, interval, masked_psnr

import kvlock_jax as kvl
from kvlock_jax.demo.judge import judge
from kvlock_jax.demo.world import FRAMES, random_scene, render, shape_cover
from kvlock_jax.evaluate import metrics
from kvlock_jax.media.encode import write_png
from kvlock_jax.pipeline.api import round_trip
from kvlock_jax.sampling.windows import number

WAYS = ("vae", "windows", "whole", "chunks", "from_last")
LENGTHS = (33, 65)


def settings(flags, long: str, **sample):
    """The config of a way."""
    config = kvl.config("demo")
    config.preset, config.sample.steps, config.sample.long = flags.preset, flags.steps, long
    config.sample.update(sample)
    config.kvlock.skip_background = False  # or every mask would compile a program of its own
    return config


def edited(model, flags, way: str, clip, ideal, mask, prompt: str, seed: int) -> np.ndarray:
    """The clip, edited in one of the ways; `ideal` is the truth."""
    if way == "vae":
        return round_trip(model, ideal)
    if way in ("windows", "moving", "whole"):
        long = "whole" if way == "whole" else "windows"
        config = settings(flags, long, seed=seed, window_shift=way == "moving")
        return kvl.edit(model, clip, mask, prompt, config=config).video
    config, parts = settings(flags, "whole", seed=seed), []
    kept = 1 if way == "from_last" else 0
    done = 0
    while done < len(clip):
        begin = max(0, done - kept)
        part, region = (x[begin : begin + FRAMES].copy() for x in (clip, mask))
        if kept and parts:
            part[0], region[0] = parts[-1][-1], False
        if not region.any():
            parts.append(part[done - begin :])
        else:
            found = kvl.edit(model, part, region, prompt, config=config).video
            parts.append(found[done - begin :])
        done = begin + len(part)
    return np.concatenate(parts)


def borders(way: str, frames: int) -> np.ndarray:
    """Frames that a window or a part begins with; those of windows where two weigh the same."""
    at = np.zeros(frames, bool)
    if way in ("chunks", "from_last"):
        at[FRAMES :: FRAMES if way == "chunks" else FRAMES - 1] = True
    elif way != "whole":
        latents = (frames - 1) // 4 + 1
        count = number(latents, 3, 1)
        starts = np.round(np.linspace(0, latents - 3, count)).astype(int)
        for start in starts[1:]:  # the latent frame that both hold, and the one after
            at[4 * start - 3] = at[min(4 * start + 1, frames - 1)] = True
    return at


def colours(video, scene, mask) -> np.ndarray:
    """The mean colour of the object's inside and of the background in each frame, `2 frames 3`."""
    inside = [shape_cover(scene.shape, 0.6 * scene.radius, c) > 0.99 for c in scene.centres]
    outside = ~np.asarray(metrics.dilate(mask, 8))
    mean = [
        [frame[at].mean(0) for frame, at in zip(video, part, strict=True)]
        for part in (inside, outside)
    ]
    return np.array(mean)


def slopes(found, truth) -> np.ndarray:
    """The slope of the colour's distance, of object and background, per 100 frames."""
    distance = np.linalg.norm(found - truth, axis=-1)
    return np.array([100 * np.polyfit(np.arange(len(d)), d, 1)[0] for d in distance])


def seams(video, at) -> float:
    """The change from frame to frame at borders over that elsewhere."""
    change = np.abs(np.diff(video.astype(np.float32), axis=0)).mean((1, 2, 3))
    return float(change[at[1:]].mean() / change[~at[1:]].mean()) if at.any() else np.nan


def main() -> None:
    """Parses the flags, edits and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--edits", type=int, default=24)
    parser.add_argument("--preset", default="hard_lock")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--frames", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--model", default="demo")
    parser.add_argument("--png", type=pathlib.Path, help="folder for a sheet of frames")
    parser.add_argument("--csv", type=pathlib.Path, help="file for every edit's figures")
    flags = parser.parse_args()
    model, rng, rows = kvl.load(flags.model), np.random.default_rng(FIRST_SEED), []
    for frames in map(int, flags.frames.split(",")):
        scenes = [
            random_scene(FIRST_SEED + i, held_out=True, frames=frames) for i in range(flags.edits)
        ]
        targets = [another(scene, rng) for scene in scenes]
        for way in flags.ways.split(","):
            found, start = [], 0.0
            for n, (scene, target) in enumerate(zip(scenes, targets, strict=True)):
                clip, ideal, mask = render(scene).video, render(target).video, box_mask(scene)
                if n == 1:
                    start = time.perf_counter()  # the first one compiles
                video = edited(model, flags, way, clip, ideal, mask, target.caption, FIRST_SEED + n)
                parts = [slice(t, t + FRAMES) for t in range(0, frames - FRAMES + 1, FRAMES)]
                verdicts = [judge(video[part], mask[part]) for part in parts]
                wanted = (target.colour, target.shape)
                right = np.mean([(v.colour, v.shape) == wanted for v in verdicts]) == 1
                of_object, of_background = slopes(
                    *(colours(x, target, mask) for x in (video, ideal))
                )
                at = borders(way, frames)
                found.append(
                    {
                        "frames": frames,
                        "way": way,
                        "seed": FIRST_SEED + n,
                        "right": float(right),
                        "foreground": masked_psnr(ideal, video, mask),
                        "background": metrics.background_psnr(clip, video, mask),
                        "drift_object": of_object,
                        "drift_background": of_background,
                        "seams": seams(video, at) / seams(ideal, at),
                    }
                )
                if n == 0 and flags.png:
                    sheet(flags.png, f"{way}_{frames}", ideal, video)
            seconds = (time.perf_counter() - start) / max(1, flags.edits - 1)
            rows += found
            mean = {key: [one[key] for one in found] for key in found[0] if key != "way"}
            print(
                f"{frames} frames, {way}: right {np.mean(mean['right']):.1%}, "
                f"foreground {interval(mean['foreground'])} dB, "
                f"background {interval(mean['background'])} dB, "
                f"drift of the object {interval(np.abs(mean['drift_object']))}, "
                f"of the background {interval(np.abs(mean['drift_background']))}, "
                f"seams {np.mean(mean['seams']):.2f}, {seconds:.1f} s an edit",
                flush=True,
            )
    if flags.csv:
        with flags.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def sheet(folder, name, ideal, video) -> None:
    """The truth above the edit, every fourth frame."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [np.concatenate(list(x[::4]), 1) for x in (ideal, video)]
    write_png(folder / f"{name}.png", np.concatenate(rows, 0))


if __name__ == "__main__":
    main()
