"""A replica on a cluster of Ray: a process that holds a model and runs groups, or several.

A replica of several hosts is a process that leads one on each host of a slice. These join as the
hosts of `kvlock batch --coordinator` do, and each runs every group; the first one's outcomes count.
"""

import contextlib
import dataclasses
import functools
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import ray
from ray.exceptions import RayActorError
from ray.util import get_placement_group, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from kvlock_jax.batch import runner
from kvlock_jax.batch.publisher import Outcome
from kvlock_jax.batch.reader import Reading
from kvlock_jax.batch.runner import Runner
from kvlock_jax.errors import LostHostError
from kvlock_jax.parallel.processes import join_hosts
from kvlock_jax.pipeline.load import Model


@dataclasses.dataclass(frozen=True)
class Replicas:
    """The replicas of a run.

    Attributes:
      load: returns the model; called on each host.
      resources: what each host takes of Ray, by Ray's names, such as `{"TPU": 8}`.
      fewest: number of replicas to begin with, and to keep.
      most: number that they may grow to while there is work, and machines.
      hosts: hosts of each.
      slice: accelerator and topology of the TPU slice that is to hold them, such as `v6e:4x4`;
        without it they lie on any nodes with the resources.
      runner: of a batch of edits; `run_group` by default.
    """

    load: Callable[[], Model]
    resources: Mapping[str, float]
    fewest: int = 1
    most: int = 1
    hosts: int = 1
    slice: str | None = None
    runner: Runner | None = None

    @property
    def host_options(self) -> dict[str, Any]:
        """The options of an actor that takes a host's resources."""
        rest = dict(self.resources)
        named = {"num_cpus": rest.pop("CPU", 0), "num_gpus": rest.pop("GPU", 0)}
        return {**named, "resources": rest}

    @property
    def options(self) -> dict[str, Any]:
        """The options of a replica's own actor, which takes nothing where it leads others."""
        return self.host_options if self.hosts == 1 else {"num_cpus": 0}


class Host:
    """A host of a replica."""

    def __init__(self, replicas: Replicas):
        self._model = runner.once(replicas.load)
        self._runner = replicas.runner or runner.run_group

    def node(self) -> str:
        """The node that it is on."""
        return ray.get_runtime_context().get_node_id()

    def address(self) -> str:
        """An address that others can join it at."""
        with socket.socket() as free:
            free.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"

    def join(self, coordinator: str, count: int, number: int) -> None:
        """Joins the other hosts; the first thing that it does with JAX."""
        join_hosts(False, coordinator, count, number)

    def outcomes(self, group: Sequence[Reading], unit: tuple[int, int, int]) -> list[Outcome]:
        """Runs a group; only the first host's outcomes come back.

        Raises:
          Error: the model cannot be loaded, or another host is lost.
        """
        done = runner.outcomes(self._runner, self._model, group, unit)
        return [_light(outcome) for outcome in done] if jax.process_index() == 0 else []


class Team:
    """The hosts of a replica, which this process leads."""

    def __init__(self, replicas: Replicas):
        options, count = replicas.host_options, replicas.hosts
        # The actor's own name, so that what it held before it died is given back.
        name = f"kvlock {ray.get_runtime_context().get_actor_id()}"
        with contextlib.suppress(ValueError):
            remove_placement_group(get_placement_group(name))
        if replicas.slice is None:
            held = placement_group([dict(replicas.resources)] * count, "SPREAD", name)
            self._give_back = functools.partial(remove_placement_group, held)
        else:
            from ray.util.tpu import slice_placement_group

            kind, topology = replicas.slice.split(":")
            reserved = slice_placement_group(topology, kind, dict(replicas.resources), name=name)
            held, self._give_back = reserved.placement_group, reserved.shutdown
        ray.get(held.ready())
        self._hosts = [
            ray.remote(Host)
            .options(
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement_group=held, placement_group_bundle_index=number
                ),
                **options,
            )
            .remote(replicas)
            for number in range(count)
        ]
        self._nodes = ray.get([host.node.remote() for host in self._hosts])
        first = ray.get(self._hosts[0].address.remote())
        joins = (host.join.remote(first, count, n) for n, host in enumerate(self._hosts))
        ray.get(list(joins))

    def outcomes(self, group: Sequence[Reading], unit: tuple[int, int, int]) -> list[Outcome]:
        """Runs a group on all hosts."""
        shared = ray.put(group)
        with causes():
            return ray.get([host.outcomes.remote(shared, unit) for host in self._hosts])[0]

    def close(self) -> None:
        """Ends the hosts, and gives back what they held."""
        self._give_back()

    def is_whole(self) -> bool:
        """Whether the nodes of all hosts are alive."""
        return set(self._nodes) <= {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def end_process() -> None:
    """Ends this process; Ray starts it anew."""
    os._exit(1)


def is_lost(error: Exception) -> bool:
    """Whether a host of the replica is gone, so that it must be started anew."""
    return isinstance(error, (RayActorError, LostHostError))


@contextlib.contextmanager
def causes() -> Iterator[None]:
    """Raises what another process raised as it raised it."""
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        raise (error.cause or error) from None


def _light(outcome: Outcome) -> Outcome:
    """An outcome without the source's frames, which no writer needs."""
    if isinstance(outcome.result, Exception):
        return outcome
    result = dataclasses.replace(outcome.result, source=outcome.result.source[:0])
    return dataclasses.replace(outcome, result=result)
