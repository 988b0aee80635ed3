"""Plans a job: groups the edits of a manifest, and finds which of them are finished.

An edit is finished when its JSON holds the hash of its request, and its video has the size that the
JSON states. The hash covers everything that the video was made from:

- the line's id, noise_id, prompt, box, name and `lossless`;
- all settings, those of the command included;
- the content of the input files, by checksum (`storage.identity`). Neither their names nor their
  times of change count, so a data set can be moved, or fetched again, and no edit is redone;
- the checkpoint's name, its content as far as `checkpoint_identity` covers it, the compute dtype.

Versions of programs are recorded, and do not count.
"""

import dataclasses
import json
import os
import posixpath
import types
import zlib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import TypeVar

import av

from kvlock_jax.batch import grouping
from kvlock_jax.batch.fingerprint import content_identity, request_hash
from kvlock_jax.batch.manifest import Common, Failure, Manifest, Request, parse, reason
from kvlock_jax.errors import InputError
from kvlock_jax.media import storage
from kvlock_jax.media.fit import Fit
from kvlock_jax.media.folders import IMAGE_SUFFIXES
from kvlock_jax.parallel import agreement

_S, _T = TypeVar("_S"), TypeVar("_T")

_THREADS = 16  # of requests to a file system that may answer slowly


@dataclasses.dataclass(frozen=True)
class Job:
    """A manifest, and how to run it.

    Attributes:
      manifest: path of the file, resolved by `storage.resolve`.
      save_dir: folder of the results, likewise; made if missing.
      common: defaults of every line.
      checkpoint: name and identity of the checkpoint (`checkpoint_identity`), and compute dtype.
      batch_size: most edits that run together.
      shard: number of this machine's part of the manifest, from 0, and count of the parts.
      overwrite: whether finished edits are done again.
      unit: pixels under a token of the model (`media.fit.Fit`).
    """

    manifest: str
    save_dir: str
    common: Common
    checkpoint: Mapping[str, str]
    batch_size: int = 1
    shard: tuple[int, int] = (0, 1)
    overwrite: bool = False
    unit: tuple[int, int, int] = (4, 16, 16)

    def __post_init__(self) -> None:
        index, count = self.shard
        if count < 1:
            raise InputError(f"num_shards must be 1 or more, found {count}")
        if not 0 <= index < count:
            raise InputError(f"shard_index must be 0 to {count - 1} of {count}, found {index}")
        if self.batch_size < 1:
            raise InputError(f"batch_size must be 1 or more, found {self.batch_size}")

    @property
    def failure_names(self) -> tuple[str, ...]:
        """Names for the file of failures; a name that another manifest's file has is passed over.

        `failed.jsonl`, `MANIFEST.failed.jsonl`, and one that holds a checksum of the whole path.
        """
        stem = posixpath.basename(self.manifest).rpartition(".")[0][:100]
        checksum = f"{zlib.crc32(self.manifest.encode()):08x}"
        heads = ("", f"{stem}.", f"{stem}-{checksum}.")
        return tuple(f"{head}failed{self._part}.jsonl" for head in heads)

    def output(self, name: str) -> str:
        """Path of a file among the results."""
        return storage.join(self.save_dir, name)

    @property
    def _part(self) -> str:
        index, count = self.shard
        return f"-{index:05d}-of-{count:05d}" if count > 1 else ""


@dataclasses.dataclass(frozen=True)
class Work:
    """The edits of a job, grouped, with those that are finished.

    Attributes:
      job: the job.
      groups: edits that run together, finished ones included; the same for every run of the job.
      hashes: `request_hash` of each edit, by id.
      finished: ids of edits that need not be done.
      failures: lines that are no edits, and edits whose files are missing.
    """

    job: Job
    groups: Sequence[Sequence[Request]]
    hashes: Mapping[str, str]
    finished: frozenset[str]
    failures: Sequence[Failure]

    @property
    def pending(self) -> list[Sequence[Request]]:
        """Groups that have a missing edit."""
        return [group for group in self.groups if any(map(self.is_missing, group))]

    @property
    def missing(self) -> list[Request]:
        """Edits that are still to be done."""
        return [request for group in self.groups for request in group if self.is_missing(request)]

    def is_missing(self, request: Request) -> bool:
        """Whether an edit is still to be done."""
        return request.id not in self.finished


def find_work(job: Job) -> Work:
    """Reads a manifest and plans its edits; writes nothing.

    Raises:
      InputError: the manifest cannot be read, holds no line, or would be overwritten.
    """
    content = storage.read_bytes(job.manifest)
    manifest = parse(content, storage.parent(job.manifest), job.common)
    if not manifest.requests and not manifest.failures:
        raise InputError(f"{job.manifest}: the manifest holds no edit")
    if _real(job.manifest) == _real(job.output(job.failure_names[0])):
        raise InputError(f"{job.manifest}: is where failures are written; give it another name")
    manifest = grouping.shard(_apart(job, manifest), *job.shard)
    with ThreadPoolExecutor(_THREADS) as pool:
        contents = _try_each(
            pool, content_identity, (f for r in manifest.requests for f in r.files)
        )
        requests, failures = [], list(manifest.failures)
        for request in manifest.requests:
            absent = [c for f in request.files if isinstance(c := contents[f], Exception)]
            if absent:
                failures.append(Failure(request.line, request.id, reason(absent[0])))
            else:
                requests.append(request)
        hashes = {
            r.id: request_hash(r, [contents[f] for f in r.files], job.checkpoint) for r in requests
        }
        # a group of one has no shape to agree on
        sizes = _try_each(pool, _probe, {r.source for r in requests} if job.batch_size > 1 else ())
        shapes = {r.id: _shape(r, sizes.get(r.source), job.unit) for r in requests}
        groups = grouping.group(requests, lambda r: shapes[r.id], job.batch_size)
        finished = []
        if not job.overwrite:
            there = storage.sizes(job.save_dir)
            checks = pool.map(lambda r: _is_finished(job, r, hashes[r.id], there), requests)
            finished = [r.id for r, done in zip(requests, checks, strict=True) if done]
    return Work(job, groups, hashes, frozenset(finished), failures)


def _apart(job: Job, manifest: Manifest) -> Manifest:
    """The manifest without edits that would overwrite an input."""
    taken = {_real(job.manifest): "the command, as --manifest"}
    for request in manifest.requests:
        for file in request.files:
            taken.setdefault(_real(file), f"line {request.line}")
    requests, failures = [], list(manifest.failures)
    for request in manifest.requests:
        outputs = [job.output(name) for name in (request.save_file, request.sidecar)]
        clash = [output for output in outputs if _real(output) in taken]
        if clash:
            why = f"{clash[0]} would be overwritten, it is read by {taken[_real(clash[0])]}"
            failures.append(Failure(request.line, request.id, why))
        else:
            requests.append(request)
    return Manifest(requests, failures)


def _real(path: str) -> str:
    return path if storage.is_remote(path) else os.path.realpath(path)


def _try_each(
    pool: Executor, function: Callable[[_S], _T], items: Iterable[_S]
) -> dict[_S, _T | Exception]:
    """The function's value for each item, or the error that it raised, computed side by side."""

    def tried(item: _S) -> _T | Exception:
        """The value for one item."""
        try:
            return function(item)
        except Exception as error:  # of this one alone
            return error

    unique = list(dict.fromkeys(items))
    return dict(zip(unique, pool.map(tried, unique), strict=True))


def _is_finished(job: Job, request: Request, wanted: str, sizes: Mapping[str, int]) -> bool:
    if not {request.save_file, request.sidecar} <= sizes.keys():
        return False
    try:
        sidecar = json.loads(storage.read_bytes(job.output(request.sidecar)))
        found = sidecar["request_hash"], sidecar["bytes"]
    except (InputError, ValueError, KeyError, TypeError):  # not ours, or damaged
        return False
    return found == (wanted, sizes[request.save_file])


def _shape(
    request: Request, size: tuple[int, int, int] | Exception | None, unit: tuple[int, int, int]
) -> Hashable:
    """The shape that the model works on; `None` of an unreadable video, which fails later."""
    if not isinstance(size, tuple):
        return None
    (frames, *space), edit = size, request.settings.edit
    frames = min(frames, edit.frame_num or frames)
    return Fit(frames, *(edit.height_width or space), unit).model_shape


def _probe(path: str) -> tuple[int, int, int]:
    """Frames (by the container's count, or its duration), height and width of a video."""
    files = storage.files(path, IMAGE_SUFFIXES)
    with storage.opened(files[0]) as file:
        raw = types.SimpleNamespace(read=file.read, seek=file.seek, tell=file.tell)
        with av.open(raw, metadata_errors="replace") as container:
            stream = container.streams.video[0]
            first = next(container.decode(stream))
            frames = stream.frames or 1
            if not stream.frames and container.duration and stream.average_rate:
                frames = round(container.duration * stream.average_rate / av.time_base)
    height, width = first.height, first.width
    if round(first.rotation / 90) % 2:
        height, width = width, height
    return (frames if files == [path] else len(files)), height, width


def agree_on_work(work: Work) -> Work:
    """The work, with the first host's list of finished edits; each host must ask.

    Raises:
      InputError: the hosts do not see the same files.
      HostError: another host failed.
    """
    ids = [request.id for group in work.groups for request in group]
    parts = [[work.hashes[n] for n in ids], [failure.line for failure in work.failures]]
    own = agreement.digest(json.dumps(parts).encode())
    marks = "".join("+" if n in work.finished else "-" for n in ids)
    answers = [json.loads(text) for text in agreement.ask("work", json.dumps([own, marks]))]
    if any(found != own for found, _ in answers):
        raise InputError(
            "the hosts do not see the same files: give paths that all of them can read"
        )
    _, marks = answers[0]
    finished = (n for n, mark in zip(ids, marks, strict=True) if mark == "+")
    return dataclasses.replace(work, finished=frozenset(finished))
