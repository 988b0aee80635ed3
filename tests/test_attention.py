"""Attention and rotary positions against plain loops and complex numbers in float64."""

import cmath
import functools
import itertools
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kvlock_jax.models.attention.dispatch import attend, attend_part
from kvlock_jax.models.attention.kernels import logit_scale
from kvlock_jax.models.attention.rope import rope_axes, rope_table, rotate

GRID = (3, 4, 5)


def turns(grid, head_dim):
    """Every token's turns `L K/2` as complex numbers, from the positions of METHOD.md's tokens."""
    third = head_dim // 6
    pairs = (head_dim // 2 - 2 * third, third, third)  # of time, rows, columns
    rows = []
    for position in itertools.product(*map(range, grid)):  # frame-major
        row = []
        for place, count in zip(position, pairs, strict=True):
            for pair in range(count):
                row.append(cmath.exp(1j * place / 10_000 ** (pair / count)))
        rows.append(row)
    return np.array(rows)


def heads(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@pytest.mark.parametrize(
    "head_dim, axes",
    [
        (12, (4, 4, 4)),
        (16, (8, 4, 4)),
        (20, (8, 6, 6)),
        (22, (10, 6, 6)),
        (26, (10, 8, 8)),
        (128, (44, 42, 42)),  # the published models'
    ],
)
def test_rope_table(head_dim, axes):
    assert rope_axes(head_dim) == axes
    cos, sin = rope_table(GRID, head_dim)
    want = turns(GRID, head_dim)
    assert cos.dtype == sin.dtype == jnp.float32
    assert cos.shape == sin.shape == want.shape
    np.testing.assert_allclose(cos, want.real, rtol=0, atol=1e-7)
    np.testing.assert_allclose(sin, want.imag, rtol=0, atol=1e-7)


def test_rope_table_keeps_its_precision_far_out():
    cos, sin = rope_table((1000, 1, 1), 8)
    want = turns((1000, 1, 1), 8)
    np.testing.assert_allclose(cos, want.real, rtol=0, atol=1e-7)
    np.testing.assert_allclose(sin, want.imag, rtol=0, atol=1e-7)


def test_rotate_turns_neighbouring_pairs():
    x = heads(2, 60, 3, 22)
    got = rotate(x, rope_table(GRID, 22))
    wide = np.asarray(x, np.float64)
    want = (wide[..., 0::2] + 1j * wide[..., 1::2]) * turns(GRID, 22)[None, :, None]
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got[..., 0::2], want.real, rtol=0, atol=1e-6)
    np.testing.assert_allclose(got[..., 1::2], want.imag, rtol=0, atol=1e-6)
    norms = np.linalg.norm(wide, axis=-1)
    np.testing.assert_allclose(np.linalg.norm(got, axis=-1), norms, rtol=1e-6)


def test_logits_depend_on_offsets_only():
    # one query and one key, put at every token
    rope = rope_table(GRID, 20)
    q, k = (
        rotate(jnp.broadcast_to(heads(1, 1, 1, 20, seed=s), (1, 60, 1, 20)), rope) for s in (1, 2)
    )
    logits = np.einsum("LK,SK->LS", q[0, :, 0], k[0, :, 0])
    places = list(itertools.product(*map(range, GRID)))
    by_offset = {}
    for (i, a), (j, b) in itertools.product(enumerate(places), repeat=2):
        offset = tuple(np.subtract(a, b).tolist())
        by_offset.setdefault(offset, []).append(logits[i, j])
    for values in by_offset.values():
        np.testing.assert_allclose(values, values[0], rtol=0, atol=1e-5)
    means = [values[0] for values in by_offset.values()]
    assert np.unique(np.round(means, 4)).size > 0.9 * len(means)  # and offsets are told apart


def attend_loop(q, k, v):
    """Attention in Python floats, one query at a time."""
    out = np.zeros(q.shape)
    for b, i, n in np.ndindex(q.shape[:3]):
        logits = [math.fsum(q[b, i, n] * k[b, s, n]) for s in range(k.shape[1])]
        weights = [2.0 ** (logit - max(logits)) for logit in logits]
        for s, weight in enumerate(weights):
            out[b, i, n] += weight / math.fsum(weights) * v[b, s, n]
    return out


@pytest.mark.parametrize("tokens, keys, scale", [(4, 4, 1.0), (3, 7, 1.0), (5, 1, 1.0), (4, 6, 30)])
def test_attend(tokens, keys, scale):
    q = scale * logit_scale(6) * heads(2, tokens, 3, 6, seed=1)
    k, v = heads(2, keys, 3, 6, seed=2), heads(2, keys, 3, 6, seed=3)
    want = attend_loop(*(np.asarray(x, np.float64) for x in (q, k, v)))
    np.testing.assert_allclose(attend(q, k, v), want, rtol=0, atol=2e-6 * max(1, scale))


def test_attend_survives_large_logits():
    q = jnp.full((1, 1, 1, 4), 1e4)
    k = jnp.stack([jnp.full((1, 1, 4), 1e4), jnp.full((1, 1, 4), -1e4)], axis=1)
    v = jnp.stack([jnp.full((1, 1, 4), 2.0), jnp.full((1, 1, 4), 3.0)], axis=1)
    np.testing.assert_array_equal(attend(q, k, v), jnp.full((1, 1, 1, 4), 2.0))


def test_attend_in_bfloat16_sums_in_float32():
    q, k, v = (heads(2, 9, 2, 32, seed=s, dtype=jnp.bfloat16) for s in range(3))
    got = attend(q, k, v)
    assert got.dtype == jnp.float32
    want = attend_loop(*(np.asarray(x, np.float64) for x in (q, k, v)))
    # half a unit in the last place of the softmax's weights, no more
    np.testing.assert_allclose(got, want, rtol=0, atol=2**-9 * np.abs(np.asarray(v)).max())
    # 1000 equal keys: weights of 1/1000, whose sum bfloat16 would stall at 1/4
    ones = jnp.ones((1, 1000, 1, 4), jnp.bfloat16)
    sums = attend(jnp.zeros((1, 1, 1, 4), jnp.bfloat16), ones, ones)
    np.testing.assert_allclose(sums, 1.0, rtol=2**-8)


def test_attend_under_vmap_equals_rows():
    q, k, v = (heads(3, 4, 2, 6, seed=s) for s in range(3))
    rows = jax.vmap(lambda *x: attend(*(a[None] for a in x))[0])(q, k, v)
    np.testing.assert_allclose(attend(q, k, v), rows, rtol=1e-6, atol=1e-6)


# -- the kernel is chosen when the program is lowered ---------------------------------------------


def weights(q, k, keys=None):
    """Of the softmax, `B L N S` in float64."""
    q, k = (np.asarray(x, np.float64) for x in (q, k[:, :keys]))
    logits = np.einsum("blnk,bsnk->blns", q, k)
    exps = 2.0 ** (logits - logits.max(-1, keepdims=True))
    return exps / exps.sum(-1, keepdims=True)


def softmax(q, k, v, keys=None):
    return np.einsum("blns,bsnk->blnk", weights(q, k, keys), np.asarray(v[:, :keys], np.float64))


def qkv(length=20, present=30, keys=None):
    q, k, v = (heads(2, n, 3, 16, seed=s) for s, n in enumerate((length, present, present)))
    real = jnp.arange(present)[:, None, None] < (present if keys is None else keys)
    return q * logit_scale(16), k, jnp.where(real, v, 1e4)


def in_scan(q, k, v, keys):
    _, out = jax.lax.scan(lambda carry, x: (carry, attend(x, k, v, keys)), 0, q[None])
    return out[0]


def in_cond(q, k, v, keys):
    return jax.lax.cond(q[0, 0, 0, 0] < jnp.inf, lambda: attend(q, k, v, keys), lambda: 0 * q)


def in_map(q, k, v, keys):
    return jax.vmap(lambda q, k, v: attend(q[None], k[None], v[None], keys)[0])(q, k, v)


FORMS = {"eager": attend, "jit": jax.jit(attend, static_argnums=3)} | {
    f.__name__: jax.jit(f, static_argnums=3) for f in (in_scan, in_cond, in_map)
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("keys", [None, 25])
def test_attend_wherever_it_is_called(form, keys):
    q, k, v = qkv(keys=keys)
    found = FORMS[form](q, k, v, keys)
    np.testing.assert_allclose(found, softmax(q, k, v, keys), rtol=0, atol=1e-5)


def test_keys_may_be_traced():
    q, k, v = qkv(keys=11)
    run = jax.jit(lambda *arrays: attend(*arrays))
    for keys in (11, 7):
        want = softmax(q, k, v, keys)
        np.testing.assert_allclose(run(q, k, v, jnp.int32(keys)), want, rtol=0, atol=1e-5)
    assert run._cache_size() == 1


KERNEL = "tpu_custom_call"


@pytest.mark.parametrize("function", [attend, in_scan, in_cond, in_map])
def test_each_backend_gets_its_own(function):
    q = jax.ShapeDtypeStruct((2, 256, 3, 128), jnp.bfloat16)
    if function is in_cond:
        q = jax.ShapeDtypeStruct(q.shape, jnp.float32)
    run = jax.jit(functools.partial(function, keys=200))
    on_tpu = export.export(run, platforms=["tpu"])(q, q, q).mlir_module()
    on_cpu = export.export(run, platforms=["cpu"])(q, q, q).mlir_module()
    assert KERNEL in on_tpu and KERNEL not in on_cpu
    assert "256x256x" not in on_tpu  # no logits there


def gradient(q, k, v, out, keys):
    """Of `sum(out * attention)` in float64, by the chain rule written out."""
    p = weights(q, k, keys)
    q, k, v, out = (np.asarray(x, np.float64) for x in (q, k[:, :keys], v[:, :keys], out))
    dp = np.einsum("blnk,bsnk->blns", out, v)
    ds = p * (dp - (dp * p).sum(-1, keepdims=True)) * np.log(2)
    dq, dk = np.einsum("blns,bsnk->blnk", ds, k), np.einsum("blns,blnk->bsnk", ds, q)
    return dq, dk, np.einsum("blns,blnk->bsnk", p, out)


@pytest.mark.parametrize("keys, traced", [(None, False), (25, False), (25, True)])
def test_gradients(keys, traced):
    q, k, v = qkv(keys=keys)
    out = heads(*q.shape, seed=9)

    def loss(q, k, v, keys):
        return jnp.sum(out * attend(q, k, v, keys))

    count = jnp.int32(keys) if traced else keys
    static = () if traced else (3,)
    found = jax.jit(jax.grad(loss, (0, 1, 2)), static_argnums=static)(q, k, v, count)
    for grad, want in zip(found, gradient(q, k, v, out, keys), strict=True):
        real = grad[:, : want.shape[1]]
        np.testing.assert_allclose(real, want, rtol=0, atol=1e-5 * np.abs(want).max())
        np.testing.assert_array_equal(grad[:, want.shape[1] :], 0.0)


def test_gradient_of_the_top():
    q, k, v = qkv()
    found = jax.jit(jax.grad(lambda k: attend_part(q, k, v)[1].sum()))(k)
    want = np.einsum("blns,blnk->bsnk", weights(q, k), np.asarray(q, np.float64))
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2)])
@pytest.mark.parametrize("rows, length", [(2, 24), (3, 25)])
def test_attend_in_a_mesh(shape, rows, length):
    """Queries are shared out where they divide, and the result is the same where they do not."""
    q, k, v = (heads(rows, n, 3, 16, seed=s) for s, n in enumerate((length, 30, 30)))
    mesh = jax.make_mesh(shape, ("data", "frames", "model"), axis_types=(AxisType.Auto,) * 3)
    with jax.set_mesh(mesh):
        found = jax.jit(attend)(q, k, v)
    np.testing.assert_allclose(found, softmax(q, k, v), rtol=0, atol=1e-5)
    if length == 24:
        spec = PartitionSpec("data" if rows == 2 else None, ("frames", "model"))
        assert found.sharding.is_equivalent_to(NamedSharding(mesh, spec), 4)


TPU = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from kvlock_jax.models.attention.dispatch import attend
from kvlock_jax.models.attention.sharded import gathered, ring

def report(name, f, shapes, mesh, spec, dtype):
    place, heads = NamedSharding(mesh, spec), shapes[0][2]
    def wide(*arrays):  # heads side by side, as linear layers write them
        out = f(*(x.reshape(*x.shape[:2], heads, -1) for x in arrays))
        return out.reshape(*out.shape[:2], -1)
    flat = ((*s[:2], s[2] * s[3]) for s in shapes)
    arrays = (jax.ShapeDtypeStruct(s, dtype, sharding=place) for s in flat)
    compiled = jax.jit(wide).lower(*arrays).compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    found = [text.count(f" {kind}(") for kind in ("all-gather", "collective-permute-start")]
    print("FOUND", name, dtype, memory.temp_size_in_bytes, "tpu_custom_call" in text, *found)

devices = np.array(topologies.get_topology_desc(sys.argv[1], platform="tpu").devices)
axes = dict(axis_names=("data", "frames", "model"), axis_types=(AxisType.Auto,) * 3)
one, eight = (Mesh(devices[:n].reshape(1, n, 1), **axes) for n in (1, 8))
q, k = (2, 4096, 12, 128), (2, 32768, 12, 128)
for dtype in ("bfloat16", "float32"):
    run = lambda q, k, v: attend(q, k, v, 32760)
    report("attend", run, (q, k, k), one, PartitionSpec(), dtype)
wide = [(1, 2048, 1, 192)] * 3
report("wide", attend, wide, one, PartitionSpec(), "float32")
cells = [(1, 6240, 1, 384)] * 3
with jax.set_mesh(eight):
    for f in (gathered, ring):
        run = lambda q, k, v: f(q, k, v, 32760)
        spec = PartitionSpec("data", "frames", "model")
        report(f.__name__, run, (k, k, k), eight, spec, "bfloat16")
    report("cells", attend, cells, eight, PartitionSpec(), "float32")
"""


@pytest.mark.parametrize("chip", [pytest.param("v5e", marks=pytest.mark.nightly), "v6e"])
def test_the_tpu_compiler_takes_them(chip):
    """At the size of 81 frames of 480x832 for 1.3B, whose logits would be 6 GB a device."""
    pytest.importorskip("libtpu", reason="libtpu, the TPU's compiler, is not installed")
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # of a CPU
    env |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    command = [sys.executable, "-c", TPU, f"{chip}:2x4"]
    ran = subprocess.run(command, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found = [line.split()[1:] for line in ran.stdout.splitlines() if line.startswith("FOUND")]
    assert len(found) == 6
    keys = 2 * 32_768 * 12 * 128 * 2  # bytes of either keys or values
    for name, _, temporaries, custom, gathers, permutes in found:
        assert custom == "True", name
        limit = {"gathered": 3.1 * keys, "ring": 2 * keys}.get(name, keys / 8)
        assert int(temporaries) < limit, (name, temporaries)
        assert (int(gathers), int(permutes)) == {"gathered": (2, 0), "ring": (0, 4)}.get(
            name, (0, 0)
        )
