"""The compute dtype where nobody names one: float32 on CPUs, bfloat16 on TPUs and GPUs."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

import kvlock_jax as kvl
from kvlock_jax.cli import edit, info, loading, main
from kvlock_jax.pipeline import load


@pytest.mark.parametrize(
    ("platform", "dtype"), [("cpu", jnp.float32), ("tpu", jnp.bfloat16), ("gpu", jnp.bfloat16)]
)
def test_the_devices_decide(platform, dtype, monkeypatch):
    device = types.SimpleNamespace(platform=platform)
    mesh = types.SimpleNamespace(devices=np.array([[device]]))
    assert load.default_dtype(mesh) == dtype
    monkeypatch.setattr(load.jax, "devices", lambda: [device])
    assert load.default_dtype() == dtype


@pytest.mark.parametrize("asked", [None, jnp.float32])
def test_load_takes_it(asked, monkeypatch, tiny_checkpoint):
    monkeypatch.setattr(load, "default_dtype", lambda mesh: jnp.dtype(jnp.bfloat16))
    model = kvl.load(tiny_checkpoint, asked)
    wanted = jnp.bfloat16 if asked is None else asked
    assert model.checkpoint.transformer.dtype == model.checkpoint.text_encoder.dtype == wanted
    assert model.checkpoint.vae.dtype == jnp.float32


class Stopped(Exception):
    """Ends a command where its edit would begin."""


@pytest.mark.parametrize(("flags", "dtype"), [([], "bfloat16"), (["--dtype=float32"], "float32")])
def test_the_command_line_takes_and_prints_it(flags, dtype, kvlock, loads, monkeypatch, capsys):
    def stop(*args, **how):
        raise Stopped

    monkeypatch.setattr(loading, "default_dtype", lambda: jnp.dtype(jnp.bfloat16))
    monkeypatch.setattr(edit, "run_edit", stop)
    with pytest.raises(Stopped):
        kvlock(*flags)
    assert loads[0][1] == jnp.dtype(dtype)
    assert f"computing in {dtype}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [([], "float32"), (["--chip=v6e"], "bfloat16"), (["--chip=v6e", "--dtype=float32"], "float32")],
)
def test_info_goes_by_the_chip(flags, dtype, capsys, tiny_checkpoint):
    assert info.default_dtype() == jnp.float32
    size = ["--size=48*32", "--frame_num=5"]
    assert main.main(["info", str(tiny_checkpoint), *size, *flags]) == 0
    assert f" in {dtype}, of a block" in capsys.readouterr().out
