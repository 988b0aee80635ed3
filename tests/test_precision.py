"""What stays float32 when the compute dtype is bfloat16 (DESIGN.md section 3), and that it matters.

Two kinds of tests. The first read the program: in a transformer's pass, and in a whole sampling
loop, bfloat16 numbers may be multiplied as matrices and moved about, nothing else; VAE and text
encoder may do more, but no norm and no softmax. The others compute, where bfloat16 would lose the
result. Of both, each is shown to fail once the island is taken away.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvlock_jax import lock
from kvlock_jax.config import LockConfig, UMT5Config, VAEConfig, WanConfig
from kvlock_jax.models import attention, linear, vae, wan
from kvlock_jax.models.umt5 import UMT5Encoder
from kvlock_jax.models.vace import VACEContext, wan_transformer
from kvlock_jax.models.vae import WanVAE
from kvlock_jax.sampling import sampler, solvers
from kvlock_jax.sampling.sampler import Edits, Program

LOW, WIDE = jnp.dtype("bfloat16"), jnp.dtype("float32")
GRID = (2, 2, 3)
SHAPE = (2, 4, 6)  # latent cells of GRID
T2V = WanConfig(
    num_attention_heads=2,
    attention_head_dim=12,
    num_layers=2,
    ffn_dim=20,
    in_channels=4,
    out_channels=4,
    text_dim=16,
    freq_dim=8,
)
VACE = dataclasses.replace(T2V, vace_layers=(0,), vace_in_channels=8)
MOVES = set(
    "broadcast_in_dim concatenate copy dynamic_slice dynamic_update_slice expand_dims gather pad "
    "reshape rev select_n slice split squeeze transpose".split()
)
ISLANDS = set("cos div exp log reduce_max reduce_sum rsqrt sin sqrt".split())


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


def transformer(config=T2V, dtype=LOW):
    return wan_transformer(config, dtype=dtype, rngs=nnx.Rngs(0))


def abstract(config=T2V):
    """Without numbers, which programs do not need and which take seconds to draw."""
    return nnx.eval_shape(lambda: transformer(config))


def context_of(config, rows, rng):
    text = jnp.asarray(rng.standard_normal((rows, 3, config.text_dim)), jnp.float32)
    if not config.vace_layers:
        return text
    control = rng.standard_normal((rows, *SHAPE, config.vace_in_channels))
    return VACEContext(text, jnp.asarray(control, jnp.float32), jnp.ones((rows,)))


def one_pass(model, locked=False):
    """The program of a pass, with a lock or without; it gives keys and values too."""
    rng = np.random.default_rng(0)
    z = jnp.asarray(rng.standard_normal((1, *SHAPE, 4)), jnp.float32)

    def run(model, z, context):
        conditioning = model.condition(context, GRID)
        t = jnp.full((1,), 500.0)
        velocity, cache = model.keys_values(z, t, conditioning)
        if locked:
            held = lock.Lock(cache, jnp.zeros((1, 12), bool), jnp.full((1,), 0.5))
            velocity, cache = model.keys_values(z, t, conditioning, held)
        assert (velocity.dtype, cache.k.dtype, cache.v.dtype) == (WIDE, LOW, LOW)
        return velocity, cache

    return jax.make_jaxpr(run)(model, z, context_of(model.config, 1, rng))


def loop(model, guidance="cfg"):
    """The program of a whole sampling run, with lock, schedules and pinned background."""
    rng = np.random.default_rng(0)
    z = jnp.asarray(rng.standard_normal((1, *SHAPE, 4)), jnp.float32)
    settings = LockConfig(background="source", guidance=guidance, rescale_uncond=guidance == "cfg")
    edits = Edits(
        source=z,
        noise=z,
        foreground=jnp.ones((1, *SHAPE), bool),
        prompts=context_of(model.config, 2, rng),
        source_prompts=context_of(model.config, 1, rng),
    )
    args = (model, z, edits, solvers.table("unipc", 4, 3.0), lock.knobs(settings, 5.0))
    return sampler.sample.trace(*args, program=Program(True, guidance, 3)).jaxpr


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


def rounding(function):
    """`function` with its result rounded, which its dtype does not show."""

    def rounded(*args, **kwargs):
        out = function(*args, **kwargs)
        return jax.tree.map(lambda x: x.astype(LOW).astype(x.dtype), out)

    return rounded


def low_attend(q, k, v):
    logits = jnp.einsum("BLNK,BSNK->BNLS", q, k, preferred_element_type=WIDE)
    weights = jax.nn.softmax((logits * q.shape[-1] ** -0.5).astype(LOW), axis=-1)
    return jnp.einsum("BNLS,BSNK->BLNK", weights, v, preferred_element_type=WIDE)


def low_sums(x, kernel):
    return jnp.matmul(x, kernel).astype(WIDE)


def low_fuse(new, cached, foreground, fusion_ratio):
    weight = jnp.where(foreground, 0.0, fusion_ratio[:, None])[:, :, None, None].astype(LOW)
    return new + weight * (cached - new)


def low_push(window, x0, push=lock.push):
    return push(window, x0.astype(LOW))


def low_step(row, state, latents, x0, step=solvers.step):
    return step(row, state, latents, x0.astype(LOW))


def low_norm(norm, x):
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(square) * norm.gamma[...].astype(x.dtype)


def lower(model, path):
    """Gives a layer the dtype that an argument forgotten in its constructor would."""
    *parents, name = path.split(".")
    for parent in parents:
        model = model[int(parent)] if parent.isdecimal() else getattr(model, parent)
    getattr(model, name).dtype = LOW


LAYERS = (
    "blocks.norm1 blocks.norm2 blocks.norm3 norm_out blocks.attn1.norm_q blocks.attn1.norm_k "
    "blocks.attn2.norm_q blocks.attn2.norm_k"
).split()
FUNCTIONS = {
    "softmax": (wan, "attend", low_attend),
    "rotary positions": (wan, "rotate", rounding(attention.rotate)),
    "sums of products": (linear, "_matmul", low_sums),
    "residual stream": (wan.Block, "__call__", rounding(wan.Block.__call__)),
    "what is added to it": (wan.FeedForward, "__call__", rounding(wan.FeedForward.__call__)),
}
OF_THE_LOOP = {
    "mixing of keys": (wan, "fuse", low_fuse),
    "variance": (lock, "push", low_push),
    "solver": (solvers, "step", low_step),
    "guidance": (lock, "guide", rounding(lock.guide)),
    "factor of the unconditional": (lock, "projection_scale", rounding(lock.projection_scale)),
}


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
    sampler.sample.clear_cache()  # of traces, which know nothing of the replacement
    assert sorted(breaches(loop(abstract()))) != ["rounded"] * 4
    sampler.sample.clear_cache()


# -- encoders ------------------------------------------------------------------------------------


def of_text():
    """The program of the text encoder."""
    config = UMT5Config(vocab_size=16, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=2)
    model = nnx.eval_shape(lambda: UMT5Encoder(config, dtype=LOW, rngs=nnx.Rngs(0)))
    ids = jnp.ones((1, 5), jnp.int32)
    return jax.make_jaxpr(lambda model: model(ids, ids))(model)


def of_video():
    """The program of the VAE for one frame, there and back."""
    config = VAEConfig(4, 4, num_res_blocks=1, latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4)
    model = nnx.eval_shape(lambda: WanVAE(config, dtype=LOW, rngs=nnx.Rngs(0)))
    return jax.make_jaxpr(lambda m: m.decode(m.encode(jnp.zeros((1, 1, 16, 16, 3)))))(model)


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


def test_vae_keeps_its_islands(monkeypatch):
    jaxpr = of_video()
    assert lost_islands(jaxpr) == [] and {"exp", "rsqrt"} <= count(jaxpr).keys()
    monkeypatch.setattr(vae, "attend", low_attend)
    monkeypatch.setattr(vae.RMSNorm, "__call__", low_norm)
    assert {"exp", "rsqrt"} <= set(lost_islands(of_video()))


# -- where bfloat16 loses the result -------------------------------------------------------------

RNG = np.random.default_rng(1)


def error(found, expected) -> float:
    """Relative L2."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def modulation(model, timestep):
    return np.asarray(model.condition_embedder.time(jnp.array([timestep]))[1])


@pytest.mark.parametrize("layer", ["time_embedder.linear_1", "time_embedder.linear_2", "time_proj"])
def test_modulation_is_that_of_float32(layer):
    """To the bit: 998 and 999, both 1000 in bfloat16, stay apart."""
    low, wide = transformer(), transformer(dtype=WIDE)
    for t in (998.0, 999.0):
        np.testing.assert_array_equal(modulation(low, t), modulation(wide, t))
    assert error(modulation(low, 998.0), modulation(low, 999.0)) > 1e-3
    lower(low, f"condition_embedder.{layer}")
    assert not np.array_equal(modulation(low, 999.0), modulation(wide, 999.0))


def velocity(model):
    """Of a model whose residual stream lies about 1000, where bfloat16 counts by fours."""
    rng = np.random.default_rng(2)
    z = jnp.asarray(rng.standard_normal((1, *SHAPE, 4)), jnp.float32)
    model.patch_embedding.bias[...] = jnp.full((model.config.dim,), 1000.0)
    context = context_of(model.config, 1, rng)
    run = jax.jit(lambda m, z: m(z, jnp.full((1,), 500.0), m.condition(context, GRID)))
    return run(model, z)


def test_a_large_residual_stream_keeps_what_is_small(monkeypatch):
    expected, kept = velocity(transformer(dtype=WIDE)), velocity(transformer())
    norm = nnx.LayerNorm.__call__
    with monkeypatch.context() as patch:
        patch.setattr(nnx.LayerNorm, "__call__", lambda n, x: norm(n, x.astype(LOW).astype(WIDE)))
        norms = velocity(transformer())
    monkeypatch.setattr(*FUNCTIONS["residual stream"])
    stream = velocity(transformer())
    errors = [error(found, expected) for found in (kept, norms, stream)]
    assert errors[0] < 0.02 and min(errors[1:]) > 0.2, errors


def test_softmax_of_large_logits():
    """About 480, where bfloat16 counts by twos: half a unit from key to key decides."""
    keys = np.full((1, 8, 1, 64), 7.5)
    keys[0, :, 0, :16] += np.arange(8)[:, None] / 32
    q, k = jnp.full((1, 1, 1, 64), 8.0, LOW), jnp.asarray(keys, LOW)
    v = jnp.asarray(RNG.standard_normal((1, 8, 1, 64)), LOW)
    weights = np.exp(0.5 * np.arange(8))
    expected = weights / weights.sum() @ np.asarray(v, np.float64)[0, :, 0]
    assert error(attention.attend(q, k, v)[0, 0, 0], expected) < 5e-3
    assert error(low_attend(q, k, v)[0, 0, 0], expected) > 0.05


def test_rotary_positions_far_out():
    """Of 1024 frames, against complex numbers in float64; with rounded tables 100 times off."""
    size = 12
    pairs = size - 2 * (2 * (size // 6))
    rope = attention.rope_table((1024, 1, 1), size)
    x = jnp.asarray(RNG.standard_normal((1, 1024, 1, size)), WIDE)
    turned = np.asarray(attention.rotate(x, rope), np.float64)[0, :, 0, :pairs]
    place = np.arange(1024)[:, None] * 10_000.0 ** (-np.arange(0, pairs, 2) / pairs)
    whole = np.asarray(x, np.float64)[0, :, 0, :pairs]
    expected = (whole[:, ::2] + 1j * whole[:, 1::2]) * np.exp(1j * place)
    assert error(turned[:, ::2], expected.real) < 1e-6
    low = attention.rotate(x, tuple(t.astype(LOW).astype(WIDE) for t in rope))
    assert error(np.asarray(low)[0, :, 0, :pairs:2], expected.real) > 1e-4


def test_variance_of_estimates_that_hardly_waver():
    """Deviations of 0.01 about 8, where bfloat16 counts by 1/32."""
    estimates = (8 + 0.01 * RNG.standard_normal((5, 1, 2, 4, 6, 4))).astype(np.float32)
    expected = estimates.astype(np.float64).var(axis=0, ddof=1).mean()
    everywhere = jnp.ones((1, 2, 4, 6), bool)

    def statistic(push):
        window = lock.X0Window.zeros(5, (1, 2, 4, 6, 4))
        for x0 in estimates:
            window = push(window, jnp.asarray(x0))
        return float(lock.hallucination(window, everywhere)[0])

    assert statistic(lock.push) == pytest.approx(expected, rel=1e-4)
    assert statistic(low_push) != pytest.approx(expected, rel=0.2)


def test_small_steps_are_not_lost():
    """The first of 50 at shift 16 are 1e-3 long, a quarter of bfloat16's unit below 1."""
    table = solvers.euler(50, 16.0)
    noise, clean = RNG.standard_normal((2, 1, 2, 4, 6, 4)).astype(np.float32)

    def low(row, state, latents, x0):
        a, b = row.predictor[:2].astype(LOW)
        return (a * latents.astype(LOW) + b * x0.astype(LOW)).astype(WIDE), state

    def run(step):
        z = jnp.asarray(noise)
        state = solvers.init(z)
        for k in range(10):
            row = jax.tree.map(lambda column, k=k: jnp.asarray(column[k]), table)
            z, state = step(row, state, z, jnp.asarray(clean))
        return z - noise

    moved = (1 - np.float64(table.sigma_next[9])) * (clean - noise.astype(np.float64))
    assert error(run(solvers.step), moved) < 1e-4
    assert error(run(low), moved) > 0.1


def test_projection_over_many_elements():
    """`s*` sums a million products at full size; 24,576 here, where bfloat16 stops counting."""
    v = (1 + 0.1 * RNG.standard_normal((2, 1, 3, 32, 64, 4))).astype(np.float32)
    cond, uncond = v.astype(np.float64)
    region = jnp.ones((1, 3, 32, 64), bool)
    found = lock.projection_scale(jnp.asarray(v[0], LOW), jnp.asarray(v[1], LOW), region)
    assert found.dtype == WIDE
    assert float(found[0]) == pytest.approx((cond * uncond).sum() / (uncond**2).sum(), rel=1e-3)
