"""Flow solvers as tables of coefficients: one row per step, and one scan body for all solvers.

Every solver here is linear in the clean estimates `m_k = x0_k = z_k - sigma_k v_k` (METHOD.md
section 1), so its coefficients are known before the loop (DESIGN.md section 2). They are computed
in NumPy float64 from the number of steps and the shift, stored in float32, and scanned over:

    corrected_k = c . (z_k, corrected_{k-1}, m_k, m_{k-1}, m_{k-2})
    z_{k+1}     = p . (corrected_k, m_k, m_{k-1})

With `a = sigma_{k+1} / sigma_k`, `lambda = log((1 - sigma) / sigma)` and `h` a step of lambda, the
exponential integral of a constant estimate is `a z + (1 - a) m`, which is Euler's step of the flow.
UniPC (arXiv 2302.04867, B(h) = e^h - 1) and DPM++ 2M (arXiv 2211.01095) add differences of
estimates to it.
"""

import dataclasses
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kvlock_jax.errors import ConfigError
from kvlock_jax.shapes import Cells

_TRAIN_STEPS = 1000

LevelGrid = Callable[[int, float], Float[np.ndarray, "steps"]]
"""From steps and shift to the noise level of each step."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SolverTable:
    """A solver's coefficients, one row per step; a single row has no leading axis.

    Attributes:
      sigma: noise level at which step k calls the model, (0, 1].
      sigma_next: noise level after the step; 0 in the last row.
      timestep: the model's timestep for `sigma`, (0, 1000], exactly as in Diffusers and in the
        publisher's code: `1000 sigma` for Euler, truncated to a whole number for UniPC and DPM++.
      corrector: weights of `(z_k, corrected_{k-1}, m_k, m_{k-1}, m_{k-2})`; `(1, 0, 0, 0, 0)` in
        a row without correction.
      predictor: weights of `(corrected_k, m_k, m_{k-1})`.
      expert: number of the model that takes the step (`with_experts`); 0 in a run of one model.
    """

    sigma: Float[Array | np.ndarray, "*steps"]
    sigma_next: Float[Array | np.ndarray, "*steps"]
    timestep: Float[Array | np.ndarray, "*steps"]
    corrector: Float[Array | np.ndarray, "*steps 5"]
    predictor: Float[Array | np.ndarray, "*steps 3"]
    expert: Int[Array | np.ndarray, "*steps"]

    def with_experts(self, boundary: float) -> "SolverTable":
        """The table of two experts, the high-noise one 0 and the low-noise one 1.

        As the publisher of Wan 2.2 (`wan/text2video.py`): a step is the high-noise expert's where
        its timestep, as the solver gives it to the model, is `1000 boundary` or more.
        """
        low = self.timestep < np.float32(boundary * _TRAIN_STEPS)
        return dataclasses.replace(self, expert=np.asarray(low, np.int32))

    @property
    def switches(self) -> Bool[Array | np.ndarray, "steps"]:
        """Marks the steps whose expert is not that of the step before."""
        before = jnp.concatenate([self.expert[:1], self.expert[:-1]])
        return self.expert != before

    @property
    def phases(self) -> list[tuple[int, range]]:
        """The steps of each expert in turn: its number, and its consecutive steps."""
        firsts = [0, *np.flatnonzero(np.diff(self.expert)) + 1, len(self.expert)]
        spans = itertools.pairwise(map(int, firsts))
        return [(int(self.expert[first]), range(first, last)) for first, last in spans]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SolverState:
    """The state between steps, float32, of one shape for all solvers.

    Attributes:
      corrected: sample that the last predictor started from.
      history: last two clean estimates, newest first.
    """

    corrected: Cells
    history: Float[Array, "2 B *space C"]


def flow_sigmas(levels: Float[np.ndarray, "steps"], shift: float) -> Float[np.ndarray, "steps"]:
    """The noise levels of a grid after the shift, `s sigma / (1 + (s - 1) sigma)` (section 1).

    Args:
      levels: unshifted levels, 0 to 1; the shift leaves 0 and 1 in place.
      shift: `s`, over 0; 1 changes nothing, a higher one spends more steps on high noise.
    """
    return shift * levels / (1.0 + (shift - 1.0) * levels)


def plain_grid(steps: int, shift: float) -> Float[np.ndarray, "steps"]:
    """The levels of equal parts from 1 to 0, shifted: the publisher's, and distilled models'.

    Origin: `get_sampling_sigmas` of Wan-Video/Wan2.2, for DPM++; LightX2V, for Euler.
    """
    return flow_sigmas(np.linspace(1.0, 0.0, steps + 1)[:-1], shift)


def plain_unipc_grid(steps: int, shift: float) -> Float[np.ndarray, "steps"]:
    """`plain_grid` from 0.999 on, where lambda is finite.

    Origin: `FlowUniPCMultistepScheduler` of Wan-Video/Wan2.2, whose first level is in float32.
    """
    return flow_sigmas(np.linspace(np.float32(0.999), 0.0, steps + 1)[:-1], shift)


def euler_grid(steps: int, shift: float) -> Float[np.ndarray, "steps"]:
    """The levels of Diffusers' `FlowMatchEulerDiscreteScheduler`.

    Equal parts from 1 to the shifted 1/1000, then shifted, which shifts the last level twice.
    """
    # Diffusers computes the last level in float32; a float64 one would put 50 steps at shift 3 one
    # float32 digit off.
    last = flow_sigmas(np.array([1 / _TRAIN_STEPS], np.float32), shift).item()
    return flow_sigmas(np.linspace(_TRAIN_STEPS, _TRAIN_STEPS * last, steps) / _TRAIN_STEPS, shift)


def unipc_grid(steps: int, shift: float) -> Float[np.ndarray, "steps"]:
    """The levels of Diffusers' `UniPCMultistepScheduler` with `use_flow_sigmas`: first 1 - 1e-6."""
    levels = flow_sigmas(np.linspace(1.0, 1 / _TRAIN_STEPS, steps + 1)[:-1], shift)
    levels[0] = 1.0 - 1e-6  # lambda is infinite at 1
    return levels


def dpmpp_grid(steps: int, shift: float) -> Float[np.ndarray, "steps"]:
    """The levels of Diffusers' `DPMSolverMultistepScheduler` with `use_flow_sigmas`.

    Equal parts from 0.999 to 0, then shifted.
    """
    # In this order, or 3 steps at shift 1 truncate to timestep 665 where Diffusers has 666.
    grid = 1.0 - np.linspace(1.0, 1 / _TRAIN_STEPS, steps + 1)[:0:-1]
    return flow_sigmas(grid, shift)


def euler(steps: int, shift: float, grid: LevelGrid = euler_grid) -> SolverTable:
    """Euler's method for the flow, `z + (sigma' - sigma) v` (METHOD.md section 1).

    Raises:
      ConfigError: steps under 1, shift not over 0, or levels that float32 cannot tell apart.
    """
    _check(steps, shift)
    sigma = _with_zero(grid(steps, shift), steps, shift)
    timestep = np.float32(_TRAIN_STEPS) * sigma[:-1].astype(np.float32)
    return _table(sigma, timestep, _no_corrector(steps), _first_order(sigma))


def unipc(steps: int, shift: float, grid: LevelGrid = unipc_grid) -> SolverTable:
    """UniPC of order 2, `bh2`, on clean estimates, lower order at the ends: Wan's settings.

    Step k first corrects the sample that it called the model on (UniC, which redoes the step before
    now that `m_k` is known), then predicts from it (UniP). Timesteps are truncated to whole
    numbers, as Diffusers and the publisher do.

    Raises:
      ConfigError: steps under 1, shift not over 0, or levels that float32 cannot tell apart.
    """
    _check(steps, shift)
    levels = grid(steps, shift)
    sigma = _with_zero(levels, steps, shift)
    return _table(sigma, np.trunc(_TRAIN_STEPS * levels), _unic(sigma), _second_order(sigma))


def dpmpp_2m(steps: int, shift: float, grid: LevelGrid = dpmpp_grid) -> SolverTable:
    """DPM-Solver++ (2M), midpoint: UniPC's predictor without its corrector, on another grid.

    Raises:
      ConfigError: steps under 1, shift not over 0, or levels that float32 cannot tell apart.
    """
    _check(steps, shift)
    levels = grid(steps, shift)
    sigma, timestep = _with_zero(levels, steps, shift), np.trunc(_TRAIN_STEPS * levels)
    return _table(sigma, timestep, _no_corrector(steps), _second_order(sigma))


def table(name: str, steps: int, shift: float, grid: str = "diffusers") -> SolverTable:
    """The table of a solver by its name in `SampleConfig.solver`, and of a grid's.

    Raises:
      ConfigError: unknown name, steps under 1, shift not over 0, or levels too close for float32.
    """
    tables: dict[str, tuple[Callable[..., SolverTable], dict[str, LevelGrid]]] = {
        "unipc": (unipc, {"diffusers": unipc_grid, "plain": plain_unipc_grid}),
        "euler": (euler, {"diffusers": euler_grid, "plain": plain_grid}),
        "dpm++": (dpmpp_2m, {"diffusers": dpmpp_grid, "plain": plain_grid}),
    }
    if name not in tables:
        raise ConfigError(f"solver must be one of {', '.join(tables)}, found {name!r}")
    solver, grids = tables[name]
    if grid not in grids:
        raise ConfigError(f"grid must be one of {', '.join(grids)}, found {grid!r}")
    return solver(steps, shift, grids[grid])


def init(latents: Cells) -> SolverState:
    """The state before the first step, whose rows give all of it the weight 0."""
    start = latents.astype(jnp.float32)
    return SolverState(start, jnp.zeros((2, *start.shape), jnp.float32))


def step(
    row: SolverTable, state: SolverState, latents: Cells, x0: Cells
) -> tuple[Cells, SolverState]:
    """One step of any solver: the latents at `row.sigma_next`, and the state after it.

    It acts on each element by itself, so a caller may overwrite some of the returned latents (the
    pinned background of METHOD.md section 8) without changing the others or the state. It must then
    overwrite them after *every* step, since a corrector gives `z_k` the weight 0 and goes back to
    the corrected sample of the step before.

    Args:
      row: row of the step, a slice of a `SolverTable`.
      state: state after the step before, or `init`.
      latents: `z_k`, the latents that the model was called on.
      x0: clean estimate `z_k - sigma_k v_k` of that call.

    Returns:
      `z_{k+1}` and the state, both float32.
    """
    c, p = row.corrector, row.predictor
    z, m = latents.astype(jnp.float32), x0.astype(jnp.float32)
    m1, m2 = state.history[0], state.history[1]
    corrected = c[0] * z + c[1] * state.corrected + c[2] * m + c[3] * m1 + c[4] * m2
    following = p[0] * corrected + p[1] * m + p[2] * m1
    return following, SolverState(corrected, jnp.stack([m, m1]))


def _check(steps: int, shift: float) -> None:
    if steps < 1:
        raise ConfigError(f"steps must be at least 1, found {steps!r}")
    if not 0 < shift < float("inf"):
        raise ConfigError(f"shift must be over 0 and finite, found {shift!r}")


def _with_zero(
    levels: Float[np.ndarray, "steps"], steps: int, shift: float
) -> Float[np.ndarray, "steps+1"]:
    """The levels and a last 0, rounded to float32 before the coefficients are computed.

    1 - 1e-6 in float32 is 1 - 1.0133e-6, and UniPC takes the logarithm of that difference: with the
    unrounded level, the weights of old estimates in steps 1 and 2 would be 0.1-0.3% off.
    """
    sigma = np.append(levels, 0.0).astype(np.float32).astype(np.float64)
    if not np.all(np.diff(sigma) < 0):
        raise ConfigError(
            f"shift must leave {steps} steps apart in float32, found {shift!r}, which does not"
        )
    return sigma


def _table(
    sigma: Float[np.ndarray, "levels"],
    timestep: Float[np.ndarray, "levels-1"],
    corrector: Float[np.ndarray, "levels-1 5"],
    predictor: Float[np.ndarray, "levels-1 3"],
) -> SolverTable:
    columns = (sigma[:-1], sigma[1:], timestep, corrector, predictor)
    expert = np.zeros(len(timestep), np.int32)
    return SolverTable(*(np.asarray(column, np.float32) for column in columns), expert)


def _no_corrector(steps: int) -> Float[np.ndarray, "{steps} 5"]:
    return np.tile([1.0, 0.0, 0.0, 0.0, 0.0], (steps, 1))


def _first_order(sigma: Float[np.ndarray, "levels"]) -> Float[np.ndarray, "levels-1 3"]:
    a = sigma[1:] / sigma[:-1]
    return np.stack([a, 1.0 - a, np.zeros_like(a)], axis=1)


def _lambda_steps(
    sigma: Float[np.ndarray, "levels"],
) -> tuple[Float[np.ndarray, "levels-2"], Float[np.ndarray, "ratios"]]:
    """The steps `h_k = lambda_{k+1} - lambda_k`, and `r_k = (lambda_{k-1} - lambda_k) / h_k`.

    `r` starts with k = 1. The step to sigma 0, where lambda is infinite, is always of first order
    and has neither.
    """
    with np.errstate(divide="ignore"):  # shift over 3e4 rounds DPM++'s first level to 1: r is -inf
        h = np.diff(np.log1p(-sigma[:-1]) - np.log(sigma[:-1]))
    return h, -h[:-1] / h[1:]


def _second_order(sigma: Float[np.ndarray, "levels"]) -> Float[np.ndarray, "levels-1 3"]:
    """`a z + (1 - a) (m_k + (m_{k-1} - m_k) / (2 r))`; first order in the first and last row."""
    rows = _first_order(sigma)
    _, r = _lambda_steps(sigma)
    extrapolation = rows[1:-1, 1] / (2.0 * r)
    rows[1:-1, 1] -= extrapolation
    rows[1:-1, 2] = extrapolation
    return rows


def _unic(sigma: Float[np.ndarray, "levels"]) -> Float[np.ndarray, "levels-1 5"]:
    """UniC's rows: row k redoes the step from k - 1 to k with `m_k` known; row 0 corrects nothing.

    `a z + (1 - a) (m_{k-1} + rho (m_k - m_{k-1}) + rho_old (m_{k-2} - m_{k-1}) / r)`. Row 1
    has no `m_{k-2}`, and its rho is 1/2; after it `rho_old + rho = b_1` and
    `r rho_old + rho = b_2`, where `b_1 = 1 / (-h) - 1 / B`, `b_2 = 2 b_1 / (-h) - 1 / B` and
    `B = e^{-h} - 1` (section 3 of the paper), so that a quadratic in lambda is integrated exactly.
    """
    rows = _no_corrector(len(sigma) - 1)
    if len(rows) == 1:
        return rows
    h, r = _lambda_steps(sigma)
    b1 = -1.0 / h - 1.0 / np.expm1(-h)
    b2 = -2.0 * b1 / h - 1.0 / np.expm1(-h)
    rho, old = np.full_like(h, 0.5), np.zeros_like(h)
    old[1:] = (b1[1:] - b2[1:]) / (1.0 - r)
    rho[1:] = b1[1:] - old[1:]
    old[1:] /= r
    a = sigma[1:-1] / sigma[:-2]
    rest = 1.0 - a
    columns = [np.zeros_like(a), a, rest * rho, rest * (1.0 - rho - old), rest * old]
    rows[1:] = np.stack(columns, axis=1)
    return rows
