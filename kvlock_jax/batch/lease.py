"""Leases: each run says in the folder of results which files it will write, while it lives.

A lease is a small file of JSON in the folder, `.kvlock-batch-RUN.lease`, and beside it lies the
run's staging folder, `.kvlock-batch-RUN`. Runs that write different files go on side by side; a run
that would write a file that another one has leased does not start.

The next run removes the lease of a dead one, with its staging folder. A run on the same machine is
dead when its process is; a run elsewhere, when the heartbeat in its staging folder is `STALE`
seconds old. Machines that share a folder need clocks that agree to a minute.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import random
import socket
import threading
import time
import unicodedata
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from kvlock_jax.errors import InputError
from kvlock_jax.media import storage

BEAT, STALE = 15.0, 120.0
"""Seconds between two heartbeats of a run, and the age of the last one of a dead run."""

_PREFIX = ".kvlock-batch"
_YOUNG = 10.0  # seconds in which two runs may have started at once, and seen each other
_TRIES = 4


@dataclasses.dataclass(frozen=True)
class Owner:
    """A run, and where it runs.

    Attributes:
      run: a random name.
      host: the machine's name, for messages.
      machine: identity of the running system, until it starts again.
      pid: the process.
      started: when the process started, by the system's own clock.
      created: when the run began, in seconds since 1970.
      outputs: names of the files that it writes, folded.
    """

    run: str
    host: str
    machine: str
    pid: int
    started: str
    created: float
    outputs: Sequence[str]

    def __str__(self) -> str:
        since = datetime.datetime.fromtimestamp(self.created).strftime("%Y-%m-%d %H:%M:%S")
        return f"process {self.pid} on {self.host}, since {since}"


class Held(Protocol):
    """A lease as whoever writes a file knows it.

    Attributes:
      stage: path of a staging folder.
    """

    stage: str

    def check(self) -> None:
        """Raises an `InputError` if the lease is lost."""


@dataclasses.dataclass(frozen=True)
class Share:
    """A run's lease in another of its processes, on any machine.

    Attributes:
      folder: folder of the results.
      path: file of the lease.
      stage: path of the process's own staging folder.
    """

    folder: str
    path: str
    stage: str

    def check(self) -> None:
        """Raises an `InputError` if the lease is lost, or this machine does not see it."""
        if storage.exists(self.path):
            return
        if not storage.exists(self.folder):
            where = f"{socket.gethostname()} does not see this folder"
            raise InputError(f"{self.folder}: {where}; give one that all machines share, or gs://")
        raise InputError(f"{self.path}: the run's lease is gone; run again to do the rest")


class Lease:
    """A run's right to write some files of a folder.

    Attributes:
      stage: path of the run's staging folder, beside the results.
      failures: name of the file of failures that the run may write.
    """

    def __init__(self, folder: str, owner: Owner, failures: str):
        self._folder, self._path = folder, _path(folder, owner.run)
        self.stage = storage.join(folder, f"{_PREFIX}-{owner.run}")
        self.failures = failures
        self._ended, self._lost = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def check(self) -> None:
        """Raises an `InputError` if another run took this one for dead, and its lease over."""
        if self._lost.is_set():
            raise InputError(
                f"{self._path}: another run took this one's lease over, since it gave no sign of "
                f"life for {STALE:.0f} seconds; run again to do the rest"
            )

    def shared(self, name: str) -> Share:
        """The lease for another process, whose staging folder has a name."""
        return Share(self._folder, self._path, storage.join(self.stage, name))

    def start(self) -> None:
        """Starts the heartbeats."""
        self._write()
        self._thread.start()

    def end(self) -> None:
        """Ends the heartbeats, and removes the staging folder and then the lease."""
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(InputError):
            storage.remove(self.stage)
        with contextlib.suppress(InputError):
            storage.remove(self._path)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            with contextlib.suppress(InputError):  # a file system may be away for a while
                if not storage.exists(self._path):
                    self._lost.set()
                    return
                self._write()

    def _write(self) -> None:
        storage.write_bytes(storage.join(self.stage, "heartbeat"), str(time.time()).encode())


@contextlib.contextmanager
def hold(
    folder: str,
    outputs: Collection[str],
    failures: Sequence[str],
    is_free: Callable[[str], bool],
) -> Iterator[Lease]:
    """Leases files of a folder, and makes the run's staging folder.

    Args:
      folder: where results are written; it exists.
      outputs: names of the files to write.
      failures: names for the file of failures, of which the first one that is free is leased.
      is_free: whether a file of failures is missing, or of this manifest.

    Raises:
      InputError: another run, which is named, has leased some of the files; or the folder cannot
        be written.
    """
    wanted = {_folded(name): name for name in outputs}
    for attempt in range(_TRIES):
        others = live_owners(folder)
        taken = {name for other in others for name in other.outputs}
        free = (name for name in failures if _folded(name) not in taken and is_free(name))
        failed = next(free, failures[-1])
        owner = _this_process([*wanted, _folded(failed)])
        path = _path(folder, owner.run)
        try:
            if not _clashes(owner, others):
                storage.write_bytes(path, json.dumps(dataclasses.asdict(owner)).encode())
                others = [other for other in live_owners(folder) if other.run != owner.run]
            clashes = _clashes(owner, others)
            if not clashes:
                lease = Lease(folder, owner, failed)
                storage.make_folder(lease.stage)
                lease.start()
                break
        except BaseException:
            _forget(folder, owner.run)
            raise
        _forget(folder, owner.run)
        other = clashes[0]
        if attempt + 1 == _TRIES or time.time() - other.created > _YOUNG:
            both = [name for fold, name in wanted.items() if fold in set(other.outputs)]
            raise InputError(
                f"{folder}: another run ({other}) is making {len(both)} of these edits' files, "
                f"such as {(both or [failed])[0]}; wait for it to end, or give another --save_dir"
            )
        time.sleep(random.uniform(0.1, 0.8))  # both may have stepped back
    try:
        yield lease
    finally:
        lease.end()


def live_owners(folder: str) -> list[Owner]:
    """Runs that are writing to a folder; removes the leases and staging folders of dead ones."""
    entries = storage.listing(folder)
    live = []
    for name in entries.files:
        run = name.removeprefix(f"{_PREFIX}-").removesuffix(".lease")
        if name != f"{_PREFIX}-{run}.lease":
            continue
        owner = _read(folder, run)
        if owner is not None and is_alive(folder, owner):
            live.append(owner)
        elif owner is not None:
            with contextlib.suppress(InputError):  # who may write may not always remove
                _forget(folder, run)
    for name in entries.folders:
        if name.startswith(_PREFIX) and not storage.exists(storage.join(folder, f"{name}.lease")):
            with contextlib.suppress(InputError):
                storage.remove(storage.join(folder, name))
    return live


def is_alive(folder: str, owner: Owner) -> bool:
    """Whether a run goes on."""
    if owner.machine == _machine() and os.name == "posix":
        return _is_running(owner.pid, owner.started)
    beat = storage.join(storage.join(folder, f"{_PREFIX}-{owner.run}"), "heartbeat")
    last = owner.created
    with contextlib.suppress(InputError, ValueError):
        last = max(last, float(storage.read_bytes(beat)))
    return time.time() - last < STALE


def _clashes(owner: Owner, others: Sequence[Owner]) -> list[Owner]:
    return [other for other in others if not set(owner.outputs).isdisjoint(other.outputs)]


def _path(folder: str, run: str) -> str:
    return storage.join(folder, f"{_PREFIX}-{run}.lease")


def _forget(folder: str, run: str) -> None:
    """Removes the staging folder and then the lease of a run."""
    storage.remove(storage.join(folder, f"{_PREFIX}-{run}"))
    storage.remove(_path(folder, run))


def _read(folder: str, run: str) -> Owner | None:
    """The owner of a lease; `None` if it has just ended, or cannot be read."""
    try:
        return Owner(**json.loads(storage.read_bytes(_path(folder, run))))
    except (InputError, ValueError, TypeError):
        return None


def _folded(name: str) -> str:
    """The name as file systems compare it that ignore case or composition."""
    return unicodedata.normalize("NFC", name).casefold()


def _this_process(outputs: Sequence[str]) -> Owner:
    return Owner(
        run=uuid.uuid4().hex[:12],
        host=socket.gethostname(),
        machine=_machine(),
        pid=os.getpid(),
        started=_started(os.getpid()),
        created=time.time(),
        outputs=tuple(outputs),
    )


def _machine() -> str:
    """Tells systems apart whose processes have numbers of their own, such as containers."""
    found = [socket.gethostname()]
    with contextlib.suppress(OSError):
        found.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        found.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(found)


def _started(pid: int) -> str:
    """When a process started, in ticks since the system did; empty where `/proc` is not there.

    A process that has ended, and that its parent has not asked after, is `dead`.
    """
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "dead" if fields[0] in "ZX" else fields[19]
    return ""


def _is_running(pid: int, started: str) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's
    return _started(pid) == started  # a number is given again
