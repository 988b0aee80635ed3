"""Counts how often work killed the process that did it, so that it is not tried for ever."""

import collections
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Protocol, TypeVar

from kvlock_jax.errors import HostError

DEATHS = 2
"""Processes that may die over a piece of work before it is given up."""

_S, _T = TypeVar("_S"), TypeVar("_T")


class Ledger:
    """What is being done where, by all processes of a run.

    A process that died leaves its work open. Its work is at fault only where its node lives on: a
    node that was preempted takes all of its processes with it.
    """

    def __init__(self) -> None:
        self._open: dict[Hashable, str] = {}
        self._deaths: collections.Counter = collections.Counter()

    def begin(self, work: Hashable, node: str, alive: Collection[str]) -> int:
        """Notes that work begins, and returns how many processes have died over it.

        Args:
          work: name of the work.
          node: where it begins.
          alive: nodes that are alive.
        """
        if self._open.get(work) in alive:
            self._deaths[work] += 1
        self._open[work] = node
        return self._deaths[work]

    def end(self, work: Hashable) -> None:
        """Notes that work has ended, well or by an error that was caught."""
        self._open.pop(work, None)


class Tries(Protocol):
    """A ledger as one process asks it."""

    def begin(self, work: Hashable) -> int:
        """Notes that work begins here, and returns how many processes have died over it."""

    def end(self, work: Hashable) -> None:
        """Notes that work has ended."""


def guarded(
    tries: Tries,
    name: Hashable,
    group: Sequence[_S],
    work: Callable[[Sequence[_S]], Sequence[_T]],
    given_up: Callable[[_S, Exception], _T],
) -> list[_T]:
    """Does work on a group, unless it has killed its process `DEATHS` times.

    Then each of the group is done alone, and what dies alone is given up.

    Args:
      tries: ledger of all processes.
      name: name of the work.
      group: what is done together.
      work: returns a value for each of a group.
      given_up: returns the value of one that is not done, for the error.
    """
    deaths = tries.begin(name)
    if deaths < DEATHS:
        done = list(work(group))
    else:
        done = []
        for number, one in enumerate(group):
            alone = tries.begin((name, number))
            if len(group) == 1 or alone:
                done.append(given_up(one, HostError(f"{deaths} processes died over it")))
            else:
                done += work([one])
            tries.end((name, number))
    tries.end(name)
    return done
