"""Prints the demo model's figures, from seeds and photos it was not trained on.

    python scripts/eval_demo.py [--model DIR] [--presets kvlock,cfg] [--png DIR]
    python scripts/eval_demo.py --context_scale 0 --presets kvlock_anchor,cfg   # as text-to-video
    python scripts/eval_demo.py --presets fast,fast:cache_every=10+kappa=5   # with other settings

Texts to video are judged on 4 seeds of each of the 24 captions; edits on 48 clips, each to another
colour and another shape inside a box 4 px wider than the object. Background PSNR is that of
METHOD.md section 13, beside its ceiling: the same clips through the VAE and back. Foreground PSNR
is that of the box against the clip with the wanted object rendered into it. Intervals hold 95% of
means over clips drawn again.
"""

import argparse
import copy
import dataclasses
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np

import kvlock_jax as kvl
from kvlock_jax import lock
from kvlock_jax.demo.judge import judge
from kvlock_jax.demo.world import COLOURS, SHAPES, Scene, random_scene, render, render_background
from kvlock_jax.evaluate import metrics
from kvlock_jax.media.encode import write_png
from kvlock_jax.models.text.prompts import encode_prompts
from kvlock_jax.models.vae import autoencoder
from kvlock_jax.pipeline.encode import encode_edits
from kvlock_jax.pipeline.overrides import apply_overrides
from kvlock_jax.pipeline.settings import resolve_settings
from kvlock_jax.sampling import solvers
from kvlock_jax.sampling.loop import Program, sample

FIRST_SEED = 910_000_000  # training never comes near
BATCH = 16
MARGIN = 4


def box_mask(scene: Scene) -> np.ndarray:
    """A square around the object in every frame, so that the mask does not give the shape away."""
    y, x = np.mgrid[:96, :96]
    reach = scene.radius + MARGIN
    return np.stack([np.maximum(abs(x - cx), abs(y - cy)) <= reach for cx, cy in scene.centres])


def another(scene: Scene, rng: np.random.Generator) -> Scene:
    """The same scene with another colour and shape."""
    colour = rng.choice([c for c in COLOURS if c != scene.colour])
    shape = rng.choice([s for s in SHAPES if s != scene.shape])
    return dataclasses.replace(scene, colour=str(colour), shape=str(shape))


def generate(model, config, scenes, seeds, clips, masks):
    """Edits clips to match scenes; returns the edits and the traces' means in the window."""
    settings = resolve_settings(config)
    networks = model.checkpoint
    how = settings.sample
    table = solvers.table(how.solver, how.steps, how.shift, how.grid)
    knobs = lock.knobs(settings.lock, how.guidance_scale)
    program = Program.of(settings.lock, branches=how.branches)
    videos, traces = [], []
    for i in range(0, len(scenes), BATCH):
        part = slice(i, i + BATCH)
        texts = [text for s in scenes[part] for text in (s.caption, "")] + [""] * BATCH
        context = encode_prompts(networks.text_encoder, model.tokenizer, texts)
        draw = jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), (3, 12, 12, 16)))
        noise = draw(jnp.asarray(seeds[part], jnp.uint32))
        edits = encode_edits(
            networks, clips[part], list(masks[part]), context, settings.edit, noise
        )
        start = jnp.array(edits.noise, copy=True)
        latents, trace = sample(networks.transformer, start, edits, table, knobs, program=program)
        videos.append(np.asarray(autoencoder.decode(networks.vae, edits.grid.join(latents))[0]))
        window = np.asarray(trace.scheduled)
        fields = (trace.sigma2, trace.fusion_ratio, trace.guidance_scale)
        traces.append([np.asarray(f)[window].mean() for f in fields])
    return np.concatenate(videos), np.mean(traces, 0)


def round_trip(model, clips) -> np.ndarray:
    """The clips after a round trip through the VAE."""
    networks = model.checkpoint
    return np.asarray(autoencoder.decode(networks.vae, autoencoder.encode(networks.vae, clips))[0])


def score(videos, scenes) -> tuple[float, float]:
    """The shares of videos with the right colour and shape, and with the right colour."""
    verdicts = [judge(video) for video in videos]
    colour = [v.colour == s.colour for v, s in zip(verdicts, scenes, strict=True)]
    both = [
        right and v.shape == s.shape for right, v, s in zip(colour, verdicts, scenes, strict=True)
    ]
    return float(np.mean(both)), float(np.mean(colour))


def main() -> None:
    """Parses the flags and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    presets = "cfg,kvlock,hard_lock,fixed_half,global_detection,kvlock_anchor"
    parser.add_argument("--presets", default=presets)
    parser.add_argument("--steps", type=int, help="instead of the config's steps")
    parser.add_argument("--guidance", type=float, help="instead of the config's guidance scale")
    parser.add_argument("--shift", type=float, help="instead of the config's shift")
    parser.add_argument("--context_scale", type=float, help="0 makes VACE weights text-to-video")
    parser.add_argument("--png", type=pathlib.Path, help="folder for sheets of frames")
    flags = parser.parse_args()
    model = kvl.load(flags.model)
    config = kvl.config("demo")
    if flags.guidance is not None:
        config.sample.guidance_scale = flags.guidance
    if flags.steps is not None:
        config.sample.steps = flags.steps
    if flags.shift is not None:
        config.sample.shift = flags.shift
    if flags.context_scale is not None:
        config.edit.context_scale = flags.context_scale
    hints = model.checkpoint.configs.transformer.vace_layers and config.edit.context_scale
    print(f"backbone: {'VACE' if hints else 'text-to-video'}")

    scenes = [random_scene(FIRST_SEED + i, held_out=True) for i in range(48)]
    clips = np.stack([render(s).video for s in scenes])
    back = np.concatenate([round_trip(model, clips[i : i + 16]) for i in range(0, 48, 16)])
    kept = metrics.psnr(clips.reshape(-1, 96, 96, 3), back.reshape(-1, 96, 96, 3))
    print(f"VAE round trip, 48 held-out clips: {kept:.2f} dB")
    real, after = score(clips, scenes), score(back, scenes)
    empty = [judge(render_background(s)).colour is None for s in scenes]
    print(
        f"judge: renders {real[0]:.1%}, after the round trip {after[0]:.1%}, "
        f"empty backgrounds {np.mean(empty):.1%}"
    )

    wanted = [dataclasses.replace(scenes[0], shape=s, colour=c) for s in SHAPES for c in COLOURS]
    wanted = wanted * 4
    plain = copy.deepcopy(config)
    plain.preset = "cfg"
    seeds = [FIRST_SEED + i for i in range(len(wanted))]
    nothing = np.zeros((len(wanted), *clips.shape[1:]), np.uint8)
    videos, _ = generate(model, plain, wanted, seeds, nothing, np.ones(nothing.shape[:-1], bool))
    both, colour = score(videos, wanted)
    print(f"text to video, {len(wanted)}: both right {both:.1%}, colour {colour:.1%}")
    sheet(flags.png, "text_to_video", videos)

    rng = np.random.default_rng(FIRST_SEED)
    targets = [another(s, rng) for s in scenes]
    masks = np.stack([box_mask(s) for s in scenes])
    ceiling = np.mean([metrics.background_psnr(*x) for x in zip(clips, back, masks, strict=True)])
    print(f"edits, 48: ceiling of background PSNR {ceiling:.2f} dB")
    ideal = np.stack([render(s).video for s in targets])
    for name in flags.presets.split(","):
        config.preset, *changes = re.split("[:+]", name)
        changes = [f"--config.kvlock.{change}" for change in changes]
        chosen = apply_overrides(copy.deepcopy(config), changes)
        videos, means = generate(model, chosen, targets, seeds[:48], clips, masks)
        both, colour = score(videos, targets)
        kept = [metrics.background_psnr(*x) for x in zip(clips, videos, masks, strict=True)]
        inside = [masked_psnr(*x) for x in zip(ideal, videos, masks, strict=True)]
        print(
            f"  {name}: both right {both:.1%}, colour {colour:.1%}, "
            f"background {interval(kept)} dB, foreground {interval(inside)} dB; "
            f"window means sigma2 {means[0]:.4f}, alpha {means[1]:.2f}, omega {means[2]:.2f}"
        )
        sheet(flags.png, f"edits_{name}", np.concatenate([clips, videos], 3))
    print(f"compiled loops: {sample._cache_size()}")


def masked_psnr(wanted, found, mask) -> float:
    """The PSNR of the pixels under a mask."""
    error = (wanted[mask].astype(float) - found[mask]) ** 2
    return 10 * np.log10(255**2 / error.mean())


def interval(values) -> str:
    """A mean, and the interval of 95% of its bootstrap."""
    rng = np.random.default_rng(0)
    means = rng.choice(values, (2000, len(values))).mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return f"{np.mean(values):.2f} ({low:.2f} to {high:.2f})"


def sheet(folder, name, videos) -> None:
    """The middle frames of up to 48 videos as one picture."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        rows = [
            np.concatenate(list(videos[i : i + 8, 4]), 1) for i in range(0, min(48, len(videos)), 8)
        ]
        write_png(folder / f"{name}.png", np.concatenate(rows, 0))


if __name__ == "__main__":
    main()
