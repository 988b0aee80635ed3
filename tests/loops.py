"""A model of a few lines, and the loop over it in plain NumPy and float64."""

import contextlib
import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from kvlock_jax import lock
from kvlock_jax.grid import Grid
from kvlock_jax.lock import KVCache
from kvlock_jax.sampling import solvers
from kvlock_jax.sampling.edits import Edits
from kvlock_jax.sampling.loop import Program, Trace, sample
from kvlock_jax.sampling.stepwise import stepwise

EDITS, T, H, W, C = SHAPE = (2, 3, 4, 6, 2)
LAYERS, HEADS, SIZE = 2, 2, 4  # a patch of 1 x 2 x 2 cells of 2 channels is 2 heads of 4
LENGTH, WIDTH = T * (H // 2) * (W // 2), HEADS * SIZE
GRID = Grid((T, H, W), LENGTH)
STEPS, WINDOW, OMEGA, SHIFT = 14, 10, 3.0, 3.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fake:
    """A model whose every token feels the keys and values of all, and so the lock.

    Attributes:
      keys: of each layer.
      values: of each layer.
      out: from a token to its velocity.
      limit: timestep under which the velocity is not finite.
      on_trace: called whenever Python runs through `__call__`.
      on_source: called with the timestep of each source pass, from inside the loop.
      on_model: called with the timestep of each other pass, from inside the loop.
    """

    keys: jax.Array
    values: jax.Array
    out: jax.Array
    limit: jax.Array
    on_trace: Callable = dataclasses.field(default=id, metadata={"static": True})
    on_source: Callable | None = dataclasses.field(default=None, metadata={"static": True})
    on_model: Callable | None = dataclasses.field(default=None, metadata={"static": True})

    def condition(self, context, grid):
        assert grid == GRID
        return jnp.tanh(context)

    def times(self, timestep):
        return timestep

    def per_token(self, timestep, of_token):
        return jnp.take_along_axis(timestep, of_token, axis=1)

    def __call__(self, latents, timestep, conditioning, lock=None):
        self.on_trace(self)
        velocity = self._velocity(latents, timestep, conditioning, lock)
        if self.on_model is None:
            return velocity

        def listened(t, v):
            self.on_model(float(t[0]))
            return np.asarray(v)

        return jax.pure_callback(listened, jax.typeof(velocity), timestep, velocity)

    def empty_cache(self, latents):
        shape = (LAYERS, len(latents), LENGTH, HEADS, SIZE)
        return KVCache.zeros(shape, jnp.float32)

    def keys_values(self, latents, timestep, conditioning, into):
        if self.on_source is not None:
            jax.debug.callback(self.on_source, timestep[0])
        velocity = self._velocity(latents, timestep, conditioning, None)
        return velocity, self._keys_values(latents, timestep, conditioning)

    def _keys_values(self, latents, timestep, text):
        x, t = to_tokens(latents), timestep.reshape(len(timestep), -1, 1) / 1000
        k = jnp.stack([jnp.tanh(x @ w + t + text[:, None]) for w in self.keys])
        v = jnp.stack([(x @ w) * (1 + t) for w in self.values])
        return KVCache(*(y.reshape(*y.shape[:-1], HEADS, SIZE) for y in (k, v)))

    def _velocity(self, latents, timestep, text, held):
        own, x = self._keys_values(latents, timestep, text), to_tokens(latents)
        cache = held and held.cache
        if isinstance(cache, lock.SourcePass):
            _, cache = self.keys_values(cache.latents, cache.time, cache.conditioning, None)
        total = jnp.tanh(text)[:, None]
        for layer in range(LAYERS):
            k, v = own.k[layer], own.v[layer]
            if held is not None:
                if held.computed is not None:
                    k, v = (lock.take(x, held.tokens) for x in (k, v))
                k, v = held.lead(k, cache.k[layer]), held.lead(v, cache.v[layer])
            total = total + (k * v).reshape(*k.shape[:2], -1).mean(axis=1, keepdims=True)
        velocity = to_cells(jnp.tanh(x @ self.out + total))
        if held is not None and held.computed is not None:
            velocity = lock.take(velocity, held.tokens)
        over = timestep.reshape(len(timestep), -1).max(axis=1) < self.limit
        return jnp.where(over[:, None, None, None], jnp.inf, velocity)


def to_tokens(z):
    return z.reshape(-1, LENGTH, WIDTH)


def to_cells(x):
    return x.reshape(-1, LENGTH, 4, C)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Echo:
    """A model that answers with the source pass's latents wherever it may."""

    def condition(self, context, grid):
        return None

    def times(self, timestep):
        return None

    def __call__(self, latents, timestep, conditioning, lock=None):
        cached = to_tokens(lock.cache.latents)
        seen = to_cells(jnp.where(lock.foreground[..., None], 0.0, cached))
        return jnp.repeat(seen, 2, axis=0)


def make_fake(seed=0, **fields) -> Fake:
    rng = np.random.default_rng(seed)
    weights = (rng.normal(0, 0.4, (n, WIDTH, WIDTH)) for n in (LAYERS, LAYERS, 1))
    keys, values, out = (jnp.asarray(w, jnp.float32) for w in weights)
    return Fake(**{"keys": keys, "values": values, "out": out[0], "limit": jnp.float32(0)} | fields)


def make_edits(seed=1, references=0) -> Edits:
    rng = np.random.default_rng(seed)
    foreground = np.zeros(SHAPE[:4], bool)
    foreground[0, :, 1:3, 2:5] = True  # its borders run through patches
    foreground[1, 1:, :2, :1] = True
    foreground[:, :references] = False
    normal = (rng.normal(size=s) for s in (SHAPE, SHAPE, (2 * EDITS, WIDTH), (EDITS, WIDTH)))
    source, noise, prompts, source_prompts = (jnp.asarray(x, jnp.float32) for x in normal)
    prompts = prompts.reshape(2, EDITS, WIDTH).swapaxes(0, 1).reshape(-1, WIDTH)
    cells = (GRID.split(x) for x in (source, noise, jnp.asarray(foreground)))
    return Edits(*cells, prompts, source_prompts, GRID, references)


def whole(patches):
    return np.asarray(GRID.join(patches))


def one_edit(edits: Edits, i: int) -> Edits:
    alone = jax.tree.map(lambda x: x[i : i + 1], edits)
    return dataclasses.replace(alone, prompts=edits.prompts[2 * i : 2 * i + 2])


def nobody(step):
    """Hears of each step, so that the loop runs step by step."""


def run(model, edits, settings, table=None, omega=OMEGA, on_step=None):
    table = solvers.euler(STEPS, SHIFT) if table is None else table
    program, knobs = Program.of(settings), lock.knobs(settings, omega)
    latents = jnp.array(edits.spread(edits.noise), copy=True)
    args = (latents, edits, table, knobs)
    if on_step is None:
        return sample(model, *args, program=program)
    experts = model if isinstance(model, list) else [model]

    def using(number):
        return contextlib.nullcontext(experts[number])

    return stepwise(using, *args, program=program, on_step=on_step)


def np_tokens(z):
    cells = [(t, h, w) for t in range(T) for h in range(0, H, 2) for w in range(0, W, 2)]
    return np.stack([z[t, h : h + 2, w : w + 2].reshape(-1) for t, h, w in cells])


def np_keys_values(weights, z, level, text):
    x = np_tokens(z)
    k = [np.tanh(x @ w + level + text) for w in weights["keys"]]
    return k, [(x @ w) * (1 + level) for w in weights["values"]]


def np_velocity(weights, z, level, text, cached, edited_tokens, alpha):
    x, total = np_tokens(z), np.tanh(text)
    own = np_keys_values(weights, z, level, text)
    for layer in range(LAYERS):
        mixed = []
        for new, old in zip((own[0][layer], own[1][layer]), cached, strict=True):
            rows = [
                n if edited else (1 - alpha) * n + alpha * o
                for n, o, edited in zip(new, old[layer], edited_tokens, strict=True)
            ]
            mixed.append(np.array(rows))
        total = total + (mixed[0] * mixed[1]).mean(axis=0)
    rows, velocity = np.tanh(x @ weights["out"] + total), np.empty(z.shape)
    for row, (t, h, w) in zip(rows, np.ndindex(T, H // 2, W // 2), strict=True):
        velocity[t, 2 * h : 2 * h + 2, 2 * w : 2 * w + 2] = row.reshape(2, 2, C)
    return velocity


def oracle(model, edits, i, settings, table, omega_0):
    """One edit by itself, METHOD.md section by section; its latents and its trace."""
    weights = {n: np.asarray(getattr(model, n), np.float64) for n in ("keys", "values", "out")}
    per_source = EDITS // len(edits.source)
    row = i // per_source
    source, noise = (whole(x).astype(np.float64)[row] for x in (edits.source, edits.noise))
    edited = whole(edits.foreground)[i, ..., 0]
    own, shown = edited.copy(), np.ones_like(edited)
    own[: edits.references], shown[: edits.references] = True, False
    edited_tokens = np_tokens(np.repeat(own[..., None], C, axis=-1)).any(axis=1)
    texts = (edits.prompts[2 * i], edits.prompts[2 * i + 1], edits.source_prompts[row])
    cond, uncond, source_text = (np.tanh(np.asarray(x, np.float64)) for x in texts)
    everything = np.ones_like(edited)
    steps = len(table.sigma)

    z, estimates, buffer, rows = noise, [], 0.0, []
    for k, (sigma, after) in enumerate(zip(table.sigma, table.sigma_next, strict=True)):
        sigma, after = float(sigma), float(after)
        scheduled, known = k >= steps - settings.kappa, len(estimates) >= 2
        sigma2 = 0.0
        if known:
            region = shown if settings.detection == "global" else edited
            recent = np.array(estimates[-settings.window :])
            sigma2 = recent.var(axis=0, ddof=1)[region].mean()
        part = sigma2 / settings.tau
        alpha, omega = settings.warmup_fusion_ratio, omega_0
        if scheduled and not settings.adapt_fusion_ratio:
            alpha = settings.fusion_ratio
        elif scheduled and known:
            alpha = min(part, 1.0)
        if not settings.enabled:
            alpha = 0.0
        if scheduled and known and settings.adapt_guidance:
            omega = omega_0 * min(max(part, settings.omega_floor), settings.omega_ceiling)
        elif scheduled and not settings.adapt_guidance:
            omega = omega_0 * settings.guidance_ratio

        seen = (1 - sigma) * source + sigma * noise
        cached = np_keys_values(weights, seen, sigma, source_text)
        branch = (cached, edited_tokens, alpha)
        v_cond = np_velocity(weights, z, sigma, cond, *branch)
        v_uncond = np_velocity(weights, z, sigma, uncond, *branch)
        s, pinned = 1.0, settings.background == "source"
        if settings.rescale_uncond:
            a, b = (v[edited if pinned else everything].ravel() for v in (v_cond, v_uncond))
            s = np.dot(a, b) / (np.dot(b, b) + 1e-8)
        v = s * v_uncond + omega * (v_cond - s * v_uncond)
        if settings.guidance == "apg":
            buffer = v_cond - v_uncond + settings.apg_momentum * buffer
            d = buffer * min(1.0, settings.apg_norm / np.sqrt((buffer**2).sum()))
            unit = v_cond / np.sqrt((v_cond**2).sum())
            parallel = (d * unit).sum() * unit
            v = v_cond + (omega - 1) * (d - parallel + settings.apg_eta * parallel)
        if k < settings.zero_init_steps:
            v = np.zeros_like(v)
        estimates.append(z - sigma * v)
        z = z + (after - sigma) * v
        if pinned:
            kept = (1 - after) * source + after * noise
            z = np.where(own[..., None], z, kept)
        rows.append((sigma, sigma2, alpha, omega, s, scheduled, True))
    return z, Trace(*(np.array(column) for column in zip(*rows, strict=True)))
