"""What stays float32 when the compute dtype is bfloat16 (DESIGN.md section 3), read off programs.

In a transformer's pass, and in a whole sampling loop, bfloat16 numbers may be multiplied as
matrices and moved about, nothing else; the text encoder may do more, but no norm and no softmax;
the VAE has none. Each test is shown to fail once the island is taken away.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from islands import (
    FUNCTIONS,
    GRID,
    LAYERS,
    LOW,
    OF_THE_LOOP,
    T2V,
    VACE,
    WIDE,
    attend,
    context_of,
    lower,
    patches,
    transformer,
)

from kvlock_jax import lock
from kvlock_jax.checkpoints import registry
from kvlock_jax.models.text.config import UMT5Config
from kvlock_jax.models.text.umt5 import UMT5Encoder
from kvlock_jax.models.vae.autoencoder import WanVAE
from kvlock_jax.models.vae.config import VAEConfig
from kvlock_jax.models.wan import block as wan_block
from kvlock_jax.sampling import solvers
from kvlock_jax.sampling.edits import Edits
from kvlock_jax.sampling.loop import Program, sample
from kvlock_jax.settings.schema import LockConfig

MOVES = set(
    "broadcast_in_dim concatenate copy dynamic_slice dynamic_update_slice expand_dims gather "
    "optimization_barrier pad reshape rev select_n slice split squeeze transpose".split()
)
ISLANDS = set("cos div exp log reduce_max reduce_sum rsqrt sin sqrt".split())


@pytest.fixture(autouse=True)
def plain_attention(monkeypatch):
    """Of texts; tokens have it from `transformer`."""
    monkeypatch.setattr(wan_block, "replicated_keys", attend)


# -- reading the program -------------------------------------------------------------------------


def equations(jaxpr) -> Iterator:
    """All equations of a program and of its loops and branches; of those, only scans themselves."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    for equation in jaxpr.eqns:
        inner = [
            part
            for value in equation.params.values()
            for part in (value if isinstance(value, (tuple, list)) else (value,))
            if hasattr(getattr(part, "jaxpr", part), "eqns")
        ]
        if equation.primitive.name == "scan":
            yield equation
        for part in inner:
            yield from equations(part)
        if not inner:
            yield equation


def dtypes(variables) -> set:
    return {v.aval.dtype for v in variables if hasattr(v.aval, "dtype")}


def touches(equation, dtype) -> bool:
    return dtype in dtypes(equation.invars) | dtypes(equation.outvars)


def count(jaxpr) -> Counter:
    return Counter(equation.primitive.name for equation in equations(jaxpr))


def breaches(jaxpr) -> list[str]:
    """Arithmetic on bfloat16 numbers other than products of matrices summed in float32."""
    found = []
    for equation in equations(jaxpr):
        name = equation.primitive.name
        if name == "scan" or not touches(equation, LOW):
            continue
        if name == "dot_general":
            if dtypes(equation.outvars) != {WIDE}:
                found.append("dot_general summed in bfloat16")
        elif name == "convert_element_type":
            if dtypes(equation.invars) == {LOW}:  # what was rounded is taken for float32
                found.append("rounded")
        elif name not in MOVES:
            found.append(name)
    return found


def lost_islands(jaxpr) -> list[str]:
    """What norms, softmax and embeddings are made of, on bfloat16 numbers."""
    all_of_it = equations(jaxpr)
    return [e.primitive.name for e in all_of_it if e.primitive.name in ISLANDS and touches(e, LOW)]


def carried(jaxpr) -> set:
    """Dtypes of the floats that loops carry, such as a residual stream."""
    found = set()
    for equation in equations(jaxpr):
        if equation.primitive.name == "scan":
            first = equation.params["num_consts"]
            found |= dtypes(equation.invars[first : first + equation.params["num_carry"]])
    return {dtype for dtype in found if jnp.issubdtype(dtype, jnp.floating)}


def abstract(config=T2V):
    """Without numbers, which programs do not need and which take seconds to draw."""
    return nnx.eval_shape(lambda: transformer(config))


def one_pass(model, locked=False):
    """The program of a pass, with a lock or without; it gives keys and values too."""
    rng = np.random.default_rng(0)

    def run(model, z, context):
        conditioning = model.condition(context, GRID)
        t = jnp.full((1,), 500.0)
        velocity, cache = model.keys_values(z, t, conditioning)
        if locked:
            held = lock.Lock(cache, jnp.zeros((1, 12), bool), jnp.full((1,), 0.5))
            velocity, cache = model.keys_values(z, t, conditioning, held)
        assert (velocity.dtype, cache.k.dtype, cache.v.dtype) == (WIDE, LOW, LOW)
        return velocity, cache

    return jax.make_jaxpr(run)(model, patches(rng), context_of(model.config, 1, rng))


def loop(model, guidance="cfg"):
    """The program of a whole sampling run, with lock, schedules and pinned background."""
    rng = np.random.default_rng(0)
    z = patches(rng)
    settings = LockConfig(background="source", guidance=guidance, rescale_uncond=guidance == "cfg")
    prompts, source = (context_of(model.config, rows, rng) for rows in (2, 1))
    edits = Edits(z, z, jnp.ones(z.shape[:3], bool), prompts, source, GRID)
    args = (model, z, edits, solvers.table("unipc", 4, 3.0), lock.knobs(settings, 5.0))
    return sample.trace(*args, program=Program.of(dataclasses.replace(settings, window=3))).jaxpr


@pytest.mark.parametrize("config", [T2V, VACE], ids=["t2v", "vace"])
def test_a_pass_only_multiplies_and_moves_bfloat16(config):
    jaxpr = one_pass(abstract(config))
    assert breaches(jaxpr) == []
    names = count(jaxpr)
    assert {
        "exp",
        "rsqrt",
        "sin",
        "cos",
        "tanh",
    } <= names.keys()  # the islands are there to be seen
    low = [e for e in equations(jaxpr) if e.primitive.name == "dot_general" and touches(e, LOW)]
    assert len(low) > 10


@pytest.mark.parametrize("config", [T2V, VACE], ids=["t2v", "vace"])
def test_a_lock_widens_only_what_it_mixes(config):
    # keys and values, of the edit and of the cache
    assert breaches(one_pass(abstract(config), locked=True)) == ["rounded"] * 4


@pytest.mark.parametrize("config, guidance", [(T2V, "cfg"), (VACE, "apg")], ids=["t2v", "vace"])
def test_the_loop_only_multiplies_and_moves_bfloat16(config, guidance):
    assert breaches(loop(abstract(config), guidance)) == ["rounded"] * 4


# -- the same, without an island -----------------------------------------------------------------


@pytest.mark.parametrize("path", LAYERS)
def test_a_layer_of_another_dtype_is_seen(path):
    model = abstract()
    lower(model, path)
    with jax.numpy_dtype_promotion("standard"):  # strict promotion alone would see it
        assert breaches(one_pass(model)) != []


@pytest.mark.parametrize("island", FUNCTIONS)
def test_a_lost_island_of_a_pass_is_seen(island, monkeypatch):
    monkeypatch.setattr(*FUNCTIONS[island])
    assert breaches(one_pass(abstract())) != []


@pytest.mark.parametrize("island", OF_THE_LOOP)
def test_a_lost_island_of_the_loop_is_seen(island, monkeypatch):
    monkeypatch.setattr(*OF_THE_LOOP[island])
    sample.clear_cache()  # of traces, which know nothing of the replacement
    assert sorted(breaches(loop(abstract()))) != ["rounded"] * 4
    sample.clear_cache()


# -- encoders ------------------------------------------------------------------------------------


def of_text():
    """The program of the text encoder."""
    config = UMT5Config(vocab_size=16, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=2)
    model = nnx.eval_shape(lambda: UMT5Encoder(config, dtype=LOW, rngs=nnx.Rngs(0)))
    ids = jnp.ones((1, 5), jnp.int32)
    return jax.make_jaxpr(lambda model: model(ids, ids))(model)


def test_text_encoder_keeps_its_islands():
    jaxpr = of_text()
    assert lost_islands(jaxpr) == [] and carried(jaxpr) == {WIDE}
    assert {"exp", "rsqrt"} <= count(jaxpr).keys()


def test_a_lost_norm_of_the_text_encoder_is_seen(monkeypatch):
    def low_rms(norm, x):
        square = jnp.square(x.astype(LOW)).mean(axis=-1, keepdims=True)
        return (x.astype(LOW) * jax.lax.rsqrt(square)).astype(WIDE)

    monkeypatch.setattr(nnx.RMSNorm, "__call__", low_rms)
    assert "rsqrt" in lost_islands(of_text())


def test_a_lost_softmax_of_the_text_encoder_is_seen(monkeypatch):
    softmax = jax.nn.softmax
    monkeypatch.setattr(jax.nn, "softmax", lambda x, axis: softmax(x.astype(LOW), axis))
    assert "exp" in lost_islands(of_text())


def test_the_vae_is_all_float32():
    """One frame there and back, of the module that a checkpoint gets under bfloat16."""
    config = VAEConfig(4, 4, num_res_blocks=1, latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4)
    frame = jnp.zeros((1, 1, 16, 16, 3))

    def touching(model):
        program = jax.make_jaxpr(lambda m: m.decode(m.encode(frame)))(model)
        return any(touches(equation, LOW) for equation in equations(program))

    assert not touching(registry.abstract(config, LOW))
    assert touching(nnx.eval_shape(lambda: WanVAE(config, dtype=LOW, rngs=nnx.Rngs(0))))
