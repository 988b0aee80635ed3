"""Many edits from one manifest, in a folder that survives anything.

Each edit ends as a video with a JSON beside it, or as a line of `failed.jsonl`. All of them are
written under another name, in a folder of their own, and then renamed; the JSON last, so where it
is, the video is whole. A run that was cut short, in whatever way, is run again, and does what is
missing (`kvlock_jax.job`).

The noise of an edit is drawn from its seed and its id (or `noise_id`): it does not depend on the
order of lines, on batches, or on what else there is. Reading the next edits and writing the last
ones go on, in a thread each, while the devices are at work.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
from jaxtyping import Array

from kvlock_jax.batch.manifest import Failure, Request, reason
from kvlock_jax.batch.resume import Job, Work
from kvlock_jax.errors import InputError
from kvlock_jax.media import encode, storage
from kvlock_jax.media.fit import Fit
from kvlock_jax.media.folders import IMAGE_SUFFIXES
from kvlock_jax.parallel import agreement
from kvlock_jax.pipeline import report
from kvlock_jax.pipeline.api import Result, run_batch
from kvlock_jax.pipeline.encode import draw_noise
from kvlock_jax.pipeline.inputs import Clip, EditInputs, read_clip, read_inputs
from kvlock_jax.pipeline.load import Model
from kvlock_jax.pipeline.settings import Settings

_S, _T = TypeVar("_S"), TypeVar("_T")

Runner = Callable[
    [Model, Sequence[EditInputs], Sequence[Settings], Sequence[Array]], Sequence[Result | Exception]
]
"""Runs edits of one shape as a batch: inputs, settings, and a key of `edit_key` to draw each one's
noise by; an edit that fails alone may have its exception in place of a result."""

OnEnd = Callable[[Request, Failure | None], None]
"""Told of each edit that ended, from any thread; of a failure where it came to none."""


@dataclasses.dataclass(frozen=True)
class Summary:
    """How a job ended: counts of edits, and where the failures are written, if any."""

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
    """Does what is to be done.

    Whatever goes wrong with an edit is its failure, and stops no other. After an interruption what
    is computed is written still; the next run goes on from there.

    Args:
      work: of `job.prepare`.
      load: gives the model; called once, when there is something to run.
      runner: of a group of edits; `run_group` by default.
      on_end: told of each edit that ended; those of `work.failures` had ended before.

    Raises:
      Error: the model cannot be loaded, or the folder of results cannot be written.
    """
    failed = {failure.line: failure for failure in work.failures}
    with _staging(work.job) as stage:
        log = _Log(work.job, stage)
        log.write(failed)
        try:
            ended = _ended(work, stage, functools.cache(load), runner or run_group, on_end)
            with contextlib.closing(ended):
                for failure in ended:
                    failed[failure.line] = failure
                    log.glance(failed)
        finally:
            log.write(failed)
    done = sum(request.line not in failed for request in work.missing)
    where = work.job.failed if failed else None
    return Summary(done, len(work.finished), len(failed), where)


def follow(work: Work, load: Callable[[], Model], runner: Runner | None = None) -> Summary:
    """`run` on a host that writes nothing, of several: its devices have a part in every edit."""
    model, runner = functools.cache(load), runner or run_group
    failed = len(work.failures)
    with ThreadPoolExecutor(1) as reading:
        for group in _ahead(reading, _Reader().read, work.pending):
            ended = [o for o in _outcomes(runner, model, group) if work.is_missing(o.request)]
            failed += sum(isinstance(outcome.result, Exception) for outcome in ended)
    done = len(work.missing) + len(work.failures) - failed
    return Summary(done, len(work.finished), failed, work.job.failed if failed else None)


def edit_key(seed: int, noise_id: str) -> Array:
    """The key that an edit's noise is drawn by, of its seed and an id: the latter's CRC-32."""
    return jax.random.fold_in(jax.random.key(seed), _number(noise_id))


def _number(noise_id: str) -> int:
    return zlib.crc32(noise_id.encode())


def run_group(
    model: Model, inputs: Sequence[EditInputs], settings: Sequence[Settings], keys: Sequence[Array]
) -> Sequence[Result | Exception]:
    """Runs edits together, a device's share of them on each along `data`; see `Runner`.

    Edits of one source that start from one noise share the source's branch: with as many of them to
    each source as all can have. Where sources do not divide over the devices, the last edit is
    there more than once, and its copies are dropped.
    """
    alike: dict[tuple, list[int]] = {}
    for n, (given, own, key) in enumerate(zip(inputs, settings, keys, strict=True)):
        drawn = np.asarray(jax.random.key_data(key)).tobytes()
        pictures = tuple(picture.tobytes() for picture in given.references)
        told = (id(given.source), drawn, own.edit.source_prompt, pictures)
        alike.setdefault(told, []).append(n)
    order, sizes = list(itertools.chain(*alike.values())), [len(own) for own in alike.values()]
    ways = model.mesh.shape["data"] if model.mesh else 1
    common = math.gcd(*sizes)
    fitting = (n for n in range(common, 0, -1) if common % n == 0)
    every = next((n for n in fitting if len(order) // n % ways == 0), 1)
    which = order + order[-1:] * (-len(order) % (every * ways))
    noise = [draw_noise(model, inputs[n], keys[n]) for n in which[::every]]
    edited, own = ([rows[n] for n in which] for rows in (inputs, settings))
    results = run_batch(model, edited, own, np.concatenate(noise))
    return [results[order.index(n)] for n in range(len(order))]


# --- three threads ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class _Read:
    """An edit's inputs, or why there are none, and the seconds that reading took."""

    request: Request
    inputs: EditInputs | Exception
    seconds: float


@dataclasses.dataclass(frozen=True, eq=False)
class _Outcome:
    """What became of an edit; `read` as in `_Read.seconds`."""

    request: Request
    result: Result | Exception
    read_inputs: float


def _ended(
    work: Work, stage: Path, model: Callable[[], Model], runner: Runner, on_end: OnEnd
) -> Iterator[Failure]:
    """Does the work, and yields the failures as they come to be known."""
    writes: collections.deque = collections.deque()
    write = functools.partial(_write, work, stage, on_end)
    with ThreadPoolExecutor(1) as writing, ThreadPoolExecutor(1) as reading:
        try:
            for group in _ahead(reading, _Reader().read, work.pending):
                outcomes = _outcomes(runner, model, group)
                writes.append(writing.submit(write, outcomes))
                while len(writes) > 2 or (writes and writes[0].done()):
                    yield from writes.popleft().result()
            while writes:
                yield from writes.popleft().result()
        finally:
            reading.shutdown(wait=False, cancel_futures=True)


def _ahead(pool: Executor, work: Callable[[_S], _T], items: Iterable[_S]) -> Iterator[_T]:
    """`map`, of which the next item is worked on while the last one is used, and no further one."""
    waiting: collections.deque = collections.deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) > 1:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


class _Reader:
    """Reads groups one after the other; edits of one source share its frames, one array of them."""

    def __init__(self) -> None:
        self._footage: tuple | None = None
        self._clip: Clip | None = None

    def read(self, group: Sequence[Request]) -> list[_Read]:
        """The inputs of a group's edits."""
        found = []
        for request in group:
            start = time.perf_counter()
            try:
                inputs = self._inputs(request)
            except Exception as error:  # of this edit alone
                inputs = error
            found.append(_Read(request, inputs, time.perf_counter() - start))
        return found

    def _inputs(self, request: Request) -> EditInputs:
        edit = request.settings.edit
        with contextlib.ExitStack() as copies:
            local = functools.partial(storage.at_hand, copies, suffixes=IMAGE_SUFFIXES)
            if self._footage != request.footage:
                self._footage = None
                self._clip = read_clip(local(request.source), edit)
                self._footage = request.footage
            mask = local(request.mask) if isinstance(request.mask, str) else request.mask
            pictures = [local(file) for file in request.references]
            return read_inputs(self._clip, mask, request.prompt, edit, pictures)


def _outcomes(runner: Runner, model: Callable[[], Model], group: Sequence[_Read]) -> list[_Outcome]:
    """Runs a group as batches of one shape.

    What the container told of a video need not be so, and the inputs of some may be at fault: what
    is left of the group depends on the files alone, so it is the same in any other run.
    """
    group = [_agreed(one) for one in group]
    unread = [g for g in group if isinstance(g.inputs, Exception)]
    ended = [_Outcome(g.request, g.inputs, g.seconds) for g in unread]
    shapes: dict[tuple, list[_Read]] = {}
    for one in group:
        if not isinstance(one.inputs, Exception):
            shape = Fit(*one.inputs.source.shape[:3]).model_shape
            shapes.setdefault((shape, len(one.inputs.references)), []).append(one)
    for batch in shapes.values():
        results = _results(runner, model(), batch)
        ended += [
            _Outcome(one.request, result, one.seconds)
            for one, result in zip(batch, results, strict=True)
        ]
    return ended


def _agreed(one: _Read) -> _Read:
    """What has been read, if all of several hosts have read the same."""
    unread = isinstance(one.inputs, Exception)
    given = () if unread else (one.inputs.source, one.inputs.mask, *one.inputs.references)
    if agreement.all_agree(*given):
        return one
    return dataclasses.replace(one, inputs=InputError("not all hosts could read the same of it"))


def _results(runner: Runner, model: Model, batch: Sequence[_Read]) -> Sequence[Result | Exception]:
    """Of a batch that fails as a whole each edit is run alone, so that one fails and not all."""
    settings = [one.request.settings for one in batch]
    keys = [edit_key(one.request.settings.sample.seed, one.request.noise_id) for one in batch]
    try:
        return runner(model, [one.inputs for one in batch], settings, keys)
    except Exception as error:
        if len(batch) == 1:
            return [error]
        return list(itertools.chain(*(_results(runner, model, [one]) for one in batch)))


def _write(work: Work, stage: Path, on_end: OnEnd, outcomes: Sequence[_Outcome]) -> list[Failure]:
    """Writes what is missing of a group; gives the failures."""
    failures = []
    for outcome in outcomes:
        request, failure = outcome.request, None
        if not work.is_missing(request):
            continue
        try:
            if isinstance(outcome.result, Exception):
                raise outcome.result
            _publish(work, stage, request, outcome.result, outcome.read_inputs)
        except Exception as error:  # of this edit alone
            failure = Failure(request.line, request.id, reason(error))
            failures.append(failure)
        on_end(request, failure)
    return failures


# --- files --------------------------------------------------------------------------------------


@contextlib.contextmanager
def _staging(job: Job) -> Iterator[Path]:
    """A local folder for what is being written, free of what a killed run left there.

    It lies among the results where they are local, so that renaming is all there is to do.
    """
    storage.make_folder(job.save_dir)
    storage.remove(job.stage)
    try:
        if storage.is_remote(job.save_dir):
            with tempfile.TemporaryDirectory(prefix="kvlock-") as folder:
                yield Path(folder)
        else:
            storage.make_folder(job.stage)
            yield Path(job.stage)
    finally:
        with contextlib.suppress(InputError):
            storage.remove(job.stage)


def _publish(work: Work, stage: Path, request: Request, result: Result, seconds: float) -> None:
    """Writes an edit: the video and then its JSON, each in one replacement."""
    job, edited, told = work.job, stage / request.save_file, stage / request.sidecar
    kept = {"lossless": request.lossless, "footage": result.footage}
    encode.write_video(edited, result.video, result.fps, **kept)
    about = {
        "id": request.id,
        "request_hash": work.hashes[request.id],
        "request": request.given,
        "defaults": dict(job.common.given),
        "noise_key": [request.settings.sample.seed, _number(request.noise_id)],
        "bytes": edited.stat().st_size,
        "checkpoint": dict(job.checkpoint),
    }
    result = dataclasses.replace(result, seconds={"read": seconds, **result.seconds})
    report.write_trace(told, result, about)
    # Else, for a moment, it would speak for a video that it was not written with.
    storage.remove(job.output(request.sidecar))
    for local in (edited, told):
        storage.upload(local, job.output(local.name), storage.join(job.stage, local.name))


class _Log:
    """The file of failures, rewritten as a whole; there is none where nothing failed."""

    def __init__(self, job: Job, stage: Path) -> None:
        self._job, self._stage = job, stage
        self._written = 0.0

    def write(self, failed: Mapping[int, Failure]) -> None:
        """Writes failures in the order of their lines."""
        self._written = time.monotonic()
        if not failed:
            storage.remove(self._job.failed)
            return
        rows = [dataclasses.asdict(failed[line]) for line in sorted(failed)]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        part = self._stage / "failed.jsonl.part"
        # names of files may hold bytes that are no text; JSON writes them as this handler does
        part.write_text(text, encoding="utf-8", errors="backslashreplace")
        storage.upload(part, self._job.failed, storage.join(self._job.stage, part.name))

    def glance(self, failed: Mapping[int, Failure]) -> None:
        """The same, once a second at most; what goes wrong with it then shows at the end."""
        if time.monotonic() - self._written > 1:
            with contextlib.suppress(InputError):
                self.write(failed)
