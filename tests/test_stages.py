"""What is compiled before the weights are there is what runs once they are."""

import dataclasses
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
import tiny

import kvlock_jax as kvl
from kvlock_jax.convert import converter
from kvlock_jax.media import encode
from kvlock_jax.models.attention.sharded import gathered
from kvlock_jax.parallel.mesh import make_mesh
from kvlock_jax.pipeline import stages
from kvlock_jax.pipeline.api import run
from kvlock_jax.pipeline.background import BackgroundCompiler
from kvlock_jax.pipeline.encode import draw_noise
from kvlock_jax.pipeline.inputs import read_inputs
from kvlock_jax.pipeline.placement import Placement, compiler_for
from kvlock_jax.pipeline.settings import resolve_settings
from kvlock_jax.runtime.compile_cache import Compiler, call
from kvlock_jax.settings.schema import run_config


def caching(folder):
    """The compiler of one device that keeps its traces in a folder."""
    return compiler_for(Placement(None, False, gathered), str(folder))


def given(steps):
    settings = resolve_settings(run_config("kvlock", steps=steps))
    return read_inputs(tiny.clip(), tiny.mask(), "a blue star", settings.edit), settings


PROGRAMS = {
    "encode",
    "encode_ids",
    "_edits",
    "sample",
    "prepare",
    "start",
    "advance",
    "step_inputs",
    "decode",
    "video_latents",
}


@pytest.mark.parametrize(
    ("kind", "by_step"),
    [
        ("text-to-video", True),
        ("VACE", False),
        ("converted", True),
        ("a mesh", True),
        ("kept", True),
    ],
)
def test_nothing_is_compiled_again(
    kind, by_step, tiny_checkpoint, tiny_vace_checkpoint, tmp_path, compiled
):
    jax.clear_caches()
    folder, mesh = tiny_checkpoint, None
    programs = caching(tmp_path) if kind == "kept" else None
    if kind in ("VACE", "kept"):
        folder = tiny_vace_checkpoint
    if kind == "converted":
        converter.convert(folder, tmp_path / "own")
        folder = tmp_path / "own"
    if kind == "a mesh":
        mesh = make_mesh(frames=2, devices=jax.devices()[:2])
    (inputs, settings), ahead = given(3), []

    def on_shapes(model):
        noise = draw_noise(model, inputs, jax.random.key(0))
        ahead.append(BackgroundCompiler(model, inputs, settings, noise, by_step, programs))
        ahead[0].wait("decoder")

    model = kvl.load(folder, mesh=mesh, on_shapes=on_shapes)
    loop = {"prepare", "start", "advance", "step_inputs"} if by_step else {"sample"}
    once = {"encode", "encode_ids", "_edits", "decode", "video_latents"}
    assert set(compiled) & PROGRAMS == once | loop
    compiled.clear()
    steps = []
    on_step = steps.append if by_step else None
    result = run(model, inputs, settings, on_step=on_step, background=ahead[0])
    assert not set(compiled) & PROGRAMS
    assert result.video.shape == inputs.source.shape and len(steps) == 3 * by_step


def test_what_another_process_traced_makes_the_same_video(tiny_vace_checkpoint, tmp_path):
    inputs, settings = given(3)
    names: list[str] = []

    def listener(event, seconds, **about):
        if event == "/jax/core/compile/jaxpr_trace_duration":
            names.append(about.get("fun_name", ""))

    def made(programs):
        names.clear()
        jax.clear_caches()
        model = kvl.load(tiny_vace_checkpoint)
        noise = draw_noise(model, inputs, jax.random.key(0))
        ahead = BackgroundCompiler(model, inputs, settings, noise, True, programs)
        how = {"on_step": lambda *step: None, "background": ahead}
        return run(model, inputs, settings, **how).video

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        wanted = made(Compiler())
        assert "flat" not in names
        np.testing.assert_array_equal(made(caching(tmp_path)), wanted)
        assert names.count("flat") == 10
        np.testing.assert_array_equal(made(caching(tmp_path)), wanted)
        assert "flat" not in names
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


def test_what_fails_ahead_stops_nothing(tiny_checkpoint, monkeypatch):
    (inputs, settings), ahead = given(3), []

    encode_rows = stages.encode_rows

    def fails_ahead(*args):
        if args[-1].__name__ == "compile":
            raise ValueError("ahead")
        return encode_rows(*args)

    monkeypatch.setattr(stages, "encode_rows", fails_ahead)

    def on_shapes(model):
        noise = draw_noise(model, inputs, jax.random.key(0))
        ahead.append(BackgroundCompiler(model, inputs, settings, noise, by_step=True))

    model = kvl.load(tiny_checkpoint, on_shapes=on_shapes)
    for stage in ("texts", "videos", "loop", "decoder"):
        ahead[0].wait(stage)
        assert bool(ahead[0]._compiled[stage].exception()) == (stage != "texts")
    assert run(model, inputs, settings, background=ahead[0]).video.shape == inputs.source.shape


def test_a_command_that_fails_does_not_wait_for_the_compiler(tiny_checkpoint, tmp_path):
    encode.write_video(tmp_path / "in.mkv", tiny.clip(), 12, lossless=True)
    program = (
        "import time; from kvlock_jax import errors; from kvlock_jax.cli import edit, main; "
        "from kvlock_jax.pipeline import stages\n"
        "def fail(*args, **how): raise errors.SamplingError('it diverged')\n"
        "stages.Loop.compile, edit.run_edit = lambda *args: time.sleep(1000), fail\n"
        "main.run()"
    )
    command = [sys.executable, "-c", program, "edit", f"--ckpt={tiny_checkpoint}", "--prompt=star"]
    command += "--video=in.mkv --bbox=8,8,24,24 --output=out.mkv --jax_cache_dir=".split()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stderr.endswith("error: it diverged\n")


@pytest.mark.parametrize("references", [0, 2])
def test_the_tokens_that_are_an_edits_own_are_counted(references, tiny_vace_checkpoint):
    model, (inputs, settings) = kvl.load(tiny_vace_checkpoint), given(3)
    pictures = [np.full((24, 16, 3), 9, np.uint8)] * references
    inputs = dataclasses.replace(inputs, references=pictures)
    noise = draw_noise(model, inputs, jax.random.key(0))
    context = stages.encode_texts(model, [inputs], [settings], 1, call)
    edits, tokens = stages.encode_inputs(model, [inputs], noise, context, settings, call)
    (_, rows, columns), frames = edits.grid.axes, edits.grid.axes[0] - references
    assert tokens.shape == (1, frames) and tokens.sum() > 0
    per_frame = edits.foreground.any(axis=-1).reshape(1, references + frames, -1).sum(axis=2)
    np.testing.assert_array_equal(tokens, per_frame[:, references:])
    assert int(edits.own.sum()) == tokens.sum() + references * rows * columns


def test_the_video_is_encoded_while_the_loop_is_compiled(monkeypatch, tiny_checkpoint):
    (inputs, settings), ahead = given(3), []
    encoded, in_time = threading.Event(), []
    prepare, compile_loop = stages.encode_rows, stages.Loop.compile

    def prepared(*args):
        made = prepare(*args)
        if args[-1].__name__ == "call":
            encoded.set()
        return made

    def compiled(loop, *args):
        in_time.append(encoded.wait(60))
        return compile_loop(loop, *args)

    monkeypatch.setattr(stages, "encode_rows", prepared)
    monkeypatch.setattr(stages.Loop, "compile", compiled)

    def on_shapes(model):
        noise = draw_noise(model, inputs, jax.random.key(0))
        ahead.append(BackgroundCompiler(model, inputs, settings, noise, by_step=True))

    model = kvl.load(tiny_checkpoint, on_shapes=on_shapes)
    run(model, inputs, settings, on_step=lambda *step: None, background=ahead[0])
    assert in_time == [True, True]
