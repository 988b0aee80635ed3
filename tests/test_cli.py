"""`kvlock edit`, `batch` and `info`, case by case, on a tiny model of random weights."""

import dataclasses
import hashlib
import importlib.metadata
import json
import re
import shutil
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import av
import jax
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

from kvlock_jax import cli, store, video
from kvlock_jax.convert import command, weights
from kvlock_jax.edit import default_config, edit, load
from kvlock_jax.errors import CheckpointError, SamplingError
from kvlock_jax.inputs import TRAINED_FRAMES

MODULE = sys.modules["kvlock_jax.edit"]  # `kvlock_jax.edit` as an attribute is the function
FILES = ["in.mkv", "mask.mkv"]


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return load(tiny_checkpoint)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, with a clip and its mask."""
    monkeypatch.chdir(tmp_path)
    video.write_video("in.mkv", tiny.clip(), 12, lossless=True)
    video.write_video("mask.mkv", tiny.mask(), 12, lossless=True)
    return tmp_path


@pytest.fixture
def loads(monkeypatch, model):
    """Puts `model` in place of loading, so that its loop compiles once; lists what was loaded."""
    calls = []
    monkeypatch.setattr(cli, "load", lambda *args, **where: calls.append(args) or model)
    return calls


@pytest.fixture
def kvlock(folder, loads, tiny_checkpoint, capsys):
    """Runs `kvlock edit`; flags of the defaults are set by keyword, and left out by None."""

    def run(*flags: str, **changes: str | None) -> tuple[int, str, str]:
        defaults = {
            "ckpt_dir": str(tiny_checkpoint),
            "src_video": "in.mkv",
            "src_mask": "mask.mkv",
            "prompt": "a red star",
            "save_file": "out.mkv",
            "sample_steps": "2",
        }
        named = [f"--{k}={v}" for k, v in (defaults | changes).items() if v is not None]
        status = cli.main(["edit", *named, *flags])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def fails(kvlock, folder, loads):
    """Runs what must fail before a model is loaded; returns the one line of its error."""

    def run(*flags: str, **changes: str | None) -> str:
        before = only(folder)
        status, _, errors = kvlock(*flags, **changes)
        assert status == 2
        assert re.fullmatch(r"error: [^\n]+\n", errors), errors
        assert loads == []
        assert only(folder) == before
        return errors

    return run


def only(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def edited(path: str = "out.mkv") -> np.ndarray:
    return video.read_video(path).frames


def settings_of(path: str = "t.json") -> dict:
    return json.loads(Path(path).read_text())["settings"]


# --- an edit ----------------------------------------------------------------------------------


def test_an_edit_with_all_it_writes(folder, tiny_checkpoint, capsys):
    arguments = (
        f"edit --ckpt {tiny_checkpoint} --video in.mkv --mask mask.mkv --save_file out.mp4 "
        "--trace t.json --plot t.png --compare c.mp4 --preset kvlock --steps 2"
    ).split()
    status = cli.main([*arguments, "--prompt", "a red star"])
    output, errors = capsys.readouterr()
    assert status == 0
    assert only(folder) == ["c.mp4", "in.mkv", "mask.mkv", "out.mp4", "t.json", "t.png"]
    found = video.read_video("out.mp4")
    assert found.frames.shape == (5, 32, 48, 3) and found.fps == 12
    assert edited("c.mp4").shape == (5, 32, 3 * 48 + 2 * 2, 3)
    assert video.read_image("t.png").shape == (600, 900, 3)
    trace = json.loads(Path("t.json").read_text())
    assert trace["prompt"] == "a red star" and trace["src_video"] == "in.mkv"
    assert len(trace["steps"]["sigma"]) == 2
    assert 0 < trace["metrics"]["background_psnr"] < 100

    lines = dict(line.split(maxsplit=1) for line in output.splitlines())
    assert list(lines) == ["video", "mask", "preset", "loaded", "on", "times", "kept", "wrote"]
    assert lines["mask"].startswith("4.2 % ")  # 64 of 1536
    assert lines["preset"].startswith("kvlock: the paper")
    assert re.search(r"wan2\.1-t2v, [\d,]+ parameters in float32, .*float32$", lines["loaded"])
    stages = re.findall(r"([a-z ]+) [\d.]+ s", lines["times"])
    assert [stage.strip() for stage in stages] == [
        "load",
        "compile ahead",
        "encode text",
        "encode video",
        "compile",
        "sample",
        "decode video",
    ]
    assert f"{trace['metrics']['background_psnr']:.2f} dB" in lines["kept"]
    assert lines["wrote"] == "out.mp4, t.json, t.png, c.mp4"
    assert errors.splitlines() == ["step 1 of 2", "step 2 of 2"]
    assert not re.search(r"[^\x20-\x7e\n]", output + errors)


@pytest.mark.parametrize("shape", [(4, 32, 48), (5, 31, 45)])
def test_any_length_and_size_is_kept(kvlock, shape):
    video.write_video("in.mkv", tiny.clip(*shape), 12, lossless=True)
    video.write_video("mask.mkv", tiny.mask(*shape), 12, lossless=True)
    assert kvlock()[0] == 0
    assert edited().shape == (*shape, 3)


def test_size_resizes_video_and_mask(kvlock):
    video.write_video("in.mkv", tiny.clip(7, 64, 96), 12, lossless=True)
    video.write_video("mask.mkv", tiny.mask(7, 64, 96), 12, lossless=True)
    status, output, _ = kvlock("--size=48*32", "--frame_num=5")
    assert status == 0
    assert edited().shape == (5, 32, 48, 3)
    assert "5 frames of 48x32" in output and "1.0 %" in output  # 8x8 of 64x96


def test_a_box_is_the_mask_of_its_pixels(kvlock):
    status, output, _ = kvlock("--lossless", src_mask=None, bbox="8,8,16,16")
    assert status == 0 and "4.2 %" in output
    assert kvlock("--lossless", save_file="by_mask.mkv")[0] == 0
    np.testing.assert_array_equal(edited(), edited("by_mask.mkv"))


@pytest.mark.parametrize(
    ("flags", "coverage"),
    [
        (["--invert_mask"], "95.8 %"),
        (["--dilate=2"], "9.4 %"),  # 12x12 of 1536
        (["--dilate=2", "--invert_mask"], "99.0 %"),  # the inverse grows: 4x4 of 1536 are left
    ],
)
def test_mask_flags(kvlock, monkeypatch, flags, coverage):
    monkeypatch.setattr(cli, "run_edit", interrupt)
    status, output, _ = kvlock(*flags)
    assert status == 130 and f"mask     {coverage}" in output


def test_an_all_white_mask_works(kvlock):
    video.write_video("mask.mkv", np.full((1, 32, 48, 3), 255, np.uint8), 12, lossless=True)
    status, output, _ = kvlock()
    assert status == 0 and "100.0 %" in output
    assert "no background to measure\n" in output


def test_composite_keeps_every_pixel_outside(kvlock):
    status, output, _ = kvlock("--composite", "--lossless")
    assert status == 0 and "PSNR inf dB" in output
    source, found, outside = tiny.clip(), edited(), tiny.mask()[..., 0] == 0
    np.testing.assert_array_equal(found[outside], source[outside])
    assert (found[~outside] != source[~outside]).any()


def test_dtype_is_that_of_the_model(kvlock, loads, monkeypatch, tiny_checkpoint):
    monkeypatch.setattr(cli, "run_edit", interrupt)
    assert kvlock("--dtype=bfloat16")[0] == 130
    assert loads == [(str(tiny_checkpoint), cli.jnp.bfloat16)]


def test_many_frames_are_warned_of(kvlock, monkeypatch):
    monkeypatch.setattr(cli, "run_edit", interrupt)
    video.write_video("in.mkv", tiny.clip(TRAINED_FRAMES + 1, 16, 16), 12)
    _, _, errors = kvlock(src_mask=None, bbox="0,0,8,8")
    assert re.match(r"warning: 82 frames: .* 81.*\n", errors)


# --- settings ---------------------------------------------------------------------------------

CONFIG = """
from kvlock_jax.config import run_config
def get_config():
    config = run_config("hard_lock", steps=2, shift=3.0, guidance_scale=2.0)
    config.kvlock.tau = 0.5
    return config
"""


def chosen(kvlock, monkeypatch, *flags: str, **changes: str | None):
    """The settings of a run that stops there."""
    seen = []
    monkeypatch.setattr(cli, "run_edit", lambda *args, **_: seen.append(args[2]) or interrupt())
    status, _, errors = kvlock(*flags, **changes)
    assert status == 130, errors
    return seen[0]


def interrupt(*_, **__):
    raise KeyboardInterrupt


def test_file_then_overrides_then_flags(kvlock, folder, monkeypatch):
    (folder / "run.py").write_text(CONFIG)
    flags = [
        "--config=run.py",
        "--config.sample.shift=5",
        "--config.sample.guidance_scale",
        "1.5",
        "--config.kvlock.kappa=7",
        "--config.edit.negative_prompt=blue and red",
        "--config.edit.composite",
        "--sample_guide_scale=1.25",
    ]
    got = chosen(kvlock, monkeypatch, *flags, sample_steps=None)
    assert got.preset == "hard_lock"  # of the file
    assert (got.sample.steps, got.lock.tau) == (2, 0.5)
    assert (got.sample.shift, got.lock.kappa) == (5.0, 7)  # overridden
    assert got.edit.negative_prompt == "blue and red" and got.edit.composite
    assert got.sample.guidance_scale == 1.25  # named


def test_every_named_flag_reaches_its_setting(kvlock, monkeypatch):
    flags = (
        "--preset=cfg --shift=2.5 --solver=dpm++ --base_seed=3 --src_prompt=one --dilate=1 "
        "--negative_prompt=two --size=64*32 --frame_num=4 --invert_mask --no-composite "
        "--context_scale=0.5 --show_masked"
    )
    got = chosen(kvlock, monkeypatch, *flags.split(), "--config.edit.composite")
    assert dataclasses.asdict(got.edit) == {
        "negative_prompt": "two",
        "source_prompt": "one",
        "invert_mask": True,
        "dilate": 1,
        "composite": False,
        "size": "64*32",
        "frame_num": 4,
        "context_scale": 0.5,
        "show_masked": True,
    }
    assert (got.preset, got.lock.enabled) == ("cfg", False)
    assert dataclasses.asdict(got.sample) == {
        "steps": 2,
        "shift": 2.5,
        "guidance_scale": 6.0,  # of configs/t2v_1_3b_480p.py, since the model is narrow
        "solver": "dpm++",
        "seed": 3,
    }


def test_settings_are_those_of_the_run(kvlock):
    assert kvlock("--config.kvlock.tau=0.02", "--config.kvlock.kappa=1", "--trace=t.json")[0] == 0
    found = settings_of()
    assert found["lock"]["tau"] == 0.02
    assert json.loads(Path("t.json").read_text())["steps"]["scheduled"] == [False, True]


def test_a_number_in_a_file_may_be_whole(kvlock, folder, monkeypatch):
    text = CONFIG.replace("shift=3.0", "shift=3")
    (folder / "run.py").write_text(text)
    got = chosen(kvlock, monkeypatch, "--config=run.py", "--sample_shift=2.5")
    assert got.sample.shift == 2.5


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--preset=kvlok"], r"no preset 'kvlok'; .*kvlock, kvlock_anchor, .*apg"),
        (["--config.preset=kvlok"], r"no preset 'kvlok'"),
        (["--config.sample.step=4"], r"--config\.sample\.step: sample has guidance_scale, seed"),
        (["--config.lock.tau=4"], r"--config\.lock\.tau: the config has .*kvlock"),
        (["--config.sample.steps.x=4"], r"--config\.sample\.steps\.x: steps has no keys"),
        (["--config.sample.steps=four"], r"--config\.sample\.steps=four"),
        (["--config.kvlock.tau=small"], r"--config\.kvlock\.tau=small"),
        (["--config.kvlock.tau=-1"], r"LockConfig\.tau must be over 0, found -1\.0"),
        (["--config.sample.shift=0"], r"SampleConfig\.shift must be over 0"),
        (["--config.sample.shift"], r"--config\.sample\.shift"),
        (["--sample_solver=heun"], r"SampleConfig\.solver must be 'unipc', .*found 'heun'"),
        (["--sample_steps=0"], r"SampleConfig\.steps must be at least 1, found 0"),
        (["--sample_steps=many"], r"--sample_steps.*'many'"),
        (["--size=832"], r"EditConfig\.size must be width\*height"),
        (["--dilate=-1"], r"EditConfig\.dilate must be 0 or more"),
        (["--dtype=int8"], r"--dtype.*'int8'.*float32"),
        (["--sample_step=3"], r"unknown flag --sample_step;"),
        (["stray"], r"'stray'"),
        (["--config=absent.py"], r"absent\.py: no such file"),
        (["--config=run.py"], r"run\.py: it must have a get_config"),
        (["--config=part.py", "--steps=2"], r"the config has no .*edit, kvlock"),
    ],
)
def test_settings_that_cannot_be(fails, folder, flags, says):
    (folder / "run.py").write_text("")
    (folder / "part.py").write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config(): return ConfigDict({'preset': 'cfg', 'sample': {}})\n"
    )
    assert re.search(says, fails(*flags))


def test_what_must_be_given(capsys):
    assert cli.main(["edit", "--prompt=a star"]) == 2
    assert re.match(r"error: .*--src_video.*--save_file.*\n", capsys.readouterr().err)
    assert cli.main([]) == 2
    assert "edit|batch|convert|info" in capsys.readouterr().err
    assert cli.main(["train"]) == 2
    assert "'train'" in capsys.readouterr().err


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
    video.write_video("mask.mkv", tiny.mask(3), 12, lossless=True)
    assert "mask mask.mkv: 3 frames, but the video has 5" in fails()


def test_mask_of_another_size(fails):
    video.write_video("mask.mkv", tiny.mask(5, 32, 64), 12, lossless=True)
    assert "mask mask.mkv: 64x32 pixels, but the video has 48x32" in fails()


def test_empty_mask(fails):
    video.write_video("mask.mkv", np.zeros((5, 32, 48, 3), np.uint8), 12, lossless=True)
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

    monkeypatch.setattr(cli, "load", broken)
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

    monkeypatch.setattr(cli, "run_edit", diverges)
    status, _, errors = kvlock("--trace=t.json")
    assert (status, errors) == (2, "error: latents are not finite after step 1 of 2\n")
    assert only(folder) == FILES


def test_a_bug_keeps_its_traceback(kvlock, monkeypatch):
    monkeypatch.setattr(cli, "run_edit", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        kvlock()
    assert caught.traceback[-1].name == "<lambda>"


def test_interruption_while_writing_leaves_nothing(kvlock, folder, monkeypatch):
    encode = video._encode

    def half(*args):
        encode(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(video, "_encode", half)
    status, _, errors = kvlock()
    assert status == 130 and errors.endswith("interrupted\n")
    assert only(folder) == FILES


def test_killed_while_sampling(folder, tiny_checkpoint):
    """Two real processes, each with thousands of steps to go."""
    (folder / "out.mp4").write_text("the film before")
    # a shell's background jobs ignore Ctrl-C, and so would their children
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    program = f"{heed}; from kvlock_jax import cli; cli.run()"
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


# --- batch ------------------------------------------------------------------------------------

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
        status = cli.main(["batch", f"--ckpt={tiny_checkpoint}", *named, *flags])
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
    told = errors.splitlines()
    assert told[0] == "1 of 2: one done" and re.fullmatch("2 of 2: edit-[0-9a-f]{16} done", told[1])
    assert only(folder / "out") == ["b.json", "b.mkv", "failed.jsonl", "one.json", "one.mp4"]
    assert json.loads(Path("out/failed.jsonl").read_text()) == {
        "line": 3,
        "id": "bad",
        "reason": f"{folder}/absent.mkv: no such file or folder",
    }

    # the first edit by what it is made of: noise of seed 0 and CRC-32 of its id
    shape = (1, 2, 4, 6, 4)
    noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), zlib.crc32(b"one")), shape)
    config = default_config(model)
    config.sample.steps = 2
    want = edit(model, "in.mkv", "mask.mkv", "a red star", config=config, noise=noise)
    found = video.read_video("out/one.mp4")
    np.testing.assert_array_equal(found.frames, want.video)
    assert found.fps == 12 and edited("out/b.mkv").shape == (5, 32, 48, 3)
    told = json.loads(Path("out/one.json").read_text())
    assert told["metrics"]["background_psnr"] == want.metrics.background_psnr
    assert told["defaults"] == {"src_mask": f"{folder}/mask.mkv"}
    assert told["checkpoint"].keys() == {"name", "identity", "dtype"}
    assert told["seconds"].keys() >= {"read", "sample"}

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
def test_a_batch_that_cannot_start(many, folder, flags, says):
    status, _, errors = many(*flags)
    assert status == 2 and re.search(says, errors), errors
    assert re.fullmatch(r"error: [^\n]+\n", errors)
    assert only(folder) == ["edits.jsonl", *FILES]


def test_an_interrupted_batch(many, folder, monkeypatch):
    monkeypatch.setattr(cli.batch, "run_batch", interrupt)
    status, _, errors = many()
    assert status == 130 and errors == "interrupted\n"
    assert only(folder / "out") == ["failed.jsonl"]


def test_many_frames_are_warned_of_once(many, monkeypatch):
    video.write_video("in.mkv", tiny.clip(TRAINED_FRAMES + 1, 16, 16), 12)
    monkeypatch.setattr(cli.batch, "run_batch", lambda *_, **__: 1 / 0)
    row = {"src_video": "in.mkv", "bbox": "0,0,8,8", "prompt": "a star"}
    status, _, errors = many(rows=[row, row | {"id": "2"}])
    assert status == 1 and errors.count("warning: 82 frames") == 1
    assert errors.count("failed: ZeroDivisionError: division by zero") == 2


# --- info -------------------------------------------------------------------------------------


def info(capsys, *arguments: str) -> dict[str, str]:
    """Lines by their first word, with two spaces before it where the line is indented."""
    assert cli.main(["info", *arguments]) == 0, capsys.readouterr().err
    found = re.findall(r"(?m)^((?:  )?\S+) +(.+)$", capsys.readouterr().out)
    assert len(dict(found)) == len(found)
    return dict(found)


def test_info_of_a_diffusers_folder(capsys, monkeypatch, tiny_checkpoint):
    lazy = weights._lazy

    def unread(*tensor):
        return dataclasses.replace(lazy(*tensor), read=pytest.fail, rows=pytest.fail)

    count = {
        part: sum(
            a.size
            for f in tiny_checkpoint.glob(f"{part}/*.safetensors")
            for a in load_file(f).values()
        )
        for part in ("transformer", "vae", "text_encoder")
    }
    monkeypatch.setattr(weights, "_lazy", unread)
    lines = info(capsys, str(tiny_checkpoint))
    assert lines["family"] == "wan2.1-t2v"
    for part, parameters in count.items():
        assert lines[part].startswith(f"{parameters:,} parameters, float32, ")
        assert f"{4 * parameters:,} bytes" in lines[part]
    assert lines["sizes"] == "2 layers, width 24, 2 heads of 12, feed-forward 20"
    assert f"({4 * sum(count.values()):,} bytes)" in lines["weights"]


def test_info_of_demo_is_that_of_its_folder(capsys, monkeypatch, tiny_checkpoint):
    monkeypatch.setattr(MODULE, "_DEMO", tiny_checkpoint)
    assert info(capsys, "demo") == info(capsys, str(tiny_checkpoint))


def test_info_of_a_converted_checkpoint(capsys, monkeypatch, tmp_path, tiny_checkpoint):
    command.convert(tiny_checkpoint, tmp_path / "own")
    monkeypatch.setattr(store, "read", pytest.fail)
    lines, published = (info(capsys, str(f)) for f in (tmp_path / "own", tiny_checkpoint))
    assert published.items() <= lines.items()
    version = importlib.metadata.version("kvlock-jax")
    assert lines["converted"] == f"by kvlock_jax {version} from wan, diffusers layout"
    for file in tiny_checkpoint.glob("*/*.safetensors"):
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        assert lines[f"  {digest}"] == file.relative_to(tiny_checkpoint).as_posix()
    data = next(p for p in (tmp_path / "own").iterdir() if p.is_dir())
    shutil.rmtree(data / "vae")
    assert cli.main(["info", str(tmp_path / "own")]) == 2
    assert re.match(r"error: .* is damaged:\n(  missing: vae/.*\n)+$", capsys.readouterr().err)


def test_info_of_a_run_on_several_devices(capsys, tiny_checkpoint):
    flags = "--size=45*31 --frame_num=4 --devices=2 --dtype=bfloat16"
    lines = info(capsys, str(tiny_checkpoint), *flags.split(), "--chip=v6e")
    # padded to 5 frames of 32x48, 2 x 2 x 3 tokens; a layer of width 24, keys and values
    assert lines["cache"].endswith("of a block: 12 tokens of 5 frames of 48x32")
    assert lines["  cache"] == f"{2 * 6 * 24 * 2} bytes  6 tokens of 12"
    assert lines["  total"].endswith("fits in 29.8 GiB")
    assert "kvlock_anchor: 50 of 50 steps" in lines["step"]
    without = info(capsys, str(tiny_checkpoint), *flags.split())
    assert without["  cache"] == lines["  cache"] and "step" not in without


@pytest.mark.parametrize(
    "flag", ["--size=832", "--frame_num=0", "--preset=cfg", "--devices=0", "--chip=v9"]
)
def test_info_that_cannot_be(capsys, flag):
    assert cli.main(["info", "demo", flag]) == 2
    assert re.fullmatch(r"error: [^\n]+\n", capsys.readouterr().err)
