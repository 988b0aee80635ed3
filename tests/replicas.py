"""What replicas on other nodes run. As a program: a driver to be killed.

It reads an address, a manifest and a folder from its arguments, and prints each edit that ended.
"""

import functools
import os
import pathlib
import sys
import time

import batches
import jax
import jax.numpy as jnp
import numpy as np

import kvlock_jax as kvl
from kvlock_jax.batch import cluster
from kvlock_jax.batch.cluster import Replicas
from kvlock_jax.batch.resume import find_work
from kvlock_jax.errors import InputError
from kvlock_jax.parallel.mesh import make_mesh

POISON = "edit-39"
"""The edit over which `poisoned` dies."""


@functools.cache
def demo():
    return kvl.load("demo")


def on_two_hosts(folder, model, inputs, settings, keys):
    """Edits on eight devices of two processes, of which the second dies once."""
    mark = pathlib.Path(folder) / "lost"
    if jax.process_index() == 1 and not mark.exists():
        mark.touch()
        os._exit(1)
    mesh = make_mesh(frames=8)
    spread = jax.NamedSharding(mesh, jax.P("frames"))
    ones = jax.make_array_from_callback((8,), spread, lambda _: np.ones(1, np.float32))
    assert float(jax.jit(jnp.sum)(ones)) == 8 and jax.process_count() == 2
    return batches.runner(model, inputs, settings, keys)


def slowly(model, inputs, settings, keys):
    time.sleep(0.4)
    return batches.runner(model, inputs, settings, keys)


def poisoned(model, inputs, settings, keys):
    if any(given.prompt == "a star" + 39 * "s" for given in inputs):
        os._exit(1)
    return batches.runner(model, inputs, settings, keys)


def refuse():
    raise InputError("no such mesh")


def nothing():
    """The model of `batches.runner`."""


def main() -> None:
    """A driver to be killed."""
    address, manifest, folder = sys.argv[1:]
    cluster.connect(address)
    replicas = Replicas(nothing, {"chip": 1}, runner=slowly)
    work = find_work(batches.job(manifest, folder))
    cluster.run(work, replicas, lambda request, _: print("ended", request.id, flush=True))


if __name__ == "__main__":
    main()
