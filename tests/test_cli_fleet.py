"""The flags of a cluster, what a run on it tells, and the ledger of its processes."""

import sys

import pytest

from kvlock_jax.batch.ledger import Ledger, guarded
from kvlock_jax.cli import main
from kvlock_jax.cli.fleet import _Progress
from kvlock_jax.errors import HostError


class Group:
    def __init__(self, replica, began, seconds, edits, failed=""):
        self.replica, self.began = replica, began
        self.requests, self.failures = edits, failed
        self.seconds = {"read": 1.0, "edit": seconds, "write": 0.5}


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--replicas 2", "--replicas needs --ray"),
        ("--replica_slice v6e:4x4", "--replica_slice needs --ray"),
        (
            "--ray --replicas 3:1",
            "--replicas must be a number or MIN:MAX, such as 1:8, found '3:1'",
        ),
        ("--ray --replicas none", "--replicas must be a number or MIN:MAX"),
        ("--ray --ray_resources {}", "--ray_resources must be such as"),
        ("--ray --ray_resources TPU", "--ray_resources must be such as"),
        ('--ray --ray_resources {"TPU":true}', "--ray_resources must be such as"),
        ('--ray --ray_resources {"TPU":0}', "--ray_resources must be such as"),
        ("--ray --replica_hosts 0", "--replica_hosts must be 1 or more, found 0"),
        ("--ray --replica_slice v6e:4x4", "--replica_slice must be such as v6e:4x4, with"),
        ("--ray --coordinator a:1", "--coordinator is of one replica"),
        ("--ray --process_id 0", "--process_id is of one replica"),
        ("--ray localhost:1", "--ray localhost:1: nothing answers there ("),
        ("--ray ray://localhost:x", "--ray ray://localhost:x: must be HOST:PORT"),
    ],
)
def test_flags_of_a_cluster(tmp_path, capsys, flags, told):
    (tmp_path / "edits.jsonl").write_text("{}")
    given = f"batch --manifest {tmp_path}/edits.jsonl --save_dir {tmp_path}/out {flags}"
    assert main.main(given.split()) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {told}")


def test_without_ray(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    for name in ("cluster", "replica"):
        monkeypatch.delitem(sys.modules, f"kvlock_jax.batch.{name}", raising=False)
    assert main.main(["batch", "--manifest=a", f"--save_dir={tmp_path}", "--ray"]) == 2
    assert capsys.readouterr().err == "error: kvlock batch --ray needs Ray: pip install '.[ray]'\n"


def test_what_a_run_tells():
    told = []
    progress = _Progress(2, told.append)
    request = type("Request", (), {"id": "a"})
    progress.on_end(request, None)
    progress.on_end(request, type("Failure", (), {"reason": "no such file"}))
    assert told[0].startswith("a done (0 failed, ") and told[0].endswith("s left)")
    assert told[1].startswith("a failed: no such file (1 failed, ") and " 0 s left" in told[1]
    for group in (("x", 0.0, 10.0, "abf", "f"), ("x", 15.0, 5.0, "c"), ("y", 5.0, 20.0, "de")):
        progress.on_group(Group(*group))
    assert progress.lines() == [
        ("replica", "x: 3 edits, 540 an hour, busy 75%"),
        ("replica", "y: 2 edits, 360 an hour, busy 100%"),
        ("stages", "read 3.0 s, edit 35.0 s, write 1.5 s"),
    ]


class Died(BaseException):
    """The end of a process."""


class Tries:
    """A ledger as the processes of one node ask it, some of which are dead."""

    def __init__(self):
        self.ledger, self.node, self.alive = Ledger(), "one", {"one", "two"}

    def begin(self, work):
        return self.ledger.begin(work, self.node, self.alive)

    def end(self, work):
        self.ledger.end(work)


def attempts(tries, group, deadly):
    """What comes of a group that is tried until no process dies over it, and the tries."""
    seen = []

    def work(some):
        seen.append("".join(some))
        if set(some) & set(deadly):
            raise Died
        return [one.upper() for one in some]

    while True:
        try:
            return guarded(tries, "name", group, work, lambda one, error: error), seen
        except Died:
            continue


def test_what_kills_twice_is_given_up_alone():
    (error,), seen = attempts(Tries(), "a", "a")
    assert isinstance(error, HostError) and str(error) == "2 processes died over it"
    assert seen == ["a", "a"]
    (first, error, last), seen = attempts(Tries(), "abc", "b")
    assert (first, last) == ("A", "C") and str(error) == "3 processes died over it"
    assert seen == ["abc", "abc", "a", "b", "a", "c"]
    tries = Tries()
    done, seen = attempts(tries, "ab", "")
    assert done == ["A", "B"] and seen == ["ab"] and tries.begin("name") == 0


def test_a_node_that_dies_is_no_fault_of_its_work():
    tries = Tries()
    for node in ("two", "three", "four"):
        assert tries.begin("name") == 0
        tries.alive = {node}
        tries.node = node
    assert tries.begin("name") == 0
    assert tries.begin("name") == 1  # its process died, its node did not
    tries.end("name")
    assert tries.begin("name") == 1 and tries.begin("other") == 0
