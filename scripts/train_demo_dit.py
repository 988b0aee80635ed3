"""Trains the demo model's transformer by flow matching on latents of the demo world.

    python scripts/train_demo_dit.py --vae runs/vae/params.npz --run runs/dit --steps 12000

First it encodes the clips (kept under `--run`, so only once), then it trains; started again, it
goes on from the state it saved. The log's `gauge` is the share of held-out clips whose denoising
error at sigma 0.93 is lowest under the right shape word: it moves long before samples do.
"""

import argparse
import functools
import pathlib
import tempfile

from training import adamw, average, fit, noised  # isort: skip  (makes the devices before JAX starts)

import demo_models
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from kvlock_jax.demo.world import COLOURS, SHAPES, caption, random_scene, render
from kvlock_jax.grid import Grid
from kvlock_jax.lock import to_latent_mask
from kvlock_jax.models.text.prompts import encode_prompts
from kvlock_jax.models.text.tokenizer import Tokenizer, write_word_tokenizer
from kvlock_jax.models.vae.autoencoder import WanVAE
from kvlock_jax.models.wan.transformer import WanTransformer

BATCH, SHARD = 16, 500
GRID = Grid.of((3, 12, 12))
OBJECT_WEIGHT = 3.0  # of the loss on the object's latents
SHIFT = 2.0  # of the noise levels trained at
DROP = 0.1  # share of clips that lose their caption, for guidance
HELD_OUT_START = 900_001_000
PROMPTS = [caption(s, c) for s in SHAPES for c in COLOURS]


@jax.jit
def encode(vae: WanVAE, video: jax.Array) -> jax.Array:
    """Latents of clips, uint8 or in [-1, 1]; not normalised, since the statistics come later."""
    if video.dtype == jnp.uint8:
        video = video.astype(jnp.float32) / 127.5 - 1.0
    return vae.encode(video, chunk=2)


def encode_shard(vae: WanVAE, start: int, held_out: bool) -> dict[str, np.ndarray]:
    """Latents, captions' numbers and object masks of `SHARD` clips, from seed `start` on."""
    parts = []
    for first in range(start, start + SHARD, 20):
        scenes = [random_scene(s, held_out=held_out) for s in range(first, first + 20)]
        clips = [render(scene) for scene in scenes]
        parts.append(
            {
                "latents": np.asarray(encode(vae, np.stack([c.video for c in clips])), np.float16),
                "prompt": np.array([PROMPTS.index(c.caption) for c in clips], np.int32),
                "mask": np.asarray(to_latent_mask(np.stack([c.mask for c in clips]))),
            }
        )
    return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}


def encoded(vae: WanVAE, folder: pathlib.Path, shards: int) -> dict[str, np.ndarray]:
    """All training clips, encoded once and kept in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(-1, shards):  # shard -1 is held out
        path = folder / f"{i}.npz"
        if not path.exists():
            start = HELD_OUT_START if i < 0 else i * SHARD
            part = path.with_suffix(".part.npz")
            np.savez(part, **encode_shard(vae, start, held_out=i < 0))
            part.rename(path)
            print(f"encoded {path.name}", flush=True)
    loaded = [np.load(folder / f"{i}.npz") for i in range(shards)]
    return {k: np.concatenate([part[k] for part in loaded]) for k in loaded[0].files}


def contexts() -> jax.Array:
    """Text contexts of all captions, then of the empty prompt."""
    with tempfile.TemporaryDirectory() as folder:
        write_word_tokenizer(folder, demo_models.WORDS, demo_models.TEXT_LEN)
        tokenizer = Tokenizer(folder, demo_models.TEXT_LEN)
        return encode_prompts(demo_models.text_encoder(), tokenizer, [*PROMPTS, ""])


def main() -> None:
    """Parses the flags, encodes, and trains."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vae", type=pathlib.Path, required=True)
    parser.add_argument("--run", type=pathlib.Path, default=pathlib.Path("runs/dit"))
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument("--shards", type=int, default=16, help=f"of {SHARD} clips")
    parser.add_argument("--rate", type=float, default=1.5e-3)
    flags = parser.parse_args()

    vae = WanVAE(demo_models.VAE, rngs=nnx.Rngs(0))
    nnx.update(vae, demo_models.load_params(flags.vae, nnx.state(vae)))
    data = encoded(vae, flags.run / "clips", flags.shards)
    mean = data["latents"].mean((0, 1, 2, 3), dtype=np.float64).astype(np.float32)
    std = data["latents"].std((0, 1, 2, 3), dtype=np.float64).astype(np.float32)
    np.savez(flags.run / "latent_stats.npz", mean=mean, std=std)
    context = contexts()

    sizes = demo_models.TRANSFORMER
    dit = WanTransformer(sizes, dtype=jnp.bfloat16, unroll=sizes.num_layers, rngs=nnx.Rngs(1))
    dit.proj_out.kernel[...] = jnp.zeros_like(dit.proj_out.kernel[...])
    graph, params = nnx.split(dit)
    optimizer = adamw(flags.rate, flags.steps)

    def velocity(params, z, sigma, text):
        model = nnx.merge(graph, params)
        condition = model.condition(text, GRID)
        return GRID.join(model(GRID.split(z), 1000 * sigma, condition))

    def loss_fn(params, batch, key):
        x, prompt, mask = batch
        keys = jax.random.split(key, 3)
        u = jax.random.uniform(keys[0], (BATCH,))
        sigma = SHIFT * u / (1 + (SHIFT - 1) * u)
        prompt = jnp.where(jax.random.uniform(keys[1], (BATCH,)) < DROP, len(PROMPTS), prompt)
        z, target = noised(x, sigma, keys[2])
        square = jnp.square(velocity(params, z, sigma, context[prompt]) - target).mean(-1)
        weight = 1 + (OBJECT_WEIGHT - 1) * mask.astype(jnp.float32)
        return jnp.sum(weight * square) / jnp.sum(weight), {"loss": jnp.mean(square)}

    @jax.jit
    def update(state, batch):
        key = jax.random.fold_in(jax.random.key(1), state["step"])
        grads, metrics = jax.grad(loss_fn, has_aux=True)(state["params"], batch, key)
        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        ema = average(state["ema"], params, state["step"], 0.999)
        step = state["step"] + 1
        return {"params": params, "ema": ema, "opt_state": opt_state, "step": step}, metrics

    def batch(step: int):
        order = np.random.default_rng(step).integers(0, len(data["prompt"]), BATCH)
        x = (data["latents"][order].astype(np.float32) - mean) / std
        return x, data["prompt"][order], data["mask"][order]

    held_out = dict(np.load(flags.run / "clips" / "-1.npz"))
    count = 96
    x = jnp.asarray((held_out["latents"][:count].astype(np.float32) - mean) / std)
    prompt, mask = held_out["prompt"][:count], jnp.asarray(held_out["mask"][:count])
    shape, colour = prompt // len(COLOURS), prompt % len(COLOURS)

    @functools.partial(jax.jit, static_argnames="sigma")
    def object_error(params, prompt, sigma):
        sigmas = jnp.full((count,), sigma)
        z, target = noised(x, sigmas, jax.random.key(2))
        square = jnp.square(velocity(params, z, sigmas, context[prompt]) - target).mean(-1)
        return jnp.sum(jnp.where(mask, square, 0), (1, 2, 3))

    def gauge(state) -> dict[str, float]:
        found = {}
        for sigma in (0.93, 0.8):
            errors = [
                object_error(state["ema"], len(COLOURS) * s + colour, sigma) for s in range(4)
            ]
            found[f"gauge_{sigma}"] = float(np.mean(np.argmin(np.stack(errors), 0) == shape))
        demo_models.save_params(flags.run / "params.npz", state["ema"])
        return found

    state = {
        "params": params,
        "ema": params,
        "opt_state": optimizer.init(params),
        "step": jnp.zeros((), jnp.int32),
    }
    fit(state, update, batch, flags.steps, flags.run, evaluate=gauge, save_every=500)


if __name__ == "__main__":
    main()
