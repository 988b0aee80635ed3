"""Trains the demo model's VAE on crops of the demo world.

    python scripts/train_demo_vae.py --run runs/vae --steps 4000

Saves its state under `--run` and goes on from there when started again. `export_demo.py` writes the
averaged weights out as a Diffusers folder.
"""

import argparse
import math
import pathlib

from training import average, fit  # isort: skip  (makes the devices before JAX starts)

import demo_models
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from kvlock_jax.demo.world import random_scene, render
from kvlock_jax.models.vae import CausalConv3d, Downsample, ResidualBlock, Upsample, WanVAE

BATCH, CROP = 4, 48
HELD_OUT = range(900_000_000, 900_000_008)  # seeds that no training step reaches
KL_WEIGHT = 1e-3


def initialise(vae: WanVAE, seed: int) -> None:
    """Starts resampling near the identity and residual branches at zero.

    The default initialisation stays at 12-13 dB for hundreds of steps.
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


def batch(step: int) -> np.ndarray:
    """Crops `4 9 48 48 3` uint8; a function of the step."""
    rng = np.random.default_rng(step)
    crops = []
    for i in range(BATCH):
        clip = render(random_scene(step * BATCH + i)).video
        y, x = rng.integers(0, clip.shape[1] - CROP + 1, 2)
        crops.append(clip[:, y : y + CROP, x : x + CROP])
    return np.stack(crops)


def to_float(video: jax.Array) -> jax.Array:
    """uint8 to [-1, 1]."""
    return video.astype(jnp.float32) / 127.5 - 1.0


def main() -> None:
    """Parses the flags and trains."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=pathlib.Path, default=pathlib.Path("runs/vae"))
    parser.add_argument("--steps", type=int, default=4000)
    flags = parser.parse_args()

    vae = WanVAE(demo_models.VAE, rngs=nnx.Rngs(0))
    initialise(vae, 0)
    graph, params = nnx.split(vae)
    rates = learning_rates(params)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, 50, flags.steps, 0.02)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b2=0.99),
        optax.stateless(lambda u, _: jax.tree.map(lambda g, r: -r * g, u, rates)),
        optax.scale_by_schedule(schedule),
    )

    def loss_fn(params: nnx.State, video: jax.Array, key: jax.Array):
        model = nnx.merge(graph, params)
        x = to_float(video)
        mean, logvar = model.moments(x, chunk=2)
        logvar = jnp.clip(logvar, -20.0, 10.0)
        z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
        error = model.decode(z, chunk=2) - x
        kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(logvar) - 1 - logvar)
        square = jnp.mean(jnp.square(error))
        loss = jnp.mean(jnp.abs(error)) + square + KL_WEIGHT * kl
        return loss, {"loss": loss, "psnr": -10 * jnp.log10(square / 4), "kl": kl}

    @jax.jit
    def update(state, video):
        key = jax.random.fold_in(jax.random.key(0), state["step"])
        grads, metrics = jax.grad(loss_fn, has_aux=True)(state["params"], video, key)
        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        ema = average(state["ema"], params, state["step"], 0.995)
        step = state["step"] + 1
        return {"params": params, "ema": ema, "opt_state": opt_state, "step": step}, metrics

    held_out = jnp.stack([render(random_scene(s, held_out=True)).video for s in HELD_OUT])

    @jax.jit
    def held_out_psnr(params):
        model = nnx.merge(graph, params)
        out = jnp.clip(model.decode(model.moments(to_float(held_out), 2)[0], 2), -1, 1)
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

    fit(state, update, batch, flags.steps, flags.run, evaluate=evaluate)


if __name__ == "__main__":
    main()
