"""`kvlock batch` on a tiny model of random weights."""

import json
import re
import shutil
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from clips import only
from commands import FILES, edited, interrupt

from kvlock_jax.batch import runner
from kvlock_jax.cli import main
from kvlock_jax.media import decode
from kvlock_jax.pipeline.api import edit
from kvlock_jax.pipeline.load import default_config

LINES = [
    {"id": "one", "src_video": "in.mkv", "prompt": "a red star", "lossless": True},
    {"src_video": "in.mkv", "bbox": "0,0,8,8", "prompt": "a blue circle", "save_file": "b.mkv"},
    {"id": "bad", "src_video": "absent.mkv", "prompt": "a red star"},
]


@pytest.fixture
def many(folder, loads, tiny_checkpoint, capsys):
    """Runs `kvlock batch` of `edits.jsonl` to `out`."""

    def run(*flags: str, rows=LINES) -> tuple[int, dict[str, str], str]:
        (folder / "edits.jsonl").write_text("\n".join(map(json.dumps, rows)))
        named = "--manifest=edits.jsonl --save_dir=out --mask=mask.mkv --steps=2".split()
        status = main.main(["batch", f"--ckpt={tiny_checkpoint}", *named, *flags])
        output, errors = capsys.readouterr()
        found = (line.split("  ", 1) for line in output.splitlines())
        return status, {what.strip(): text.strip() for what, text in found}, errors

    return run


def test_a_batch_and_again(many, folder, model, loads, tiny_checkpoint):
    status, lines, errors = many()
    assert status == 1
    assert lines["edits"] == "3, of which 1 cannot run as they stand"
    assert lines["skipped"].startswith("0 ") and lines["to do"] == "2 in 1 groups of up to 8"
    assert lines["loaded"].startswith(f"{tiny_checkpoint}: wan2.1-t2v, ")
    assert lines["batch"] == f"2 done, 0 skipped, 1 failed: {folder}/out/failed.jsonl"
    facts = errors.splitlines()
    assert facts[0] == "1 of 2: one done" and re.fullmatch(
        "2 of 2: edit-[0-9a-f]{16} done", facts[1]
    )
    assert only(folder / "out") == ["b.json", "b.mkv", "failed.jsonl", "one.json", "one.mp4"]
    assert json.loads(Path("out/failed.jsonl").read_text()) == {
        "line": 3,
        "id": "bad",
        "reason": f"{folder}/absent.mkv: no such file or folder",
        "manifest": f"{folder}/edits.jsonl",
    }

    # the first edit by what it is made of: noise of seed 0 and CRC-32 of its id
    shape = (1, 2, 4, 6, 4)
    noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), zlib.crc32(b"one")), shape)
    config = default_config(model)
    config.sample.steps = 2
    want = edit(model, "in.mkv", "mask.mkv", "a red star", config=config, noise=noise)
    found = decode.read_video("out/one.mp4")
    np.testing.assert_array_equal(found.frames, want.video)
    assert found.fps == 12 and edited("out/b.mkv").shape == (5, 32, 48, 3)
    facts = json.loads(Path("out/one.json").read_text())
    assert facts["metrics"]["background_psnr"] == want.metrics.background_psnr
    assert facts["defaults"] == {"src_mask": f"{folder}/mask.mkv"}
    assert facts["checkpoint"].keys() == {"name", "identity", "dtype"}
    assert facts["seconds"].keys() >= {"read", "sample"}

    status, lines, errors = many()
    assert status == 1 and errors == "" and len(loads) == 1
    assert lines["batch"].startswith("0 done, 2 skipped, 1 failed")
    shutil.copy("in.mkv", "absent.mkv")
    status, lines, errors = many("--batch_size=2")
    assert status == 0 and lines["batch"] == "1 done, 2 skipped, 0 failed"
    assert lines["to do"] == "1 in 1 groups of up to 2"
    assert "failed.jsonl" not in only(folder / "out")
    status, lines, _ = many("--config.kvlock.tau=0.5", "--num_shards=2", "--shard_index=1")
    assert (status, lines["batch"]) == (0, "1 done, 0 skipped, 0 failed")
    assert json.loads(Path("out/bad.json").read_text())["settings"]["lock"]["tau"] == 0.5
    assert many("--config.kvlock.tau=0.5", "--overwrite")[1]["batch"].startswith("3 done")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--manifest=none.jsonl"], r"/none\.jsonl: no such file"),
        (["--manifest=gs://b/edits.jsonl"], "gs://b/edits.jsonl: cannot be read .*gcsfs"),
        (["--num_shards=2", "--shard_index=2"], "shard_index must be 0 to 1 of 2, found 2"),
        (["--batch_size=0"], "batch_size must be 1 or more"),
        (["--steps=0"], r"SampleConfig\.steps must be at least 1"),
        (["--prompts=x"], "unknown flag --prompts"),
        (["--config.kvlock.tua=1"], r"unknown key --config\.kvlock\.tua: kvlock has"),
        (["--bbox=0,0,8,8"], "either src_mask or bbox, found both"),
        (["--src_mask=", "--bbox=0,0,8"], "bbox must be four whole numbers"),
        (["--ckpt=absent"], "absent: no such folder"),
        (["--save_dir=in.mkv"], "in.mkv: cannot be made"),
    ],
)
def test_a_batch_that_cannot_start(many, folder, no_gcsfs, flags, says):
    status, _, errors = many(*flags)
    assert status == 2 and re.search(says, errors), errors
    assert re.fullmatch(r"error: [^\n]+\n", errors)
    assert only(folder) == ["edits.jsonl", *FILES]


def test_an_interrupted_batch(many, folder, monkeypatch):
    monkeypatch.setattr(runner, "run_batch", interrupt)
    status, _, errors = many()
    assert status == 130 and errors == "interrupted\n"
    assert only(folder / "out") == ["failed.jsonl"]
