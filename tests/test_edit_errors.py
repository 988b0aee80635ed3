"""Edits that cannot be, each with its line."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from edits import CLIP, MASK, config_of, edit
from flax import nnx

import kvlock_jax as kvl
from kvlock_jax.errors import CheckpointError, ConfigError, InputError, SamplingError


def test_nothing_to_load(tmp_path):
    with pytest.raises(CheckpointError, match=r"no/where: no such folder; give 'demo' or"):
        kvl.load(tmp_path / "no" / "where")
    with pytest.raises(CheckpointError, match=r"kvlock\.json"):
        kvl.load(tmp_path)


def test_no_such_config():
    with pytest.raises(ConfigError, match=r"no config 'none'; there are demo, t2v_14b_480p"):
        kvl.config("none")


def spoiled(**kvlock):
    config = config_of()
    config.kvlock.update(kvlock)
    return config


BAD = {
    "empty prompt": (dict(prompt=" \n"), InputError, "the prompt is empty"),
    "noise of another shape": (
        dict(noise=np.zeros((2, 4, 6, 4))),
        InputError,
        r"noise must have the shape \(1, 2, 4, 6, 4\), found \(2, 4, 6, 4\)",
    ),
    "unknown key of the lock": (
        dict(config=spoiled(taw=0.1)),
        ConfigError,
        "unknown key 'taw' of LockConfig; it has enabled, .*tau",
    ),
    "value out of range": (
        dict(config=spoiled(tau=-1.0)),
        ConfigError,
        r"LockConfig\.tau must be over 0, found -1\.0",
    ),
    "unknown part": (
        dict(config=type(config_of())({"preset": "cfg", "lock": {}})),
        ConfigError,
        "unknown key 'lock' of the config; it has preset, sample, edit, kvlock",
    ),
    "unknown preset": (dict(config=config_of("kvlok")), ConfigError, "no preset 'kvlok'"),
    "empty mask": (dict(mask=np.zeros_like(MASK)), InputError, "the mask is empty"),
    "nothing left to edit": (
        dict(mask=np.ones_like(MASK), config=config_of(invert_mask=True)),
        InputError,
        "the mask is empty",
    ),
    "mask of another length": (
        dict(mask=MASK[:3]),
        InputError,
        "mask: 3 frames, but the video has 5",
    ),
    "box outside": (dict(mask=(0, 0, 49, 8)), InputError, "not a box inside 48x32 pixels"),
    "floats": (
        dict(clip=CLIP / 255),
        InputError,
        r"must be uint8 frames height width 3, found float64 of shape \(5, 32, 48, 3\)",
    ),
    "one image": (dict(clip=CLIP[0]), InputError, r"found uint8 of shape \(32, 48, 3\)"),
    "no such file": (dict(clip="missing.mp4"), InputError, "missing.mp4: no such file"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_used_is_named(model, case):
    given, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        edit(model, **given)


def broken(model, part, path, value):
    """The model with one number of one parameter replaced."""
    network = nnx.clone(getattr(model.checkpoint, part))
    parameter = next(v for p, v in nnx.to_flat_state(nnx.state(network)) if p == path)
    array = parameter.get_value()
    spoilt = nnx.from_flat_state(
        [(path, parameter.replace(array.at[(0,) * array.ndim].set(value)))]
    )
    nnx.update(network, spoilt)
    whole = dataclasses.replace(model.checkpoint, **{part: network})
    return dataclasses.replace(model, checkpoint=whole)


def test_latents_that_are_not_finite(model):
    bad = broken(model, "transformer", ("patch_embedding", "kernel"), jnp.inf)
    with pytest.raises(SamplingError, match=r"not finite after step 1 of 3: .*patch_embedding"):
        edit(bad)
    noise = np.full((1, 2, 4, 6, 4), np.inf, np.float32)
    with pytest.raises(SamplingError, match="not finite after step 1 of 3: lower the guidance"):
        edit(model, noise=noise)


def test_pixels_that_are_not_finite(model):
    bad = broken(model, "vae", ("decoder", "conv_out", "bias"), jnp.nan)
    with pytest.raises(SamplingError, match="the VAE's pixels are not finite"):
        edit(bad)
