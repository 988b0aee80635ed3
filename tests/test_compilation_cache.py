"""A process finds the programs that an earlier one compiled, and only in folders to trust."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from kvlock_jax.media import decode, encode
from kvlock_jax.runtime import compile_cache


def edit(checkpoint: Path, folder: Path, *flags: str) -> None:
    one_device = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
    env = os.environ | {"XDG_CACHE_HOME": str(folder / "user"), "XLA_FLAGS": one_device}
    del env["JAX_COMPILATION_CACHE_DIR"]
    argv = [sys.executable, "-m", "kvlock_jax.cli.main", "edit", "--ckpt_dir", str(checkpoint)]
    argv += ["--src_video", str(folder / "in.mkv"), "--bbox", "8,8,16,16", "--prompt", "a star"]
    argv += ["--save_file", str(folder / "out.mkv"), "--lossless", "--sample_steps", "2", *flags]
    ran = subprocess.run(argv, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def programs(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.name.endswith("-cache")}


def test_a_second_process_compiles_nothing(tiny_checkpoint, tmp_path):
    encode.write_video(tmp_path / "in.mkv", tiny.clip(), 8, lossless=True)
    kept = tmp_path / "user" / "kvlock_jax" / "programs"
    edit(tiny_checkpoint, tmp_path)
    found, first = programs(kept), decode.read_video(tmp_path / "out.mkv").frames
    for name in ("advance", "prepare", "start", "encode", "decode", "_edits"):
        assert any(program.startswith(f"jit_{name}-") for program in found), name
    edit(tiny_checkpoint, tmp_path, "--sample_steps", "3", "--jax_cache_dir", str(kept))
    assert {p for p in programs(kept) - found if "advance" in p or "encode" in p} == set()
    traced = {path: path.stat().st_mtime_ns for path in (kept / "traced").iterdir()}
    assert len([path for path in traced if path.name.startswith("advance-")]) == 1
    edit(tiny_checkpoint, tmp_path)
    assert programs(kept) >= found
    assert {path: path.stat().st_mtime_ns for path in (kept / "traced").iterdir()} == traced
    np.testing.assert_array_equal(decode.read_video(tmp_path / "out.mkv").frames, first)


@pytest.fixture
def setting():
    """Unsets JAX's own folder; `restored_cache` sets it again."""
    jax.config.update("jax_compilation_cache_dir", None)


def test_the_folder_is_the_users(setting, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert compile_cache.cache_folder() == "/somewhere/kvlock_jax/programs"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/one")
    assert compile_cache.cache_folder() == "/home/one/.cache/kvlock_jax/programs"


def test_jaxs_setting_does_not_move_the_users_folder(setting):
    """It moves compiled programs, and never traces."""
    jax.config.update("jax_compilation_cache_dir", "/elsewhere")
    assert compile_cache.cache_folder() != "/elsewhere"
    compile_cache.keep_programs(None)
    assert jax.config.jax_compilation_cache_dir == "/elsewhere"


def test_a_flag_overrides_jaxs_setting(setting):
    jax.config.update("jax_compilation_cache_dir", "/elsewhere")
    compile_cache.keep_programs("/flag")
    assert jax.config.jax_compilation_cache_dir == "/flag"
    compile_cache.keep_programs("")
    assert jax.config.jax_compilation_cache_dir is None


def test_compiled_programs_stay_in_a_private_folder(setting, monkeypatch, tmp_path):
    """They are machine code."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compile_cache.keep_programs(None)
    folder = tmp_path / "kvlock_jax" / "programs"
    assert jax.config.jax_compilation_cache_dir == str(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    jax.config.update("jax_compilation_cache_dir", None)
    with pytest.warns(UserWarning, match="others may write to it"):
        compile_cache.keep_programs(None)
    assert jax.config.jax_compilation_cache_dir is None
