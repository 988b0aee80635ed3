"""Trains the demo model further: two objects, posts in front, captions that leave colours open.

    python scripts/train_demo_pairs.py --model FOLDER --run runs/pairs --steps 12000

It starts from the weights of a demo model (`--model`; the embedded one by default) and trains the
transformer with its context blocks, on clips of one object and of two. A fifth of the rows are
trained without context, as text to video. Started again it goes on from where it was. `bound` is
the share of held-out pairs under a mask of both objects whose error at sigma 0.93 is lower by the
right caption than by one that swaps their colours, `placed` likewise with objects swapped.
"""

import argparse
import dataclasses
import pathlib
import tempfile

from training import adamw, average, fit, noised  # isort: skip  (makes the devices before JAX starts)

import demo_models
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from train_demo_dit import BATCH, DROP, GRID, HELD_OUT_START, OBJECT_WEIGHT, SHARD, SHIFT, encode

import kvlock_jax as kvl
from kvlock_jax.demo.world import (
    COLOURS,
    FRAMES,
    SHAPES,
    SIZE,
    Scene,
    caption,
    random_pair,
    random_scene,
    render,
    shape_cover,
    with_post,
)
from kvlock_jax.lock import to_latent_mask
from kvlock_jax.models.text.prompts import encode_prompts
from kvlock_jax.models.text.tokenizer import Tokenizer, write_word_tokenizer
from kvlock_jax.models.wan.conditioning import fold_mask
from kvlock_jax.models.wan.vace import VACEContext, WanVACETransformer

SEEDS = 100_000  # the first clip's; `train_demo_dit.py` has lower ones
PAIRS, POSTS = 0.5, 0.15  # shares of the clips
NO_CONTEXT = 0.2  # share of the rows trained as text to video
ONE_MASKED = {"box": 0.45, "still": 0.15, "grown": 0.1, "exact": 0.1, "all": 0.15, "none": 0.05}
TWO_MASKED = {"box": 0.4, "still": 0.1, "grown": 0.1, "both": 0.28, "all": 0.1, "none": 0.02}
"""Kinds of masks and their shares. `still` is one box for all frames; `both` a box round each."""

ONE = [caption(s, c) for s in SHAPES for c in ("", *COLOURS)]
PROMPTS = [*ONE, *(f"{a} and {b}" for a in ONE for b in ONE), ""]
NUMBERS = {prompt: number for number, prompt in enumerate(PROMPTS)}


@dataclasses.dataclass(frozen=True)
class Example:
    """A clip to train on: its scene, and the pixels to inpaint."""

    scene: Scene
    kind: str
    mask: np.ndarray

    def prompts(self) -> tuple[list[str], list[float]]:
        """Captions that fit, with their shares."""
        scene, whole = self.scene, self.scene.caption
        full, opened = caption(scene.shape, scene.colour), caption(scene.shape)
        if scene.other is None:
            return [full, opened], [0.75, 0.25]
        shapes = " and ".join(caption(part.split()[2]) for part in whole.split(" and "))
        if self.kind in ("both", "all"):
            return [whole, shapes], [0.8, 0.2]
        return [whole, shapes, full, opened], [0.45, 0.15, 0.25, 0.15]


def example(seed: int, *, held_out: bool = False, kind: str = "") -> Example:
    """The example of a seed; `held_out` ones are pairs."""
    rng = np.random.default_rng([seed, 3])
    draw, margin = rng.uniform(), rng.uniform(1, 14)
    if held_out or draw < PAIRS:
        scene, kinds = random_pair(seed, held_out=held_out), TWO_MASKED
    else:
        scene, kinds = random_scene(seed), ONE_MASKED
        scene = with_post(scene, seed) if draw < PAIRS + POSTS else scene
    kind = kind or str(rng.choice(list(kinds), p=list(kinds.values())))
    if kind in ("exact", "grown"):
        radius = scene.radius + (min(margin, 8) if kind == "grown" else 0)
        mask = np.stack([shape_cover(scene.shape, radius, c) > 0 for c in scene.centres])
    elif kind in ("box", "still", "both"):
        mask = boxes(scene, margin)
        if kind == "both":
            mask |= boxes(dataclasses.replace(scene, **dataclasses.asdict(scene.other)), margin)
        if kind == "still":
            mask = np.broadcast_to(mask.any(0), mask.shape)
    else:
        mask = np.full((FRAMES, SIZE, SIZE), kind == "all")
    return Example(scene, kind, mask)


def boxes(scene: Scene, margin: float) -> np.ndarray:
    """A square round the first object in each frame."""
    y, x = np.mgrid[:SIZE, :SIZE]
    reach = scene.radius + margin
    return np.stack([np.maximum(abs(x - a), abs(y - b)) <= reach for a, b in scene.centres])


def encode_shard(vae, start: int, held_out: bool) -> dict[str, np.ndarray]:
    """Latents of clips, normalised, of what VACE is shown of them, and the objects' masks."""
    parts = []
    for first in range(start, start + SHARD, 20):
        kind = "both" if held_out else ""
        found = [example(s, held_out=held_out, kind=kind) for s in range(first, first + 20)]
        clips = [render(each.scene) for each in found]
        masks = np.stack([each.mask for each in found])
        objects = np.stack([clip.mask for clip in clips])
        for number, each in enumerate(found):
            if each.kind in ("both", "all") and each.scene.other:
                other = dataclasses.asdict(each.scene.other) | {"other": None}
                objects[number] |= render(dataclasses.replace(each.scene, **other)).mask
        videos = np.stack([clip.video for clip in clips])
        shown = np.where(masks[..., None], 0.0, videos / np.float32(127.5) - 1)
        part = {
            "latents": np.asarray(encode(vae, videos), np.float16),
            "inactive": np.asarray(encode(vae, shown.astype(np.float32)), np.float16),
            "objects": np.asarray(to_latent_mask(objects)),
        }
        parts.append(part)
    return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}


def encoded(vae, folder: pathlib.Path, shards: int) -> tuple[dict, dict]:
    """All training clips and the held-out ones, encoded once and kept in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for i in range(-1, shards):
        path = folder / f"{i}.npz"
        if not path.exists():
            part = path.with_suffix(".part.npz")
            start = HELD_OUT_START if i < 0 else SEEDS + i * SHARD
            np.savez(part, **encode_shard(vae, start, held_out=i < 0))
            part.rename(path)
            print(f"encoded {path.name}", flush=True)
        found[i] = dict(np.load(path))
    held_out = found.pop(-1)
    return {k: np.concatenate([f[k] for f in found.values()]) for k in found[0]}, held_out


def contexts() -> jax.Array:
    """Text contexts of `PROMPTS`."""
    with tempfile.TemporaryDirectory() as folder:
        write_word_tokenizer(folder, demo_models.WORDS, demo_models.TEXT_LEN)
        tokenizer = Tokenizer(folder, demo_models.TEXT_LEN)
        return encode_prompts(demo_models.text_encoder(), tokenizer, PROMPTS)


def main() -> None:
    """Parses the flags, encodes, and trains."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo", help="a demo model's folder")
    parser.add_argument("--run", type=pathlib.Path, default=pathlib.Path("runs/pairs"))
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument("--shards", type=int, default=16, help=f"of {SHARD} clips")
    parser.add_argument("--rate", type=float, default=8e-4)
    parser.add_argument("--encode_only", action="store_true")
    flags = parser.parse_args()

    trained = kvl.load(flags.model, dtype="float32").checkpoint
    data, held_out = encoded(trained.vae, flags.run / "clips", flags.shards)
    if flags.encode_only:
        return
    # masked pixels are shown blank
    blank = jnp.zeros((1, FRAMES, SIZE, SIZE, 3), jnp.float32)
    blank = np.asarray(encode(trained.vae, blank))
    context = contexts()

    sizes = demo_models.VACE
    model = WanVACETransformer(sizes, dtype=jnp.bfloat16, unroll=sizes.num_layers, rngs=nnx.Rngs(2))
    graph, params = nnx.split(model)
    weights = dict(nnx.to_flat_state(nnx.state(trained.transformer)))
    params = nnx.from_flat_state(
        [
            (path, value.replace(jnp.asarray(weights[path][...], jnp.float32)))
            for path, value in nnx.to_flat_state(params)
        ]
    )
    optimizer = adamw(flags.rate, flags.steps)

    def velocity(params, z, sigma, text, control, scale):
        model = nnx.merge(graph, params)
        shown = VACEContext(text, GRID.split(control), scale)
        return GRID.join(model(GRID.split(z), 1000 * sigma, model.condition(shown, GRID)))

    def control_of(inactive, mask):
        reactive = jnp.broadcast_to(blank, inactive.shape)
        return jnp.concatenate([inactive, reactive, fold_mask(mask).astype(jnp.float32)], -1)

    def loss_fn(params, batch, key):
        x, inactive, objects, prompt, mask = batch
        keys = jax.random.split(key, 4)
        u = jax.random.uniform(keys[0], (BATCH,))
        sigma = SHIFT * u / (1 + (SHIFT - 1) * u)
        dropped = jax.random.uniform(keys[1], (BATCH,)) < DROP
        text = context[jnp.where(dropped, len(PROMPTS) - 1, prompt)]
        scale = (jax.random.uniform(keys[2], (BATCH,)) >= NO_CONTEXT).astype(jnp.float32)
        z, target = noised(x, sigma, keys[3])
        found = velocity(params, z, sigma, text, control_of(inactive, mask), scale)
        square = jnp.square(found - target).mean(-1)
        weight = 1 + (OBJECT_WEIGHT - 1) * objects.astype(jnp.float32)
        return jnp.sum(weight * square) / jnp.sum(weight), {"loss": jnp.mean(square)}

    @jax.jit
    def update(state, batch):
        key = jax.random.fold_in(jax.random.key(5), state["step"])
        grads, metrics = jax.grad(loss_fn, has_aux=True)(state["params"], batch, key)
        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        ema = average(state["ema"], params, state["step"], 0.999)
        step = state["step"] + 1
        return {"params": params, "ema": ema, "opt_state": opt_state, "step": step}, metrics

    def chosen(part, order):
        return [part[k][order].astype(np.float32) for k in ("latents", "inactive")]

    def batch(step: int):
        rng = np.random.default_rng([step, 5])
        order = rng.integers(0, len(data["latents"]), BATCH)
        found = [example(SEEDS + int(number)) for number in order]
        texts = [NUMBERS[str(rng.choice(names, p=shares))] for names, shares in
                 (each.prompts() for each in found)]  # fmt: skip
        masks = np.stack([each.mask for each in found])
        return *chosen(data, order), data["objects"][order], np.array(texts), masks

    count = 96
    x, inactive = map(jnp.asarray, chosen(held_out, np.arange(count)))
    seeds = range(HELD_OUT_START, HELD_OUT_START + count)
    examples = [example(seed, held_out=True, kind="both") for seed in seeds]
    control = control_of(inactive, jnp.stack([each.mask for each in examples]))
    weighed = jnp.asarray(held_out["objects"][:count])
    names = [each.scene.caption for each in examples]
    swaps = {"right": names, "bound": [], "placed": []}
    for name in names:
        (_, c1, s1), (_, c2, s2) = (part.split() for part in name.split(" and "))
        swaps["bound"].append(f"{caption(s1, c2)} and {caption(s2, c1)}")
        swaps["placed"].append(f"{caption(s2, c2)} and {caption(s1, c1)}")

    @jax.jit
    def errors(params, prompt):
        sigmas = jnp.full((count,), 0.93)
        z, target = noised(x, sigmas, jax.random.key(4))
        found = velocity(params, z, sigmas, context[prompt], control, jnp.ones((count,)))
        return jnp.sum(jnp.where(weighed, jnp.square(found - target).mean(-1), 0), (1, 2, 3))

    def gauge(state) -> dict[str, float]:
        demo_models.save_params(flags.run / "params.npz", state["ema"])
        found = {
            name: errors(state["ema"], np.array([NUMBERS[text] for text in texts]))
            for name, texts in swaps.items()
        }
        shares = {k: float(np.mean(found["right"] < found[k])) for k in ("bound", "placed")}
        return shares | {"object_error": float(found["right"].mean())}

    state = {
        "params": params,
        "ema": params,
        "opt_state": optimizer.init(params),
        "step": jnp.zeros((), jnp.int32),
    }
    fit(state, update, batch, flags.steps, flags.run, evaluate=gauge, save_every=500)


if __name__ == "__main__":
    main()
