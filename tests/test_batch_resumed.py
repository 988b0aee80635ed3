"""Batches that are cut short, and end as if they had not been."""

import collections
import json
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import batches
import fsspec
import numpy as np
import pytest
from manifests import all_frames, failures, names, poor, write

from kvlock_jax.batch import lease
from kvlock_jax.batch.runner import Summary
from kvlock_jax.media import encode, storage


@pytest.fixture
def folder(tmp_path):
    batches.write_inputs(tmp_path)
    return tmp_path


# --- what goes wrong --------------------------------------------------------------------------


def test_forty_edits_with_six_broken(forty):
    manifest, good, out, summary = forty
    assert summary == Summary(34, 0, 6, str(out / "failed.jsonl"))
    assert names(out) == sorted(
        [*(f"{n}.mkv" for n in good), *(f"{n}.json" for n in good), "failed.jsonl"]
    )
    rows = failures(out)
    assert [(row["line"], row["id"]) for row in rows] == [
        (4, "edit-03"),
        (9, "edit-08"),
        (14, "edit-13"),
        (20, None),
        (28, "edit-26"),
        (34, "edit-33"),
    ]
    for row, says in zip(
        rows,
        [
            f"{manifest.parent}/absent.mkv: no such file or folder",
            f"mask {manifest.parent}/short.npy: 3 frames, but the video has 5",
            "the mask is empty, nothing to edit: no pixel is over half of white",
            "not JSON: Expecting ',' delimiter at column ",
            "id 'edit-26' is that of line 27 already",
            f"{manifest.parent}/story.mkv: not a readable video or image (Invalid data",
        ],
        strict=True,
    ):
        assert row["reason"].startswith(says)


@pytest.fixture(scope="module")
def forty(tmp_path_factory):
    """An undisturbed run of forty: manifest, ids that come to something, folder, summary."""
    folder = tmp_path_factory.mktemp("forty")
    manifest, good = batches.forty(folder)
    summary = batches.do(manifest, folder / "whole", batch_size=2)
    return manifest, good, folder / "whole", summary


# --- cut short --------------------------------------------------------------------------------


def test_killed_five_times_and_resumed(forty, processes, tmp_path):
    """Real processes, killed while some of their edits are read, computed, written and renamed."""
    manifest, _, whole, _ = forty
    want, draw = all_frames(whole), random.Random(4)
    finished: list[str] = []
    for process in processes:
        process.stdin.write(f"{manifest}\n{tmp_path}\n")
        process.stdin.flush()
        for _ in range(draw.randint(1, 7)):
            finished += said(process.stdout.readline())
        time.sleep(draw.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        finished += said(process.communicate()[0])
        assert process.returncode == -signal.SIGKILL
        found = all_frames(tmp_path)  # a half-written one could not be read
        assert found == {name: want[name] for name in found}
        committed = {p.stem for p in tmp_path.glob("*.json")}
        assert set(finished) <= committed <= {Path(name).stem for name in found}
        for name in committed:
            json.loads((tmp_path / f"{name}.json").read_text())
    assert 5 <= len(finished) < 34
    assert max(collections.Counter(finished).values()) == 1  # nothing is done twice

    summary = batches.do(manifest, tmp_path, batch_size=2)
    assert summary.done + summary.skipped == 34 and summary.skipped >= len(finished)
    assert all_frames(tmp_path) == want
    assert names(tmp_path) == names(whole)
    assert (tmp_path / "failed.jsonl").read_text() == (whole / "failed.jsonl").read_text()


@pytest.fixture(scope="module", autouse=True)
def processes():
    """Five processes that finish their imports while other tests run, and wait for a job."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    started = [subprocess.Popen([sys.executable, batches.__file__], **pipes) for _ in range(5)]
    yield started
    for process in started:
        process.kill()
        process.communicate()


def said(text: str) -> list[str]:
    """The ids that a process printed as done."""
    return [line.split()[1] for line in text.splitlines() if line.startswith("done ")]


class Killed(BaseException):
    """Stands for a kill that nothing can answer."""


@pytest.mark.parametrize("redo", [False, True])
def test_cut_short_at_any_file(folder, monkeypatch, redo):
    """Stopped before each change of the folder in turn: no JSON ever speaks for another video."""
    monkeypatch.setattr(lease, "_is_running", lambda *_: False)  # after a kill
    manifest, before, stops = write(folder, {}, {}), {}, 0
    batches.do(manifest, folder / "whole")
    want = all_frames(folder / "whole")
    if redo:
        batches.do(write(folder, {"prompt": "before"}, {"base_seed": 9}), folder / "before")
        before = all_frames(folder / "before")
        write(folder, {}, {})
    made = {
        json.loads(side.read_text())["request_hash"]: all_frames(side.parent)[f"{side.stem}.mkv"]
        for side in folder.glob("*/*.json")
    }
    for count in range(100):
        out = folder / f"out{count}"
        if redo:
            fsspec.filesystem("file").put(f"{folder}/before/", f"{out}/", recursive=True)
        left = [count]

        def counted(change, left=left):
            def changed(*args):
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
                return change(*args)

            return changed

        with monkeypatch.context() as patch:
            for name in ("upload", "remove"):
                patch.setattr(storage, name, counted(getattr(storage, name)))
            try:
                batches.do(manifest, out)
            except Killed:
                stops += 1
            else:
                break
        found = all_frames(out) if out.exists() else {}
        assert all(content in (want[name], before.get(name)) for name, content in found.items())
        for side in out.glob("*.json"):
            facts = json.loads(side.read_text())["request_hash"]
            assert found[side.with_suffix(".mkv").name] == made[facts]
        batches.do(manifest, out)
        assert all_frames(out) == want and names(out) == names(folder / "whole")
    assert stops >= 8  # stage, list, and of each edit the old JSON, the video, the new JSON


def test_an_interruption_keeps_what_is_done(folder):
    manifest, seen = write(folder, {}, {}, {}, {}), []

    def runner(*args):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(args)
        return batches.runner(*args)

    with pytest.raises(KeyboardInterrupt):
        batches.do(manifest, folder / "out", runner)
    assert names(folder / "out") == ["0.json", "0.mkv", "1.json", "1.mkv"]
    threads = {thread.name for thread in threading.enumerate()}
    assert not [name for name in threads if "ThreadPool" in name]
    assert batches.do(manifest, folder / "out") == Summary(2, 2, 0, None)


def test_what_a_killed_run_left_is_removed(folder):
    out, manifest = folder / "out", write(folder, {}, {"prompt": ""})
    for stage in (".kvlock-batch", ".kvlock-batch-0123456789ab"):
        (out / stage).mkdir(parents=True)
        (out / stage / "0.mkv").write_text("half")
    (out / "mine.txt").touch()
    batches.do(manifest, out)
    assert names(out) == ["0.json", "0.mkv", "failed.jsonl", "mine.txt"]


def test_a_group_runs_whole_and_writes_what_is_missing(folder):
    manifest = write(folder, {}, {}, {})
    batches.do(manifest, folder / "out", batch_size=3)
    before = {p.name: p.stat().st_mtime_ns for p in (folder / "out").iterdir()}
    (folder / "out" / "1.json").unlink()
    sizes = []

    def runner(model, inputs, *rest):
        sizes.append(len(inputs))
        return batches.runner(model, inputs, *rest)

    assert batches.do(manifest, folder / "out", runner, batch_size=3) == Summary(1, 2, 0, None)
    after = {p.name: p.stat().st_mtime_ns for p in (folder / "out").iterdir()}
    assert sizes == [3]
    assert {name for name in after if after[name] != before[name]} == {"1.mkv", "1.json"}
    assert batches.do(manifest, folder / "out", overwrite=True).done == 3


def test_one_image_is_a_mask_of_all_frames(folder):
    region = np.zeros(batches.SHAPE[1:], np.uint8)
    region[8:16, 8:24] = 255
    encode.write_png(folder / "mask.png", np.stack([region] * 3, axis=-1))
    rows = [{"bbox": None, "src_mask": mask} for mask in ("mask.png", "mask.npy")]
    manifest = write(folder, *(row | {"noise_id": "x"} for row in rows))
    assert batches.do(manifest, folder / "out", batch_size=2).done == 2
    found = all_frames(folder / "out")
    assert found["0.mkv"] == found["1.mkv"]


def test_the_list_of_failures_is_written_as_they_come(folder, monkeypatch):
    clock, lists = iter(range(0, 1000, 10)), []
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    manifest = write(folder, *({"prompt": "bad"} for _ in range(6)))

    def runner(*args):
        path = folder / "out" / "failed.jsonl"
        lists.append(len(failures(folder / "out")) if path.exists() else 0)
        return poor(*args)

    assert batches.do(manifest, folder / "out", runner).failed == 6
    assert lists[0] == 0 and lists[-1] >= 2 and lists == sorted(lists)
    assert [row["line"] for row in failures(folder / "out")] == [1, 2, 3, 4, 5, 6]
