"""Several runs in one folder: side by side where they may, refused where not, and dead ones."""

import dataclasses
import json
import re
import subprocess
import sys
import threading
import time

import batches
import fsspec
import pytest
from manifests import all_frames, failures, names, write

from kvlock_jax.batch import lease
from kvlock_jax.errors import InputError
from kvlock_jax.media import encode, storage


@pytest.fixture
def folder(tmp_path):
    batches.write_inputs(tmp_path)
    return tmp_path


@pytest.fixture(params=["local", "memory"])
def out(request, folder):
    """A folder for results, of either kind."""
    system = fsspec.filesystem("memory")
    yield str(folder / "out") if request.param == "local" else "memory://out"
    system.rm("/", recursive=True)


class Paused:
    """A runner that waits in its first batch until it is let go."""

    def __init__(self):
        self.begun, self.go = threading.Event(), threading.Event()

    def __call__(self, *args):
        self.begun.set()
        assert self.go.wait(60)
        return batches.runner(*args)


@pytest.fixture
def beside():
    """Starts a run that pauses; `beside(...)` returns how to end it and have its summary."""
    started = []

    def start(manifest, out, **changes):
        runner, ended = Paused(), []

        def work():
            ended.append(batches.do(manifest, out, runner, **changes))

        thread = threading.Thread(target=work)
        started.append((runner, thread))
        thread.start()
        assert runner.begun.wait(60)

        def end():
            runner.go.set()
            thread.join()
            return ended[0]

        return end

    yield start
    for runner, thread in started:
        runner.go.set()
        thread.join()


def left(out) -> list[str]:
    """Names in a folder that are no results."""
    system, place = fsspec.core.url_to_fs(out)
    return [path for path in system.find(place) if "kvlock" in path]


def rows(*ids, **changes) -> list[dict]:
    return [{"id": n, "save_file": f"{n}.mkv"} | changes for n in ids]


# --- two runs ---------------------------------------------------------------------------------


def test_two_manifests_go_side_by_side(folder, out, beside):
    first = write(folder, *rows("a", "b"), *rows("x", prompt=""), name="first.jsonl")
    second = write(folder, *rows("c", "d"), *rows("y", prompt=""), name="second.jsonl")
    end = beside(first, out)
    there = batches.do(second, out)
    assert (there.done, there.failed) == (2, 1)
    assert there.failures == f"{out}/second.failed.jsonl"
    here = end()
    assert (here.done, here.failed, here.failures) == (2, 1, f"{out}/failed.jsonl")
    results = {f"{n}.{kind}" for n in "abcd" for kind in ("mkv", "json")}
    assert storage.sizes(out).keys() == {*results, "failed.jsonl", "second.failed.jsonl"}
    assert left(out) == []
    for path, manifest, name in ((here.failures, first, "x"), (there.failures, second, "y")):
        (row,) = map(json.loads, storage.read_bytes(path).splitlines())
        assert (row["id"], row["manifest"]) == (name, str(manifest))


def test_two_runs_of_the_same_edits_do_not(folder, out, beside, monkeypatch):
    monkeypatch.setattr(lease, "_YOUNG", 0)
    manifest = write(folder, *rows("a", "b", "c"))
    end = beside(manifest, out)
    with pytest.raises(InputError) as caught:
        batches.do(manifest, out)
    assert re.fullmatch(
        rf"{re.escape(out)}: another run \(process \d+ on [^ ]+, since [-\d]+ [:\d]+\) is making 6 "
        "of these edits' files, such as a.mkv; wait for it to end, or give another --save_dir",
        str(caught.value),
    )
    other = write(folder, *rows("z"), *rows("B", prompt="x"), name="other.jsonl")
    with pytest.raises(InputError, match=r"is making 2 of .*, such as B\.mkv"):
        batches.do(other, out)
    assert end().done == 3 and left(out) == []
    assert batches.do(manifest, out).skipped == 3


def test_edits_that_are_finished_are_nobodys(folder, out, beside):
    """A manifest may hold finished edits of one that is running."""
    batches.do(write(folder, *rows("a"), name="first.jsonl"), out)
    end = beside(write(folder, *rows("a", "b"), name="first.jsonl"), out)
    assert batches.do(write(folder, *rows("a", "c"), name="second.jsonl"), out).done == 1
    assert end().done == 1


def test_shards_go_side_by_side(folder, out, beside):
    manifest = write(folder, *(row | {"src_video": f"{row['id']}.mkv"} for row in rows(*"012")))
    end = beside(manifest, out, shard=(0, 2))
    assert batches.do(manifest, out, shard=(1, 2)).done == 1
    assert end().done == 2 and left(out) == []


def test_one_of_two_that_start_at_once_goes_on(folder, out):
    manifest, ended = write(folder, *rows("a", "b")), []
    together = threading.Barrier(2)

    def start():
        together.wait()
        try:
            ended.append(batches.do(manifest, out))
        except InputError as error:
            ended.append(error)

    threads = [threading.Thread(target=start) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counts = [
        summary.done + summary.skipped for summary in ended if not isinstance(summary, Exception)
    ]
    assert 2 in counts and left(out) == []


# --- failures ---------------------------------------------------------------------------------


def test_a_manifest_without_failures_leaves_the_list_of_another(folder):
    bad = write(folder, *rows("x", src_video="none.mkv"), name="bad.jsonl")
    good = write(folder, *rows("a"), name="good.jsonl")
    out = folder / "out"
    assert batches.do(bad, out).failures == str(out / "failed.jsonl")
    before = (out / "failed.jsonl").read_text()
    assert batches.do(good, out).failures is None
    assert (out / "failed.jsonl").read_text() == before
    write(folder, *rows("a"), *rows("y", prompt=""), name="good.jsonl")
    assert batches.do(good, out).failures == str(out / "good.failed.jsonl")
    assert (out / "failed.jsonl").read_text() == before


def test_a_list_is_mended_wherever_it_is(folder):
    bad = write(folder, *rows("x", prompt=""), name="bad.jsonl")
    good = write(folder, *rows("y", prompt=""), name="good.jsonl")
    out = folder / "out"
    batches.do(bad, out), batches.do(good, out)
    write(folder, *rows("x"), name="bad.jsonl")
    assert batches.do(bad, out).failures is None
    assert names(out) == ["good.failed.jsonl", "x.json", "x.mkv"]
    assert batches.do(good, out).failures == str(out / "failed.jsonl")  # which is free by now
    assert names(out) == ["failed.jsonl", "x.json", "x.mkv"]


def test_manifests_of_one_name_have_lists_of_their_own(folder):
    for n in range(3):
        (folder / str(n)).mkdir()
        (folder / str(n) / "edits.jsonl").write_text("{}")
    out = folder / "out"
    found = [batches.do(folder / str(n) / "edits.jsonl", out).failures for n in range(3)]
    assert len(set(found)) == 3 and found[:2] == [
        str(out / "failed.jsonl"),
        str(out / "edits.failed.jsonl"),
    ]
    assert re.search(r"edits-[0-9a-f]{8}\.failed\.jsonl$", found[2])


def test_a_list_of_an_earlier_version_is_replaced(folder):
    (folder / "out").mkdir()
    (folder / "out" / "failed.jsonl").write_text('{"line": 1, "id": "x", "reason": "old"}\n')
    batches.do(write(folder, *rows("a"), *rows("x", prompt="")), folder / "out")
    assert [row["line"] for row in failures(folder / "out")] == [2]


# --- runs that died ---------------------------------------------------------------------------


def dead(out, changes, beat=None):
    """A lease, and what lay in its staging folder, of a run of edit `a` that was cut short."""
    owner = dataclasses.replace(lease._this_process(["a.mkv"]), **changes)
    storage.make_folder(out)
    stage = f"{out}/.kvlock-batch-{owner.run}"
    storage.write_bytes(f"{stage}.lease", json.dumps(dataclasses.asdict(owner)).encode())
    storage.make_folder(stage)
    storage.write_bytes(f"{stage}/a.mkv", b"half")
    if beat is not None:
        storage.write_bytes(f"{stage}/heartbeat", str(beat).encode())


@pytest.fixture(scope="module")
def ended() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_the_lease_of_a_dead_process_is_taken_over(folder, out, ended):
    dead(out, {"pid": ended})
    dead(out, {"run": "other", "started": "0"})  # its number is another process's by now
    assert batches.do(write(folder, *rows("a")), out).done == 1
    assert storage.sizes(out).keys() == {"a.mkv", "a.json"} and left(out) == []


@pytest.mark.parametrize("age", [10, 1000])
def test_the_lease_of_another_machine_lives_by_its_heartbeat(folder, out, age, ended):
    changes = {"machine": "another", "host": "another", "pid": ended, "created": 0}
    dead(out, changes, beat=time.time() - age)
    manifest = write(folder, *rows("a"))
    if age > lease.STALE:
        assert batches.do(manifest, out).done == 1 and left(out) == []
    else:
        with pytest.raises(InputError, match="on another, since"):
            batches.do(manifest, out)
        assert batches.do(write(folder, *rows("b")), out).done == 1
        assert len(left(out)) == 3


def test_a_run_that_was_taken_for_dead_stops(folder, out, monkeypatch):
    """It had been suspended, say. What it computes is not written over what others may write."""
    monkeypatch.setattr(lease, "BEAT", 0.02)

    def runner(*args):
        (name,) = [path for path in left(out) if path.endswith(".lease")]
        fsspec.core.url_to_fs(out)[0].rm_file(name)
        time.sleep(0.2)
        return batches.runner(*args)

    with pytest.raises(InputError, match="another run took this one's lease over"):
        batches.do(write(folder, *rows("a", "b")), out, runner)
    assert "a.mkv" not in storage.sizes(out)


def test_a_heartbeat_goes_on(folder, out, monkeypatch):
    monkeypatch.setattr(lease, "BEAT", 0.02)
    beats = set()

    def runner(*args):
        for _ in range(20):
            time.sleep(0.02)
            (path,) = [path for path in left(out) if path.endswith("heartbeat")]
            beats.add(fsspec.core.url_to_fs(out)[0].cat_file(path))
        return batches.runner(*args)

    batches.do(write(folder, *rows("a")), out, runner)
    assert len(beats) > 2


# --- full disks -------------------------------------------------------------------------------


def test_a_full_disk_stops_the_batch(folder, monkeypatch):
    """No further edit is computed, finished edits stay, and the next run does the rest."""
    write_video, ran = encode.write_video, []

    def full(path, *args, **kwargs):
        if path.name == "b.mkv":
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        write_video(path, *args, **kwargs)

    def runner(model, inputs, *rest):
        ran.append(inputs)
        time.sleep(0.1)
        return batches.runner(model, inputs, *rest)

    manifest, out = write(folder, *rows(*"abcdefgh")), folder / "out"
    with monkeypatch.context() as patch:
        patch.setattr(encode, "write_video", full)
        with pytest.raises(InputError, match=r"the batch stops, .*: OSError: .*No space left"):
            batches.do(manifest, out, runner)
    assert len(ran) <= 4
    assert names(out) == ["a.json", "a.mkv", "failed.jsonl"]
    assert [row["id"] for row in failures(out)] == ["b"]
    assert batches.do(manifest, out).done == 7 and len(all_frames(out)) == 8


def test_a_disk_that_takes_no_list_either(folder, monkeypatch):
    def full(*_, **__):
        monkeypatch.setattr(storage, "upload", full)
        raise InputError("out: cannot be written") from OSError(122, "Disk quota exceeded")

    monkeypatch.setattr(encode, "write_video", full)
    with pytest.raises(InputError, match="the batch stops"):
        batches.do(write(folder, *rows(*"ab")), folder / "out")


def test_odd_names_of_folders_are_names(folder):
    """`[1]` of a remote folder is no pattern, so nothing of `out1` is touched."""
    memory = fsspec.filesystem("memory")
    try:
        for name in ("a.json", "a.mkv", "failed.jsonl"):
            memory.pipe_file(f"/out1/{name}", b"mine")
        manifest = write(folder, *rows("a"))
        for _ in range(2):
            assert batches.do(manifest, "memory://out[1]", overwrite=True).done == 1
        assert storage.sizes("memory://out1") == {"a.json": 4, "a.mkv": 4, "failed.jsonl": 4}
        assert storage.sizes("memory://out[1]").keys() == {"a.json", "a.mkv"}
    finally:
        memory.rm("/", recursive=True)


def test_a_file_of_the_users_is_no_list(folder):
    bad = write(folder, *rows("x", prompt=""), name="bad.jsonl")
    good = write(folder, *rows("y", prompt=""), name="good.jsonl")
    batches.do(bad, folder / "out")
    (folder / "out" / "good.failed.jsonl").write_text("my notes")
    assert re.search(r"good-[0-9a-f]{8}\.failed", batches.do(good, folder / "out").failures)
    assert (folder / "out" / "good.failed.jsonl").read_text() == "my notes"
