"""Batches of edits: outputs, failures, and work that runs side by side."""

import dataclasses
import json
import threading
import time
import zlib
from pathlib import Path

import batches
import fsspec
import jax
import numpy as np
import pytest
from manifests import all_frames, failures, names, poor, write

from kvlock_jax.batch.manifest import Common
from kvlock_jax.batch.publisher import Publisher
from kvlock_jax.batch.reader import Reader
from kvlock_jax.batch.resume import find_work
from kvlock_jax.batch.runner import Summary, edit_key, run
from kvlock_jax.errors import CheckpointError, InputError
from kvlock_jax.media import decode, encode, storage
from kvlock_jax.pipeline import report
from kvlock_jax.settings.schema import run_config


@pytest.fixture
def folder(tmp_path):
    batches.write_inputs(tmp_path)
    return tmp_path


# --- outputs ----------------------------------------------------------------------------------


def test_a_video_and_a_json_beside_it(folder):
    manifest = write(folder, {"base_seed": 3, "config.kvlock.tau": 0.5})
    summary = batches.do(manifest, folder / "out")
    assert summary == Summary(done=1, skipped=0, failed=0, failures=None)
    assert names(folder / "out") == ["0.json", "0.mkv"]
    found = decode.read_video(folder / "out" / "0.mkv")
    # the key by its definition, and the fake edit's frames of it
    key = jax.random.fold_in(jax.random.key(3), zlib.crc32(b"0"))
    inputs = Reader().read(find_work(batches.job(manifest, folder / "out")).groups[0])[0].inputs
    np.testing.assert_array_equal(found.frames, batches.frames(inputs, key))
    assert found.fps == 12
    facts = json.loads((folder / "out" / "0.json").read_text())
    assert facts["request"] == json.loads(manifest.read_text())
    assert facts["id"] == "0" and facts["noise_key"] == [3, zlib.crc32(b"0")] and facts["seed"] == 3
    assert facts["settings"]["lock"]["tau"] == 0.5 and facts["settings"]["sample"]["steps"] == 2
    assert facts["checkpoint"] == {"name": "none"}
    assert facts["versions"].keys() == {"kvlock_jax", "jax"}
    assert facts["metrics"]["background_psnr"] == "Infinity" and facts["metrics"]["psnr"] == 30
    assert facts["seconds"].keys() == {"read", "sample"}
    assert facts["bytes"] == (folder / "out" / "0.mkv").stat().st_size
    assert len(facts["request_hash"]) == 64


def test_results_depend_on_id_and_seed_alone(folder):
    rows = [
        {"src_video": f"{n % 2}.mkv", "steps": 2 + n // 4, "base_seed": n % 3} for n in range(8)
    ]
    batches.do(write(folder, *rows), folder / "one")
    lines = (folder / "edits.jsonl").read_text().splitlines()
    (folder / "other.jsonl").write_text("\n".join([*reversed(lines[2:]), "{"]))
    batches.do(folder / "other.jsonl", folder / "two", batch_size=3)
    one, two = all_frames(folder / "one"), all_frames(folder / "two")
    assert len(two) == 6 and two == {name: one[name] for name in two}
    assert len(set(one.values())) == 8


def test_what_share_a_noise_id_start_from_one_noise(folder):
    rows = [{"prompt": "a star", "noise_id": name} for name in (None, "x", "x", 7)]
    batches.do(write(folder, *rows), folder / "out", batch_size=4)
    found = all_frames(folder / "out")
    assert found["1.mkv"] == found["2.mkv"] and len(set(found.values())) == 3
    facts = [json.loads((folder / "out" / f"{n}.json").read_text())["noise_key"] for n in range(4)]
    assert facts == [[0, zlib.crc32(name)] for name in (b"0", b"x", b"x", b"7")]


def test_a_default_name_and_a_suffix_of_ones_choice(folder):
    manifest = write(folder, {"save_file": None, "lossless": None}, {"save_file": "x.mov"})
    assert batches.do(manifest, folder / "out").done == 2
    assert names(folder / "out") == ["0.json", "0.mp4", "x.json", "x.mov"]


def test_edits_of_one_source_share_its_frames(folder, monkeypatch):
    shared, decoded = [], []
    read_video = decode.read_video
    monkeypatch.setattr(
        decode,
        "read_video",
        lambda path, *more, **resize: (
            decoded.extend([path] * len(resize)) or read_video(path, *more, **resize)
        ),
    )

    def runner(model, inputs, *rest):
        shared.append([given.source for given in inputs])
        return batches.runner(model, inputs, *rest)

    rows = [{}, {"src_video": "1.mkv"}, {"bbox": "8,8,16,16"}, {"size": "96*64"}, {"size": "96*64"}]
    manifest = write(folder, *rows)
    assert batches.do(manifest, folder / "out", runner, batch_size=2).done == 5
    (first, third), (second,), (fourth, fifth) = shared
    assert first is third and fourth is fifth and first.shape == second.shape
    assert fourth.shape == (5, 64, 96, 3)
    assert [Path(path).name for path in decoded] == ["0.mkv", "1.mkv", "0.mkv"]
    assert decode.read_video(folder / "out" / "2.mkv").fps == 12


def test_what_shards_do_is_the_whole(folder):
    manifest = write(folder, *({"src_video": f"{n % 3}.mkv"} for n in range(7)), {"prompt": ""})
    whole = batches.do(manifest, folder / "whole")
    parts = [batches.do(manifest, folder / "parts", shard=(n, 3)) for n in range(3)]
    assert sum(p.done for p in parts) == whole.done == 7 and whole.failed == 1
    assert all_frames(folder / "parts") == all_frames(folder / "whole")
    assert [p.failures is None for p in parts] == [True, False, True]  # line 8 is the second's
    assert parts[1].failures == str(folder / "parts" / "failed-00001-of-00003.jsonl")
    assert Path(parts[1].failures).read_text() == Path(whole.failures).read_text()


def test_a_mended_line_leaves_the_list(folder):
    manifest = write(folder, {}, {"src_video": "absent.mkv"}, {"prompt": " "})
    assert batches.do(manifest, folder / "out").failed == 2
    (folder / "1.mkv").rename(folder / "absent.mkv")
    again = batches.do(manifest, folder / "out")
    assert again == Summary(1, 1, 1, str(folder / "out" / "failed.jsonl"))
    assert [row["line"] for row in failures(folder / "out")] == [3]
    write(folder, {}, {"src_video": "absent.mkv"}, {})
    assert batches.do(manifest, folder / "out") == Summary(1, 2, 0, None)
    assert names(folder / "out") == ["0.json", "0.mkv", "1.json", "1.mkv", "2.json", "2.mkv"]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_bad_edit_stops_no_other(folder, batch_size):
    manifest = write(folder, {}, {"prompt": "bug"}, {"prompt": "bad"}, {}, {})
    summary = batches.do(manifest, folder / "out", poor, batch_size=batch_size)
    assert (summary.done, summary.failed) == (3, 2)
    assert [(row["id"], row["reason"]) for row in failures(folder / "out")] == [
        ("1", "KeyError: 'a bug'"),
        ("2", "latents are not finite after step 1 of 2"),
    ]
    assert sorted(all_frames(folder / "out")) == ["0.mkv", "3.mkv", "4.mkv"]


def test_a_result_that_cannot_be_written(folder):
    (folder / "out" / "0.mkv").mkdir(parents=True)
    summary = batches.do(write(folder, {}, {}), folder / "out")
    assert (summary.done, summary.failed) == (1, 1)
    assert "0.mkv: cannot be written" in failures(folder / "out")[0]["reason"]
    assert names(folder / "out") == ["0.mkv", "1.json", "1.mkv", "failed.jsonl"]


def test_a_failing_edit_leaves_what_it_was_before(folder):
    manifest = write(folder, {})
    batches.do(manifest, folder / "out")
    before = (folder / "out" / "0.json").read_bytes()
    write(folder, {"prompt": "bad"})
    assert batches.do(manifest, folder / "out", poor).failed == 1
    assert (folder / "out" / "0.json").read_bytes() == before


def test_a_container_need_not_tell_the_truth(folder, monkeypatch):
    """Videos that seem to be of one shape and are not, run apart."""
    encode.write_video(folder / "1.mkv", batches.clip(1, (5, 64, 48)), 12, lossless=True)
    monkeypatch.setattr("kvlock_jax.batch.resume._probe", lambda path: (5, 32, 48))
    shapes = []

    def runner(model, inputs, *rest):
        shapes.append([given.source.shape[1] for given in inputs])
        return batches.runner(model, inputs, *rest)

    manifest = write(folder, *({"src_video": f"{n}.mkv"} for n in (0, 1, 2)))
    assert batches.do(manifest, folder / "out", runner, batch_size=3).done == 3
    assert shapes == [[32, 32], [64]]


def test_a_model_that_does_not_load_ends_it_all(folder):
    def load():
        raise CheckpointError("damaged")

    work = find_work(batches.job(write(folder, {}), folder / "out"))
    with pytest.raises(CheckpointError, match="damaged"):
        run(work, load)
    assert names(folder / "out") == []


def test_no_model_is_loaded_for_nothing(folder):
    manifest = write(folder, {}, {"src_video": "story.mkv"})
    batches.do(manifest, folder / "out")
    summary = run(find_work(batches.job(manifest, folder / "out")), pytest.fail)
    assert (summary.skipped, summary.failed) == (1, 1)


def test_a_folder_that_cannot_be(folder):
    (folder / "out").touch()
    with pytest.raises(InputError, match="out: cannot be"):
        batches.do(write(folder, {}), folder / "out")


# --- what runs beside what --------------------------------------------------------------------


def test_reading_and_writing_go_on_while_the_device_works(folder, monkeypatch):
    """Edit 1 computes until edit 2 is read and edit 0 is being written; that waits for it too."""
    read, writing = ({str(n): threading.Event() for n in range(8)} for _ in range(2))
    computing = threading.Event()
    inputs_of, publish = Reader._inputs, Publisher._publish

    def reading(self, request):
        found = inputs_of(self, request)
        read[request.id].set()
        return found

    def publishing(self, request, *rest):
        writing[request.id].set()
        if request.id == "0":
            assert computing.wait(30), "edit 1 does not start before edit 0 is written"
        publish(self, request, *rest)

    monkeypatch.setattr(Reader, "_inputs", reading)
    monkeypatch.setattr(Publisher, "_publish", publishing)

    def runner(model, inputs, *rest):
        n = len(inputs[0].prompt)
        if n == 1:
            computing.set()
            assert read["2"].wait(30), "edit 2 is not read meanwhile"
            assert writing["0"].wait(30), "edit 0 is not written meanwhile"
        time.sleep(0.05)
        assert not read[str(n + 2)].is_set(), "no more than one is read ahead"
        return batches.runner(model, inputs, *rest)

    manifest = write(folder, *({"prompt": "p" * n or "\u00e9\u00e9\u00e9\u00e9"} for n in range(4)))
    summary = batches.do(manifest, folder / "out", runner)
    assert summary.done == 4, failures(folder / "out")


def test_the_end_of_each_edit_is_told_once(folder):
    facts = []
    manifest = write(folder, {}, {"prompt": "bad"}, {}, {"prompt": ""})
    work = find_work(batches.job(manifest, folder / "out"))
    batches.run(work, poor, lambda request, failure: facts.append((request.id, failure is None)))
    assert sorted(facts) == [("0", True), ("1", False), ("2", True)]


# --- places -----------------------------------------------------------------------------------


@pytest.fixture
def memory():
    system = fsspec.filesystem("memory")
    yield system
    system.rm("/", recursive=True)


def test_everything_may_be_remote(folder, memory, monkeypatch):
    (folder / "images").mkdir()
    for n, image in enumerate(batches.clip(5)):
        encode.write_png(folder / "images" / f"{n}.png", image)
    rows = [
        {"bbox": None, "src_mask": "mask.npy"},
        {"src_video": "images"},
        {"src_video": "story.mkv"},
        {"bbox": None, "src_mask": "memory://set/short.npy"},
        {"src_video": "none.mkv"},
        {"src_ref_images": ["images/0.png"]},
    ]
    manifest = write(folder, *rows)
    batches.do(manifest, folder / "out")
    memory.put(f"{folder}/", "/set/", recursive=True)
    memory.rm("/set/out", recursive=True)
    memory.pipe_file("/out/.kvlock-batch-x/0.mkv", b"half")
    there = ("memory://set/edits.jsonl", "memory://out")
    for batch_size, counts in ((2, (3, 0, 3)), (1, (0, 3, 3))):
        summary = batches.do(*there, batch_size=batch_size)
        assert summary == Summary(*counts, "memory://out/failed.jsonl")
    want = [name for name in names(folder / "out") if name != "failed.jsonl"]
    assert storage.sizes("memory://out").keys() == {*want, "failed.jsonl"}
    assert not [name for name in memory.find("/out") if "kvlock" in name]
    for name in want:
        if name.endswith(".mkv"):
            with storage.local_copy(f"memory://out/{name}", ()) as local:
                found = decode.read_video(local).frames
            np.testing.assert_array_equal(found, decode.read_video(folder / "out" / name).frames)
    reasons = [json.loads(line)["reason"] for line in memory.cat("/out/failed.jsonl").splitlines()]
    assert reasons[0].startswith("memory://set/story.mkv: not a readable video")
    assert reasons[1].startswith("mask memory://set/short.npy: 3 frames")
    assert reasons[2] == "memory://set/none.mkv: no such file or folder"
    (folder / "here").mkdir()
    assert batches.do(there[0], folder / "here").done == 3
    assert all_frames(folder / "here") == all_frames(folder / "out")


def test_keys_of_edits():
    keys = [edit_key(seed, name) for seed in (0, 2**32 - 1) for name in ("a", "b", "\u00e9")]
    assert len({tuple(np.asarray(jax.random.key_data(key)).tolist()) for key in keys}) == 6
    want = jax.random.fold_in(jax.random.key(0), 0xE8B7BE43)  # CRC-32 of "a"
    assert jax.random.key_data(keys[0]).tolist() == jax.random.key_data(want).tolist()


def test_defaults_are_written_down(folder):
    write(folder, {})
    common = Common(run_config("kvlock"), {"prompt": "a circle"})
    batches.do(folder / "edits.jsonl", folder / "out", common=common)
    facts = json.loads((folder / "out" / "0.json").read_text())
    assert facts["defaults"] == {"prompt": "a circle"}
    assert dataclasses.asdict(batches.METRICS).keys() == facts["metrics"].keys()
    assert facts["steps"].keys() == set(report.STEPS)
