"""The UMT5 encoder against Transformers, the publisher's own outputs, and its published size."""

import json
from pathlib import Path

import fresh
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from peers import relative_l2
from transformers.models.umt5.modeling_umt5 import UMT5Attention

from kvlock_jax.convert import diffusers, original, table, weights
from kvlock_jax.models.text.config import UMT5Config
from kvlock_jax.models.text.umt5 import UMT5Encoder, relative_buckets

ORIGINAL = Path(__file__).parent / "data" / "original"

CONFIGS = {
    "heads narrower than the model": UMT5Config(
        vocab_size=97, d_model=48, d_kv=8, d_ff=72, num_layers=2, num_heads=4
    ),
    "heads wider than the model": UMT5Config(
        vocab_size=31,
        d_model=40,
        d_kv=16,
        d_ff=24,
        num_layers=3,
        num_heads=5,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=20,
        layer_norm_epsilon=1e-4,
    ),
}


def peer(config: UMT5Config) -> transformers.UMT5EncoderModel:
    """Transformers' encoder with weights far from their initial values."""
    torch.manual_seed(0)
    fields = {name: getattr(config, name) for name in config.__dataclass_fields__}
    model = transformers.UMT5EncoderModel(transformers.UMT5Config(**fields)).eval()
    for name, parameter in model.named_parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.ndim == 2 and "layer" in name else 1.0
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=scale)
    return model


def converted(config, arrays, rows, dtype=jnp.float32) -> UMT5Encoder:
    model = nnx.eval_shape(lambda: UMT5Encoder(config, dtype=dtype, rngs=nnx.Rngs(0)))
    graph, abstract = nnx.split(model)
    tensors = {
        key: table.LazyTensor(array.shape, array.dtype, lambda array=array: array)
        for key, array in arrays.items()
    }
    return nnx.merge(graph, table.fill(abstract, tensors, rows, "the peer"))


def from_peer(config, model, dtype=jnp.float32):
    # Transformers' own state dict names the tied embedding twice
    arrays = {key: value.numpy() for key, value in model.state_dict().items()}
    return converted(config, arrays, diffusers.UMT5, dtype)


def prompts(config, length):
    """Token ids of three prompts: full, padded, and one token long."""
    rng = np.random.default_rng(1)
    mask = np.arange(length)[None] < np.array([length, length // 2, 1])[:, None]
    return np.where(mask, rng.integers(1, config.vocab_size, mask.shape), 0), mask


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_transformers(name):
    config = CONFIGS[name]
    model = peer(config)
    ids, mask = prompts(config, 45)
    with torch.no_grad():
        want = model(torch.tensor(ids), torch.tensor(mask).long()).last_hidden_state.numpy()
    got = from_peer(config, model)(jnp.asarray(ids, jnp.int32), jnp.asarray(mask))
    assert got.shape == want.shape and got.dtype == jnp.float32
    assert relative_l2(np.asarray(got)[mask], want[mask]) < 1e-5


def test_equals_the_publisher():
    sizes = json.loads((ORIGINAL / "config.json").read_text())["umt5"]
    config = UMT5Config(
        vocab_size=sizes["vocab"],
        d_model=sizes["dim"],
        d_kv=sizes["dim_attn"] // sizes["num_heads"],
        d_ff=sizes["dim_ffn"],
        num_layers=sizes["num_layers"],
        num_heads=sizes["num_heads"],
        relative_attention_num_buckets=sizes["num_buckets"],
    )
    tensors = weights.open_file(ORIGINAL / "umt5.safetensors")
    arrays = {key: tensor.read() for key, tensor in tensors.items()}
    with np.load(ORIGINAL / "umt5_io.npz") as data:
        ids, mask, hidden = (data[key] for key in ("ids", "mask", "hidden"))
    got = converted(config, arrays, original.UMT5)(jnp.asarray(ids, jnp.int32), jnp.asarray(mask))
    real = mask != 0
    assert 0 < real.sum() < real.size  # the recording has padding
    assert relative_l2(np.asarray(got)[real], hidden[real]) < 1e-5


@pytest.mark.parametrize("buckets, max_distance", [(32, 128), (16, 20), (64, 512)])
def test_buckets_equal_transformers(buckets, max_distance):
    config = transformers.UMT5Config(
        relative_attention_num_buckets=buckets, relative_attention_max_distance=max_distance
    )
    positions = torch.arange(600)
    offsets = positions[None] - positions[:, None]
    want = UMT5Attention(config, layer_idx=0)._relative_position_bucket(offsets).numpy()
    got = relative_buckets(600, buckets, max_distance)
    np.testing.assert_array_equal(got, want)
    assert got.min() == 0 and got.max() == buckets - 1


def test_padding_does_not_reach_real_tokens():
    config = CONFIGS["heads narrower than the model"]
    model = fresh.module(lambda: UMT5Encoder(config, rngs=nnx.Rngs(0)))
    ids, mask = prompts(config, 12)
    ids, mask = jnp.asarray(ids, jnp.int32), jnp.asarray(mask)
    other = jnp.where(mask, ids, 5)
    np.testing.assert_array_equal(model(ids, mask)[mask], model(other, mask)[mask])


def test_bfloat16_keeps_its_float32_islands():
    config = CONFIGS["heads narrower than the model"]
    model = peer(config)
    ids, mask = prompts(config, 20)
    ids, mask = jnp.asarray(ids, jnp.int32), jnp.asarray(mask)
    exact = from_peer(config, model)(ids, mask)
    rounded = from_peer(config, model, jnp.bfloat16)(ids, mask)
    assert rounded.dtype == jnp.float32
    assert 1e-5 < relative_l2(rounded[mask], exact[mask]) < 3e-2
    graph, params = nnx.split(from_peer(config, model, jnp.bfloat16))
    program = str(jax.make_jaxpr(lambda p: nnx.merge(graph, p)(ids, mask))(params))
    in_bfloat16 = [line for line in program.splitlines() if "= " in line and ":bf16" in line]
    assert any("dot_general" in line for line in in_bfloat16)
    # softmax, the norms' roots and the logits it is fed by are float32
    assert not [line for line in in_bfloat16 if " exp " in line or " rsqrt" in line]


def test_published_size_without_memory():
    config = UMT5Config(
        vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64
    )
    model = nnx.eval_shape(lambda: UMT5Encoder(config, rngs=nnx.Rngs(0)))
    sizes = [leaf.size for leaf in jax.tree.leaves(nnx.state(model))]
    assert sum(sizes) == 5_680_910_336
    layer = model.block.layer[1].DenseReluDense
    assert layer.wo.kernel.shape == (24, 10240, 4096)
    ids = jax.ShapeDtypeStruct((2, 512), jnp.int32)
    hidden = nnx.eval_shape(lambda m, i: m(i, i), model, ids)
    assert hidden.shape == (2, 512, 4096)


def test_every_layer_starts_with_its_own_weights():
    config = CONFIGS["heads wider than the model"]
    kernel = UMT5Encoder(config, rngs=nnx.Rngs(0)).block.layer[0].SelfAttention.q.kernel[...]
    assert kernel.shape == (3, 40, 80)
    assert not np.allclose(kernel[0], kernel[1])
    # T5 starts its queries at deviation 1/sqrt(D K), since its logits have no scale
    np.testing.assert_allclose(np.std(kernel), (40 * 16) ** -0.5, rtol=0.05)
