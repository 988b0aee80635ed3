"""One of two hosts of a batch that meets one injected error after another, as a program.

Its programs are a sum over the devices of both hosts, in place of a model. Arguments: the port of
the first host, this host's number, the manifest, and a folder for the folders of results.
"""

import functools
import json
import os
import sys
import time
from pathlib import Path

import batches
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from kvlock_jax.batch import runner as batch
from kvlock_jax.batch.publisher import Publisher
from kvlock_jax.batch.reader import Reader
from kvlock_jax.batch.resume import agree_on_work, find_work
from kvlock_jax.errors import Error
from kvlock_jax.parallel import agreement
from kvlock_jax.parallel.mesh import make_mesh
from kvlock_jax.parallel.processes import join_hosts

STAGES = ["none", "read", "encode", "write", "decode", "loop"]
"""Stages to fail at, one a run; the last leaves the other host inside a program."""


@functools.cache
def programs():
    mesh = make_mesh(frames=jax.device_count())
    spread = NamedSharding(mesh, PartitionSpec("frames"))
    whole = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, PartitionSpec()))
    ones = np.ones(mesh.size, np.float32)
    return lambda: int(whole(jax.make_array_from_callback(ones.shape, spread, lambda i: ones[i])))


def runner(stage, model, inputs, settings, keys):
    """Agrees as `run_batch` does, and runs a program on all devices."""

    def work():
        parts = {str(n): agreement.digest(one.source) for n, one in enumerate(inputs)}
        fail(stage, "encode")
        agreement.agree("inputs of an edit", parts)
        fail(stage, "loop")
        assert programs()() == jax.device_count()
        fail(stage, "decode")
        return batches.runner(model, inputs, settings, keys)

    return agreement.together("a batch", work)


def fail(stage, here, host=1):
    if stage == here and jax.process_index() == host:
        raise RuntimeError(f"injected at {here}")


def main(port, host, manifest, folder):
    agreement.GRACE = 3.0
    join_hosts(coordinator=f"localhost:{port}", num_processes=2, process_id=int(host))
    programs()()
    inputs_of, publish = Reader._inputs, Publisher._publish
    for stage in STAGES:

        def reading(self, request, stage=stage):
            fail(stage, "read")
            return inputs_of(self, request)

        def publishing(self, *args, stage=stage):
            fail(stage, "write", host=0)
            publish(self, *args)

        Reader._inputs, Publisher._publish = reading, publishing
        start = time.monotonic()
        work = agree_on_work(find_work(batches.job(manifest, Path(folder) / stage, batch_size=2)))
        run = functools.partial(runner, stage)
        try:
            if agreement.is_writer():
                summary = batches.run(work, run)
            else:
                summary = batch.follow(work, lambda: None, run)
            said = {"done": summary.done, "failed": summary.failed}
        except Error as error:
            said = {"error": str(error)}
        seconds = time.monotonic() - start
        print(json.dumps({"stage": stage, "seconds": seconds, **said}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
    agreement.leave("the end of the test")
    os._exit(0)  # a thread is still inside a program
