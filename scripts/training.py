"""The loop that the demo trainings share: it saves, resumes, averages weights and logs.

Import it before JAX: it makes one CPU device per core, over which `fit` splits every batch:
much of XLA's CPU code runs on one thread of its device.
"""

import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count={os.cpu_count()}")

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

State = dict[str, Any]
"""A training state: `params`, their running average `ema`, `opt_state` and the `step` reached."""


def average(ema: Any, params: Any, step: jax.Array, decay: float) -> Any:
    """`ema <- d ema + (1 - d) params` with `d = min(decay, (1 + step) / (10 + step))`.

    The ramp lets the average forget the initial weights within the first steps.
    """
    ramp = (1.0 + step) / (10.0 + step)
    d = jnp.minimum(decay, ramp)
    return jax.tree.map(lambda a, b: a + (1 - d) * (b - a), ema, params)


def adamw(rate: float, steps: int) -> optax.GradientTransformation:
    """AdamW of the transformers: 300 steps of warm-up, then down to a fiftieth of the rate."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, 300, steps, rate / 50)
    step = optax.adamw(schedule, b2=0.99, weight_decay=0.01)
    return optax.chain(optax.clip_by_global_norm(1.0), step)


def noised(x: jax.Array, sigma: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Latents `B T H W C` at noise levels `B`, and the velocities there."""
    eps = jax.random.normal(key, x.shape)
    s = sigma[:, None, None, None, None]
    return (1 - s) * x + s * eps, eps - x


def prefetch(make: Callable[[int], Any], start: int, stop: int, depth: int = 4) -> Iterator[Any]:
    """`make(start) .. make(stop - 1)` in order, a few of them ahead on another thread."""
    with ThreadPoolExecutor(1) as pool:
        ahead = [pool.submit(make, i) for i in range(start, min(start + depth, stop))]
        for i in range(start, stop):
            batch = ahead.pop(0).result()
            if i + depth < stop:
                ahead.append(pool.submit(make, i + depth))
            yield batch


def fit(
    state: State,
    update: Callable[[State, Any], tuple[State, dict[str, jax.Array]]],
    batches: Callable[[int], Any],
    steps: int,
    run: pathlib.Path,
    *,
    save_every: int = 200,
    log_every: int = 50,
    evaluate: Callable[[State], dict[str, float]] | None = None,
    evaluate_every: int = 500,
) -> State:
    """Trains to `steps`, from the last state saved under `run` if there is one.

    A batch is a function of its step, so a resumed run sees what an undisturbed one would have.
    The log is `run/log.jsonl`, a line every `log_every` steps.
    """
    run.mkdir(parents=True, exist_ok=True)
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    with ocp.CheckpointManager((run / "state").absolute(), options=options) as manager:
        if (last := manager.latest_step()) is not None:
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
            state = manager.restore(last, args=ocp.args.StandardRestore(abstract))
            print(f"resumed at step {last}", flush=True)
        auto = (jax.sharding.AxisType.Auto,)
        mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=auto)
        split, whole = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in (("data",), ()))
        state = jax.device_put(state, whole)
        start, begin, taken = int(state["step"]), time.time(), 0
        for step, batch in enumerate(prefetch(batches, start, steps), start + 1):
            state, metrics = update(state, jax.device_put(batch, split))
            taken += 1
            record = {}
            if step % log_every == 0:
                record = {k: round(float(v), 5) for k, v in metrics.items()}
                record["seconds_per_step"] = round((time.time() - begin) / taken, 3)
            if evaluate and (step % evaluate_every == 0 or step == steps):
                record |= {k: round(float(v), 4) for k, v in evaluate(state).items()}
                begin, taken = time.time(), 0
            if record:
                line = json.dumps({"step": step, **record})
                print(line, flush=True)
                with open(run / "log.jsonl", "a") as log:
                    log.write(line + "\n")
            if step % save_every == 0 or step == steps:
                manager.save(step, args=ocp.args.StandardSave(state))
    return state
