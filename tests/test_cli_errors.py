"""`kvlock edit` on what cannot be: one line, and nothing lost."""

import contextlib
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import tiny
from clips import only
from commands import FILES

from kvlock_jax.cli import edit, loading, main
from kvlock_jax.errors import CheckpointError, SamplingError
from kvlock_jax.media import encode
from kvlock_jax.media.encode import write_video
from kvlock_jax.parallel import agreement

# --- bad input --------------------------------------------------------------------------------


def write_sound(path: str) -> None:
    with av.open(path, "w") as output:
        stream = output.add_stream("pcm_s16le", rate=8000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        frame.sample_rate = 8000
        output.mux([*stream.encode(frame), *stream.encode(None)])


def test_not_a_video(fails):
    Path("text.mp4").write_text("a story, not a film")
    assert "text.mp4: not a readable video" in fails(src_video="text.mp4")


def test_no_such_video(fails):
    assert "absent.mp4: no such file" in fails(src_video="absent.mp4")


def test_only_sound(fails):
    write_sound("sound.mkv")
    assert "sound.mkv: no video stream, only audio" in fails(src_video="sound.mkv")


@pytest.mark.parametrize("flag", ["src_video", "src_mask"])
def test_empty_file(fails, flag):
    Path("empty.mp4").touch()
    assert "empty.mp4: the file is empty" in fails(**{flag: "empty.mp4"})


def test_mask_of_another_length(fails):
    write_video("mask.mkv", tiny.mask(3), 12, lossless=True)
    assert "mask mask.mkv: 3 frames, but the video has 5" in fails()


def test_mask_of_another_size(fails):
    write_video("mask.mkv", tiny.mask(5, 32, 64), 12, lossless=True)
    assert "mask mask.mkv: 64x32 pixels, but the video has 48x32" in fails()


def test_empty_mask(fails):
    write_video("mask.mkv", np.zeros((5, 32, 48, 3), np.uint8), 12, lossless=True)
    assert "the mask is empty, nothing to edit" in fails()


@pytest.mark.parametrize("box", ["1,2,3", "a,2,3,4", "8,8,4,16", "0,0,49,32"])
def test_bad_box(fails, box):
    assert "bbox" in fails(src_mask=None, bbox=box)


@pytest.mark.parametrize("changes", [{"src_mask": None}, {"bbox": "0,0,8,8"}])
def test_mask_and_box_exclude_each_other(fails, changes):
    assert "give either --src_mask FILE or --bbox" in fails(**changes)


@pytest.mark.parametrize("prompt", ["", "  "])
def test_empty_prompt(fails, prompt):
    assert "the prompt is empty" in fails(prompt=prompt)


# --- bad checkpoints --------------------------------------------------------------------------


@pytest.fixture
def damaged(tiny_checkpoint, folder):
    return shutil.copytree(tiny_checkpoint, folder / "wan")


def test_truncated_weights(fails, damaged):
    file = damaged / "text_encoder" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "model.safetensors is damaged or cut short" in fails(ckpt_dir="wan")


def test_missing_shard(fails, damaged):
    shard = sorted(damaged.glob("transformer/*-00002-*.safetensors"))[0]
    shard.unlink()
    assert f"not in the folder: {shard.name}" in fails(ckpt_dir="wan")


def test_no_checkpoint(fails, folder):
    assert "absent: no such folder; give 'demo'" in fails(ckpt_dir="absent")
    (folder / "void").mkdir()
    assert "kvlock.json: it is no converted checkpoint" in fails(ckpt_dir="void")


def test_further_lines_are_indented(kvlock, monkeypatch):
    def broken(*_, **__):
        raise CheckpointError("wan does not fit:\n  missing: a.weight\nunexpected: b.weight")

    monkeypatch.setattr(loading, "load", broken)
    status, _, errors = kvlock()
    assert status == 2
    assert errors == "error: wan does not fit:\n  missing: a.weight\n  unexpected: b.weight\n"


# --- outputs ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--save_file=absent/out.mp4"], "output folder absent does not exist"),
        (["--trace=absent/t.json"], "output folder absent does not exist"),
        (["--plot=absent/t.png"], "output folder absent does not exist"),
        (["--compare=absent/c.mp4"], "output folder absent does not exist"),
        (["--save_file=out.avi"], "out.avi: the name must end in .mp4"),
        (["--trace=t.txt"], "t.txt: the name must end in .json"),
        (["--plot=t.jpg"], "t.jpg: the name must end in .png"),
        (["--save_file=in.mkv"], "--save_file and --src_video are the same file"),
        (["--compare=./out.mkv"], "--compare and --save_file are the same file"),
    ],
)
def test_outputs_are_checked_first(fails, flags, says):
    assert says in fails(*flags)


def test_diverged_sampling_writes_nothing(kvlock, folder, monkeypatch):
    def diverges(*_, **__):
        raise SamplingError("latents are not finite after step 1 of 2")

    monkeypatch.setattr(edit, "run_edit", diverges)
    status, _, errors = kvlock("--trace=t.json")
    assert (status, errors) == (2, "error: latents are not finite after step 1 of 2\n")
    assert only(folder) == FILES


def test_a_bug_keeps_its_traceback(kvlock, monkeypatch):
    monkeypatch.setattr(edit, "run_edit", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        kvlock()
    assert caught.traceback[-1].name == "<lambda>"


@pytest.mark.parametrize(
    ("raised", "why"),
    [
        (SamplingError("not finite"), "not finite"),
        (KeyboardInterrupt(), "interrupted"),
        (ZeroDivisionError("a bug"), "ZeroDivisionError: a bug"),
    ],
)
def test_other_hosts_hear_why_this_one_ends(monkeypatch, capsys, raised, why):
    reasons = []

    def fails(args):
        raise raised

    monkeypatch.setattr(edit, "join", fails)
    monkeypatch.setattr(agreement, "leave", reasons.append)
    command = "edit --src_video=in.mkv --bbox=0,0,8,8 --prompt=star --save_file=out.mkv".split()
    with contextlib.suppress(ZeroDivisionError):
        assert main.main(command) in (2, 130)
    assert reasons == [why]


def test_interruption_while_writing_leaves_nothing(kvlock, folder, monkeypatch):
    finish = encode._encode

    def half(*args):
        finish(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(encode, "_encode", half)
    status, _, errors = kvlock()
    assert status == 130 and errors.endswith("interrupted\n")
    assert only(folder) == FILES


def test_killed_while_sampling(folder, tiny_checkpoint):
    """Two real processes, each with thousands of steps to go."""
    (folder / "out.mp4").write_text("the film before")
    # a shell's background jobs ignore Ctrl-C, and so would their children
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    program = f"{heed}; from kvlock_jax.cli import main; main.run()"
    command = [sys.executable, "-c", program, "edit", f"--ckpt={tiny_checkpoint}"]
    command += "--video=in.mkv --mask=mask.mkv --output=out.mp4 --trace=t.json".split()
    command += "--frame_num=1 --steps=4000 --preset=cfg --prompt=star".split()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ends = {signal.SIGINT: 130, signal.SIGKILL: -signal.SIGKILL}
    processes = {sent: subprocess.Popen(command, **pipes) for sent in ends}
    try:
        for sent, process in processes.items():
            while "step 400 of 4000" not in (line := process.stderr.readline()):
                assert line, "it ended before its time"
            process.send_signal(sent)
            output, errors = process.communicate()
            assert process.returncode == ends[sent], errors
            assert "step 4000 of 4000" not in errors  # at once, not when the loop is through
            assert "Traceback" not in errors and "wrote" not in output
    finally:
        for process in processes.values():
            process.kill()
            process.communicate()
    assert only(folder) == [*FILES, "out.mp4"]
    assert (folder / "out.mp4").read_text() == "the film before"
