"""Measures what bfloat16 changes, on the demo model, and writes docs/precision.md.

    python scripts/precision.py [--model DIR] [--steps 50] [--page docs/precision.md]

First the compute dtype: weights and inputs are the same in both runs; only the dtype of matrix
products and the cache differs (`kvlock edit --dtype bfloat16`). Then float32 products as a TPU
makes them by default, with operands rounded to bfloat16, beside the full products that this package
asks for. A CPU ignores that setting, so the rounding is simulated.
"""

import argparse
import contextlib
import functools
import pathlib
import platform

import jax
import jax.numpy as jnp
import numpy as np

import kvlock_jax as kvl
from kvlock_jax.evaluate import metrics
from kvlock_jax.models.text.prompts import encode_prompts
from kvlock_jax.models.vae import autoencoder
from kvlock_jax.pipeline.encode import draw_noise, encode_edits
from kvlock_jax.pipeline.inputs import read_inputs
from kvlock_jax.pipeline.settings import resolve_settings

ROOT = pathlib.Path(__file__).parents[1]
DEMO = ROOT / "kvlock_jax" / "demo"
PROMPT = "a blue square"
LEVELS = (0.9, 0.5, 0.1)

PAGE = """# bfloat16 beside float32

Written by `python scripts/precision.py`; do not edit. Model: {model}; {device}, JAX {jax},
{steps} steps, preset `{preset}`, the bundled clip, prompt "{prompt}".

With `--dtype bfloat16`, the default on TPUs and GPUs, matrices are multiplied in bfloat16, products
of the transformer are summed in float32, and the key and value cache is kept in bfloat16. Norms,
softmax, modulation, rotary positions, the transformer's residual stream, solver, guidance and the
variance statistic stay float32; `tests/test_precision.py` checks that on the traced program. The
VAE computes in float32 whatever the dtype, as the publisher and Diffusers run it.

| what | figure |
|---|---|
{rows}

Relative L2 is `|b - f| / |f|`, of bfloat16's result b and float32's f. Rounding a number once costs
up to 3.9e-03 of it, 1.7e-03 root mean square. PSNR is over all pixels but where it says background,
which keeps 8 pixels away from the mask.

Two runs of an edit part as they go: every step starts from what the one before made of the
difference. PSNR between them says how far they parted, not which is better; that is what the lines
on the background are for.

## Blocks in 8 bits

`--weights int8` and `--weights float8` (e4m3) keep the kernels of the transformer's blocks in 8
bits, with a float32 scale for each output channel, and multiply in the compute dtype: here
bfloat16, beside bfloat16 kernels, each against float32 alone.

| bfloat16 products | bfloat16 kernels | int8 | float8 |
|---|---|---|---|
{small}

## What "float32" means on a TPU

A dtype does not say how exactly a product is computed. A TPU multiplies bfloat16 numbers: by
default XLA rounds float32 operands to 8 of their 24 bits, and a GPU may round them to 11. Float32
products of this package (the VAE, the modulation, and everything with `--dtype float32`) therefore
ask for `precision=HIGHEST`, which keeps all bits and takes a TPU six passes instead of one.
Products in bfloat16 keep the fast default. `tests/test_tpu_precision.py` checks the programs that
are lowered for a TPU, the attention kernel included.

The table simulates the rounding of operands on a CPU: one pass is a TPU's default, three passes are
XLA's `HIGH`.

| float32 products with operands rounded to bfloat16 | one pass | three passes |
|---|---|---|
{simulated}

Decoded frames are compared before they are rounded to whole levels. One pass moves the VAE's pixels
by {verdict}. That is less than the
VAE's own error, but it would separate an edit from the publisher's float32 wherever the background
is compared with the source, so the VAE keeps all bits. The modulation multiplies every activation
of every block, and its three small products, computed once for all steps, cost no time worth
saving.
"""


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--page", type=pathlib.Path, default=ROOT / "docs" / "precision.md")
    args = parser.parse_args()

    wide, low = (kvl.load(args.model, dtype) for dtype in (jnp.float32, jnp.bfloat16))
    config = kvl.default_config(wide)
    config.sample.steps = args.steps
    settings = resolve_settings(config)
    inputs = read_inputs(str(DEMO / "clip.mp4"), str(DEMO / "mask.mp4"), PROMPT, settings.edit)

    rows = []
    for what, figure in (
        *passes(wide, low, inputs, settings),
        *edits(wide, low, inputs, config),
    ):
        print(f"{what}: {figure}", flush=True)
        rows.append(f"| {what} | {figure} |")
    small = [f"| {row} |" for row in in_8_bits(args.model, wide, low, inputs, config)]
    print(*small, sep="\n", flush=True)
    simulated, verdict = simulations(wide, inputs, settings)
    device = f"{jax.devices()[0].device_kind} ({platform.machine()})"
    facts = dict(device=device, jax=jax.__version__, steps=args.steps, model=args.model)
    facts |= dict(simulated="\n".join(simulated), verdict=verdict, small="\n".join(small))
    page = PAGE.format(rows="\n".join(rows), preset=settings.preset, prompt=PROMPT, **facts)
    args.page.write_text(page)


def passes(wide, low, inputs, settings):
    """Relative L2 of the text context, and of the velocity of one pass at each noise level."""
    texts = [inputs.prompt, settings.edit.negative_prompt, settings.edit.source_prompt]
    contexts = [encode_prompts(m.checkpoint.text_encoder, m.tokenizer, texts) for m in (wide, low)]
    yield "text context, relative L2", f"{relative(contexts[1], contexts[0]):.1e}"

    noise = draw_noise(wide, inputs, jax.random.key(0))
    video, mask = inputs.source[None], [inputs.mask]
    encoded = encode_edits(wide.checkpoint, video, mask, contexts[0], settings.edit, noise)

    @jax.jit
    def velocity(transformer, sigma):
        z = (1 - sigma) * encoded.source + sigma * encoded.noise
        timestep, both = jnp.full((2,), 1000 * sigma), jnp.concatenate([z, z])
        return transformer(both, timestep, transformer.condition(encoded.prompts, encoded.grid))

    for sigma in LEVELS:
        exact, found = (velocity(m.checkpoint.transformer, jnp.float32(sigma)) for m in (wide, low))
        yield f"velocity at noise level {sigma}, relative L2", f"{relative(found, exact):.1e}"


def in_8_bits(name, wide, low, inputs, config):
    """Rows of bfloat16 products with kernels of 16 and of 8 bits."""
    models = [low, *(kvl.load(name, jnp.bfloat16, weights=kind) for kind in ("int8", "float8"))]
    settings, found = resolve_settings(config), {}
    for model in models:
        for what, figure in passes(wide, model, inputs, settings):
            if what.startswith("velocity"):
                found.setdefault(what, []).append(figure)
    exact = kvl.edit(wide, inputs.source, inputs.mask, inputs.prompt, config=config).video
    for model in models:
        made = kvl.edit(model, inputs.source, inputs.mask, inputs.prompt, config=config)
        background = f"{made.metrics.background_psnr:.2f} dB"
        found.setdefault("edit's background PSNR", []).append(background)
        found.setdefault("edit, against float32", []).append(decibel(exact, made.video))
    for what, figures in found.items():
        yield f"{what} | {' | '.join(figures)}"


def edits(wide, low, inputs, config):
    """PSNR between whole edits, and the background's of each."""
    ceiling = kvl.round_trip(wide, inputs.source)
    yield "VAE round trip of the clip", decibel(inputs.source, ceiling)
    made = {}
    for name, model in (("float32", wide), ("bfloat16", low)):
        made[name] = kvl.edit(model, inputs.source, inputs.mask, inputs.prompt, config=config)
        yield f"edit's background PSNR, {name}", f"{made[name].metrics.background_psnr:.2f} dB"
    exact, found = (result.video for result in made.values())
    yield "edit in bfloat16, against float32", decibel(exact, found)
    inside = np.abs(found.astype(int) - exact)[inputs.mask].mean()
    yield "the same, mean difference under the mask", f"{inside:.2f} of 255 levels"


def simulations(model, inputs, settings):
    """Rows of one and of three passes beside exact products, and what they say of the VAE."""
    texts = [inputs.prompt, settings.edit.negative_prompt, settings.edit.source_prompt]
    noise = draw_noise(model, inputs, jax.random.key(0))
    network, vae = model.checkpoint.transformer, model.checkpoint.vae
    timesteps = jnp.float32([1000.0 * sigma for sigma in LEVELS])
    context = encode_prompts(model.checkpoint.text_encoder, model.tokenizer, texts)
    video, mask = inputs.source[None], [inputs.mask]
    edits = encode_edits(model.checkpoint, video, mask, context, settings.edit, noise)
    z = 0.5 * edits.source + 0.5 * edits.noise
    both, half = jnp.concatenate([z, z]), jnp.full((2,), 500.0)

    def results() -> dict:
        """The values to compare, from newly traced programs."""
        jax.clear_caches()
        latents = autoencoder.encode(vae, video)
        pixels = jax.jit(lambda vae, z: vae.decode(z))(vae, latents)
        times = jax.jit(lambda model, t: model.times(t))
        run = jax.jit(lambda model, z, t: model(z, t, model.condition(edits.prompts, edits.grid)))
        return {
            "VAE: latents of the clip, relative L2": latents,
            "VAE: decoded frames, relative L2": pixels,
            "modulation at three noise levels, relative L2": times(network, timesteps).modulation,
            "velocity at noise level 0.5, relative L2": run(network, both, half),
            "velocity of the rounded modulation alone, relative L2": run(
                network, both, times(network, half)
            ),
        }

    with products(0):
        exact = results()
    found = {}
    for passes in (1, 3):
        with products(passes):
            found[passes] = results()
            rounded = jax.jit(lambda model, t: model.times(t))(network, half)
        with products(0):
            jax.clear_caches()
            run = jax.jit(lambda m, z, t: m(z, t, m.condition(edits.prompts, edits.grid)))
            alone = "velocity of the rounded modulation alone, relative L2"
            found[passes][alone] = run(network, both, rounded)
    rows = []
    for what, value in exact.items():
        figures = (f"{relative(found[passes][what], value):.1e}" for passes in (1, 3))
        rows.append(f"| {what} | {' | '.join(figures)} |")
        print(rows[-1], flush=True)
    key = "VAE: decoded frames, relative L2"
    error = [np.abs(np.asarray(found[n][key] - exact[key])) * 127.5 for n in (1, 3)]
    verdict = (
        f"{error[0].mean():.2f} of 255 levels on average and {error[0].max():.0f} at most, after "
        f"three passes {error[1].mean():.4f} and {error[1].max():.2f}"
    )
    print(verdict)
    return rows, verdict


@contextlib.contextmanager
def products(passes):
    """Makes float32 products of operands rounded to bfloat16, in as many passes as a TPU; 0 exact.

    Programs traced in the block take the forms for TPUs, which have one convolution where a CPU
    filters.
    """
    kept = jax.lax.platform_dependent, jax.lax.conv_general_dilated, jnp.matmul, jnp.einsum
    jax.lax.platform_dependent = lambda *args, default, **others: default(*args)
    if passes:
        jax.lax.conv_general_dilated = in_passes(kept[1], passes, 0)
        jnp.matmul = in_passes(kept[2], passes, 0)
        jnp.einsum = in_passes(kept[3], passes, 1)
    try:
        yield
    finally:
        jax.lax.platform_dependent, jax.lax.conv_general_dilated, jnp.matmul, jnp.einsum = kept
        jax.clear_caches()


def in_passes(product, passes, first):
    """A product by one pass, or by three: of high parts, and of high and low parts crosswise."""

    @functools.wraps(product)
    def made(*args, **options):
        before, (x, y), after = args[:first], args[first : first + 2], args[first + 2 :]
        parts = []
        for operand in (x, y):
            high = jax.lax.reduce_precision(operand, 8, 7)
            parts.append((high, jax.lax.reduce_precision(operand - high, 8, 7)))
        (x, x_low), (y, y_low) = parts
        pairs = [(x, y), (x, y_low), (x_low, y)][:passes]
        return sum(product(*before, *pair, *after, **options) for pair in pairs)

    return made


def relative(found, exact) -> float:
    """`|found - exact| / |exact|` in float64."""
    found, exact = np.asarray(found, np.float64), np.asarray(exact, np.float64)
    return np.linalg.norm(found - exact) / np.linalg.norm(exact)


def decibel(a, b) -> str:
    return f"{metrics.psnr(a, b):.2f} dB"


if __name__ == "__main__":
    main()
