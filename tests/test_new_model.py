"""The page on new models: its transformer, with joint attention, runs locked through the loop."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvlock_jax import lock
from kvlock_jax.grid import Grid
from kvlock_jax.sampling import solvers
from kvlock_jax.sampling.edits import Edits
from kvlock_jax.sampling.loop import Program, sample
from kvlock_jax.sampling.windows import Windows
from kvlock_jax.settings.schema import LockConfig

PAGE = (Path(__file__).parents[1] / "docs" / "new-model.md").read_text()
GRID = Grid.of((2, 4, 4))
WIDTH, LAYERS, WORDS, STEPS = 8, 2, 3, 4
FOREGROUND = np.zeros((1, 2, 4, 4), bool)
FOREGROUND[:, :, :2, :2] = True


@pytest.fixture(scope="module")
def joint():
    """The page's model, with random weights."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict = {"__name__": "new_model"}
    exec(compile(code, "docs/new-model.md", "exec"), names)
    rng = np.random.default_rng(0)
    blocks = rng.normal(0, 0.4, (LAYERS, 3, WIDTH, WIDTH))
    return names["JointDiT"](jnp.asarray(blocks, jnp.float32), WIDTH)


def edit(model, preset, prompt=0, tokens=None, windows=None, **changes):
    """The edited latents of a preset, `T H W C`, and the source's."""
    rng = np.random.default_rng(1)
    source, noise = (jnp.asarray(rng.normal(size=(1, 2, 4, 4, 2)), jnp.float32) for _ in range(2))
    texts = jnp.asarray(np.random.default_rng(2).normal(size=(3, WORDS, WIDTH)), jnp.float32)
    cells = [GRID.split(x) for x in (source, noise, jnp.asarray(FOREGROUND))]
    edits = Edits(*cells, texts[:2] + prompt, texts[2:], GRID)
    settings = LockConfig(**{**vars(lock.preset(preset, 3.0)), "kappa": 2, **changes})
    program = Program.of(settings, tokens, windows=windows)
    table = solvers.table("euler", STEPS, 3.0)
    knobs = lock.knobs(settings, 3.0)
    latents, _ = sample(model, jnp.array(edits.noise), edits, table, knobs, program=program)
    return GRID.join(latents)[0], source[0]


def test_only_the_locked_slice_is_the_sources(joint):
    """In the first block, where keys depend on latents alone, background keys are the cache's."""
    z = jax.random.normal(jax.random.key(0), (1, GRID.tokens, 4, 2))
    text = jax.random.normal(jax.random.key(1), (1, WORDS, WIDTH))
    time = joint.times(jnp.array([500.0]))
    _, cache = joint.keys_values(z, time, text, into=None)
    assert cache.k.shape == joint.empty_cache(z).k.shape
    own = lock.to_token_mask(jnp.asarray(FOREGROUND))
    none = joint(z, time, text, lock.Lock(cache, own, jnp.zeros(1)))
    np.testing.assert_array_equal(none, joint(z, time, text))
    # onto itself a lock changes nothing, onto another source everything
    same = joint(z, time, text, lock.Lock(cache, own, jnp.ones(1)))
    np.testing.assert_allclose(same, none, atol=1e-6)
    _, other = joint.keys_values(z[:, ::-1], time, text, into=None)
    assert np.abs(joint(z, time, text, lock.Lock(other, own, jnp.ones(1))) - none).max() > 0.01


def test_background_is_the_sources_and_the_prompt_counts(joint):
    one, source = edit(joint, "hard_lock")
    other, _ = edit(joint, "hard_lock", prompt=1)
    outside = ~FOREGROUND[0]
    np.testing.assert_allclose(one[outside], source[outside], atol=1e-6)
    assert np.abs(one - other)[FOREGROUND[0]].max() > 0.01


@pytest.mark.parametrize("changes", [{"cache": "carried"}, {"tokens": 2}])
def test_every_way_through_the_loop_agrees(joint, changes):
    """The carried cache, and the pass over the foreground alone, against the fused full pass."""
    plain, _ = edit(joint, "hard_lock", skip_background=False)
    np.testing.assert_allclose(edit(joint, "hard_lock", **changes)[0], plain, atol=1e-4)


def test_it_runs_over_windows(joint):
    """One that covers the clip is the clip; of two, each attends to its own frame alone."""
    whole, _ = edit(joint, "kvlock")
    one, _ = edit(joint, "kvlock", windows=Windows.of(GRID, 0, 2, 1))
    np.testing.assert_allclose(one, whole, rtol=1e-5, atol=1e-5)
    two, _ = edit(joint, "kvlock", windows=Windows.of(GRID, 0, 1, 0))
    assert two.shape == whole.shape and np.abs(two - whole).max() > 1e-3
