"""Two experts: the loop over the switch, against the publishers' own runs (`data/wan22`)."""

import contextlib
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import loops
import numpy as np
import pytest
from flax import nnx

from kvlock_jax import lock
from kvlock_jax.checkpoints import registry
from kvlock_jax.convert import original, sizes, table, weights
from kvlock_jax.grid import Grid
from kvlock_jax.models.family import Encoded
from kvlock_jax.models.wan.families import VACE_FUN
from kvlock_jax.models.wan.vace import VACEContext
from kvlock_jax.sampling import loop, solvers
from kvlock_jax.sampling.edits import Edits
from kvlock_jax.sampling.program import Program
from kvlock_jax.sampling.stepwise import stepwise
from kvlock_jax.settings.schema import SampleConfig

DATA = Path(__file__).parent / "data" / "wan22"
CONFIG = json.loads((DATA / "config.json").read_text())
SWITCHING = json.loads((DATA / "switching.json").read_text())
SOLVERS = {"unipc": "unipc", "dpm++": "dpm++", "flow": "euler"}


@functools.cache
def expert(name: str, kind: str):
    """A tiny expert of the publisher's layout."""
    tensors = weights.open_file(DATA / f"{name}.safetensors")
    described = CONFIG[kind] | {"_class_name": "VaceWanModel" if kind == "vace" else "WanModel"}
    described |= {"model_type": "vace" if kind == "vace" else "t2v"}
    config = sizes.transformer(tensors, described, DATA)
    graph, abstract = nnx.split(registry.abstract(config))
    return nnx.merge(graph, table.fill(abstract, tensors, original.WAN, name))


@functools.cache
def arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(DATA / f"{name}_io.npz") as data:
        return dict(data)


def texts(given: dict[str, np.ndarray], length: int) -> np.ndarray:
    both = (given["context"], given["negative"])
    return np.stack([np.pad(text, ((0, length - len(text)), (0, 0))) for text in both])


def last(x: np.ndarray) -> np.ndarray:
    """Channels last."""
    return np.moveaxis(x, 0, -1)


def relative(got, want) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def published(solver: str, steps: int, shift: float):
    """The publisher's table; "flow" is Diffusers' Euler there too."""
    grid = "diffusers" if solver == "flow" else "plain"
    return solvers.table(SOLVERS[solver], steps, shift, grid)


def run(kind: str, start: np.ndarray, prompts, solver: str, scales: dict[str, float]) -> np.ndarray:
    """The latents of a run without a lock over both experts."""
    settings = CONFIG[f"{kind}_run"]
    steps = published(solver, settings["steps"], settings["shift"])
    steps = steps.with_experts(settings["boundary"])
    given = arrays(kind)
    key = f"run_{'plain_' if kind == 'vace' else ''}{solver}"
    np.testing.assert_allclose(steps.timestep, given[f"{key}_t"], rtol=1e-6)
    np.testing.assert_array_equal(steps.expert == 0, given[f"{key}_high"])
    noise = last(start)[None]
    grid = Grid.of(noise.shape[1:4])
    z = jax.device_put(grid.split(jnp.asarray(noise)), jax.devices()[0])  # as an edit's are
    empty = jnp.zeros((1, *z.shape[1:3]), bool)
    edits = Edits(z, z, empty, prompts(grid), None, grid)
    plain = lock.preset("cfg", 1.0)
    omega = np.array([scales["high"], scales["low"]])[steps.expert]
    models = [expert(f"{kind}_{role}", kind) for role in ("high", "low")]
    edited, trace = stepwise(
        lambda number: contextlib.nullcontext(models[number]),
        *(jnp.array(z), edits, steps, lock.knobs(plain, omega)),
        program=Program.of(plain),
    )
    np.testing.assert_allclose(trace.guidance_scale[:, 0], omega)
    return np.moveaxis(np.asarray(grid.join(edited))[0], -1, 0)


@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
def test_text_to_video_equals_the_publisher(solver, compiled):
    given = arrays("a14b")
    text = jnp.asarray(texts(given, CONFIG["a14b"]["text_len"]))
    low, high = CONFIG["a14b_run"]["guide_scale_low_high"]
    start = given[f"run_{solver}_x"][0]
    jax.clear_caches()
    compiled.clear()
    got = run("a14b", start, lambda grid: text, solver, {"high": high, "low": low})
    assert relative(got, given[f"run_{solver}_latents"]) < 1e-5
    assert compiled.count("advance") == 1  # one step serves both


@pytest.mark.parametrize("solver", ["flow", "unipc"])
@pytest.mark.parametrize("context", ["plain", "references"])
def test_vace_fun_equals_the_publisher(solver, context):
    given, settings = arrays("vace"), CONFIG["vace_run"]
    text = jnp.asarray(texts(given, CONFIG["vace"]["text_len"]))
    key, scale = f"run_{context}_{solver}", settings["vace_context_scale"]
    control = jnp.asarray(last(given[f"context_{context}"])[None])

    def prompts(grid):
        return VACEContext(text, grid.split(control), jnp.full(1, scale, jnp.float32))

    omega = settings["guidance_scale"]
    got = run("vace", given[f"{key}_x"][0], prompts, solver, {"high": omega, "low": omega})
    references = got.shape[1] - given[f"{key}_latents"].shape[2]
    assert relative(got[:, references:], given[f"{key}_latents"][0]) < 1e-5


@pytest.mark.parametrize("name", SWITCHING)
def test_experts_take_the_steps_of_the_publishers_loops(name):
    want, shift = SWITCHING[name], float(name.split("shift ")[1].split()[0])
    solver = next(solver for solver in SOLVERS if solver in name)
    ours = solvers.table(SOLVERS[solver], want["steps"], shift)
    ours = ours if name.startswith("diffusers") else published(solver, want["steps"], shift)
    steps = ours.with_experts(0.875)
    np.testing.assert_allclose(steps.timestep, want["timesteps"], rtol=1e-6)
    np.testing.assert_array_equal(steps.expert == 0, want["high"])
    (first, high), (second, low) = steps.phases
    assert (first, second) == (0, 1) and high.stop == low.start == want["high_steps"]


# -- the lock over the switch --------------------------------------------------------------------


def two(**fields):
    return [loops.make_fake(seed, **fields) for seed in (0, 3)]


def test_the_same_expert_twice_is_one_model():
    settings, edits = lock.preset("kvlock", loops.OMEGA), loops.make_edits()
    steps = solvers.euler(loops.STEPS, loops.SHIFT)
    want, trace = loops.run(loops.make_fake(), edits, settings)
    twice = [loops.make_fake()] * 2
    ticks: list[int] = []
    got, same = loops.run(
        twice,
        edits,
        settings,
        steps.with_experts(0.8),
        on_step=lambda step: ticks.append(step.number),
    )
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
    np.testing.assert_allclose(same.sigma2, trace.sigma2, rtol=1e-5, atol=1e-7)
    assert ticks == list(range(loops.STEPS))


def test_a_carried_cache_never_crosses_the_switch():
    edits, steps = loops.make_edits(), solvers.euler(loops.STEPS, loops.SHIFT).with_experts(0.8)
    carried = lock.preset("hard_lock", loops.OMEGA)
    carried = loop.dataclasses.replace(carried, cache="carried", cache_every=100)
    seen: list[float] = []
    models = two(on_source=lambda timestep: seen.append(float(timestep)))
    loops.run(models, edits, carried, steps, on_step=loops.nobody)
    jax.effects_barrier()
    first = steps.phases[1][1].start
    np.testing.assert_allclose(seen, steps.timestep[[0, first]], rtol=1e-6)


def test_each_expert_has_its_guidance_scale():
    sample = SampleConfig(guidance_scale=4.0, guidance_scale_low=3.0)
    assert sample.guidance_scales == {"high": 4.0, "low": 3.0} and sample.branches == 2
    assert SampleConfig(guidance_scale=4.0).guidance_scales["low"] == 4.0
    assert SampleConfig(guidance_scale=1.0, guidance_scale_low=1.0).branches == 1
    assert SampleConfig(guidance_scale=1.0, guidance_scale_low=3.0).branches == 2


# -- VACE-Fun's conditioning ---------------------------------------------------------------------


@pytest.mark.parametrize("references", [0, 2])
def test_conditioning_equals_videox_fun(references):
    """Its mask is 1 from 0.5 on; the tiny VAE of Wan 2.1, with published statistics."""
    given = arrays("vace")
    tensors = weights.open_file(DATA.parent / "original" / "vae.safetensors")
    config = sizes.vae(tensors, DATA)
    graph, abstract = nnx.split(registry.abstract(config))
    vae = nnx.merge(graph, table.fill(abstract, tensors, original.vae(config), "vae"))
    video, mask = last(given["video"][0]), given["mask"][0, 0] >= 0.5
    pictures = list(np.moveaxis(given["references"][0], 0, -1))[:references]
    conditioner = VACE_FUN.conditioner
    as_pixels = [np.asarray(np.round(picture * 255), np.uint8) for picture in pictures]
    canvases = conditioner.canvases(as_pixels, *mask.shape[1:])
    for canvas, picture in zip(canvases, pictures, strict=True):  # of the video's size already
        np.testing.assert_allclose(canvas, 2 * picture - 1, atol=1 / 127)

    levels = np.zeros(video.shape, np.uint8)  # stands for the video, whose levels are not whole

    def encode(clips, masks, inside):
        rows = [
            np.where((seen == inside)[..., None], 2 * (video if clip is levels else clip) - 1, 0.0)
            for clip, seen in zip(clips, masks, strict=True)
        ]
        return Encoded([vae.encode(jnp.asarray(np.stack(rows), jnp.float32))], np.arange(len(rows)))

    exact = [encode([p[None]], [np.ones((1, *p.shape[:2]), bool)], True).rows() for p in pictures]
    encoded = conditioner.encode(encode, [levels], [mask], scale=0.8, show_masked=False)
    latents = encode([video], [np.ones_like(mask)], True).rows()
    grid = Grid.of((latents.shape[1] + references, *latents.shape[2:4]))
    text = jnp.zeros((2, 4, 8))
    args = (text, text[1:], latents, exact, encoded)
    args = jax.tree.map(jnp.asarray, args)  # as inside of the compiled program
    context, _ = conditioner.contexts(*args, grid)
    want = given["context_references" if references else "context_plain"]
    got = np.moveaxis(np.asarray(grid.join(context.control))[0], -1, 0)
    assert relative(got, want) < 1e-5
    assert float(context.scale[0]) == np.float32(0.8)
