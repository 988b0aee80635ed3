"""`kvlock batch --ray`: a manifest's edits on a cluster."""

import argparse
import collections
import functools
import importlib
import json
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

from kvlock_jax.batch.manifest import Failure, Request
from kvlock_jax.batch.resume import Work
from kvlock_jax.batch.runner import Summary
from kvlock_jax.checkpoints.format import Contents
from kvlock_jax.cli.loading import dtype_name, load_model, place
from kvlock_jax.cli.terminal import say
from kvlock_jax.errors import InputError
from kvlock_jax.pipeline.load import Model
from kvlock_jax.runtime.compile_cache import keep_programs


def add_cluster(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of a cluster to a command's parser."""
    add = parser.add_argument_group("a cluster of Ray (docs/fleet.md)").add_argument
    about = "spread the edits over a cluster: the one at ADDRESS, or that of RAY_ADDRESS, or a new "
    add("--ray", nargs="?", const="", metavar="ADDRESS", help=about + "one of this machine alone")
    about = "processes that hold a model: a number, or as many as there are machines for (1)"
    add("--replicas", metavar="MIN:MAX", help=about)
    about = "what each host of a replica takes; by default a machine's TPU chips, a GPU, or a CPU"
    add("--ray_resources", metavar="JSON", help=about + """, such as '{"TPU": 8}'""")
    add("--replica_hosts", type=int, metavar="N", help="hosts of a replica that spans several (1)")
    about = "accelerator and topology of the TPU slice that holds a replica of several hosts"
    add("--replica_slice", metavar="v6e:4x4", help=about)


def cluster_of(args: argparse.Namespace, contents: Contents) -> "Cluster | None":
    """The cluster that the flags name, which this process joins; `None` without `--ray`.

    Raises:
      InputError: flags contradict one another, Ray is missing, or there is no such cluster.
    """
    others = ("replicas", "ray_resources", "replica_hosts", "replica_slice")
    if args.ray is None:
        if given := [name for name in others if getattr(args, name) is not None]:
            raise InputError(f"--{given[0]} needs --ray")
        return None
    clashing = [
        name
        for name in ("coordinator", "num_processes", "process_id")
        if getattr(args, name) is not None
    ]
    if given := ["distributed"] * args.distributed + clashing:
        raise InputError(f"--{given[0]} is of one replica, Ray joins its hosts: --replica_hosts N")
    least, most = _numbers(args.replicas)
    hosts = 1 if args.replica_hosts is None else args.replica_hosts
    if hosts < 1:
        raise InputError(f"--replica_hosts must be 1 or more, found {hosts}")
    if args.replica_slice is not None and (hosts == 1 or args.replica_slice.count(":") != 1):
        raise InputError("--replica_slice must be such as v6e:4x4, with --replica_hosts N")
    taken = _resources(args.ray_resources)
    module = _module()
    module.connect(args.ray or None)
    replicas = module.Replicas(
        load=functools.partial(_load, args, contents),
        resources=taken or module.resources(),
        fewest=least,
        most=most,
        hosts=hosts,
        slice=args.replica_slice,
    )
    return Cluster(module, replicas, functools.partial(_facts, args, contents))


class Cluster:
    """A cluster that this process has joined."""

    def __init__(self, module: ModuleType, replicas: Any, facts: Callable[[], tuple[str, int]]):
        self._module, self._replicas, self._facts = module, replicas, facts

    def facts(self, dtype: str | None, size: int | None) -> tuple[str, int]:
        """The compute dtype and the batch size; a replica is asked for what is not given."""
        if dtype is None or size is None:
            if self._replicas.hosts > 1:
                raise InputError("--replica_hosts needs --dtype and --batch_size")
            if self._replicas.resources.keys() == {"CPU"}:  # this process has the same devices
                found = self._facts()
            else:
                say("asking", f"a replica for its devices, once one has {self._taken}")
                found = self._module.ask(self._replicas, self._facts)
            dtype, size = dtype or found[0], size or found[1]
        return dtype, size

    @property
    def _taken(self) -> str:
        return ", ".join(f"{n:g} {name}" for name, n in self._replicas.resources.items())

    def run(self, work: Work, count: Callable[[str], None]) -> Summary:
        """Runs the edits, tells how far they are, and at the end what took how long."""
        progress = _Progress(len(work.missing), count)
        summary = self._module.run(work, self._replicas, progress.on_end, progress.on_group)
        for line in progress.lines():
            say(*line)
        return summary


class _Progress:
    """Counts what has ended, and when."""

    def __init__(self, total: int, count: Callable[[str], None]):
        self._total, self._count, self._start = total, count, time.monotonic()
        self._done = self._failed = 0
        self._groups: dict[str, list] = collections.defaultdict(list)

    def on_end(self, request: Request, failure: Failure | None) -> None:
        """Prints the outcome of an edit."""
        self._failed += failure is not None
        self._done += failure is None
        ended, passed = self._done + self._failed, time.monotonic() - self._start
        left = (self._total - ended) * passed / ended
        what = f"{request.id} failed: {failure.reason}" if failure else f"{request.id} done"
        pace = f"{self._done * 3600 / passed:.0f} an hour, {left:.0f} s left"
        self._count(f"{what} ({self._failed} failed, {pace})")

    def on_group(self, ended: Any) -> None:
        """Keeps the times of a group."""
        self._groups[ended.replica].append(ended)

    def lines(self) -> list[tuple[str, str]]:
        """Headings and lines: of each replica, and of the stages of all."""
        lines, totals = [], collections.Counter()
        for name, groups in sorted(self._groups.items()):
            begun = min(group.began for group in groups)
            span = max(group.began + group.seconds["edit"] for group in groups) - begun
            busy = sum(group.seconds["edit"] for group in groups)
            edits = sum(len(group.requests) - len(group.failures) for group in groups)
            if span > 0:
                pace = f"{edits * 3600 / span:.0f} an hour, busy {min(1, busy / span):.0%}"
                lines.append(("replica", f"{name}: {edits} edits, {pace}"))
            for group in groups:
                totals.update(group.seconds)
        if totals:
            parts = (f"{name} {totals[name]:.1f} s" for name in ("read", "edit", "write"))
            lines.append(("stages", ", ".join(parts)))
        return lines


def _load(args: argparse.Namespace, contents: Contents) -> Model:
    """The model, in a replica."""
    keep_programs(args.jax_cache_dir)
    return load_model(args, contents, place(args, contents, many=True))


def _facts(args: argparse.Namespace, contents: Contents) -> tuple[str, int]:
    """The compute dtype, and the devices that have edits of their own, on one host."""
    mesh = place(args, contents, many=True).mesh
    return dtype_name(args), mesh.shape["data"] if mesh else 1


def _numbers(text: str | None) -> tuple[int, int]:
    """The least and the largest number of replicas."""
    try:
        least, _, most = (text or "1").partition(":")
        numbers = int(least), int(most or least)
    except ValueError:
        numbers = (0, 0)
    if not 1 <= numbers[0] <= numbers[1]:
        raise InputError(f"--replicas must be a number or MIN:MAX, such as 1:8, found {text!r}")
    return numbers


def _resources(text: str | None) -> dict[str, float]:
    """The resources of a host."""
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    numbers = found.values() if isinstance(found, dict) else [None]
    if not found or not all(type(n) in (int, float) and n > 0 for n in numbers):
        raise InputError(f'--ray_resources must be such as {{"TPU": 8}}, found {text!r}')
    return found


def _module() -> ModuleType:
    """The module that imports Ray."""
    try:
        return importlib.import_module("kvlock_jax.batch.cluster")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in ("ray", "pyarrow"):
            raise
        raise InputError("kvlock batch --ray needs Ray: pip install '.[ray]'") from error
