"""Flags of devices, and two processes beside one."""

import argparse
import json
import os
import socket
import subprocess
import sys
import types
from pathlib import Path

import batches
import faulty
import jax
import numpy as np
import pytest
import tiny
from manifests import all_frames, failures

from kvlock_jax.cli import loading, main
from kvlock_jax.cli.flags import add_devices
from kvlock_jax.errors import ConfigError
from kvlock_jax.media import decode, encode
from kvlock_jax.models.attention.sharded import overlapped, ring
from kvlock_jax.models.wan.config import WanConfig
from kvlock_jax.runtime.compile_cache import CachingCompiler, Compiler

CONFIG = WanConfig(4, 12, 2, 40)
CONTENTS = types.SimpleNamespace(
    configs=types.SimpleNamespace(transformer=CONFIG),
    models={"transformer": types.SimpleNamespace(size=1_000)},
)


def parsed(*argv):
    parser = argparse.ArgumentParser()
    add_devices(parser)
    return parser.parse_args(argv)


def placed_by(args, many):
    return loading.place(args, CONTENTS, many=many)


def test_one_edit_has_all_devices_on_frames_and_many_have_them_on_data():
    one = placed_by(parsed(), many=False)
    assert dict(one.mesh.shape) == {"data": 1, "frames": 8, "model": 1}
    assert (one.spread, one.attend) == (False, overlapped)
    many = placed_by(parsed(), many=True)
    assert dict(many.mesh.shape) == {"data": 8, "frames": 1, "model": 1}
    assert str(one) == "8 devices: data 1, frames 8, model 1"


def test_a_mesh_of_one_device_is_none():
    placed = placed_by(parsed("--mesh", "frames=1", "--spread_weights"), many=False)
    assert (placed.mesh, placed.spread) == (None, False)
    assert str(placed) == "cpu"


def test_what_is_asked_for_is_had():
    args = parsed("--mesh", "data=2,frames=2,model=2", "--attention", "ring", "--spread_weights")
    placed = placed_by(args, many=False)
    assert (placed.spread, placed.attend) == (True, ring)
    assert str(placed) == "8 devices: data 2, frames 2, model 2, weights spread"


@pytest.mark.parametrize(
    ("mesh", "folder", "enabled", "kind"),
    [
        ("frames=1", "cache", True, CachingCompiler),
        ("frames=8", "cache", True, Compiler),
        ("frames=1", "", True, Compiler),
        ("frames=1", "cache", False, Compiler),
    ],
)
def test_what_is_traced_is_kept_of_one_device_beside_a_cache(mesh, folder, enabled, kind):
    args = parsed("--mesh", mesh, "--jax_cache_dir", folder)
    placed = placed_by(args, many=False)
    jax.config.update("jax_enable_compilation_cache", enabled)
    assert type(loading.compiler(args, placed)) is kind


@pytest.mark.parametrize("mesh", ["frames=1", "frames=8"])
def test_tiles_are_the_vaes(mesh):
    args = parsed("--mesh", mesh, "--vae_tiles", "3")
    assert placed_by(args, many=False).vae_tiles == 3
    with pytest.raises(ConfigError, match="--vae_tiles must be 1 or more, found 0"):
        placed_by(parsed("--vae_tiles", "0"), many=False)


def test_weights_that_do_not_fit_each_decide_for_the_mesh(monkeypatch):
    device = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": 3_000})
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    many = placed_by(parsed(), many=True)
    assert dict(many.mesh.shape) == {"data": 1, "frames": 8, "model": 1} and many.spread
    given = placed_by(parsed("--mesh", "data=8"), many=True)
    assert not given.spread  # over one device there is nothing to spread
    assert not placed_by(parsed("--no-spread_weights"), many=True).spread


def test_heads_that_do_not_divide_are_refused_with_what_would():
    args = parsed("--mesh", "model=8")
    with pytest.raises(ConfigError, match="model=8 does not divide the model's 4 heads: use one of "
                       "1, 2, 4"):  # fmt: skip
        placed_by(args, many=False)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--coordinator", "localhost:1"], "--num_processes, --process_id must be given too"),
        (["--process_id", "1"], "--coordinator, --num_processes must be given too"),
        (
            ["--coordinator", "localhost:1", "--num_processes", "2", "--process_id", "2"],
            "--process_id must be from 0 to 1, found 2",
        ),
    ],
)
def test_hosts_are_named_in_full(argv, message):
    with pytest.raises(ConfigError, match=message):
        loading.join(parsed(*argv))


# -- several hosts ---------------------------------------------------------------------------------

COMMAND = "import sys; from kvlock_jax.cli.main import run; run()"


def started(folder: Path, argv: list[str]) -> subprocess.Popen:
    """`kvlock` in a process with four devices of its own."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, "-c", COMMAND, *argv], env=env, cwd=folder, **pipe)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    encode.write_video(tmp_path / "clip.mkv", tiny.clip(), 16, lossless=True)
    encode.write_video(tmp_path / "mask.mkv", tiny.mask(), 16, lossless=True)
    return tmp_path


def one_and_two(folder: Path, argv: list[str], out: str) -> list[str]:
    """Runs a command in this process of 8 devices, and in two of 4; what the two said.

    Args:
      folder: to run in.
      argv: the command.
      out: what is named "one" and "two" in it.
    """
    assert main.main([arg.replace(out, "one") for arg in argv]) == 0
    hosts = ["--coordinator", f"localhost:{free_port()}", "--num_processes", "2", "--process_id"]
    argv = [arg.replace(out, "two") for arg in argv]
    pair = [started(folder, [*argv, *hosts, str(i)]) for i in range(2)]
    said = [process.communicate(timeout=300)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], "\n".join(said)
    return said


def compare(one: Path, two: Path) -> None:
    one, two = (decode.read_video(path).frames for path in (one, two))
    assert np.abs(one.astype(int) - two).max() <= 1


def test_two_processes_are_one(tiny_vace_checkpoint, folder):
    for name in ("one", "two"):
        (folder / name).mkdir()
    argv = [
        "edit", "--ckpt_dir", str(tiny_vace_checkpoint), "--src_video", "clip.mkv",
        "--src_mask", "mask.mkv", "--prompt", "a blue star", "--sample_steps", "4",
        "--preset", "kvlock_anchor", "--save_file", "@/edit.mkv", "--lossless", "--dilate", "1",
        "--trace", "@/trace.json", "--mesh", "frames=8", "--spread_weights",
    ]  # fmt: skip
    said = one_and_two(folder, argv, "@")
    assert "8 devices of 2 hosts" in said[0]
    assert "wrote" in said[0] and "wrote" not in said[1]
    compare(*(folder / n / "edit.mkv" for n in ("one", "two")))
    traces = [json.loads((folder / n / "trace.json").read_text()) for n in ("one", "two")]
    sigma2 = [trace["steps"]["sigma2"] for trace in traces]
    np.testing.assert_allclose(*sigma2, rtol=1e-5, atol=1e-9)


def test_two_processes_do_one_manifest(tiny_vace_checkpoint, folder):
    rows = [{"id": name, "prompt": f"a {name} star"} for name in ("red", "blue")]
    (folder / "edits.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    argv = [
        "batch", "--ckpt_dir", str(tiny_vace_checkpoint), "--manifest", "edits.jsonl",
        "--save_dir", "@", "--src_video", "clip.mkv", "--src_mask", "mask.mkv",
        "--sample_steps", "2", "--mesh", "data=2,frames=4",
    ]  # fmt: skip
    one_and_two(folder, argv, "@")
    for n in ("one", "two"):
        assert sorted(p.name for p in (folder / n).iterdir()) == [
            "blue.json", "blue.mp4", "red.json", "red.mp4",
        ]  # fmt: skip
    for name in ("red", "blue"):
        psnr = [
            json.loads((folder / n / f"{name}.json").read_text())["metrics"]["background_psnr"]
            for n in ("one", "two")
        ]
        np.testing.assert_allclose(*psnr, rtol=1e-3)


def test_errors_of_one_host_neither_mix_edits_nor_hang(tmp_path):
    """At each stage of a batch in turn, on one of two real hosts; their program is a sum."""
    batches.write_inputs(tmp_path)
    row = {"bbox": "0,0,8,8", "prompt": "a star", "lossless": True}
    rows = [
        row | {"id": name, "src_video": f"{n}.mkv", "save_file": f"{name}.mkv"}
        for n, name in enumerate("ab")
    ]
    manifest = tmp_path / "edits.jsonl"
    manifest.write_text("\n".join(map(json.dumps, rows)))
    batches.do(manifest, tmp_path / "whole", batch_size=2)
    want = all_frames(tmp_path / "whole")

    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    env["XLA_FLAGS"] = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    command = [sys.executable, faulty.__file__, str(free_port())]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
    hosts = [
        subprocess.Popen([*command, str(n), str(manifest), str(tmp_path)], **pipe) for n in range(2)
    ]
    said = [host.communicate(timeout=240) for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], said
    ended = [
        [json.loads(line) for line in output.splitlines() if line.startswith("{")]
        for output, _ in said
    ]
    assert [end["stage"] for end in ended[0]] == faulty.STAGES, said
    for stage, *ends in zip(faulty.STAGES, *ended, strict=True):
        assert max(end["seconds"] for end in ends) < 60
        if stage == "loop":
            assert all("RuntimeError: injected at loop" in end["error"] for end in ends)
        else:
            assert [end["failed"] for end in ends] == [0 if stage == "none" else 2] * 2
        found = all_frames(tmp_path / stage)
        assert found == (want if stage == "none" else {})
        reasons = [row["reason"] for row in failures(tmp_path / stage)] if stage != "none" else []
        assert all(f"RuntimeError: injected at {stage}" in reason for reason in reasons)
        assert len(reasons) == (0 if stage == "none" else 2)
