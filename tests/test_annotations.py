"""Array annotations are checked while tests run."""

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from kvlock_jax import lock
from kvlock_jax.grid import Grid
from kvlock_jax.sampling.edits import Edits

Z = jnp.zeros((2, 3, 4))


def test_arrays_that_do_not_fit_are_found():
    with pytest.raises(TypeCheckError, match="omega"):
        lock.guide(Z, Z, jnp.ones(3), jnp.ones(2))
    with pytest.raises(TypeCheckError, match="v_uncond"):
        lock.guide(Z, jnp.zeros((2, 3, 5)), jnp.ones(2), jnp.ones(2))
    with pytest.raises(TypeCheckError, match="region"):
        jax.jit(lock.projection_scale)(Z, Z, jnp.ones((2, 3)))
    assert lock.guide(Z, Z, jnp.ones(2), jnp.ones(2)).shape == Z.shape


def test_a_test_may_hand_in_other_arrays(unchecked):
    lock.guide(Z, Z, jnp.ones(2), jnp.ones(1))


def test_trees_may_hold_what_is_no_array():
    grid, source = Grid((1, 2, 2), 1), jnp.zeros((1, 1, 4, 4))
    edits = Edits(source, source, jnp.ones((1, 1, 4), bool), None, None, grid)
    assert jax.tree.map(lambda x: x.shape, edits).foreground == (1, 1, 4)
    assert jax.eval_shape(lambda: edits).noise.shape == (1, 1, 4, 4)
    with pytest.raises(TypeCheckError, match="foreground"):
        Edits(source, source, jnp.ones((1, 1, 4)), None, None, grid)
