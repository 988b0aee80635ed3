"""Edits on a cluster of Ray: nodes that die and join, edits that kill, drivers that are killed."""

import collections
import contextlib
import functools
import os
import signal
import subprocess
import sys
import threading

import batches
import numpy as np
import pytest
import ray
import replicas
from ray.cluster_utils import Cluster

from kvlock_jax.batch import cluster, runner
from kvlock_jax.batch.cluster import Replicas
from kvlock_jax.batch.lease import Share
from kvlock_jax.batch.reader import Reader
from kvlock_jax.batch.resume import find_work
from kvlock_jax.errors import InputError
from kvlock_jax.media import decode

pytestmark = [
    pytest.mark.usefixtures("swept"),
    pytest.mark.filterwarnings("ignore"),  # of Ray, and of forks beside JAX's threads
]

STORE = 80_000_000  # bytes of a node's object store: as few as Ray takes


@pytest.fixture(scope="module")
def nodes():
    """A head whose CPUs read and write; nodes that hold replicas are added."""
    folders = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    with pytest.MonkeyPatch.context() as patch:  # of the nodes, which inherit it
        patch.setenv("PYTHONPATH", folders)
        patch.setenv("RAY_AUTH_MODE", "disabled")
        yield from cluster_of_this_machine()


def cluster_of_this_machine():
    made = Cluster(True, head_node_args={"num_cpus": 2, "object_store_memory": STORE})
    cluster.connect(made.address)
    yield made
    ray.shutdown()
    made.shutdown()


@contextlib.contextmanager
def holding(nodes, count: int, **resources: float):
    added = [
        nodes.add_node(num_cpus=0, resources=resources, object_store_memory=STORE)
        for _ in range(count)
    ]
    nodes.wait_for_nodes()
    yield added
    for node in added:
        if node in nodes.list_all_nodes():
            nodes.remove_node(node, allow_graceful=False)


def frames(folder):
    paths = [path for path in folder.iterdir() if path.suffix == ".mkv"]
    return {path.stem: decode.read_video(path).frames for path in paths}


def assert_same(folder, other):
    one, two = frames(folder), frames(other)
    assert one.keys() == two.keys() and one
    for name, video in one.items():
        np.testing.assert_array_equal(video, two[name], err_msg=name)
    assert not [path for path in folder.iterdir() if path.name.startswith(".kvlock")]


class Alone:
    """A ledger of one process."""

    def __init__(self, ledger):
        pass

    def begin(self, work):
        return 0

    def end(self, work):
        pass


def test_a_row_is_the_work_of_a_group_without_what_is_finished(tmp_path):
    manifest, good = batches.forty(tmp_path)
    lines = manifest.read_text().splitlines()
    manifest.write_text(lines[0])
    batches.do(manifest, tmp_path / "out")
    manifest.write_text("\n".join(lines))
    work = find_work(batches.job(manifest, tmp_path / "out", batch_size=40))
    rows = [cluster._of_one(work, group) for group in work.pending]
    missing = [request.id for row in rows for request in row.missing]
    assert "edit-00" in {request.id for row in rows for group in row.groups for request in group}
    assert "edit-00" not in missing and set(good) - {"edit-00"} < set(missing)


def test_a_writer_that_may_not_write_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "_Tries", Alone)
    manifest, _ = batches.forty(tmp_path)
    out = tmp_path / "out"
    work = find_work(batches.job(manifest, out))
    work = cluster._of_one(work, work.pending[0])
    (readings,) = (Reader().read(group) for group in work.groups)
    outcomes = runner.outcomes(batches.runner, replicas.nothing, readings, work.job.unit)
    row = {"number": 0, "work": work, "outcomes": outcomes, "stop": None}
    row |= {"replica": "here", "began": 0.0, "read": 1.0, "edit": 2.0}
    share = Share(str(out), str(out / "run.lease"), str(out / "stage"))
    ended = cluster._write(None, share, row)
    assert "does not see this folder" in ended.stop and ended.requests == ()
    out.mkdir()
    ended = cluster._write(None, share, row)
    assert "the run's lease is gone" in ended.stop and list(out.iterdir()) == []
    (out / "run.lease").touch()
    ended = cluster._write(None, share, row)
    assert ended.stop is None and [request.id for request in ended.requests] == ["edit-00"]
    assert ended.seconds.keys() == {"read", "edit", "write"} and ended.failures == ()
    assert {path.name for path in out.iterdir()} >= {"edit-00.mkv", "edit-00.json"}
    assert not list((out / "stage").iterdir())
    assert cluster._write(None, share, {**row, "stop": "no weights"}).stop == "no weights"


def test_a_node_dies_another_joins_and_all_is_as_on_one_machine(nodes, tmp_path):
    manifest, good = batches.forty(tmp_path)
    lines = manifest.read_text().replace('"sample_steps": 3', '"sample_steps": 2')
    manifest.write_text(lines.replace('"sample_steps": 4', '"sample_steps": 2'))
    plain = runner.run(find_work(batches.job(manifest, tmp_path / "plain")), replicas.demo)
    ended: collections.Counter = collections.Counter()
    enough = threading.Event()

    def on_end(request, failure):
        ended[request.id] += 1
        if len(ended) == 8:
            enough.set()

    with holding(nodes, 2, chip=1) as added:

        def change():
            assert enough.wait(300)
            nodes.remove_node(added[0], allow_graceful=False)
            added.append(nodes.add_node(num_cpus=0, resources={"chip": 1}))

        changing = threading.Thread(target=change)
        changing.start()
        work = find_work(batches.job(manifest, tmp_path / "fleet"))
        summary = cluster.run(work, Replicas(replicas.demo, {"chip": 1}, 2, 2), on_end)
        changing.join()
    assert (summary.done, summary.failed) == (plain.done, plain.failed) == (len(good), 6)
    assert set(ended.values()) == {1} and set(good) < set(ended)
    assert_same(tmp_path / "fleet", tmp_path / "plain")
    failures = (tmp_path / name / "failed.jsonl" for name in ("fleet", "plain"))
    assert len({path.read_text() for path in failures}) == 1
    again = find_work(batches.job(manifest, tmp_path / "fleet"))
    assert again.finished == set(good)  # for either kind of run


def test_a_driver_is_killed_and_another_run_does_the_rest_but_what_kills_its_process(
    nodes, tmp_path
):
    manifest, good = batches.forty(tmp_path)
    batches.do(manifest, tmp_path / "plain")
    with holding(nodes, 1, chip=1):
        one = Replicas(replicas.nothing, {"chip": 1})
        assert cluster.ask(one, os.getpid) != os.getpid() and cluster.resources() == {"CPU": 1}
        with pytest.raises(InputError, match=r"^no such mesh$"):
            cluster.ask(one, replicas.refuse)
        command = [sys.executable, replicas.__file__, nodes.address, manifest, tmp_path / "fleet"]
        driver = subprocess.Popen(command, stdout=subprocess.PIPE)
        for _ in range(5):
            assert driver.stdout.readline().startswith(b"ended edit-")
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        driver.stdout.close()
        work = find_work(batches.job(manifest, tmp_path / "fleet"))
        assert 5 <= len(work.finished) <= 12
        deadly = Replicas(replicas.nothing, {"chip": 1}, runner=replicas.poisoned)
        summary = cluster.run(work, deadly)
    assert summary.done + summary.skipped == len(good) - 1
    assert summary.skipped == len(work.finished) and summary.failed == 7
    assert "2 processes died over it" in (tmp_path / "fleet" / "failed.jsonl").read_text()
    (tmp_path / "plain" / f"{replicas.POISON}.mkv").unlink()
    assert_same(tmp_path / "fleet", tmp_path / "plain")


def test_a_replica_of_two_hosts_that_loses_one(nodes, tmp_path, monkeypatch):
    manifest, _ = batches.forty(tmp_path)
    manifest.write_text("\n".join(manifest.read_text().splitlines()[:3]))
    batches.do(manifest, tmp_path / "plain")
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    monkeypatch.setenv("XLA_FLAGS", flags)
    with holding(nodes, 2, chip=1):
        work = find_work(batches.job(manifest, tmp_path / "fleet"))
        losing = functools.partial(replicas.on_two_hosts, str(tmp_path))
        pair = Replicas(replicas.nothing, {"chip": 1}, hosts=2, runner=losing)
        summary = cluster.run(work, pair)
    assert summary.done == 3 and (tmp_path / "lost").exists()
    assert_same(tmp_path / "fleet", tmp_path / "plain")
