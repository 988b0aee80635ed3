"""Clips longer than the model: windows of the latents, and runs over them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvlock_jax import lock
from kvlock_jax.grid import Grid
from kvlock_jax.lock import Lock
from kvlock_jax.models.wan.config import WanConfig
from kvlock_jax.models.wan.transformer import WanTransformer
from kvlock_jax.models.wan.vace import VACEContext, wan_transformer
from kvlock_jax.parallel.mesh import make_mesh
from kvlock_jax.sampling import solvers
from kvlock_jax.sampling.edits import Edits, bucket
from kvlock_jax.sampling.loop import sample
from kvlock_jax.sampling.program import Program
from kvlock_jax.sampling.windows import Windows, number

SIZES = WanConfig(2, 16, 2, 24, in_channels=4, out_channels=4, text_dim=8, freq_dim=8)
VACE = dataclasses.replace(SIZES, vace_layers=(0,), vace_in_channels=6)
T, H, W, STEPS, OMEGA = 7, 4, 8, 4, 3.0


def network(config):
    model = wan_transformer(config, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(3)  # hints of initial parameters are zero
    return jax.tree.map(lambda x: x + jnp.asarray(rng.normal(0, 0.1, x.shape), x.dtype), model)


def make_edits(vace=False, references=0, edits=2, foreground=((1, 5), (2, 7))):
    """Edits of one source; each has a box in the latent frames of `foreground`."""
    rng = np.random.default_rng(1)
    grid = Grid.of((references + T, H, W))
    shape = (1, *grid.space, 4)
    own = np.zeros((edits, *grid.space), bool)
    for mask, (first, last) in zip(own, foreground, strict=False):
        mask[references + first : references + last, 1:3, 2:5] = True
    draw = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in (shape, shape))
    cells = [grid.split(x) for x in (*draw, jnp.asarray(own))]
    text, source_text = (
        jnp.asarray(rng.normal(size=(n, 5, 8)), jnp.float32) for n in (2 * edits, 1)
    )
    if vace:
        control = jnp.asarray(rng.normal(size=(edits + 1, *grid.space, 6)), jnp.float32)
        control = grid.split(control)
        text = VACEContext(text, control[:edits], jnp.full(edits, 0.7))
        source_text = VACEContext(source_text, control[edits:], jnp.full(1, 0.7))
    return Edits(*cells, text, source_text, grid, references)


def run(model, edits, settings, frames=None, overlap=1, *, tokens=None, idle=None, **rest):
    """The edited latents, over windows of some latent frames or whole."""
    windows = frames and Windows.of(edits.grid, edits.references, frames, overlap, **rest)
    program = Program.of(settings, tokens, windows=windows)
    program = program if idle is None else dataclasses.replace(program, idle=idle)
    table = solvers.euler(STEPS, 3.0)
    start = jnp.array(edits.spread(edits.noise), copy=True)
    args = (start, edits, table, lock.knobs(settings, OMEGA))
    latents, trace = sample(model, *args, program=program)
    return np.asarray(latents), jax.tree.map(np.asarray, trace)


def preset(name, **changes):
    return dataclasses.replace(lock.preset(name, OMEGA), kappa=2, window=2, **changes)


@pytest.mark.parametrize(
    "whole, frames, overlap, count",
    [
        (21, 21, 5, 1),
        (22, 21, 5, 2),
        (54, 21, 5, 3),  # with overlaps of 4 and 5
        (55, 21, 5, 3),
        (56, 21, 5, 4),
        (126, 21, 5, 8),
        (9, 3, 1, 4),
        (17, 3, 1, 8),
        (5, 2, 1, 4),
    ],
)
def test_windows_cover_a_clip(whole, frames, overlap, count):
    assert number(whole, frames, overlap) == count
    for moves in (False, True):
        windows = Windows.of(Grid.of((whole + 2, 2, 2)), 2, frames, overlap, moves=moves)
        assert (windows.count, windows.frames) == (count, frames)
        starts = windows.starts(8)
        assert (starts[:, 0] == 0).all() and (starts[:, -1] == whole - frames).all()
        shared = frames - np.diff(starts, axis=1)
        least = overlap - overlap // 5 - (overlap // 2 if moves else 0)
        assert (shared >= least).all()
        assert (len(np.unique(starts, axis=0)) > 1) == (moves and count > 2 and overlap > 1)
    assert windows.grid.space == (2 + frames, 2, 2)


def test_a_weight_rises_and_falls_over_the_overlap():
    windows = Windows.of(Grid.of((9, 2, 2)), 0, 5, 2)
    np.testing.assert_allclose(windows.weights, [1 / 3, 2 / 3, 1, 2 / 3, 1 / 3])


@pytest.mark.parametrize(
    "settings, vace, references",
    [
        (preset("kvlock"), False, 0),
        (preset("hard_lock", detection="global"), True, 1),
        (preset("kvlock", cache="carried", lock_contexts=True), True, 2),
        (preset("apg"), False, 1),
    ],
)
def test_one_window_is_the_whole_clip(settings, vace, references):
    model, edits = network(VACE if vace else SIZES), make_edits(vace, references)
    want, trace = run(model, edits, settings)
    got, of_windows = run(model, edits, settings, T)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(of_windows.sigma2, trace.sigma2, rtol=1e-5)


@pytest.mark.parametrize("vace, references", [(False, 0), (True, 2)])
def test_velocities_are_joined_by_their_weights(vace, references):
    """One step of Euler's, against passes over each window alone."""
    model, edits = network(VACE if vace else SIZES), make_edits(vace, references, edits=1)
    settings = preset("hard_lock", background="model", rescale_uncond=False)
    windows = Windows.of(edits.grid, references, 3, 2)
    assert windows.count == 5
    table, starts = solvers.euler(1, 3.0), [0, 1, 2, 3, 4]
    program = Program.of(settings, windows=windows)
    start = jnp.array(edits.noise, copy=True)
    got, _ = sample(model, start, edits, table, lock.knobs(settings, OMEGA), program=program)
    clip, rows = edits.grid, jnp.full(2, 1000.0 * table.sigma[0])

    def cut(x, first):
        """A window of some frames, behind the references."""
        x = clip.join(x[..., None] if x.ndim == 3 else x)
        return jnp.concatenate([x[:, :references], x[:, references:][:, first : first + 3]], 1)

    total, weights = np.zeros((2, *clip.space, 4)), np.zeros(clip.space[0])
    for first in starts:
        noise = cut(edits.noise, first)
        grid = Grid.of(noise.shape[1:4])
        texts = (edits.prompts, edits.source_prompts)
        if vace:
            texts = [
                dataclasses.replace(text, control=grid.split(cut(text.control, first)))
                for text in texts
            ]
        texts = [model.condition(text, grid) for text in texts]
        z, own = grid.split(noise), grid.split(cut(edits.foreground, first))[..., 0].any(-1)
        own = own | (jnp.arange(grid.tokens) < references * H // 2 * W // 2)
        cache = model.keys_values(z, rows[:1], texts[1])[1]  # at noise level 1 the source is noise
        held = Lock(cache, own, jnp.ones(1))
        velocity = np.asarray(grid.join(model(jnp.tile(z, (2, 1, 1, 1)), rows, texts[0], held)))
        share = np.array([1 / 3, 2 / 3, 1 / 3])
        at = references + first
        total[:, :references] += velocity[:, :references] / len(starts)
        total[:, at : at + 3] += share[:, None, None, None] * velocity[:, references:]
        weights[at : at + 3] += share
    total[:, references:] /= weights[references:, None, None, None]
    v_cond, v_uncond = (clip.split(jnp.asarray(v, jnp.float32)[None]) for v in total)
    velocity = lock.guide(v_cond, v_uncond, jnp.full(1, OMEGA), jnp.ones(1))
    want = edits.noise - table.sigma[0] * velocity
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


def test_windows_without_foreground_are_left_out(monkeypatch):
    """Where the background is pinned their velocity reaches nothing."""
    model, edits = network(SIZES), make_edits(foreground=((0, 2), (1, 2)))
    settings = preset("fast", warmup_fusion_ratio=1.0)
    windows = Windows.of(edits.grid, 0, 3, 1)
    tokens = bucket(windows.most_tokens(np.array([[4] * 2 + [0] * 5] * 2)), windows.grid)
    assert windows.count == 3 and tokens < windows.grid.tokens
    called = []

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Counted:
        """A model that tells of each pass."""

        inner: WanTransformer

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def __call__(self, *args):
            jax.debug.callback(called.append, 1)
            return self.inner(*args)

    for moves in (False, True):
        want, _ = run(model, edits, settings, 3, tokens=tokens, idle=False, moves=moves)
        got, _ = run(Counted(model), edits, settings, 3, tokens=tokens, moves=moves)
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
        kept = ~np.asarray(edits.foreground)
        source = np.asarray(edits.spread(edits.source))
        np.testing.assert_allclose(got[kept], source[kept], atol=1e-6)
    jax.effects_barrier()
    assert len(called) == 2 * STEPS  # of three windows only the first holds foreground


@pytest.mark.parametrize("moves", [False, True])
def test_a_carried_cache_of_windows(moves):
    model, edits = network(VACE), make_edits(vace=True, references=1)
    for changes in ({}, {"background": "source", "warmup_fusion_ratio": 0.5}):
        settings = preset("kvlock", **changes)
        want, _ = run(model, edits, settings, 4, 2, moves=moves)
        carried = dataclasses.replace(settings, cache="carried")
        got, _ = run(model, edits, carried, 4, 2, moves=moves)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape, at_once", [((4, 1, 1), 4), ((1, 4, 2), 1), ((2, 2, 1), 2)])
def test_a_mesh_shares_windows(shape, at_once):
    """Over `data` a few run at once; over `frames` devices share the tokens of each."""
    model, edits = network(VACE), make_edits(vace=True, references=1, edits=1)
    settings = preset("kvlock_anchor", warmup_fusion_ratio=0.3)
    want, trace = run(model, edits, settings, 3)
    devices = jax.devices()[: int(np.prod(shape))]
    with jax.set_mesh(make_mesh(*shape, devices=devices)):
        got, on_mesh = run(model, edits, settings, 3, at_once=at_once)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(on_mesh.sigma2, trace.sigma2, rtol=1e-3)
