"""What several hosts must agree on: they run the same programs, in the same order, on their shares
of the same arrays. One that did another edit than the rest would not fail, it would spoil theirs.
"""

import dataclasses
import json
import zlib

import jax
import numpy as np
from jax.experimental import multihost_utils

from kvlock_jax.errors import InputError
from kvlock_jax.job import Work


def is_writer() -> bool:
    """Whether this host writes what all of them made."""
    return jax.process_index() == 0


def agree(*contents: np.ndarray | bytes) -> bool:
    """Whether all hosts have the same, told by a checksum; each must ask."""
    if jax.process_count() == 1:
        return True
    checksum = 0
    for content in contents:
        checksum = zlib.crc32(np.ascontiguousarray(content), checksum)
    return len(set(multihost_utils.process_allgather(np.uint32(checksum)).tolist())) == 1


def agreed(work: Work) -> Work:
    """The work, with what the first host finds finished; each must ask.

    Raises:
      InputError: the hosts do not see the same files.
    """
    if jax.process_count() == 1:
        return work
    ids = [request.id for group in work.groups for request in group]
    told = [[work.hashes[n] for n in ids], [failure.line for failure in work.failures]]
    if not agree(json.dumps(told).encode()):
        raise InputError(
            "the hosts do not see the same files: give paths that all of them can read"
        )
    finished = np.array([n in work.finished for n in ids], bool)
    finished = multihost_utils.broadcast_one_to_all(finished)
    named = (n for n, is_so in zip(ids, finished, strict=True) if is_so)
    return dataclasses.replace(work, finished=frozenset(named))
