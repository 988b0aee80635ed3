"""Float8 and GGUF files: the velocity of what each holds, and what is refused."""

import json
from pathlib import Path

import gguf
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import originals
import pytest
from flax import nnx
from safetensors.numpy import save_file
from test_wan import velocity_of

import kvlock_jax as kvl
from kvlock_jax.checkpoints import format
from kvlock_jax.convert import converter, diffusers, original, sizes, table, weights
from kvlock_jax.errors import CheckpointError

DATA = Path(__file__).parent / "data"
QUANTISED = DATA / "quantised"
FILES = sorted(
    path.name for path in QUANTISED.iterdir() if path.suffix in (".gguf", ".safetensors")
)


def filled(tensors):
    config = sizes.transformer(tensors, originals.SIZES["dit"], QUANTISED)
    graph, state = nnx.split(diffusers.abstract(diffusers.TRANSFORMER, config))
    return nnx.merge(graph, table.fill(state, tensors, original.WAN, "quantised"))


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_what_it_stands_for(name):
    path = QUANTISED / name
    key = f"gguf_{path.stem}" if path.suffix == ".gguf" else path.stem
    with np.load(QUANTISED / "expected.npz") as data:
        want, plain = data[key], data["velocity"]
    found = np.moveaxis(
        velocity_of(filled(weights.open_weights(path)), *originals.golden_inputs())[0], -1, 0
    )
    norm = np.linalg.norm(want)
    # the published float32 weights give 1.1e-6 as well: what the networks' sums differ by
    assert np.linalg.norm(found - want) < 2e-6 * norm
    assert np.linalg.norm(plain - want) > 1e-5 * norm


def written(tmp_path, tensors, metadata=None):
    path = tmp_path / "a.safetensors"
    save_file({k: np.asarray(v) for k, v in tensors.items()}, path, metadata)
    return path


BYTES = np.arange(256, dtype=np.uint8).reshape(16, 16)


@pytest.mark.parametrize("kind", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
@pytest.mark.parametrize("spelling", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("shape", [(), (1,), (16,), (16, 1), (16, 4, 1)])
def test_a_scale_multiplies_matrix_rows_or_blocks(tmp_path, kind, spelling, shape):
    scale = np.linspace(0.5, 2.0, int(np.prod(shape)), dtype=np.float32).reshape(shape)
    path = written(tmp_path, {"a.weight": BYTES.view(kind), f"a.{spelling}": scale})
    found = weights.open_file(path)["a.weight"].read()
    wide = BYTES.view(kind).astype(np.float32)
    by = np.broadcast_to(scale, shape)
    if len(shape) == 3:
        want = wide * np.repeat(scale[..., 0], 4, axis=1)
    else:
        want = wide * (by.reshape(-1, 1) if by.size > 1 else by.reshape(()))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, want)


FORMAT = np.frombuffer(json.dumps({"format": "nvfp4"}).encode(), np.uint8)


@pytest.mark.parametrize(
    "more, message",
    [
        ({"a.weight_scale": np.ones(3, np.float32)}, r"is \[16, 16\], and its scale \[3\]"),
        ({"b.weight_scale": np.ones(1, np.float32)}, "has a scale for b.weight, which it lacks"),
        ({"a.comfy_quant": FORMAT}, r"quantised as nvfp4 \(a\)"),
        ({"a.comfy_quant": np.zeros(3, np.uint8)}, "is not JSON"),
        ({"a.weight.absmax": np.ones(3, np.float32)}, "is quantised .it holds a.weight.absmax"),
        ({"b.weight": np.ones(3, np.int8)}, "b.weight is I8, probably quantised"),
    ],
)
def test_other_formats_are_refused_by_name(tmp_path, more, message):
    path = written(tmp_path, {"a.weight": BYTES.view(ml_dtypes.float8_e4m3fn)} | more)
    with pytest.raises(CheckpointError, match=message) as caught:
        weights.open_file(path)
    assert len(str(caught.value).splitlines()) == 1


def test_broken_gguf_files_get_a_line(tmp_path):
    path, whole = tmp_path / "a.gguf", (QUANTISED / "q8_0.gguf").read_bytes()
    for content in (b"", b"GGUF", *(whole[:size] for size in (3000, 90_000, -9))):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="is damaged, or no GGUF file") as caught:
            weights.open_weights(path)
        assert len(str(caught.value).splitlines()) == 1


def test_a_type_that_gguf_cannot_read_is_named(tmp_path):
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "wan")
    writer.add_tensor("a.weight", np.zeros((2, 32), np.int32))
    for write in ("header_to_file", "kv_data_to_file", "tensors_to_file"):
        getattr(writer, f"write_{write}")()
    writer.close()
    with pytest.raises(CheckpointError, match=r"a\.weight is I32, which gguf cannot read"):
        weights.open_weights(path)


def test_a_prefix_of_many_keys_is_no_part_of_a_name(tmp_path):
    inside = {f"model.diffusion_model.a{n}": np.ones(1, np.float32) for n in range(6)}
    path = written(tmp_path, inside | {"first_stage_model.a": np.ones(1, np.float32)})
    assert sorted(weights.open_file(path)) == [f"a{n}" for n in range(6)]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A published folder without a transformer, and files of one with heads of 128."""
    folder = originals.write_folder(tmp_path_factory.mktemp("parts") / "wan")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "config.json").unlink()
    wide = originals.wide_transformer()
    float8 = {
        f"model.diffusion_model.{k}": v.astype(
            ml_dtypes.float8_e4m3fn if v.ndim == 2 else np.float16
        )
        for k, v in wide.items()
    }
    save_file(float8, folder.parent / "float8.safetensors")
    exact = {k.removeprefix("model.diffusion_model."): np.float32(v) for k, v in float8.items()}
    save_file(exact, folder.parent / "exact.safetensors")
    return folder


def leaves(model):
    return [np.asarray(leaf.get_value()) for _, leaf in nnx.to_flat_state(nnx.state(model))]


def test_a_file_takes_the_place_of_a_transformer(parts, tmp_path):
    """Loaded, converted and described; in bfloat16 it is rounded as it is read."""
    files = [parts.parent / f"{name}.safetensors" for name in ("exact", "float8")]
    want, found = (kvl.load(parts, files=kvl.Files(file)).checkpoint.transformer for file in files)
    for one, other in zip(leaves(want), leaves(found), strict=True):
        np.testing.assert_array_equal(one, other)
    assert (
        kvl.pipeline.load.describe(
            parts, kvl.Files(files[1])
        ).configs.transformer.num_attention_heads
        == 1
    )
    small = kvl.load(parts, jnp.bfloat16, files=kvl.Files(files[1])).checkpoint.transformer
    assert small.blocks.ffn.net_0.kernel[...].dtype == jnp.bfloat16
    converter.convert(parts, tmp_path / "own", files=kvl.Files(files[1]))
    own = kvl.load(tmp_path / "own").checkpoint
    for one, other in zip(leaves(want), leaves(own.transformer), strict=True):
        np.testing.assert_array_equal(one, other)
    assert "transformer/float8.safetensors" in format.describe(tmp_path / "own").source["files"]
    with pytest.raises(CheckpointError, match="of single parts take a published folder"):
        kvl.load(tmp_path / "own", files=kvl.Files(files[1]))
    with pytest.raises(CheckpointError, match="no such file of a transformer"):
        kvl.load(parts, files=kvl.Files(tmp_path / "absent.gguf"))
    with pytest.raises(CheckpointError, match="has neither"):
        kvl.load(parts)
