"""Outputs of an edit: found wanting before the work, and written each for itself."""

import dataclasses
import errno
import json
import os
import re
import tempfile
from fractions import Fraction
from pathlib import Path

import batches
import fsspec
import numpy as np
import pytest
from clips import only
from commands import FILES

from kvlock_jax.cli import edit as command
from kvlock_jax.errors import InputError
from kvlock_jax.media import decode, encode, storage
from kvlock_jax.pipeline import report
from kvlock_jax.pipeline.api import Result
from kvlock_jax.pipeline.outputs import Outputs, check_outputs, probe_outputs, write_outputs
from kvlock_jax.pipeline.settings import resolve_settings
from kvlock_jax.settings.schema import run_config

LONG = "x" * 240 + ".mkv"  # 244 bytes, of 255 that file systems take


@pytest.fixture(scope="module")
def result():
    clip = batches.clip(0)
    mask = np.zeros(batches.SHAPE, bool)
    mask[:, 8:16, 8:24] = True
    return Result(
        video=clip,
        source=clip,
        mask=mask,
        fps=Fraction(12),
        trace=batches.NO_TRACE,
        metrics=batches.METRICS,
        seconds={"sample": 0.5},
        settings=resolve_settings(run_config("kvlock", steps=2)),
    )


@pytest.fixture
def drawn(monkeypatch):
    """A plot without its drawing, which takes a second."""

    def draw(path, trace, settings):
        with encode.replacing(encode.check_output(path, (".png",))) as part:
            part.write_bytes(b"a plot")

    monkeypatch.setattr(report, "plot_trace", draw)


@pytest.fixture
def memory():
    system = fsspec.filesystem("memory")
    yield system
    system.rm("/", recursive=True)


def four(folder) -> Outputs:
    files = {"trace": "t.json", "plot": "t.png", "compare": "c.mkv"}
    return Outputs(f"{folder}/o.mkv", **{k: f"{folder}/{v}" for k, v in files.items()})


# --- before the work --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("x" * 252 + ".mkv", "File name too long"),
        ("absent/o.mkv", "does not exist, create it"),
        ("file/o.mkv", "does not exist, create it"),
        ("folder.mkv", "is a folder, not a file"),
    ],
)
def test_paths_that_cannot_be_written_are_found(tmp_path, name, reason):
    (tmp_path / "file").touch()
    (tmp_path / "folder.mkv").mkdir()
    wanted = Outputs(tmp_path / name)
    with pytest.raises(InputError, match=reason):
        check_outputs(wanted, {})
        probe_outputs(wanted)
    assert only(tmp_path) == ["file", "folder.mkv"]


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_folder_that_takes_no_file_is_found(tmp_path, monkeypatch, code):
    def refuse(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(InputError, match=rf"t\.json: cannot be written \({os.strerror(code)}\)"):
        probe_outputs(Outputs(None, trace=tmp_path / "t.json"))


def test_probes_leave_nothing(tmp_path, memory):
    (tmp_path / "o.mkv").write_text("the film before")
    for folder in (tmp_path, "memory://out"):
        check_outputs(four(folder), {})
        probe_outputs(four(folder))
    assert only(tmp_path) == ["o.mkv"] and (tmp_path / "o.mkv").read_text() == "the film before"
    assert memory.find("/") == []


def test_a_store_that_takes_no_file_is_found(memory, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError("403")

    monkeypatch.setattr(type(memory), "pipe_file", refuse)
    with pytest.raises(InputError, match=r"memory://out/o\.mkv: cannot be written \(403\)"):
        probe_outputs(Outputs("memory://out/o.mkv"))


def test_outputs_are_apart_from_inputs(tmp_path):
    inputs = {"src_video": ["memory://in.mkv"], "src_ref_images": [str(tmp_path / "a.png"), ""]}
    for wanted, flags in (
        (Outputs("memory://in.mkv"), "--save_file and --src_video"),
        (Outputs(tmp_path / "o.mkv", plot=tmp_path / "." / "a.png"), "--plot and --src_ref_images"),
        (Outputs(tmp_path / "o.mkv", compare=tmp_path / "o.mkv"), "--compare and --save_file"),
    ):
        with pytest.raises(InputError, match=f"{flags} are the same file"):
            check_outputs(wanted, inputs)


# --- after it ---------------------------------------------------------------------------------


@pytest.mark.parametrize("remote", [False, True])
def test_all_are_written(tmp_path, memory, drawn, result, remote):
    folder = "memory://out" if remote else str(tmp_path)
    lossless = dataclasses.replace(four(folder), lossless=True)
    written = write_outputs(lossless, result, {"prompt": "a star"})
    assert written.errors == [] and len(written.paths) == 4
    assert storage.sizes(folder).keys() == {"o.mkv", "t.json", "t.png", "c.mkv"}
    with storage.local_copy(f"{folder}/o.mkv", ()) as local:
        np.testing.assert_array_equal(decode.read_video(local).frames, result.video)
    assert json.loads(storage.read_bytes(f"{folder}/t.json"))["prompt"] == "a star"


def test_long_names_are_written(tmp_path, result):
    wanted = Outputs(tmp_path / LONG, trace=tmp_path / LONG.replace(".mkv", ".json"))
    probe_outputs(wanted)
    assert write_outputs(wanted, result, {}).errors == []
    assert only(tmp_path) == [LONG.replace(".mkv", ".json"), LONG]


@pytest.mark.parametrize("lost", ["t.json", "t.png", "c.mkv"])
def test_one_that_fails_loses_no_other(tmp_path, drawn, result, lost):
    (tmp_path / lost).mkdir()
    written = write_outputs(four(tmp_path), result, {})
    (error,) = written.errors
    assert f"{lost}: is a folder" in str(error)
    want = {"o.mkv", "t.json", "t.png", "c.mkv"}
    assert {Path(path).name for path in written.paths} == want - {lost}
    assert set(only(tmp_path)) == want


def test_a_video_that_cannot_be_written_is_kept(tmp_path, drawn, result, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "out" / "o.mkv").mkdir(parents=True)
    wanted = dataclasses.replace(four(tmp_path / "out"), lossless=True)
    written = write_outputs(wanted, result, {})
    (error,) = written.errors
    kept = re.search(r"is a folder.*; the video is kept as (.*)", str(error))[1]
    np.testing.assert_array_equal(decode.read_video(kept).frames, result.video)
    assert Path(kept).is_relative_to(tmp_path / "temporary") and len(written.paths) == 3


def test_a_disk_that_is_full_altogether_is_named(tmp_path, result, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(encode, "_encode", full)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (error,) = write_outputs(Outputs(tmp_path / "o.mkv"), result, {}).errors
    assert str(error).count("No space left on device") == 2 and "nor could it be kept" in str(error)


# --- the command ------------------------------------------------------------------------------


@pytest.fixture
def ran(monkeypatch, result):
    """Puts a result in place of the edit."""
    monkeypatch.setattr(command, "run_edit", lambda *_, **__: result)
    monkeypatch.setattr(command, "BackgroundCompiler", lambda *_, **__: None)


def test_the_command_writes_to_a_store(kvlock, folder, ran, memory):
    flags = ["--trace=memory://out[1]/t.json"]
    status, output, errors = kvlock(*flags, save_file="memory://out[1]/o.mkv")
    assert status == 0, errors
    assert "wrote    memory://out[1]/o.mkv, memory://out[1]/t.json\n" in output
    assert storage.sizes("memory://out[1]").keys() == {"o.mkv", "t.json"}
    assert only(folder) == FILES


def test_the_command_names_what_it_could_not_write(kvlock, folder, ran, monkeypatch):
    def fail(*_, **__):
        raise InputError("o.mkv: cannot be written (gone)")

    (folder / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "temporary"))
    monkeypatch.setattr(encode, "write_video", fail)
    status, output, errors = kvlock("--trace=t.json")
    assert status == 2 and "wrote    t.json\n" in output
    assert errors.startswith("error: o.mkv: cannot be written (gone); nor could it be kept: ")
    assert only(folder) == [*FILES, "t.json", "temporary"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([f"--save_file={'x' * 252}.mkv"], "File name too long"),
        (["--trace=in.mkv/t.json"], "output folder in.mkv does not exist"),
        (["--save_file=foo://x/o.mkv"], "foo://x/o.mkv: cannot be written .*not known"),
    ],
)
def test_the_command_finds_them_before_the_work(fails, flags, says):
    assert re.search(says, fails(*flags))
