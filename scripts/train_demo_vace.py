"""Trains the demo model's context blocks: VACE by the publisher's recipe, on the demo world.

    python scripts/train_demo_vace.py --vae runs/vae/params.npz --dit runs/dit --run runs/vace

The transformer of `train_demo_dit.py` stays frozen; its blocks, copied, become context blocks that
learn to inpaint by text under masks of several kinds. Started again it goes on from where it was.
`gauge` is as there, under boxes; `kept` the squared error of x0 outside of them at sigma 0.8.
"""

import argparse
import pathlib

from training import adamw, average, fit, noised  # isort: skip  (makes the devices before JAX starts)

import demo_models
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from train_demo_dit import (
    BATCH,
    DROP,
    GRID,
    HELD_OUT_START,
    OBJECT_WEIGHT,
    PROMPTS,
    SHARD,
    SHIFT,
    contexts,
    encode,
)

from kvlock_jax.demo.world import COLOURS, FRAMES, SIZE, random_scene, render, shape_cover
from kvlock_jax.lock import to_latent_mask
from kvlock_jax.models.vae.autoencoder import WanVAE
from kvlock_jax.models.wan.conditioning import fold_mask
from kvlock_jax.models.wan.vace import VACEContext, WanVACETransformer

KINDS = {"exact": 0.15, "grown": 0.2, "box": 0.4, "frames": 0.08, "all": 0.12, "none": 0.05}
"""Kinds of masks and their shares: `all` trains text-to-video, `none` trains keeping."""


def mask_of(seed: int, *, held_out: bool = False, kind: str | None = None) -> np.ndarray:
    """The pixels to inpaint in the clip of a seed, of a kind that the seed draws by default."""
    rng = np.random.default_rng([seed, 1])
    kind = kind or str(rng.choice(list(KINDS), p=list(KINDS.values())))
    scene = random_scene(seed, held_out=held_out)
    margin = rng.uniform(2, 10)
    if kind in ("exact", "grown"):
        radius = scene.radius + (margin if kind == "grown" else 0)
        return np.stack([shape_cover(scene.shape, radius, c) > 0 for c in scene.centres])
    if kind == "box":
        y, x = np.mgrid[:SIZE, :SIZE]
        reach = scene.radius + margin
        return np.stack([np.maximum(abs(x - a), abs(y - b)) <= reach for a, b in scene.centres])
    mask = np.full((FRAMES, SIZE, SIZE), kind == "all")
    if kind == "frames":
        first = rng.integers(0, FRAMES - 3)
        mask[first : first + rng.integers(3, FRAMES)] = True
    return mask


def inactive_shard(vae: WanVAE, start: int, held_out: bool) -> dict[str, np.ndarray]:
    """Latents of `SHARD` clips with the masked pixels at 0, from seed `start` on."""
    parts = []
    for first in range(start, start + SHARD, 20):
        seeds = range(first, first + 20)
        kind = "box" if held_out else None
        clips = np.stack([render(random_scene(s, held_out=held_out)).video for s in seeds])
        masks = np.stack([mask_of(s, held_out=held_out, kind=kind) for s in seeds])
        video = np.where(masks[..., None], 0.0, clips / np.float32(127.5) - 1)
        parts.append(np.asarray(encode(vae, video.astype(np.float32)), np.float16))
    return {"inactive": np.concatenate(parts)}


def encoded(
    vae: WanVAE, clips: pathlib.Path, folder: pathlib.Path, shards: int
) -> tuple[dict, dict]:
    """The latents of `train_demo_dit.py` and the inactive latents, held-out ones too."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for i in range(-1, shards):
        path = folder / f"{i}.npz"
        if not path.exists():
            part = path.with_suffix(".part.npz")
            start = HELD_OUT_START if i < 0 else i * SHARD
            np.savez(part, **inactive_shard(vae, start, held_out=i < 0))
            part.rename(path)
            print(f"encoded {path.name}", flush=True)
        found[i] = dict(np.load(clips / f"{i}.npz")) | dict(np.load(path))
    held_out = found.pop(-1)
    return {k: np.concatenate([f[k] for f in found.values()]) for k in found[0]}, held_out


def main() -> None:
    """Parses the flags, encodes, and trains."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vae", type=pathlib.Path, required=True)
    parser.add_argument("--dit", type=pathlib.Path, required=True, help="the base's run")
    parser.add_argument("--run", type=pathlib.Path, default=pathlib.Path("runs/vace"))
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--shards", type=int, default=12, help=f"of {SHARD} clips")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--encode_only", action="store_true")
    flags = parser.parse_args()

    vae = WanVAE(demo_models.VAE, rngs=nnx.Rngs(0))
    nnx.update(vae, demo_models.load_params(flags.vae, nnx.state(vae)))
    data, held_out = encoded(vae, flags.dit / "clips", flags.run / "inactive", flags.shards)
    if flags.encode_only:
        return
    stats = np.load(flags.dit / "latent_stats.npz")
    mean, std = stats["mean"], stats["std"]
    # masked pixels are shown blank
    blank = jnp.zeros((1, FRAMES, SIZE, SIZE, 3), jnp.float32)
    blank = (np.asarray(encode(vae, blank)) - mean) / std
    context = contexts()

    sizes = demo_models.VACE
    model = WanVACETransformer(sizes, dtype=jnp.bfloat16, unroll=sizes.num_layers, rngs=nnx.Rngs(2))
    graph, params, base = nnx.split(model, lambda path, _: path[0].startswith("vace"), ...)
    base = demo_models.load_params(flags.dit / "params.npz", base)
    copied = {path[1:]: v for path, v in nnx.to_flat_state(base) if path[0] == "blocks"}
    layers = np.array(sizes.vace_layers)
    params = nnx.from_flat_state(
        [
            (path, v.replace(copied[path[1:]][...][layers]) if path[1:] in copied else v)
            for path, v in nnx.to_flat_state(params)
        ]
    )
    params, base = jax.tree.map(jnp.asarray, (params, base))
    optimizer = adamw(flags.rate, flags.steps)

    def velocity(params, base, z, sigma, text, control):
        model = nnx.merge(graph, params, base)
        shown = VACEContext(text, GRID.split(control), jnp.ones((z.shape[0],)))
        return GRID.join(model(GRID.split(z), 1000 * sigma, model.condition(shown, GRID)))

    def control_of(inactive, mask):
        reactive = jnp.broadcast_to(blank, inactive.shape)
        return jnp.concatenate([inactive, reactive, fold_mask(mask).astype(jnp.float32)], -1)

    def loss_fn(params, base, batch, key):
        x, inactive, prompt, weighed, mask = batch
        keys = jax.random.split(key, 3)
        u = jax.random.uniform(keys[0], (BATCH,))
        sigma = SHIFT * u / (1 + (SHIFT - 1) * u)
        prompt = jnp.where(jax.random.uniform(keys[1], (BATCH,)) < DROP, len(PROMPTS), prompt)
        z, target = noised(x, sigma, keys[2])
        found = velocity(params, base, z, sigma, context[prompt], control_of(inactive, mask))
        square = jnp.square(found - target).mean(-1)
        weight = 1 + (OBJECT_WEIGHT - 1) * weighed.astype(jnp.float32)
        return jnp.sum(weight * square) / jnp.sum(weight), {"loss": jnp.mean(square)}

    @jax.jit
    def update(state, batch):
        key = jax.random.fold_in(jax.random.key(3), state["step"])
        gradient = jax.grad(loss_fn, has_aux=True)
        grads, metrics = gradient(state["params"], state["base"], batch, key)
        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        ema = average(state["ema"], params, state["step"], 0.999)
        return state | {
            "params": params,
            "ema": ema,
            "opt_state": opt_state,
            "step": state["step"] + 1,
        }, metrics

    def normalised(part, order):
        return [(part[k][order].astype(np.float32) - mean) / std for k in ("latents", "inactive")]

    def batch(step: int):
        order = np.random.default_rng([step, 2]).integers(0, len(data["prompt"]), BATCH)
        masks = np.stack([mask_of(int(seed)) for seed in order])
        return *normalised(data, order), data["prompt"][order], data["mask"][order], masks

    count = 96
    x, inactive = map(jnp.asarray, normalised(held_out, np.arange(count)))
    prompt, weighed = held_out["prompt"][:count], jnp.asarray(held_out["mask"][:count])
    seeds = range(HELD_OUT_START, HELD_OUT_START + count)
    boxes = jnp.stack([mask_of(s, held_out=True, kind="box") for s in seeds])
    control, outside = control_of(inactive, boxes), ~to_latent_mask(boxes)
    shape, colour = prompt // len(COLOURS), prompt % len(COLOURS)

    @jax.jit
    def errors(params, base, prompt, sigma):
        sigmas = jnp.full((count,), sigma)
        z, target = noised(x, sigmas, jax.random.key(4))
        found = velocity(params, base, z, sigmas, context[prompt], control)
        square = jnp.square(found - target).mean(-1)
        kept = jnp.mean(square, where=outside)
        return jnp.sum(jnp.where(weighed, square, 0), (1, 2, 3)), sigma**2 * kept

    def gauge(state) -> dict[str, float]:
        params, base = state["ema"], state["base"]
        by_shape = [errors(params, base, len(COLOURS) * s + colour, 0.93)[0] for s in range(4)]
        right = float(np.mean(np.argmin(np.stack(by_shape), 0) == shape))
        demo_models.save_params(flags.run / "params.npz", nnx.merge_state(params, base))
        return {"gauge_0.93": right, "kept": errors(params, base, prompt, 0.8)[1]}

    state = {
        "params": params,
        "ema": params,
        "base": base,
        "opt_state": optimizer.init(params),
        "step": jnp.zeros((), jnp.int32),
    }
    fit(state, update, batch, flags.steps, flags.run, evaluate=gauge, save_every=500)


if __name__ == "__main__":
    main()
