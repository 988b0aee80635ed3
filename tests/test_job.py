"""The work of a manifest: finished, changed and impossible edits."""

import dataclasses
import json
import os
import shutil
from types import SimpleNamespace

import batches
import numpy as np
import pytest

from kvlock_jax.batch import fingerprint, resume
from kvlock_jax.batch.fingerprint import checkpoint_identity
from kvlock_jax.batch.manifest import Common
from kvlock_jax.batch.resume import find_work
from kvlock_jax.errors import InputError
from kvlock_jax.media import encode
from kvlock_jax.settings.schema import run_config

ROWS = [
    {"id": "a", "src_video": "0.mkv", "src_mask": "mask.npy", "prompt": "a star"},
    {"id": "b", "src_video": "0.mkv", "bbox": "0,0,8,8", "prompt": "a star"},
    {"id": "c", "src_video": "1.mkv", "src_mask": "mask.npy", "prompt": "a star"},
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    batches.write_inputs(folder)
    write(folder, ROWS)
    assert batches.do(folder / "edits.jsonl", folder / "out").done == 3
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    """Three edits that are finished, in `out`, and what they were made of."""
    return shutil.copytree(finished, tmp_path / "work")


def write(folder, rows):
    (folder / "edits.jsonl").write_text("\n".join(map(json.dumps, rows)))


def missing(folder, **changes) -> str:
    """Ids of the edits that are missing."""
    work = find_work(batches.job(folder / "edits.jsonl", folder / "out", **changes))
    assert work.failures == []
    return "".join(request.id for request in work.missing)


def changed(folder, row=0, **changes) -> str:
    rows = [dict(r) for r in ROWS]
    rows[row] |= changes
    write(folder, rows)
    return missing(folder)


# --- finished ---------------------------------------------------------------------------------


def test_what_is_finished_need_not_be_done(folder):
    assert missing(folder) == ""
    assert missing(folder, batch_size=3) == ""
    assert missing(folder, overwrite=True) == "abc"
    assert missing(folder, shard=(0, 2)) == missing(folder, shard=(1, 2)) == ""


def test_other_writing_of_the_same_changes_nothing(folder):
    write(folder, [dict(reversed(r.items())) for r in reversed(ROWS)])
    assert missing(folder) == ""
    assert changed(folder, src_video=f"{folder}/0.mkv") == ""
    assert changed(folder, row=1, bbox=[0, 0, 8, 8]) == ""
    os.utime(folder / "0.mkv", (1, 1))
    assert missing(folder) == ""
    os.rename(folder / "0.mkv", folder / "00.mkv")
    write(folder, [r | {"src_video": r["src_video"].replace("0", "00")} for r in ROWS])
    assert missing(folder) == ""


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "a circle"},
        {"negative_prompt": "x"},
        {"base_seed": 1},
        {"config.kvlock.tau": 0.5},
        {"composite": True},
        {"lossless": True},
        {"save_file": "a.mov"},
        {"src_video": "2.mkv"},
        {"src_mask": None, "bbox": "0,0,8,8"},
        {"id": "d", "save_file": "a.mp4"},
    ],
)
def test_what_changed_is_done_again(folder, change):
    assert changed(folder, **change) == change.get("id", "a")


def test_boxes_of_other_frames_are_done_again(folder):
    assert changed(folder, row=1, bbox="0:0,0,8,8 2:0,0,8,9") == "b"


def test_content_of_files_counts(folder):
    np.save(folder / "mask.npy", np.ones((32, 48), bool))
    assert missing(folder) == "ac"
    encode.write_video(folder / "1.mkv", batches.clip(7), 12, lossless=True)
    assert missing(folder) == "ac"
    encode.write_video(folder / "0.mkv", batches.clip(7), 12, lossless=True)
    assert missing(folder) == "abc"


def test_folders_of_images_count_by_their_images(folder):
    (folder / "images").mkdir()
    for n, image in enumerate(batches.clip(0)):
        encode.write_png(folder / "images" / f"{n}.png", image)
    write(folder, [ROWS[0] | {"src_video": "images"}])
    assert batches.do(folder / "edits.jsonl", folder / "out").done == 1
    (folder / "images" / "notes.txt").touch()
    assert missing(folder) == ""
    encode.write_png(folder / "images" / "3.png", batches.clip(1)[0])
    assert missing(folder) == "a"
    batches.do(folder / "edits.jsonl", folder / "out")
    os.rename(folder / "images" / "0.png", folder / "images" / "9.png")
    assert missing(folder) == "a"


def test_settings_and_model_of_the_command_count(folder):
    assert missing(folder, common=Common(run_config("kvlock", steps=3))) == "abc"
    other = batches.job(folder / "edits.jsonl", folder / "out")
    other = dataclasses.replace(other, checkpoint={"name": "none", "dtype": "bfloat16"})
    assert len(find_work(other).missing) == 3


@pytest.mark.parametrize("name", ["a.mp4", "a.json"])
@pytest.mark.parametrize("damage", ["gone", "cut", "empty", "another's"])
def test_damaged_outputs_are_done_again(folder, name, damage):
    file = folder / "out" / name
    if damage == "gone":
        file.unlink()
    elif damage == "another's":
        shutil.copy(folder / "out" / name.replace("a.", "b."), file)
    else:
        file.write_bytes(file.read_bytes()[: 100 if damage == "cut" else 0])
    assert missing(folder) == "a"


@pytest.mark.parametrize("text", ["[]", "3", '"x"', "{}", "null", '{"request_hash": 1}'])
def test_a_json_that_is_not_ours(folder, text):
    (folder / "out" / "a.json").write_text(text)
    assert missing(folder) == "a"


# --- groups -----------------------------------------------------------------------------------


def test_groups_are_the_same_whatever_is_finished(folder):
    whole = find_work(batches.job(folder / "edits.jsonl", folder / "out", batch_size=2))
    (folder / "out" / "b.json").unlink()
    rest = find_work(batches.job(folder / "edits.jsonl", folder / "out", batch_size=2))
    ids = [[r.id for r in group] for group in rest.groups]
    assert ids == [[r.id for r in group] for group in whole.groups] == [["a", "b"], ["c"]]
    assert [[r.id for r in g] for g in rest.pending] == [["a", "b"]] and not whole.pending


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", " images"])
def test_shapes_are_told_by_the_files(tmp_path, suffix):
    for name, size in (("x", (5, 32, 48)), ("y", (4, 30, 47)), ("z", (9, 32, 48))):
        if suffix == " images":
            (tmp_path / f"{name}{suffix}").mkdir()
            for n, image in enumerate(batches.clip(0, size)):
                encode.write_png(tmp_path / f"{name}{suffix}" / f"{n}.png", image)
        else:
            encode.write_video(tmp_path / f"{name}{suffix}", batches.clip(0, size), 25)
    row = {"bbox": "0,0,8,8", "prompt": "a star"}
    rows = [row | {"src_video": f"{name}{suffix}"} for name in "zxy"]
    rows += [row | {"src_video": f"z{suffix}", "frame_num": n} for n in (5, 30)]
    rows += [row | {"src_video": f"z{suffix}", "size": "64*32"}]
    write(tmp_path, rows)
    work = find_work(batches.job(tmp_path / "edits.jsonl", tmp_path / "out", batch_size=9))
    assert [[r.line for r in group] for group in work.groups] == [[1, 5], [2, 3, 4], [6]]


def test_a_picture_is_one_frame(tmp_path):
    encode.write_png(tmp_path / "x.png", batches.clip(0)[0])
    assert resume._probe(str(tmp_path / "x.png")) == (1, 32, 48)


# --- what can't be ----------------------------------------------------------------------------


def test_an_input_is_never_overwritten(folder):
    shutil.copy(folder / "0.mkv", folder / "out" / "x.mkv")
    (folder / "out" / "link.mp4").symlink_to(folder / "1.mkv")
    rows = [
        ROWS[0] | {"src_video": "out/x.mkv", "save_file": "y.mkv"},
        ROWS[1] | {"save_file": "x.mkv"},
        ROWS[2] | {"save_file": "link.mp4"},
        ROWS[2] | {"id": "edits"},
    ]
    write(folder, rows)
    os.rename(folder / "edits.jsonl", folder / "out" / "edits.json")
    rows = [r | {"src_video": str(folder / r["src_video"]), "src_mask": None} for r in rows]
    rows = [r | {"bbox": "0,0,8,8"} for r in rows]
    (folder / "out" / "edits.json").write_text("\n".join(map(json.dumps, rows)))
    work = find_work(batches.job(folder / "out" / "edits.json", folder / "out"))
    assert [f.line for f in work.failures] == [2, 3, 4]
    assert [
        f.reason.partition(" would be overwritten, it is read by ")[2] for f in work.failures
    ] == [
        "line 1",
        "line 3",
        "the command, as --manifest",
    ]


def test_a_manifest_that_cannot_be(folder):
    with pytest.raises(InputError, match="no such file"):
        find_work(batches.job(folder / "none.jsonl", folder / "out"))
    with pytest.raises(InputError, match=r"cannot be read \(Is a directory\)"):
        find_work(batches.job(folder / "out", folder / "out"))
    (folder / "blank.jsonl").write_text("\n \n")
    with pytest.raises(InputError, match=r"blank\.jsonl: the manifest holds no edit"):
        find_work(batches.job(folder / "blank.jsonl", folder / "out"))
    shutil.copy(folder / "edits.jsonl", folder / "out" / "failed.jsonl")
    with pytest.raises(InputError, match="is where failures are written"):
        find_work(batches.job(folder / "out" / "failed.jsonl", folder / "out"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"shard": (2, 2)}, "shard_index must be 0 to 1 of 2, found 2"),
        ({"shard": (-1, 2)}, "shard_index must be 0 to 1 of 2, found -1"),
        ({"shard": (0, 0)}, "num_shards must be 1 or more, found 0"),
        ({"batch_size": 0}, "batch_size must be 1 or more, found 0"),
    ],
)
def test_a_job_that_cannot_be(change, says):
    with pytest.raises(InputError, match=says):
        batches.job("edits.jsonl", "out", **change)


# --- checkpoints ------------------------------------------------------------------------------


def test_identity_of_a_published_checkpoint(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    weights = np.random.default_rng(0).bytes(1 << 18)
    (first / "vae").mkdir(parents=True)
    (first / "vae" / "model.safetensors").write_bytes(weights)
    (first / "vae" / "config.json").write_text("{}")
    shutil.copytree(first, second)
    (second / "readme.txt").touch()
    one, two = (
        fingerprint.checkpoint_identity(str(first)),
        fingerprint.checkpoint_identity(str(second)),
    )
    assert one["name"] == str(first) and one["identity"] == two["identity"]
    for change in (weights[:-1] + b"x", b"x" + weights[1:], weights + weights[-(1 << 16) :]):
        (second / "vae" / "model.safetensors").write_bytes(change)
        assert fingerprint.checkpoint_identity(str(second))["identity"] != one["identity"]
    demo = fingerprint.checkpoint_identity("demo")
    assert demo["name"] == "demo" and len(demo["identity"]) == 64


def test_identity_of_a_converted_checkpoint(tmp_path, monkeypatch):
    """What was converted tells it, and to what; its own files are others each time."""

    def identity_of(sha, dtype, crc):
        model = SimpleNamespace(dtypes=(dtype,))
        facts = SimpleNamespace(
            source={"files": {"a": sha}}, models={"vae": model}, files={"vae/0": crc}
        )
        monkeypatch.setattr(fingerprint.format, "is_checkpoint", lambda folder: True)
        monkeypatch.setattr(fingerprint.format, "read_metadata", lambda folder: facts)
        return fingerprint.checkpoint_identity(str(tmp_path))["identity"]

    first = identity_of("1", "float32", "2")
    assert identity_of("1", "float32", "3") == first
    assert identity_of("2", "float32", "2") != first != identity_of("1", "bfloat16", "2")


@pytest.mark.parametrize("file", ["model-00001-of-00002.safetensors", "vae.pth", "a/b/words.json"])
def test_a_checkpoint_is_told_from_another_by_any_of_its_files(tmp_path, file):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_bytes(b"one")
    before = checkpoint_identity(str(tmp_path))
    assert checkpoint_identity(str(tmp_path)) == before
    (tmp_path / file).write_bytes(b"two")
    assert checkpoint_identity(str(tmp_path)) != before
