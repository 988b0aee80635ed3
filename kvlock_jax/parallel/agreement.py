"""Hosts of one run agree on what they do, and end together when one of them fails.

They run the same programs on shares of the same arrays. A host that ran another edit than the rest
would not fail, it would spoil theirs; one that raised while the rest are inside a program would
leave them waiting there. So hosts talk to each other outside of all programs, through the key-value
store of `jax.distributed`:

- `ask` gathers one text from every host, and `agree` compares what they hold;
- `together` runs work on every host and gives it the same outcome on all: if it fails on one, it
  fails on each, and none goes on with a half-made result;
- a host that ends early says so with `leave`, and whoever waits for it raises a `LostHostError`.

The exchanges of a run are numbered. A host posts one message to each number and reads those of the
others, so the numbers never fall out of step. A message carries a topic; where topics differ, a
host has failed in the outer one of two nested `together`, and the others come out to it.

On one host all of this returns at once.
"""

import concurrent.futures
import contextlib
import contextvars
import dataclasses
import functools
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

import jax
import numpy as np
from jax._src import distributed

from kvlock_jax.errors import Error, HostError, InputError, LostHostError

_T = TypeVar("_T")

GRACE = 15.0
"""Seconds for a host to come out of a program after another has failed; XLA aborts after 40."""

_POLL = 0.5  # seconds between two looks at the other hosts
_PARTING = 20.0  # seconds that the host of the key-value store stays for the others to leave
_ENDING = 2.0  # seconds for a host that has left to end: JAX aborts it once the store is gone


def is_writer() -> bool:
    """Whether this host writes the results of all."""
    return jax.process_index() == 0


def is_joined() -> bool:
    """Whether this host has joined others."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def ask(topic: str, text: str) -> list[str]:
    """Gathers a text from every host, in the hosts' order; each must ask.

    Raises:
      HostError: a host failed in the enclosing `together`.
      LostHostError: a host has ended, or is at another topic.
    """
    return [text] if jax.process_count() == 1 else _line().ask(topic, text)


def agree(topic: str, parts: Mapping[str, str]) -> None:
    """Checks that all hosts hold the same; each must ask.

    Args:
      topic: name of the exchange, for messages.
      parts: values, or digests of them, by names that a user knows.

    Raises:
      InputError: some differ; it names them.
      HostError: as in `ask`.
    """
    answers = [json.loads(text) for text in ask(topic, json.dumps(dict(parts)))]
    names = dict.fromkeys(name for answer in answers for name in answer)
    unlike = [name for name in names if len({answer.get(name) for answer in answers}) > 1]
    if unlike:
        raise InputError(
            f"the hosts were given different values of {', '.join(unlike)}: "
            "start every host with the same flags and files"
        )


def together(topic: str, work: Callable[[], _T]) -> _T:
    """Does work on every host; it succeeds on all, or raises on all.

    Raises:
      Exception: the work's own, where it failed on this host.
      HostError: it failed on another host, which is named with its error.
      LostHostError: a host failed while this one was inside a program that they share.
    """
    return work() if jax.process_count() == 1 else _line().together(topic, work)


def leave(why: str) -> None:
    """Tells the other hosts, if there are any, that this one ends, and why."""
    if is_joined():
        _line().leave(why)


def digest(*contents: np.ndarray | bytes) -> str:
    """A checksum of arrays, with their shapes and dtypes, or of bytes."""
    found = hashlib.blake2b(digest_size=16)
    for content in contents:
        if isinstance(content, bytes):
            found.update(content)
        else:
            found.update(f"{content.dtype} {content.shape} ".encode())
            found.update(np.ascontiguousarray(content).reshape(-1).view(np.uint8))
    return found.hexdigest()


# --- messages -----------------------------------------------------------------------------------


class Store(Protocol):
    """Texts by key that all hosts see; a key is written once."""

    def put(self, key: str, text: str) -> None:
        """Writes a key."""

    def get(self, key: str, seconds: float) -> str | None:
        """Text of a key; `None` if nobody writes it in that time."""

    def drop(self, key: str) -> None:
        """Forgets a key."""


@dataclasses.dataclass(frozen=True)
class _Message:
    """One host's part of an exchange.

    Attributes:
      topic: of the exchange.
      depth: how many `together` the host is in.
      failure: reason why its work failed, at the end of a `together`.
      text: of an `ask`.
    """

    topic: str
    depth: int
    failure: str | None = None
    text: str = ""


class Line:
    """This host's line to the others.

    Args:
      store: key-value store that all hosts see.
      host: number of this host.
      hosts: count of hosts.
      grace: seconds as in `GRACE`.
    """

    def __init__(self, store: Store, host: int, hosts: int, grace: float):
        self._store, self._host, self._hosts, self._grace = store, host, hosts, grace
        self._number = self._depth = 0

    def ask(self, topic: str, text: str) -> list[str]:
        """As the function of this name."""
        messages = self._exchange(_Message(topic, self._depth + 1, text=text))
        for host, message in enumerate(messages):
            if message.failure:
                raise _failed(host, message.failure)
        if any(message.topic != topic for message in messages):
            raise _apart(messages)
        return [message.text for message in messages]

    def together(self, topic: str, work: Callable[[], _T]) -> _T:
        """As the function of this name."""
        with self._within() as depth, self._leaving():
            error, done = None, None
            try:
                done = self._watched(topic, work)
            except LostHostError:
                raise
            except Exception as raised:
                error = raised
            own = _Message(topic, depth, _reason(error) if error else None)
            while True:
                messages = self._exchange(own)
                if all((m.topic, m.depth) == (topic, depth) for m in messages):
                    break
                failed = [(m.depth, h, m.failure) for h, m in enumerate(messages) if m.failure]
                if not failed:
                    raise _apart(messages)
                outermost, host, failure = min(failed)
                if outermost < depth:  # a host failed further out: this one goes there
                    raise error or _failed(host, failure)
                # Hosts further in see this failure, come out, and post to the next number.
        if error is not None:
            raise error
        for host, message in enumerate(messages):
            if message.failure:
                raise _failed(host, message.failure)
        return done

    def leave(self, why: str) -> None:
        """As the function of this name; the store's host stays until the others have left."""
        with contextlib.suppress(Exception):  # the store may have ended first
            if self._store.get(_left_key(self._host), 0) is None:  # or the first reason holds
                self._store.put(_left_key(self._host), why)
            self._store.put(_parted_key(self._host), why)
            if self._host == 0:
                until = time.monotonic() + _PARTING
                for host in range(self._hosts):
                    self._store.get(_parted_key(host), max(0.0, until - time.monotonic()))
                time.sleep(_ENDING)

    def _exchange(self, own: _Message) -> list[_Message]:
        """Posts a message, and returns those of all hosts."""
        self._number += 1
        self._store.put(
            _exchange_key(self._number, self._host), json.dumps(dataclasses.asdict(own))
        )
        messages = [self._wait_for(host) for host in range(self._hosts)]
        if self._number > 1:  # whoever posts to this number has read the last one
            self._store.drop(_exchange_key(self._number - 1, self._host))
        return messages

    def _wait_for(self, host: int) -> _Message:
        while True:
            text = self._store.get(_exchange_key(self._number, host), _POLL)
            if text is not None:
                return _Message(**json.loads(text))
            self._check_left(host)

    def _watched(self, topic: str, work: Callable[[], _T]) -> _T:
        """Does the work in a thread; gives it up if another host left it in a program."""
        future: concurrent.futures.Future[_T] = concurrent.futures.Future()

        def target() -> None:
            """Does the work, and hands on its outcome."""
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        context = contextvars.copy_context()
        threading.Thread(target=context.run, args=(target,), daemon=True).start()
        others = [host for host in range(self._hosts) if host != self._host]
        failed_at = None
        while not concurrent.futures.wait([future], _POLL).done:
            for host in others:
                self._check_left(host)
                text = self._store.get(_exchange_key(self._number + 1, host), 0)
                failure = _Message(**json.loads(text)).failure if text else None
                if failure is None:
                    continue
                failed_at = failed_at or time.monotonic()
                if time.monotonic() - failed_at > self._grace:
                    raise LostHostError(
                        f"host {host} failed ({failure}), and this host, in a program they share, "
                        f"did not come out of {topic}: the run cannot go on, start it again"
                    )
        return future.result()

    def _check_left(self, host: int) -> None:
        why = self._store.get(_left_key(host), 0)
        if why is not None:
            raise LostHostError(f"host {host} ended ({why}): the run cannot go on without it")

    @contextlib.contextmanager
    def _within(self) -> Iterator[int]:
        self._depth += 1
        try:
            yield self._depth
        finally:
            self._depth -= 1

    @contextlib.contextmanager
    def _leaving(self) -> Iterator[None]:
        """Tells the others if this host will not exchange the outcome: it is stuck, or ends."""
        try:
            yield
        except BaseException as error:
            if isinstance(error, LostHostError) or not isinstance(error, Exception):
                with contextlib.suppress(Exception):
                    self._store.put(_left_key(self._host), _reason(error))
            raise


def _exchange_key(number: int, host: int) -> str:
    return f"kvlock/exchange/{number}/{host}"


def _left_key(host: int) -> str:
    return f"kvlock/left/{host}"


def _parted_key(host: int) -> str:
    return f"kvlock/parted/{host}"


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, Error) else f"{type(error).__name__}: {text}"


def _failed(host: int, failure: str) -> HostError:
    return HostError(f"host {host} failed: {failure}")


def _apart(messages: list[_Message]) -> LostHostError:
    places = ", ".join(f"host {host} at {m.topic!r}" for host, m in enumerate(messages))
    return LostHostError(
        f"the hosts do different things ({places}): start every host with the same command"
    )


# --- the store of jax.distributed ---------------------------------------------------------------


class _Coordinator:
    """The key-value store of `jax.distributed`, as a `Store`."""

    def __init__(self, client: Any):
        self._client = client

    def put(self, key: str, text: str) -> None:
        """As in `Store`."""
        self._client.key_value_set(key, text, allow_overwrite=True)

    def get(self, key: str, seconds: float) -> str | None:
        """As in `Store`."""
        try:
            if seconds:
                return self._client.blocking_key_value_get(key, max(1, round(1000 * seconds)))
            return self._client.key_value_try_get(key)
        except jax.errors.JaxRuntimeError as error:
            if str(error).startswith(("NOT_FOUND", "DEADLINE_EXCEEDED")):
                return None
            reason = str(error).splitlines()[0]
            raise LostHostError(f"the first host cannot be reached ({reason})") from error

    def drop(self, key: str) -> None:
        """As in `Store`."""
        self._client.key_value_delete(key)


def _line() -> Line:
    # The client is private: JAX has no public way to talk between hosts outside of a program.
    client = distributed.global_state.client
    if client is None:
        raise LostHostError("several hosts must be joined before they run: --distributed does")
    return _line_of(client)


@functools.lru_cache(maxsize=1)
def _line_of(client: Any) -> Line:
    return Line(_Coordinator(client), jax.process_index(), jax.process_count(), GRACE)
