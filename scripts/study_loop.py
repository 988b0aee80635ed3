"""What the study does to the loop: it replays statistics, and measures how much guidance does.

The loop reads sigma2 from the state of each step. `Watched` puts values there that a rule makes of
the run's own ones, or of those that another run had: so alpha and omega follow them instead.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from kvlock_jax import lock
from kvlock_jax.sampling import loop

Rule = Callable[[int, np.ndarray], np.ndarray]
"""The statistic of each edit in a step, from the step's number and their own."""


def recorded(course: np.ndarray) -> Rule:
    """The rule that replays a course, steps x edits."""
    return lambda number, sigma2: course[number]


def typical(tau: float, power: int, shift: int = 0) -> Rule:
    """The rule under which edits of the usual sigma2 have tau, the others by their ratio to it.

    With power 1 an edit of twice the batch's geometric mean has 2 tau, with -1 it has tau / 2. With
    a shift each edit has the ratio of another one of the batch.
    """

    def rule(number: int, sigma2: np.ndarray) -> np.ndarray:
        logarithm = np.log(np.maximum(sigma2, 1e-12))
        return tau * np.exp(power * np.roll(logarithm - np.nanmean(logarithm), shift))

    return rule


class Watched:
    """A context in which `loop.advance` follows a rule, and its guidance is measured at a step.

    Attributes:
      gap: mean square of the difference of conditional and unconditional velocity inside the mask,
        of each edit, in step `at`; `None` before it.
    """

    def __init__(self, rule: Rule | None, at: int | None):
        self.gap: np.ndarray | None = None
        self._rule, self._at, self._number = rule, at, 0
        self._advance = loop.advance
        self._patch = contextlib.ExitStack()

    def __enter__(self) -> "Watched":
        self._patch.enter_context(mock.patch.object(loop, "advance", self))
        return self

    def __exit__(self, *raised: object) -> None:
        self._patch.close()

    def __call__(self, *args: Any, program: Any) -> Any:
        """Runs a step."""
        if self._number == self._at:
            self.gap = np.asarray(_gap(*args, program=program))
        *rest, state = args
        if self._rule is not None:
            found = self._rule(self._number, np.asarray(state.sigma2))
            state = dataclasses.replace(state, sigma2=jnp.asarray(found, jnp.float32))
        self._number += 1
        return self._advance(*rest, state, program=program)

    def lower(self, *args: Any, **static: Any) -> Any:
        """Lowers the step, which stays as it was."""
        return self._advance.lower(*args, **static)


@functools.partial(jax.jit, static_argnames="program")
def _gap(model, edits, knobs, texts, inputs, state, *, program) -> jax.Array:
    """The gap between the branches of a step, as `loop.advance` computes them."""
    knobs = dataclasses.replace(knobs, guidance_scale=inputs.guidance_scale)
    at = (state.sigma2, lock.ready(state.window), inputs.scheduled, knobs)
    alpha, beta = lock.inject(lock.fusion_ratio(*at), inputs.injected, knobs)
    over = loop._Step(model, edits, knobs, texts, program).over
    omega = lock.guidance_scale(*at)
    cond, uncond = over.branches(state.latents, inputs, state.cache, (alpha, beta), omega)
    inside = edits.foreground[..., None]
    square, axes = jnp.where(inside, jnp.square(cond - uncond), 0.0), (1, 2, 3)
    return square.sum(axes) / (inside.sum(axes) * square.shape[-1]).astype(jnp.float32)
