"""An edit compiled as a user's is, with LLVM's optimisations, which the rest of the suite lacks."""

import os
import subprocess
import sys

import numpy as np
from commands import edited


def test_an_optimised_edit_is_the_edit(kvlock, folder, tiny_checkpoint):
    status, _, errors = kvlock("--lossless")
    assert status == 0, errors
    flags = {
        "ckpt_dir": tiny_checkpoint,
        "src_video": "in.mkv",
        "src_mask": "mask.mkv",
        "prompt": "a red star",
        "save_file": "optimised.mkv",
        "sample_steps": "2",
    }
    command = [sys.executable, "-m", "kvlock_jax.cli.main", "edit", "--lossless"]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    ran = subprocess.run(
        [*command, *(f"--{name}={value}" for name, value in flags.items())],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    got, want = (edited(path).astype(int) for path in ("optimised.mkv", "out.mkv"))
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= 1
