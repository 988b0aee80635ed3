"""What enters the programs of several hosts is the same on all, or nothing runs."""

import dataclasses
import types
from fractions import Fraction

import batches
import fleet
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvlock_jax.checkpoints import registry
from kvlock_jax.errors import HostError, InputError
from kvlock_jax.parallel import agreement
from kvlock_jax.pipeline import api, hosts
from kvlock_jax.pipeline.inputs import EditInputs
from kvlock_jax.pipeline.settings import resolve_settings
from kvlock_jax.settings.schema import run_config

MASK = np.zeros(batches.SHAPE, bool)
MASK[:, 8:16, 8:24] = True
INPUTS = EditInputs(batches.clip(0), MASK, Fraction(12), "a star", (batches.clip(1)[0],))
NOISE = np.zeros((1, 2, 4, 6, 4), np.float32)


def settings(**changes):
    config = run_config("kvlock", steps=2)
    config.sample.update(changes)
    return resolve_settings(config)


def network(value=0.0):
    """A network of one small parameter."""
    made = nnx.Module()
    made.bias = nnx.Param(jnp.full(3, value, jnp.float32))
    made.attend, made.tiles = network, 1
    return nnx.clone(made)


def a_model(value=0.0):
    parts = {name: network() for name in ("transformer", "vae")}
    configs = types.SimpleNamespace(networks=registry.NETWORKS)
    networks = types.SimpleNamespace(configs=configs, text_encoder=network(value), **parts)
    return types.SimpleNamespace(checkpoint=networks, mesh=None)


def begin(model="m", inputs=(INPUTS,), each=None, noise=NOISE, **rest):
    """Calls `run_batch`, which must end before it looks into the model."""
    each = each or [settings()] * len(inputs)
    return lambda: api.run_batch(model, inputs, each, noise, **rest)


def other(**changes):
    return {"inputs": [dataclasses.replace(INPUTS, **changes)]}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (other(source=batches.clip(2)), "src_video"),
        (other(mask=~MASK), "src_mask"),
        (other(prompt="a circle"), "prompt"),
        (other(references=()), "src_ref_images"),
        (other(source=batches.clip(0)[:4], mask=MASK[:4]), "src_video, src_mask"),
        ({"noise": NOISE + 1}, "the noise"),
        ({"each": [settings(seed=1)]}, "sample.seed"),
        ({"each": [settings(steps=3, shift=2.0)]}, "sample.steps, sample.shift"),
        ({"on_step": print}, "by_step"),
        ({"inputs": [INPUTS] * 2}, "src_video"),
        ({"model": "n"}, "the model"),
    ],
)
def test_hosts_of_different_inputs_do_not_begin(monkeypatch, change, named):
    monkeypatch.setattr(hosts, "digest_model", str)
    for error in fleet.run(monkeypatch, begin(), begin(**change)):
        assert isinstance(error, InputError), error
        assert f"different values of {named}" in str(error)


def test_of_several_edits_the_one_that_differs_is_named(monkeypatch):
    monkeypatch.setattr(hosts, "digest_model", str)
    pair = [INPUTS, dataclasses.replace(INPUTS, prompt="a circle")]
    for error in fleet.run(monkeypatch, begin(inputs=[INPUTS] * 2), begin(inputs=pair)):
        assert "different values of prompt of edit 2:" in str(error)


def test_equal_inputs_go_on(monkeypatch):
    monkeypatch.setattr(hosts, "digest_model", str)
    for error in fleet.run(monkeypatch, begin(), begin()):
        assert isinstance(error, AttributeError)  # of a model that is none


def test_models_are_told_apart_by_their_small_parameters():
    assert hosts.digest_model(a_model()) == hosts.digest_model(a_model())
    assert hosts.digest_model(a_model()) != hosts.digest_model(a_model(1.0))


def test_an_edit_that_one_host_cannot_read_fails_on_all(monkeypatch):
    def edit(clip):
        return lambda: api.edit("m", clip, MASK, "a star", config=run_config("kvlock"))

    monkeypatch.setattr(api, "run", lambda *_, **__: agreement.ask("further", ""))
    works = edit(INPUTS.source), edit(INPUTS.source.astype(float))
    first, second = fleet.run(monkeypatch, *works, grace=20)
    assert isinstance(second, InputError) and "a video must be uint8" in str(second)
    assert isinstance(first, HostError) and "host 1 failed: a video must be uint8" in str(first)
