"""Models of Diffusers as peers of ours."""

import dataclasses
import functools
import math
import tempfile

import jax.numpy as jnp
import numpy as np
import torch
from diffusers import WanTransformer3DModel, WanVACETransformer3DModel

from kvlock_jax.convert import diffusers
from kvlock_jax.models.wan.config import WanConfig


def scrambled(model: torch.nn.Module) -> torch.nn.Module:
    """The model with every parameter far from its initial value."""
    torch.manual_seed(0)
    for name, parameter in model.eval().named_parameters():
        scale = math.prod(parameter.shape[1:]) ** -0.5 if "weight" in name else 0.4
        norm = "norm" in name and name.endswith("weight")
        torch.nn.init.normal_(parameter, float(norm), 0.4 if norm else scale)
    return model


@functools.cache
def pair(config: WanConfig, dtype: jnp.dtype):
    """Diffusers' transformer of a size, scrambled, and ours, loaded from what it saved."""
    sizes = dataclasses.asdict(config)
    peer, layout = WanVACETransformer3DModel, diffusers.VACE_TRANSFORMER
    if not config.vace_layers:
        sizes = {name: size for name, size in sizes.items() if not name.startswith("vace")}
        peer, layout = WanTransformer3DModel, diffusers.TRANSFORMER
    peer = scrambled(peer(**sizes))
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(folder)
        ours = diffusers.load_model(folder, layout, compute_dtype=dtype)
    assert ours.config == config
    return peer, ours


def relative_l2(got, want):
    """The distance of two arrays of one shape, in lengths of the second."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return np.linalg.norm(got - want) / np.linalg.norm(want)
