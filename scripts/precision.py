"""Measures what computing in bfloat16 changes, on the demo model, and writes docs/precision.md.

    python scripts/precision.py [--model DIR] [--steps 50] [--page docs/precision.md]

Weights and inputs are the same in both; only the dtype of matrix products and the cache differs
(`kvlock edit --dtype bfloat16`). The VAE computes in float32 in both.
"""

import argparse
import pathlib
import platform

import jax
import jax.numpy as jnp
import numpy as np

import kvlock_jax as kvl
from kvlock_jax.evaluate import metrics
from kvlock_jax.models.text.prompts import encode_prompts
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

With `--dtype bfloat16` matrices are multiplied in bfloat16, products of the transformer summed in
float32, and the key and value cache is kept in bfloat16. Norms, softmax, modulation, rotary
positions, the transformer's residual stream, solver, guidance and the variance statistic stay
float32; `tests/test_precision.py` holds that, by reading the traced program. The VAE computes in
float32 whatever the dtype, as the publisher and Diffusers run it.

| what | figure |
|---|---|
{rows}

Relative L2 is `|b - f| / |f|`, of bfloat16's result b and float32's f. Rounding a number once costs
up to 3.9e-03 of it, 1.7e-03 root mean square. PSNR is over all pixels but where it says background,
which keeps 8 pixels away from the mask.

Two runs of an edit part as they go: every step starts from what the one before made of the
difference. PSNR between them says how far they parted, not which is better; that is what the lines
on the background are for.
"""


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--page", type=pathlib.Path, default=ROOT / "docs" / "precision.md")
    args = parser.parse_args()

    wide, low = kvl.load(args.model), kvl.load(args.model, jnp.bfloat16)
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
    device = f"{jax.devices()[0].device_kind} ({platform.machine()})"
    facts = dict(device=device, jax=jax.__version__, steps=args.steps, model=args.model)
    page = PAGE.format(rows="\n".join(rows), preset=settings.preset, prompt=PROMPT, **facts)
    args.page.write_text(page)


def passes(wide, low, inputs, settings):
    """Relative L2 of the text context, and of the velocity of one pass at each noise level."""
    texts = [inputs.prompt, settings.edit.negative_prompt, settings.edit.source_prompt]
    contexts = [encode_prompts(m.checkpoint.text_encoder, m.tokenizer, texts) for m in (wide, low)]
    yield "text context, relative L2", f"{relative(contexts[1], contexts[0]):.1e}"

    noise = draw_noise(wide, inputs, jax.random.key(0))
    video, mask = inputs.source[None], inputs.mask[None]
    told = encode_edits(wide.checkpoint, video, mask, contexts[0], settings.edit, noise)

    @jax.jit
    def velocity(transformer, sigma):
        z = (1 - sigma) * told.source + sigma * told.noise
        timestep, both = jnp.full((2,), 1000 * sigma), jnp.concatenate([z, z])
        return transformer(both, timestep, transformer.condition(told.prompts, told.grid))

    for sigma in LEVELS:
        exact, found = (velocity(m.checkpoint.transformer, jnp.float32(sigma)) for m in (wide, low))
        yield f"velocity at noise level {sigma}, relative L2", f"{relative(found, exact):.1e}"


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


def relative(found, exact) -> float:
    """`|found - exact| / |exact|` in float64."""
    found, exact = np.asarray(found, np.float64), np.asarray(exact, np.float64)
    return np.linalg.norm(found - exact) / np.linalg.norm(exact)


def decibel(a, b) -> str:
    return f"{metrics.psnr(a, b):.2f} dB"


if __name__ == "__main__":
    main()
