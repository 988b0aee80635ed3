"""How exactly a TPU makes each product, read off the programs that are lowered for one.

By default it rounds float32 operands to bfloat16, which no dtype in a program shows.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from islands import GRID, LOW, T2V, VACE, WIDE, context_of, patches

from kvlock_jax import lock
from kvlock_jax.checkpoints import registry
from kvlock_jax.models.attention import kernels
from kvlock_jax.models.attention.flash import flash
from kvlock_jax.models.linear import Linear
from kvlock_jax.models.text.config import UMT5Config
from kvlock_jax.models.text.umt5 import UMT5Encoder
from kvlock_jax.models.vae import autoencoder
from kvlock_jax.models.vae.config import VAEConfig
from kvlock_jax.models.wan.conditioning import on_canvas
from kvlock_jax.models.wan.vace import wan_transformer
from kvlock_jax.sampling import solvers
from kvlock_jax.sampling.edits import Edits
from kvlock_jax.sampling.loop import Program, sample
from kvlock_jax.settings.schema import LockConfig

PRODUCT = re.compile(
    r"stablehlo\.(?:dot_general|convolution).*?: \((tensor<[^>]*>), (tensor<[^>]*>)\)", re.DOTALL
)


def products(function, *args) -> list[tuple[str, bool]]:
    """Operands' dtype of each product for a TPU, and whether all of their bits are multiplied."""
    text = jax.jit(function).trace(*args).lower(lowering_platforms=("tpu",)).as_text()
    found = []
    for match in PRODUCT.finditer(text):
        kinds = {re.search(r"[x<]([a-z]\w*)>$", operand)[1] for operand in match.groups()}
        exact = "precision = [HIGHEST, HIGHEST]" in match[0] or (
            match[0].count("#stablehlo<precision HIGHEST>") == 2
        )
        found.append((" ".join(sorted(kinds)), exact))
    return found


def breaches(found: list[tuple[str, bool]]) -> list[str]:
    """Float32 products that lose bits, and narrower ones that are not the fast kind."""
    return [kind for kind, exact in found if exact != (kind == "f32")]


def kinds(found: list[tuple[str, bool]]) -> set[str]:
    return {kind for kind, _ in found}


def abstract(make):
    return nnx.eval_shape(make)


def transformer(config, dtype):
    return abstract(lambda: wan_transformer(config, dtype=dtype, rngs=nnx.Rngs(0)))


def a_pass(model, z, context):
    """A pass that makes a cache, and one that is locked to it."""
    conditioning = model.condition(context, GRID)
    times = model.times(jnp.full((1,), 500.0))
    velocity, cache = model.keys_values(z, times, conditioning)
    held = lock.Lock(cache, jnp.zeros((1, 12), bool), jnp.full((1,), 0.5))
    return velocity, model.keys_values(z, times, conditioning, held)


@pytest.mark.parametrize("dtype", [WIDE, LOW], ids=str)
def test_a_pass(dtype):
    rng = np.random.default_rng(0)
    args = transformer(T2V, dtype), patches(rng), context_of(T2V, 1, rng)
    found = products(a_pass, *args)
    assert breaches(found) == []
    assert kinds(found) == ({"f32"} if dtype == WIDE else {"f32", "bf16"})


@pytest.mark.parametrize("dtype", [WIDE, LOW], ids=str)
def test_the_whole_loop(dtype):
    """With VACE, a source branch, schedules, guidance and solver."""
    rng = np.random.default_rng(0)
    z = patches(rng)
    prompts, source = (context_of(VACE, rows, rng) for rows in (2, 1))
    edits = Edits(z, z, jnp.ones(z.shape[:3], bool), prompts, source, GRID)
    settings = LockConfig(background="source", guidance="apg", rescale_uncond=False, window=3)
    table, knobs = solvers.table("unipc", 4, 3.0), lock.knobs(settings, 5.0)
    program = functools.partial(sample, program=Program.of(settings))
    found = products(program, transformer(VACE, dtype), z, edits, table, knobs)
    assert breaches(found) == []
    assert kinds(found) == ({"f32"} if dtype == WIDE else {"f32", "bf16"})


def test_modulation_alone_is_float32_in_bfloat16():
    model = transformer(T2V, LOW)
    found = products(lambda model, t: model.times(t), model, jnp.ones(2))
    assert found == [("f32", True)] * 3


@pytest.mark.parametrize("dtype", [WIDE, LOW], ids=str)
def test_the_text_encoder(dtype):
    config = UMT5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2)
    model = abstract(lambda: UMT5Encoder(config, dtype=dtype, rngs=nnx.Rngs(0)))
    ids = jnp.zeros((1, 4), jnp.int32)
    found = products(lambda model, ids: model(ids, ids), model, ids)
    assert breaches(found) == []
    assert kinds(found) == {"f32" if dtype == WIDE else "bf16"}


SMALL = VAEConfig(2, 4, num_res_blocks=1, latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4)


@pytest.mark.parametrize(
    ("coder", "shape"),
    [(autoencoder.encode, (1, 9, 16, 16, 3)), (autoencoder.decode, (1, 3, 2, 2, 4))],
    ids=["encode", "decode"],
)
def test_the_vae_whatever_is_asked_for(coder, shape):
    """As many products are convolutions over time, which a first frame alone has not."""
    vae = registry.abstract(SMALL, LOW)
    found = products(coder, vae, jnp.zeros(shape))
    assert breaches(found) == [] and kinds(found) == {"f32"}
    assert len(found) > 30


@pytest.mark.parametrize("dtype", [WIDE, LOW], ids=str)
@pytest.mark.parametrize("kernel", [kernels.plain, kernels.chunked], ids=["plain", "chunked"])
def test_attention(kernel, dtype):
    x = jnp.zeros((1, 8, 2, 4), dtype)
    found = products(kernel, x, x, x)
    assert len(found) == 2 and breaches(found) == []
    assert kinds(found) == {"f32" if dtype == WIDE else "bf16"}


def inner_products(jaxpr) -> list:
    """Precisions of all products of a program and of its parts, Pallas kernels included."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.append(equation.params["precision"])
        for value in equation.params.values():
            for part in value if isinstance(value, (tuple, list)) else (value,):
                part = getattr(part, "jaxpr", part)
                if hasattr(part, "eqns"):
                    found += inner_products(part)
    return found


@pytest.mark.parametrize("dtype", [WIDE, LOW], ids=str)
def test_attention_of_tpus(dtype):
    """Mosaic's text cannot be read; its kernel's own program can, and is lowered as well."""
    x = jnp.zeros((1, 128, 1, 128), dtype)
    found = inner_products(jax.make_jaxpr(flash)(x, x, x).jaxpr)
    exact = (jax.lax.Precision.HIGHEST,) * 2
    assert found and all((precision == exact) == (dtype == WIDE) for precision in found)
    lowered = jax.jit(flash).trace(x, x, x).lower(lowering_platforms=("tpu",))
    assert "tpu_custom_call" in lowered.as_text()


def test_gradients_of_a_linear_layer():
    layer = abstract(lambda: Linear(4, 3, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    found = products(
        lambda layer, x: jax.grad(lambda x: layer(x).sum())(x), layer, jnp.ones((2, 4))
    )
    assert found and breaches(found) == []


def test_pictures_and_guidance():
    """Resizing multiplies matrices; s* and the statistic are sums, which stay float32."""
    picture = jnp.zeros((9, 7, 3), jnp.uint8)
    found = products(lambda picture: on_canvas(picture, 16, 16), picture)
    assert found and breaches(found) == []
    v = jnp.ones((1, 12, 4, 4))
    assert products(lock.projection_scale, v, v) == []


def test_a_product_that_names_no_precision_is_seen():
    x = jnp.ones((2, 2))
    assert breaches(products(jnp.matmul, x, x)) == ["f32"]
    assert breaches(products(lambda x: jnp.convolve(x, x), jnp.ones(3))) == ["f32"]
    highest = jax.lax.Precision.HIGHEST
    assert breaches(products(lambda x: jnp.matmul(x, x, precision=highest), x.astype(LOW))) == [
        "bf16"
    ]
