"""Trains the demo model's VAE on crops of the demo world.

    python scripts/train_demo_vae.py --run runs/vae --steps 2400
    python scripts/train_demo_vae.py --run runs/decoder --decoder_of runs/vae/params.npz
    python scripts/train_demo_vae.py --run runs/long --long_of runs/decoder/params.npz --steps 800

Saves its state under `--run` and goes on from there when started again; `params.npz` there holds
the averaged weights. The second command trains the decoder alone, so latents stay what they were.
The third trains on longer clips, of which every latent frame is held to what the encoder that it
starts from makes of nine frames: without it colours shift from the fourth latent frame on.
"""

import argparse
import functools
import math
import pathlib

from training import average, fit  # isort: skip  (makes the devices before JAX starts)

import demo_models
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from kvlock_jax.demo.world import FRAMES, random_scene, render
from kvlock_jax.models.vae.autoencoder import WanVAE
from kvlock_jax.models.vae.blocks import Downsample, ResidualBlock, Upsample
from kvlock_jax.models.vae.convolutions import CausalConv3d

BATCH, CROP = 4, 48
HELD_OUT = range(900_000_000, 900_000_008)  # seeds that no training step reaches
KL_WEIGHT = 1e-3
BLEND = 4  # pixels around a splice that may change with it
LEAK_WEIGHT = (
    1.5  # weight of the change that a splice causes outside itself, beside the reconstruction
)
LONG = 17  # frames of the longer clips
LATENT_WEIGHT = 1.0  # weight of the latents' squared error, by their variance


def initialise(vae: WanVAE, seed: int) -> None:
    """Starts resampling near the identity and residual branches at zero.

    With the default initialisation the first hundreds of steps gain next to nothing.
    """
    rng = np.random.default_rng(seed)
    for _, module in nnx.iter_modules(vae):
        if isinstance(module, ResidualBlock):
            module.conv2.kernel[...] = jnp.zeros_like(module.conv2.kernel[...])
        elif isinstance(module, Downsample):
            kernel = 0.1 * module.resample.kernel[...]
            eye = jnp.eye(kernel.shape[-1])
            module.resample.kernel[...] = kernel.at[:2, :2].add(eye / 4)
            if module.time_conv is not None:
                _near(module.time_conv, jnp.stack([0.25 * eye, 0.5 * eye, 0.25 * eye]))
        elif isinstance(module, Upsample):
            c_in, c_out = module.resample.kernel.shape[2:]
            halve = jnp.repeat(jnp.eye(c_out), c_in // c_out, axis=0) * (c_out / c_in)
            # a random orthogonal mixture, so that no channel is thrown away twice alike
            mix = jnp.array(np.linalg.qr(rng.standard_normal((c_in, c_in)))[0], jnp.float32)
            halve = mix @ halve * math.sqrt(c_in / c_out)
            kernel = 0.1 * module.resample.kernel[...]
            module.resample.kernel[...] = kernel.at[1, 1].add(halve)
            if module.time_conv is not None:
                twice = jnp.tile(jnp.eye(c_in), (1, 2))
                _near(module.time_conv, jnp.stack([0 * twice, 0 * twice, twice]))
    for coder in (vae.encoder, vae.decoder):
        proj = coder.mid_block.attentions[0].proj
        proj.kernel[...] = jnp.zeros_like(proj.kernel[...])


def _near(conv: CausalConv3d, taps: jax.Array) -> None:
    conv.kernel[...] = 0.1 * conv.kernel[...] + taps[:, None, None]


def learning_rates(params: nnx.State, base: float = 0.5, most: float = 3e-3) -> nnx.State:
    """A factor per parameter: `min(most, base / fan_in)` for kernels, `most` for the rest."""

    def rate(p: jax.Array) -> float:
        return min(most, base / math.prod(p.shape[:-1])) if p.ndim > 1 else most / 3

    return jax.tree.map(rate, params)


def batch(step: int, frames: int = FRAMES, size: int = BATCH) -> np.ndarray:
    """Crops `size frames 48 48 3` uint8; a function of the step."""
    rng = np.random.default_rng(step)
    crops = []
    for i in range(size):
        clip = render(random_scene(step * BATCH + i, frames=frames)).video
        y, x = rng.integers(0, clip.shape[1] - CROP + 1, 2)
        crops.append(clip[:, y : y + CROP, x : x + CROP])
    return np.stack(crops)


def spliced(z: jax.Array, frames: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Splices a moving box of its neighbour into each clip; returns latents and the pixels outside.

    An edit's latents are such a splice, and inside the box they are a model's guess: too strong or
    too weak, and noisy. A decoder that has seen some keeps what lies outside; next to the box it
    may blend: held to every pixel there, at a weight of 2, it lost 1.4 dB everywhere.
    """
    keys = jax.random.split(key, 5)
    step = jax.random.randint(keys[4], (2, BATCH, 1, 1), -1, 2)
    low = (
        jax.random.randint(keys[0], (2, BATCH, 1, 1), 0, 4) + step * jnp.arange(z.shape[1])[:, None]
    )
    high = low + jax.random.randint(keys[1], (2, BATCH, 1, 1), 2, 4)
    at = jnp.arange(z.shape[2])
    rows, columns = (at >= low) & (at < high)
    box = rows[:, :, :, None] & columns[:, :, None, :]

    gain, noise = jax.random.uniform(keys[2], (2, BATCH, 1, 1, 1, 1))
    off = z.std((0, 1, 2, 3)) * jax.random.normal(keys[3], z.shape)
    guess = (0.8 + 0.6 * gain) * jnp.roll(z, 1, 0) + 0.6 * noise * off
    pixels = box[:, (jnp.arange(frames) + 3) // 4].repeat(8, 2).repeat(8, 3)
    edge = (1, 1, 2 * BLEND + 1, 2 * BLEND + 1)
    near = jax.lax.reduce_window(pixels, False, jax.lax.bitwise_or, edge, (1,) * 4, "SAME")
    return jnp.where(box[..., None], guess, z), ~near[..., None]


def short_latents(vae: WanVAE, x: jax.Array) -> jax.Array:
    """Latents of a long clip, each frame encoded within nine frames at most."""
    first = vae.moments(x[:, :9], 2)[0]
    starts = range(4, x.shape[1] - 8, 4)
    rest = [vae.moments(x[:, at : at + 9], 2)[0][:, 2:] for at in starts]
    return jnp.concatenate([first, *rest], axis=1)


def to_float(video: jax.Array) -> jax.Array:
    """uint8 to [-1, 1]."""
    return video.astype(jnp.float32) / 127.5 - 1.0


def main() -> None:
    """Parses the flags and trains."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=pathlib.Path, default=pathlib.Path("runs/vae"))
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--decoder_of", type=pathlib.Path, help="params.npz to start from")
    parser.add_argument("--long_of", type=pathlib.Path, help="params.npz to start from")
    flags = parser.parse_args()
    start, is_long = flags.decoder_of or flags.long_of, flags.long_of is not None
    whole, frames = start is None, LONG if is_long else FRAMES
    chunk = (frames - 1) // 4  # one piece: XLA on CPU compiles gradients of a loop's body badly

    vae = WanVAE(demo_models.VAE, rngs=nnx.Rngs(0))
    initialise(vae, 0)
    graph, params = nnx.split(vae)
    rates = learning_rates(params)
    if not whole:
        wide = functools.partial(jnp.asarray, dtype=jnp.float32)  # exported weights are float16
        params = jax.tree.map(wide, demo_models.load_params(start, params))
    if flags.decoder_of:
        for part in ("encoder", "quant_conv"):
            rates[part] = jax.tree.map(lambda _: 0.0, rates[part])
    if is_long:
        rates, teacher = jax.tree.map(lambda rate: rate / 4, rates), params
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, 50, flags.steps, 0.02)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b2=0.99),
        optax.stateless(lambda u, _: jax.tree.map(lambda g, r: -r * g, u, rates)),
        optax.scale_by_schedule(schedule),
    )

    def loss_fn(params: nnx.State, video: jax.Array, key: jax.Array):
        model = nnx.merge(graph, params)
        keys = jax.random.split(key)
        x = to_float(video)
        mean, logvar = model.moments(x, chunk)
        logvar = jnp.clip(logvar, -20.0, 10.0)
        z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(keys[0], mean.shape)
        y = model.decode(z, chunk)  # the latent statistics are 0 and 1 here
        square = jnp.mean(jnp.square(y - x))
        kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(logvar) - 1 - logvar)
        loss = jnp.mean(jnp.abs(y - x)) + square + KL_WEIGHT * kl
        metrics = {"psnr": -10 * jnp.log10(square / 4), "kl": kl}
        if flags.decoder_of:
            mixed, outside = spliced(z, x.shape[1], keys[1])
            moved = jnp.abs(model.decode(mixed, chunk) - y)
            metrics["leak"] = jnp.sum(outside * moved) / (3 * jnp.sum(outside))
            loss += LEAK_WEIGHT * metrics["leak"]
        if is_long:
            wanted = jax.lax.stop_gradient(short_latents(nnx.merge(graph, teacher), x))
            off = jnp.mean(jnp.square(mean - wanted) / jnp.var(wanted, axis=(0, 1, 2, 3)))
            metrics["latents"], loss = off, loss + LATENT_WEIGHT * off
        return loss, metrics | {"loss": loss}

    @jax.jit
    def update(state, video):
        key = jax.random.fold_in(jax.random.key(0), state["step"])
        grads, metrics = jax.grad(loss_fn, has_aux=True)(state["params"], video, key)
        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        ema = average(state["ema"], params, state["step"], 0.995)
        step = state["step"] + 1
        return {"params": params, "ema": ema, "opt_state": opt_state, "step": step}, metrics

    scenes = [random_scene(s, held_out=True, frames=frames) for s in HELD_OUT]
    held_out = jnp.stack([render(scene).video for scene in scenes])

    @jax.jit
    def held_out_psnr(params):
        model = nnx.merge(graph, params)
        out = jnp.clip(model.decode(model.moments(to_float(held_out), chunk)[0], chunk), -1, 1)
        return -10 * jnp.log10(jnp.mean(jnp.square(out - to_float(held_out))) / 4)

    state = {
        "params": params,
        "ema": params,
        "opt_state": optimizer.init(params),
        "step": jnp.zeros((), jnp.int32),
    }

    def evaluate(state):
        demo_models.save_params(flags.run / "params.npz", state["ema"])
        return {"held_out_psnr": held_out_psnr(state["ema"])}

    make = functools.partial(batch, frames=frames, size=BATCH // 2 if is_long else BATCH)
    every = {"log_every": 10, "evaluate_every": 100, "save_every": 50} if is_long else {}
    fit(state, update, make, flags.steps, flags.run, evaluate=evaluate, **every)


if __name__ == "__main__":
    main()
