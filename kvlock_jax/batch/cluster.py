"""Runs the edits of a manifest on a cluster of Ray: `runner.run` in many processes.

The groups of a job go through Ray Data as rows: tasks read their files, replicas edit, tasks write.
Each row holds the `Work` of one group, and each stage calls what `runner.run` calls for a group, so
a run on one machine and a run on a cluster go on from each other. The driver holds the lease and
the list of failures. Ray holds readers back while replicas are busy, keeps off nodes that are about
to be taken away, restarts what dies, and gives its work to others.
"""

import dataclasses
import functools
import logging
import pickle
import socket
import time
import uuid
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ray
import ray.data
from ray.data import ActorPoolStrategy
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from kvlock_jax.batch import runner
from kvlock_jax.batch.lease import Lease, Share
from kvlock_jax.batch.ledger import Ledger, guarded
from kvlock_jax.batch.manifest import Failure, Request, reason
from kvlock_jax.batch.publisher import OnEnd, Outcome, Publisher, staging
from kvlock_jax.batch.reader import Reader, Reading
from kvlock_jax.batch.replica import Host, Replicas, Team, causes, end_process, is_lost
from kvlock_jax.batch.resume import Work
from kvlock_jax.batch.runner import Summary
from kvlock_jax.errors import InputError
from kvlock_jax.media import storage

_IN_FLIGHT = 2  # groups at a replica: the one that runs, and the next


@dataclasses.dataclass(frozen=True)
class Ended:
    """A group that has been through all stages.

    Attributes:
      requests: its edits that finished or failed.
      failures: those that failed.
      replica: the process that ran it.
      began: when that began, in seconds since 1970.
      seconds: of each stage: `read`, `edit` and `write`.
      stop: why no further edit can be done, if none can.
    """

    requests: tuple[Request, ...]
    failures: tuple[Failure, ...]
    replica: str
    began: float
    seconds: Mapping[str, float]
    stop: str | None = None


def connect(address: str | None) -> None:
    """Joins the cluster at an address, or the one that the environment names, or a new one here.

    This process keeps off the accelerators, which belong to replicas.

    Raises:
      InputError: there is no cluster at the address.
    """
    jax.config.update("jax_platforms", "cpu")
    if address and address not in ("auto", "local"):
        _check_answers(address)
    try:
        ray.init(address, logging_level=logging.WARNING, ignore_reinit_error=True)
    except (ConnectionError, ValueError, RuntimeError) as error:
        where = f"--ray {address}" if address else "--ray"
        raise InputError(f"{where}: {reason(error)}") from error


def _check_answers(address: str) -> None:
    """Raises an `InputError` where Ray would wait for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        raise InputError(f"--ray {address}: must be HOST:PORT")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"--ray {address}: nothing answers there ({error})") from error


def resources() -> dict[str, float]:
    """What a replica takes by default: all TPU chips of a machine, or a GPU, or a CPU."""
    chips = max((node["Resources"].get("TPU", 0) for node in ray.nodes()), default=0)
    if chips:
        return {"TPU": chips}
    return {"GPU": 1} if ray.cluster_resources().get("GPU") else {"CPU": 1}


def ask(replicas: Replicas, question: Callable[[], Any]) -> Any:
    """The answer to a question that a replica's machine must be asked, such as its devices.

    Raises:
      Error: as the question does.
    """
    options = {**replicas.host_options, "max_calls": 1}  # its process gives the devices back
    with causes():
        return ray.get(ray.remote(**options)(lambda: question()).remote())


def run(
    work: Work,
    replicas: Replicas,
    on_end: OnEnd = lambda request, failure: None,
    on_group: Callable[[Ended], None] = lambda ended: None,
) -> Summary:
    """`runner.run` on the cluster that this process has joined.

    Args:
      work: of `resume.find_work`.
      replicas: the processes that edit.
      on_end: called for each edit that finishes or fails.
      on_group: called for each group that has ended, after its edits.

    Raises:
      Error: as `runner.run` does; or the cluster fails.
    """

    def failures(held: Lease, stage: Path) -> Iterator[Failure]:
        """Runs the edits, and yields those that fail."""
        for ended in _ended(work, replicas, held) if work.pending else ():
            failed = {failure.line: failure for failure in ended.failures}
            for request in ended.requests:
                on_end(request, failed.get(request.line))
            on_group(ended)
            yield from ended.failures
            if ended.stop is not None:
                raise InputError(ended.stop)

    try:
        return runner.hold(work, failures)
    except RayError as error:
        raise InputError(f"the cluster failed, run again to do the rest: {error}") from error


def _ended(work: Work, replicas: Replicas, held: Lease) -> Iterator[Ended]:
    """Sends the groups through the stages, and yields each when it has ended."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    ledger = ray.remote(_Ledger).options(num_cpus=0, scheduling_strategy=here).remote()
    rows = [
        {"row": pickle.dumps({"number": number, "work": _of_one(work, group)})}
        for number, group in enumerate(work.pending)
    ]
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.wait_for_min_actors_s = -1  # replicas may come later than the first files are read
    for name in ("ray.data", "ray.data._internal"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with ray.data.DataContext.current(context):
        data = ray.data.from_items(rows, override_num_blocks=len(rows))
        # Stages of equal resources would run in one process: CPUs are counted a little apart.
        data = data.map(_stage(functools.partial(_read, ledger)), num_cpus=0.99)
        pool = ActorPoolStrategy(
            min_size=replicas.fewest,
            max_size=replicas.most,
            max_tasks_in_flight_per_actor=_IN_FLIGHT,
        )
        data = data.map(
            _Replica, fn_constructor_args=(replicas, ledger), compute=pool, **replicas.options
        )
        data = data.map(_stage(functools.partial(_write, ledger, held.shared(""))), num_cpus=0.98)
        for row in data.iter_rows():
            yield pickle.loads(row["row"])


def _of_one(work: Work, group: Sequence[Request]) -> Work:
    """The work of one of the groups."""
    return dataclasses.replace(
        work,
        groups=[group],
        hashes={one.id: work.hashes[one.id] for one in group},
        finished=frozenset(one.id for one in group if not work.is_missing(one)),
        failures=(),
    )


# --- the stages, each in processes of its own ---------------------------------------------------


class _Ledger(Ledger):
    """The ledger of a run, an actor."""

    def begin(self, work: Hashable, node: str) -> int:
        """Notes that work begins on a node."""
        return super().begin(work, node, {n["NodeID"] for n in ray.nodes() if n["Alive"]})


@dataclasses.dataclass(frozen=True)
class _Tries:
    """The ledger as a process asks it."""

    ledger: Any

    def begin(self, work: Hashable) -> int:
        """Notes that work begins in this process."""
        node = ray.get_runtime_context().get_node_id()
        return ray.get(self.ledger.begin.remote(work, node))

    def end(self, work: Hashable) -> None:
        """Notes that work has ended."""
        ray.get(self.ledger.end.remote(work))


def _stage(work: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, bytes]], dict[str, bytes]]:
    """A stage of pickled rows, as Arrow has no columns for what is in them."""
    return lambda row: {"row": pickle.dumps(work(pickle.loads(row["row"])), protocol=5)}


@functools.cache
def _reader() -> Reader:
    """The reader of this process, which keeps the last clip, and off the accelerators."""
    jax.config.update("jax_platforms", "cpu")
    return Reader()


def _read(ledger: Any, row: dict[str, Any]) -> dict[str, Any]:
    """Reads a group."""
    start, (group,) = time.perf_counter(), row["work"].groups

    def unread(request: Request, error: Exception) -> Reading:
        """What stands for files that nobody could read."""
        return Reading(request, error, 0.0)

    name = "read", row["number"]
    readings = guarded(_Tries(ledger), name, group, _reader().read, unread)
    return {**row, "readings": readings, "read": time.perf_counter() - start}


class _Replica:
    """Runs groups, on its own host or on several that it leads."""

    def __init__(self, replicas: Replicas, ledger: Any):
        self._team = Team(replicas) if replicas.hosts > 1 else None
        self._hosts, self._tries = self._team or Host(replicas), _Tries(ledger)
        self._name = f"{socket.gethostname()} {ray.get_runtime_context().get_actor_id()[:8]}"

    def __call__(self, row: dict[str, bytes]) -> dict[str, bytes]:
        """Runs a group."""
        return _stage(self._run)(row)

    def _run(self, row: dict[str, Any]) -> dict[str, Any]:
        began, start, unit = time.time(), time.perf_counter(), row["work"].job.unit

        def done(group: Sequence[Reading]) -> list[Outcome]:
            """The outcomes of a group."""
            return self._hosts.outcomes(group, unit)

        def not_done(one: Reading, error: Exception) -> Outcome:
            """The outcome of an edit that nobody could run."""
            return Outcome(one.request, error, one.seconds)

        name, stop = ("edit", row["number"]), None
        try:
            outcomes = guarded(self._tries, name, row.pop("readings"), done, not_done)
        except Exception as error:
            is_whole = self._team is None or self._team.is_whole()
            if self._team and (is_lost(error) or not is_whole):
                if not is_whole:
                    self._tries.end(name)  # the edit is not at fault
                self._team.close()
                end_process()
            outcomes, stop = [], reason(error)  # of all edits: the model cannot be loaded
            self._tries.end(name)
        took = time.perf_counter() - start
        about = {"replica": self._name, "began": began, "edit": took, "stop": stop}
        return {**row, "outcomes": outcomes, **about}


def _write(ledger: Any, share: Share, row: dict[str, Any]) -> Ended:
    """Writes a group."""
    start, work, stop = time.perf_counter(), row["work"], row["stop"]
    own = dataclasses.replace(share, stage=storage.join(share.stage, uuid.uuid4().hex[:12]))
    ended: list[Request] = []
    failures: list[Failure] = []

    def unwritten(one: Outcome, error: Exception) -> Failure:
        """The failure of an edit that nobody could write."""
        ended.append(one.request)
        return Failure(one.request.line, one.request.id, reason(error))

    try:
        if stop is None:
            own.check()
            storage.make_folder(own.stage)
            with staging(work.job, own) as stage:
                results = Publisher(work, own, stage, lambda request, _: ended.append(request))
                name = "write", row["number"]
                outcomes = row["outcomes"]
                failures = guarded(_Tries(ledger), name, outcomes, results.write, unwritten)
            stop = None if results.stop is None else reason(results.stop)
            storage.remove(own.stage)
    except InputError as error:  # the lease is lost, or the folder is out of reach
        stop = reason(error)
    seconds = {"read": row["read"], "edit": row["edit"], "write": time.perf_counter() - start}
    about = (row["replica"], row["began"], seconds, stop)
    return Ended(tuple(ended), tuple(failures), *about)
