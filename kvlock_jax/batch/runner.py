"""Runs the edits of a manifest, in a folder that a run may leave at any moment.

Each edit ends as a video with a JSON beside it, or as a line of the file of failures. A run that
was cut short is started again and does the missing edits (`kvlock_jax.batch.resume`).

The noise of an edit is drawn from its seed and its id (or `noise_id`): it does not depend on the
order of lines, on batches, or on other edits. Two threads read the next edits (`reader`) and write
the last ones (`publisher`) while the devices work.

On several hosts each reads and runs every edit, and the first writes. They agree on each edit's
inputs before it runs, and on the outcome of each batch before anything is retried or written.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array

from kvlock_jax.batch import lease, publisher
from kvlock_jax.batch.lease import Lease
from kvlock_jax.batch.manifest import Failure, reason
from kvlock_jax.batch.publisher import FailureLog, OnEnd, Outcome, Publisher, noise_number
from kvlock_jax.batch.reader import Reader, Reading, ahead
from kvlock_jax.batch.resume import Work
from kvlock_jax.errors import HostError, InputError, LostHostError
from kvlock_jax.media import storage
from kvlock_jax.media.fit import Fit
from kvlock_jax.parallel import agreement
from kvlock_jax.pipeline.api import Result, run_batch
from kvlock_jax.pipeline.encode import draw_noise
from kvlock_jax.pipeline.hosts import digest_inputs
from kvlock_jax.pipeline.inputs import EditInputs
from kvlock_jax.pipeline.load import Model
from kvlock_jax.pipeline.settings import Settings

Runner = Callable[
    [Model, Sequence[EditInputs], Sequence[Settings], Sequence[Array]], Sequence[Result | Exception]
]
"""Runs edits of one shape as a batch: inputs, settings, and a key of `edit_key` to draw each one's
noise by; an edit that fails alone may have its exception in place of a result."""


@dataclasses.dataclass(frozen=True)
class Summary:
    """Counts of a job's edits, and the path of the file of failures, if there are any."""

    done: int
    skipped: int
    failed: int
    failures: str | None


def run(
    work: Work,
    load: Callable[[], Model],
    runner: Runner | None = None,
    on_end: OnEnd = lambda request, failure: None,
) -> Summary:
    """Runs the missing edits of a job.

    An error of one edit is its failure, and stops no other. After an interruption the computed
    edits are still written; the next run does the rest.

    Args:
      work: of `resume.find_work`.
      load: returns the model; called once, when the first batch is ready to run.
      runner: of a batch of edits; `run_group` by default.
      on_end: called for each edit that finishes or fails, but not for those of `work.failures`.

    Raises:
      Error: the model cannot be loaded, the folder of results cannot be written, its disk is full,
        another run is making some of the same edits, or another host is lost.
    """

    def failures(held: Lease, stage: Path) -> Iterator[Failure]:
        """Runs the edits, and yields those that fail."""
        return _failures(work, Publisher(work, held, stage, on_end), load, runner or run_group)

    return hold(work, failures)


def hold(work: Work, failures: Callable[[Lease, Path], Iterator[Failure]]) -> Summary:
    """Holds the lease of a job while it runs, and keeps its list of failures.

    Args:
      work: of `resume.find_work`.
      failures: runs and writes the missing edits, given the lease and a staging folder, and yields
        each failure as soon as it is known; a generator, closed at the end.

    Raises:
      Error: as `run` does; or what `failures` raises.
    """
    job, failed = work.job, {failure.line: failure for failure in work.failures}
    storage.make_folder(job.save_dir)
    outputs = [name for r in work.missing for name in (r.save_file, r.sidecar)]
    is_free = functools.partial(publisher.may_hold_failures, job)
    with (
        lease.hold(job.save_dir, outputs, job.failure_names, is_free) as held,
        publisher.staging(job, held) as stage,
    ):
        log = FailureLog(job, held, stage)
        log.write(failed)
        try:
            with contextlib.closing(failures(held, stage)) as ended:
                for failure in ended:
                    failed[failure.line] = failure
                    log.glance(failed)
        except BaseException:
            with contextlib.suppress(InputError):  # of a disk that is full, above all
                log.write(failed)
            raise
        log.write(failed)
    done = sum(request.line not in failed for request in work.missing)
    summary = Summary(done, len(work.finished), len(failed), log.path if failed else None)
    agreement.ask("the end of the batch", json.dumps(dataclasses.asdict(summary)))
    return summary


def follow(work: Work, load: Callable[[], Model], runner: Runner | None = None) -> Summary:
    """`run` on a host that writes nothing: its devices take part in every edit."""
    with ThreadPoolExecutor(1) as reading:
        model = once(load)
        for group in ahead(reading, Reader().read, work.pending):
            outcomes(runner or run_group, model, group, work.job.unit)
    first, *_ = agreement.ask("the end of the batch", "")
    return Summary(**json.loads(first))


def edit_key(seed: int, noise_id: str) -> Array:
    """The key of an edit's noise, from its seed and the CRC-32 of an id."""
    return jax.random.fold_in(jax.random.key(seed), noise_number(noise_id))


def run_group(
    model: Model, inputs: Sequence[EditInputs], settings: Sequence[Settings], keys: Sequence[Array]
) -> Sequence[Result | Exception]:
    """Runs edits together, a device's share of them on each along `data`; see `Runner`.

    Edits of one source that start from one noise share the source's branch: as many to each source
    as every source can have. Where sources do not divide over the devices, the last edit is
    repeated, and the copies' results are dropped.
    """
    branches: dict[tuple, list[int]] = {}
    for n, (edit, own, key) in enumerate(zip(inputs, settings, keys, strict=True)):
        noise_key = np.asarray(jax.random.key_data(key)).tobytes()
        pictures = tuple(picture.tobytes() for picture in edit.references)
        branch = (id(edit.source), noise_key, own.edit.source_prompt, pictures)
        branches.setdefault(branch, []).append(n)
    order = list(itertools.chain(*branches.values()))
    ways = model.mesh.shape["data"] if model.mesh else 1
    common = math.gcd(*map(len, branches.values()))
    divisors = (n for n in range(common, 0, -1) if common % n == 0)
    share = next((n for n in divisors if len(order) // n % ways == 0), 1)
    rows = order + order[-1:] * (-len(order) % (share * ways))
    noise = [draw_noise(model, inputs[n], keys[n]) for n in rows[::share]]
    edits, each = ([values[n] for n in rows] for values in (inputs, settings))
    results = run_batch(model, edits, each, np.concatenate(noise))
    return [results[order.index(n)] for n in range(len(order))]


# --- the work of a run --------------------------------------------------------------------------


def _failures(
    work: Work, results: Publisher, load: Callable[[], Model], runner: Runner
) -> Iterator[Failure]:
    """Runs and writes the missing edits, and yields each failure as soon as it is known."""
    model = once(load)
    writes: collections.deque = collections.deque()
    with ThreadPoolExecutor(1) as writing, ThreadPoolExecutor(1) as reading:
        try:
            for group in ahead(reading, Reader().read, work.pending):
                try:
                    done = outcomes(runner, model, group, work.job.unit)
                except LostHostError as error:  # the run ends, and these edits with it
                    failed = [Outcome(one.request, error, one.seconds) for one in group]
                    yield from writing.submit(results.write, failed).result()
                    raise
                writes.append(writing.submit(results.write, done))
                while len(writes) > 2 or (writes and writes[0].done()):
                    yield from writes.popleft().result()
                if results.stop is not None:
                    break
            while writes:
                yield from writes.popleft().result()
            if results.stop is not None:
                raise results.stop
        finally:
            reading.shutdown(wait=False, cancel_futures=True)


def once(load: Callable[[], Model]) -> Callable[[], Model]:
    """The model, loaded by all hosts when it is first asked for."""
    return functools.cache(lambda: agreement.together("loading the model", load))


def outcomes(
    runner: Runner,
    model: Callable[[], Model],
    group: Sequence[Reading],
    unit: tuple[int, int, int],
) -> list[Outcome]:
    """Runs a group as batches of one shape.

    A container may announce another shape than its frames have, and some inputs may be at fault:
    the batches depend on the files alone, so they are the same in any other run.

    Args:
      runner: of a batch of edits.
      model: returns the model; called if an edit can run.
      group: what was read.
      unit: pixels under a token of the model.

    Raises:
      Error: the model cannot be loaded, or another host is lost.
    """
    group = _agreed(group)
    done = [
        Outcome(one.request, one.inputs, one.seconds)
        for one in group
        if isinstance(one.inputs, Exception)
    ]
    shapes: dict[tuple, list[Reading]] = {}
    for one in group:
        if not isinstance(one.inputs, Exception):
            shape = Fit(*one.inputs.source.shape[:3], unit).model_shape
            shapes.setdefault((shape, len(one.inputs.references)), []).append(one)
    for batch in shapes.values():
        results = _results(runner, model(), batch)
        done += [
            Outcome(one.request, result, one.seconds)
            for one, result in zip(batch, results, strict=True)
        ]
    return done


def _results(
    runner: Runner, model: Model, batch: Sequence[Reading]
) -> Sequence[Result | Exception]:
    """Runs a batch, and if it fails as a whole, each of its edits alone."""
    settings = [one.request.settings for one in batch]
    keys = [edit_key(one.request.settings.sample.seed, one.request.noise_id) for one in batch]

    def together() -> Sequence[Result | Exception]:
        """Results that all hosts have."""
        results = runner(model, [one.inputs for one in batch], settings, keys)
        return _common("results of a batch", results)

    try:
        return agreement.together("a batch of the manifest", together)
    except LostHostError:
        raise
    except Exception as error:
        if len(batch) == 1:
            return [error]
        return list(itertools.chain(*(_results(runner, model, [one]) for one in batch)))


# --- several hosts ------------------------------------------------------------------------------


def _agreed(group: Sequence[Reading]) -> list[Reading]:
    """What was read, with an error for each edit that the hosts read differently."""
    if jax.process_count() == 1:
        return list(group)
    inputs = _common("inputs of a group", [one.inputs for one in group])
    read = [{} if isinstance(i, Exception) else digest_inputs(i) for i in inputs]
    answers = [json.loads(text) for text in agreement.ask("inputs of a group", json.dumps(read))]
    for n, parts in enumerate(read):
        unlike = [name for name in parts if len({answer[n][name] for answer in answers}) > 1]
        if unlike:
            inputs[n] = InputError(f"the hosts read different values of {', '.join(unlike)}")
    return [dataclasses.replace(one, inputs=i) for one, i in zip(group, inputs, strict=True)]


def _common(topic: str, values: Sequence) -> list:
    """Values of which some are errors, with an error wherever another host has one."""
    values = list(values)
    errors = [reason(value) if isinstance(value, Exception) else None for value in values]
    answers = [json.loads(text) for text in agreement.ask(topic, json.dumps(errors))]
    for n, error in enumerate(errors):
        if error is None:
            failed = ((host, found[n]) for host, found in enumerate(answers) if found[n])
            for host, why in itertools.islice(failed, 1):
                values[n] = HostError(f"host {host} failed: {why}")
    return values
