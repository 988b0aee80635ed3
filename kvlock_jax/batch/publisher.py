"""Writes the results of a batch, and the list of its failures.

All files are written under another name, in the run's staging folder, and then renamed; the JSON of
an edit last, so where it is, the video is whole.
"""

import contextlib
import dataclasses
import json
import os
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from kvlock_jax.batch.lease import Held, Lease
from kvlock_jax.batch.manifest import Failure, Request, reason
from kvlock_jax.batch.resume import Job, Work
from kvlock_jax.errors import InputError
from kvlock_jax.media import encode, storage
from kvlock_jax.pipeline import report
from kvlock_jax.pipeline.api import Result

OnEnd = Callable[[Request, Failure | None], None]
"""Called when an edit finishes or fails, from any thread, with the failure if it failed."""


@dataclasses.dataclass(frozen=True, eq=False)
class Outcome:
    """The result of an edit, or its error, and the seconds that reading its inputs took."""

    request: Request
    result: Result | Exception
    seconds: float


def noise_number(noise_id: str) -> int:
    """The number that an id adds to an edit's seed: its CRC-32."""
    return zlib.crc32(noise_id.encode())


@contextlib.contextmanager
def staging(job: Job, lease: Held) -> Iterator[Path]:
    """A local folder for files while they are written.

    It is the lease's, among the results, where those are local, so that a rename publishes a file.
    """
    if storage.is_remote(job.save_dir):
        with tempfile.TemporaryDirectory(prefix="kvlock-") as folder:
            yield Path(folder)
    else:
        yield Path(lease.stage)


class Publisher:
    """Writes results.

    Attributes:
      stop: error after which no further edit can be written, such as of a full disk.
    """

    def __init__(self, work: Work, lease: Held, stage: Path, on_end: OnEnd):
        self._work, self._lease, self._stage, self._on_end = work, lease, stage, on_end
        self.stop: Exception | None = None

    def write(self, outcomes: Sequence[Outcome]) -> list[Failure]:
        """Writes the missing edits of a group; returns the failures."""
        failures = []
        for outcome in outcomes:
            request, failure = outcome.request, None
            if self.stop is not None or not self._work.is_missing(request):
                continue
            try:
                if isinstance(outcome.result, Exception):
                    raise outcome.result
                self._lease.check()
                self._publish(request, outcome.result, outcome.seconds)
            except Exception as error:  # of this edit alone, as a rule
                for name in (request.save_file, request.sidecar):
                    (self._stage / name).unlink(missing_ok=True)
                failure = Failure(request.line, request.id, reason(error))
                failures.append(failure)
                self.stop = self._ends_all(error)
            self._on_end(request, failure)
        return failures

    def _ends_all(self, error: Exception) -> Exception | None:
        """The error to end the run with, if no further edit can be written either."""
        if storage.is_full(error):
            return InputError(f"the batch stops, no further edit can be written: {reason(error)}")
        try:
            self._lease.check()
        except InputError as lost:
            return lost
        return None

    def _publish(self, request: Request, result: Result, seconds: float) -> None:
        """Writes an edit: the video and then its JSON, each in one replacement."""
        job = self._work.job
        video, sidecar = (self._stage / name for name in (request.save_file, request.sidecar))
        kept = {"lossless": request.lossless, "footage": result.footage}
        encode.write_video(video, result.video, result.fps, **kept)
        about = {
            "id": request.id,
            "request_hash": self._work.hashes[request.id],
            "request": request.given,
            "defaults": dict(job.common.given),
            "noise_key": [request.settings.sample.seed, noise_number(request.noise_id)],
            "bytes": video.stat().st_size,
            "checkpoint": dict(job.checkpoint),
        }
        result = dataclasses.replace(result, seconds={"read": seconds, **result.seconds})
        report.write_trace(sidecar, result, about)
        # Else, for a moment, it would speak for a video that it was not written with.
        storage.remove(job.output(request.sidecar))
        for local in (video, sidecar):
            part = storage.join(self._lease.stage, local.name)
            storage.upload(local, job.output(local.name), part)


class FailureLog:
    """A manifest's file of failures, rewritten as a whole; removed where nothing failed.

    The file is `failed.jsonl`, or `MANIFEST.failed.jsonl` where that belongs to another manifest.
    """

    def __init__(self, job: Job, lease: Lease, stage: Path):
        self._manifest, self._stage = job.manifest, stage
        self.path = job.output(lease.failures)
        self._part = storage.join(lease.stage, lease.failures)
        self._written = 0.0
        for name in job.failure_names:  # of an earlier run, when this name was another's
            if name != lease.failures and _manifest_of(job, name) == job.manifest:
                storage.remove(job.output(name))

    def write(self, failed: Mapping[int, Failure]) -> None:
        """Writes failures in the order of their lines."""
        self._written = time.monotonic()
        if not failed:
            storage.remove(self.path)
            return
        rows = [dataclasses.asdict(failed[line]) for line in sorted(failed)]
        rows = [row | {"manifest": self._manifest} for row in rows]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        local = os.fspath(self._stage / "failures")
        # names of files may hold bytes that are no text; JSON writes them as this handler does
        storage.write_bytes(local, text.encode("utf-8", errors="backslashreplace"))
        storage.upload(local, self.path, self._part)

    def glance(self, failed: Mapping[int, Failure]) -> None:
        """`write`, once a second at most; an error of it shows at the end."""
        if time.monotonic() - self._written > 1:
            with contextlib.suppress(InputError, OSError):
                self.write(failed)


def may_hold_failures(job: Job, name: str) -> bool:
    """Whether a file is free for the failures of a job: missing, or of its manifest.

    `failed.jsonl` is free too where it does not name its manifest, as earlier versions wrote it.
    """
    owner = _manifest_of(job, name)
    if owner is None:
        return name == job.failure_names[0] or not storage.exists(job.output(name))
    return owner == job.manifest


def _manifest_of(job: Job, name: str) -> str | None:
    """The manifest of a file of failures; `None` if the file is missing or does not say."""
    try:
        return json.loads(storage.read_bytes(job.output(name)).splitlines()[0])["manifest"]
    except (InputError, ValueError, LookupError, TypeError):
        return None
