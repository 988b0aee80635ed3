"""Attention over a mesh against the plain softmax in NumPy, float64, and its traffic."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kvlock_jax.errors import ConfigError
from kvlock_jax.models.attention.kernels import logit_scale
from kvlock_jax.models.attention.sharded import gathered, replicated_keys, ring

MESHES = [(1, 8, 1), (2, 4, 1), (2, 2, 2), (1, 4, 2), (8, 1, 1)]
BLNK = PartitionSpec("data", "frames", "model")
BSNK = PartitionSpec("data", None, "model")
SHAPE = (8, 48, 4, 16)


def make_mesh(*shape):
    names = ("data", "frames", "model")
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * 3)


def softmax(q, k, v, keys=None):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k[:, :keys], v[:, :keys]))
    logits = np.einsum("blnk,bsnk->blns", q, k)
    weights = 2.0 ** (logits - logits.max(-1, keepdims=True))
    return np.einsum("blns,bsnk->blnk", weights / weights.sum(-1, keepdims=True), v)


def qkv(keys=None, present=None):
    rng = np.random.default_rng(0)
    batch, length, heads, size = SHAPE
    present = present or length
    q, k, v = (rng.normal(size=(batch, n, heads, size)) for n in (length, present, present))
    q *= logit_scale(size)
    if keys is not None:
        k[:, keys:] *= 10
        v[:, keys:] = 1e4
    return [jnp.asarray(x, jnp.float32) for x in (q, k, v)]


def compiled(function, mesh, arrays, *specs):
    """The function compiled for arrays that lie as the specs say, and its answer to them."""
    placed = [
        jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)
    ]
    with jax.set_mesh(mesh):
        run = jax.jit(function).lower(*placed).compile()
        return run, run(*placed)


def sent(run):
    """Sizes of what each collective of a program gives a device, by kind."""
    found = {}
    kinds = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute|broadcast"
    for shapes, kind in re.findall(rf"= (.*) ((?:{kinds})(?:-start)?)\(", run.as_text()):
        if kind != "broadcast":
            sizes = [
                int(np.prod([int(n) for n in s.split(",")]))
                for s in re.findall(r"f32\[([0-9,]+)\]", shapes)
            ]
            found.setdefault(kind, []).extend(sizes)
    return found


@pytest.mark.parametrize("function", [gathered, ring])
@pytest.mark.parametrize(
    "shape, keys",
    [*((shape, 41) for shape in MESHES), ((1, 8, 1), None), ((1, 8, 1), 7), ((2, 2, 2), 7)],
)
def test_equals_one_device(shape, function, keys):
    """41 of 48 leave a part of a block as padding, 7 leave whole blocks."""
    arrays = qkv(keys)
    mesh = make_mesh(*shape)
    run, found = compiled(lambda *x: function(*x, keys), mesh, arrays, BLNK, BLNK, BLNK)
    np.testing.assert_allclose(found, softmax(*arrays, keys), rtol=0, atol=1e-5)
    assert found.dtype == jnp.float32
    assert found.sharding.is_equivalent_to(NamedSharding(mesh, BLNK), 4)

    data, frames, model = shape
    rows = np.prod(SHAPE) // data // model
    if frames == 1:
        assert sent(run) == {}
    elif function is gathered:  # keys and values, whole along frames
        assert sent(run) == {"all-gather": [rows, rows]}
    else:  # a block of keys and one of values: before the loop of turns, and in its body
        turns = 1 if frames == 2 else 2
        assert sent(run) == {"collective-permute": [rows // frames] * 2 * turns}


@pytest.mark.parametrize("function", [gathered, ring])
def test_keys_may_be_traced(function):
    for keys in (7, 41):
        arrays = [*qkv(keys), jnp.int32(keys)]
        mesh = make_mesh(2, 2, 2)
        _, found = compiled(function, mesh, arrays, BLNK, BLNK, BLNK, PartitionSpec())
        np.testing.assert_allclose(found, softmax(*arrays[:3], keys), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", MESHES)
def test_replicated_keys(shape):
    arrays = qkv(present=10)
    mesh = make_mesh(*shape)
    run, found = compiled(replicated_keys, mesh, arrays, BLNK, BSNK, BSNK)
    np.testing.assert_allclose(found, softmax(*arrays), rtol=0, atol=1e-5)
    assert sent(run) == {}
    assert found.sharding.is_equivalent_to(NamedSharding(mesh, BLNK), 4)


@pytest.mark.parametrize("function", [gathered, ring])
def test_without_a_mesh(function):
    arrays = qkv(41)
    found = jax.jit(lambda *x: function(*x, 41))(*arrays)
    np.testing.assert_allclose(found, softmax(*arrays, 41), rtol=0, atol=1e-5)


@pytest.mark.parametrize("keys", [None, 7])
def test_gradients_of_a_ring(keys):
    arrays, mesh = qkv(keys), make_mesh(1, 4, 2)

    def grads(function):
        return jax.grad(lambda *x: jnp.sum(jnp.sin(function(*x, keys))), (0, 1, 2))

    _, found = compiled(grads(ring), mesh, arrays, BLNK, BLNK, BLNK)
    want = jax.jit(grads(ring))(*arrays)  # on one device
    for got, right in zip(found, want, strict=True):
        np.testing.assert_allclose(got, right, rtol=0, atol=1e-5 * np.abs(right).max())


@pytest.mark.parametrize("function", [gathered, ring, replicated_keys])
@pytest.mark.parametrize(
    "mesh, shape, message",
    [
        (
            (1, 1, 8),
            (1, 8, 12, 4),
            "12 heads do not divide over 8 devices of mesh axis 'model'; "
            "these numbers divide: 1, 2, 3, 4, 6, 12",
        ),
        ((2, 4, 1), (3, 8, 12, 4), "3 edits do not divide over 2 devices of mesh axis 'data'"),
        ((1, 8, 1), (1, 12, 3, 4), "12 tokens do not divide over 8 devices of mesh axis 'frames'"),
    ],
)
def test_what_does_not_divide_is_refused(function, mesh, shape, message):
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    with jax.set_mesh(make_mesh(*mesh)), pytest.raises(ConfigError, match=re.escape(message)):
        jax.eval_shape(function, x, x, x)
