"""`kvlock edit`, case by case, on a tiny model of random weights."""

import dataclasses
import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from clips import only
from commands import edited, interrupt, settings_of

from kvlock_jax.cli import edit, main
from kvlock_jax.media import decode, encode

# --- an edit ----------------------------------------------------------------------------------


def test_an_edit_with_all_it_writes(folder, tiny_checkpoint, capsys):
    arguments = (
        f"edit --ckpt {tiny_checkpoint} --video in.mkv --mask mask.mkv --save_file out.mp4 "
        "--trace t.json --plot t.png --compare c.mp4 --preset kvlock --steps 2"
    ).split()
    status = main.main([*arguments, "--prompt", "a red star"])
    output, errors = capsys.readouterr()
    assert status == 0
    assert only(folder) == ["c.mp4", "in.mkv", "mask.mkv", "out.mp4", "t.json", "t.png"]
    found = decode.read_video("out.mp4")
    assert found.frames.shape == (5, 32, 48, 3) and found.fps == 12
    assert edited("c.mp4").shape == (5, 32, 3 * 48 + 2 * 2, 3)
    assert decode.read_image("t.png").shape == (600, 900, 3)
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
    encode.write_video("in.mkv", tiny.clip(*shape), 12, lossless=True)
    encode.write_video("mask.mkv", tiny.mask(*shape), 12, lossless=True)
    assert kvlock()[0] == 0
    assert edited().shape == (*shape, 3)


def test_size_resizes_video_and_mask(kvlock):
    encode.write_video("in.mkv", tiny.clip(7, 64, 96), 12, lossless=True)
    encode.write_video("mask.mkv", tiny.mask(7, 64, 96), 12, lossless=True)
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
    monkeypatch.setattr(edit, "run_edit", interrupt)
    status, output, _ = kvlock(*flags)
    assert status == 130 and f"mask     {coverage}" in output


def test_an_all_white_mask_works(kvlock):
    encode.write_video("mask.mkv", np.full((1, 32, 48, 3), 255, np.uint8), 12, lossless=True)
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
    monkeypatch.setattr(edit, "run_edit", interrupt)
    assert kvlock("--dtype=bfloat16")[0] == 130
    assert loads == [(str(tiny_checkpoint), jnp.bfloat16)]


def test_windows_of_a_long_clip_are_named(kvlock, monkeypatch):
    monkeypatch.setattr(edit, "run_edit", interrupt)
    encode.write_video("in.mkv", tiny.clip(82, 16, 16), 12)
    _, printed, _ = kvlock(src_mask=None, bbox="0,0,8,8")
    assert re.search(r"windows +2 of 81 frames, which share about 20\n", printed)
    _, printed, _ = kvlock("--long=whole", src_mask=None, bbox="0,0,8,8")
    assert "windows" not in printed


# --- settings ---------------------------------------------------------------------------------

CONFIG = """
from kvlock_jax.settings.schema import run_config
def get_config():
    config = run_config("hard_lock", steps=2, shift=3.0, guidance_scale=2.0)
    config.kvlock.tau = 0.5
    return config
"""


def chosen(kvlock, monkeypatch, *flags: str, **changes: str | None):
    """The settings of a run that stops there."""
    seen = []
    monkeypatch.setattr(edit, "run_edit", lambda *args, **_: seen.append(args[2]) or interrupt())
    status, _, errors = kvlock(*flags, **changes)
    assert status == 130, errors
    return seen[0]


@pytest.mark.parametrize(
    "flags",
    [
        ["--preset=distilled", "--config.sample.steps=8"],
        ["--config.preset=distilled", "--sample_steps=8"],
    ],
)
def test_a_preset_brings_its_sampling(kvlock, monkeypatch, flags):
    got = chosen(kvlock, monkeypatch, *flags, sample_steps=None)
    sample = got.sample
    assert (sample.steps, sample.shift, sample.grid, sample.branches) == (8, 5.0, "plain", 1)
    assert got.lock.kappa == 3


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
        "--sample_guide_scale_low=2 --boundary=0.9 --sample_grid=plain "
        "--long=windows --window=13 --window_overlap=8 --window_shift "
        "--context_scale=0.5 --show_masked --ceiling --pool_seeds=2 --fit=pad --fps=8 --no_audio"
    )
    got = chosen(kvlock, monkeypatch, *flags.split(), "--config.edit.composite")
    assert dataclasses.asdict(got.edit) == {
        "negative_prompt": "two",
        "source_prompt": "one",
        "invert_mask": True,
        "dilate": 1,
        "composite": False,
        "size": "64*32",
        "fit": "pad",
        "frame_num": 4,
        "fps": 8.0,
        "no_audio": True,
        "context_scale": 0.5,
        "show_masked": True,
        "ceiling": True,
    }
    assert (got.preset, got.lock.enabled, got.lock.pool_seeds) == ("cfg", False, 2)
    assert dataclasses.asdict(got.sample) == {
        "steps": 2,
        "shift": 2.5,
        "guidance_scale": 6.0,  # of configs/t2v_1_3b_480p.py, since the model is narrow
        "guidance_scale_low": 2.0,
        "boundary": 0.9,
        "grid": "plain",
        "solver": "dpm++",
        "seed": 3,
        "long": "windows",
        "window": 13,
        "window_overlap": 8,
        "window_shift": True,
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
        (
            ["--config.sample.step=4"],
            r"config\.sample\.step: sample has boundary, grid, guid",
        ),
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
        (["--config=run.py"], r"run\.py: must define get_config"),
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
    assert main.main(["edit", "--prompt=a star"]) == 2
    assert re.match(r"error: .*--src_video.*--save_file.*\n", capsys.readouterr().err)
    assert main.main([]) == 2
    assert "edit|batch|mask|app|convert|info" in capsys.readouterr().err
    assert main.main(["train"]) == 2
    assert "'train'" in capsys.readouterr().err
