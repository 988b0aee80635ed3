"""Nothing that a checkpoint's JSON files say is trusted: types, ranges, and names of files."""

import copy
import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from etils import epath
from flax import nnx
from safetensors.numpy import load_file, save_file

from kvlock_jax.checkpoints import format, metadata, registry
from kvlock_jax.convert import sizes, table
from kvlock_jax.convert.converter import convert
from kvlock_jax.convert.diffusers import _family
from kvlock_jax.convert.source import open_source
from kvlock_jax.convert.weights import open_folder, read_json
from kvlock_jax.errors import CheckpointError, SamplingError
from kvlock_jax.models.text.config import UMT5Config
from kvlock_jax.models.text.tokenizer import Tokenizer, write_word_tokenizer
from kvlock_jax.models.vae.config import VAEConfig
from kvlock_jax.models.wan.config import WanConfig

VALUES = {
    "family": "wan2.1-t2v",
    "version": "0.1",
    "source": {"layout": "diffusers", "folder": "wan", "files": {"a.safetensors": "0" * 64}},
    "configs": {
        "transformer": dataclasses.asdict(WanConfig(2, 12, 2, 16)),
        "vae": dataclasses.asdict(VAEConfig()),
        "text_encoder": dataclasses.asdict(UMT5Config(8, 8, 4, 12, 2, 2)),
        "scheduler": {"flow_shift": 3.0},
    },
    "models": {n: {"parameters": 3, "dtypes": ["float32"], "size": 12} for n in registry.NETWORKS},
    "data": "kvlock-0123abcd",
    "files": {"vae/manifest.ocdbt": "0123abcd", "tokenizer/tokenizer.json": "89abcdef"},
}
PATH = epath.Path("wan") / "kvlock.json"


def changed(where: str, value) -> dict:
    values = copy.deepcopy(VALUES)
    *parents, last = where.split("/")
    inner = values
    for name in parents:
        inner = inner[name]
    inner[last] = value
    return json.loads(json.dumps(values))


def test_good_metadata_is_read():
    got = metadata.parse(json.loads(json.dumps(VALUES)) | {"later": 1}, PATH)
    assert (got.data, got.files, got.source) == (VALUES["data"], VALUES["files"], VALUES["source"])
    assert got.configs.transformer == WanConfig(2, 12, 2, 16)
    assert got.models["vae"] == metadata.Stored(3, ("float32",), 12)


BAD = {
    "family": [5, None, ["wan2.1-t2v"], {}],
    "version": [5, None],
    "source": [5, "x", {"files": 5}, {"files": {"a": 5}}, {"layout": 3}],
    "data": [5, None, "", ".", "..", "../../etc", "/etc", "other", "kvlock-0123abcd/..", ["x"]],
    "files": [
        *(5, None, "x", ["x"], {"a": 5}, {"a": "zz"}, {"a": None}),
        *({name: "0" * 8} for name in ("../../etc", "/etc/passwd", "a/../../b", "..", "", "a//b")),
    ],
    "configs": [5, None, [], {}, {"vae": {}}],
    "configs/vae": [5, [], "x", {"depth": 3}, {"z_dim": "4"}],
    "configs/scheduler": [5, None, []],
    "configs/transformer/eps": [float("nan"), float("inf"), 0, -1, "x"],
    "configs/transformer/vace_layers": [5, ["x"]],
    "configs/transformer/patch_size": [5, [1, 2], [0, 2, 2]],
    "configs/text_encoder/relative_attention_max_distance": [8, 0],
    "configs/vae/latents_std": [[0.0] * 16, [float("nan")] * 16],
    "configs/text_encoder/layer_norm_epsilon": [float("nan")],
    "models": [5, None, [], {}],
    "models/vae": [5, [], {}],
    "models/vae/parameters": [-1, "x", 1.5, True, None],
    "models/vae/size": [-1, None],
    "models/vae/dtypes": [5, "float32", [5], None],
}


@pytest.mark.parametrize(
    ("where", "value"),
    [(where, value) for where, values in BAD.items() for value in values],
    ids=lambda value: str(value)[:30],
)
def test_a_field_that_does_not_fit_is_named(where, value):
    field = where.split("/")[-1]
    with pytest.raises(CheckpointError, match=r"wan/kvlock\.json") as caught:
        metadata.parse(changed(where, value), PATH)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and len(message) < 400
    assert (
        field in message or "describe" in message or "unknown key" in message or "z_dim" in message
    )


@pytest.mark.parametrize("content", ["[" * 100_000, "3", '"x"', "null"])
def test_metadata_that_is_no_object(content, tmp_path):
    (tmp_path / "kvlock.json").write_text(content)
    for reader in (format.read_metadata, lambda folder: read_json(folder / "kvlock.json")):
        with pytest.raises(CheckpointError, match=r"kvlock\.json .*JSON"):
            reader(tmp_path)


@pytest.mark.parametrize("architectures", [5, {}, {"a": 1}, "UMT5", [], [[]], None])
def test_the_class_of_a_config_may_be_anything(architectures):
    assert _family({"architectures": architectures}) in (None, [])


@pytest.mark.parametrize("shard", ["../x.safetensors", "/x", "..", "", ".", 5, None, ["x"], {}])
def test_a_shard_lies_beside_its_index(shard, tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(CheckpointError, match=r"index\.json (must list names|lists 1 shards)"):
        open_folder(tmp_path, "model")


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({"num_heads": "x"}, "num_heads of config.json must be a whole number"),
        ({"num_heads": [1]}, "num_heads of config.json must be a whole number"),
        ({"num_heads": -2}, "num_heads of config.json must be a whole number"),
        ({"_class_name": ["x"]}, r"is of a \['x'\], expected"),
        ({"model_type": {}}, "is of model type"),
    ],
)
def test_the_publishers_config_may_hold_anything(described, message, tmp_path):
    shapes = {
        "patch_embedding.weight": (64, 16, 1, 2, 2),
        "blocks.0.ffn.0.weight": (128, 64),
        "time_embedding.0.weight": (64, 8),
        "text_embedding.0.weight": (64, 8),
        "head.head.weight": (64, 64),
    }
    kind = np.dtype(np.float32)
    tensors = {key: table.LazyTensor(shape, kind, pytest.fail) for key, shape in shapes.items()}
    with pytest.raises(CheckpointError, match=message):
        sizes.transformer(tensors, described, tmp_path)


def test_a_tensor_of_no_numbers_gives_no_sizes(tmp_path):
    empty = table.LazyTensor((0, 16, 1, 2, 2), np.dtype(np.float32), pytest.fail)
    with pytest.raises(CheckpointError, match=r"expected 5 axes, none of length 0"):
        sizes.transformer({"patch_embedding.weight": empty}, {}, tmp_path)


def test_so_may_its_list_of_context_layers(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"vace_layers of config.json must be a list, found 5"
    ):
        sizes._context_layers({"vace_layers": 5}, 4, 2, tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (5, "does not hold a JSON object: it is 5"),
        ([["pad_token", "x"]], "does not hold a JSON object"),
        ({"pad_token": 5}, "pad_token must be a string, found 5"),
        ({"pad_token": {"text": "x"}}, "pad_token must be a string, found None"),
        ({"model_max_length": "x"}, "model_max_length must be a number of tokens, found 'x'"),
        ({"model_max_length": -1}, "model_max_length must be a number of tokens, found -1"),
    ],
)
def test_tokenizer_settings_that_do_not_fit(settings, message, tmp_path):
    write_word_tokenizer(tmp_path, ["star"], 4)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=message):
        Tokenizer(tmp_path)


@pytest.fixture
def broken(tiny_checkpoint, tmp_path):
    """A published folder with one NaN."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "wan")
    key = "decoder.conv_in.bias"
    shards = {path: load_file(path) for path in (folder / "vae").glob("*.safetensors")}
    path, arrays = next((path, arrays) for path, arrays in shards.items() if key in arrays)
    arrays[key][0] = np.nan
    save_file(arrays, path)
    return folder


MESSAGE = r"decoder\.conv_in\.bias .*is not finite: 1 of \d+ numbers are NaN or infinite"


def test_weights_that_are_not_finite_are_named_by_conversion(broken, tmp_path):
    with pytest.raises(CheckpointError, match=MESSAGE):
        convert(broken, tmp_path / "out")
    assert not format.is_checkpoint(tmp_path / "out")


def test_and_by_loading_a_published_folder(broken):
    with pytest.raises(CheckpointError, match=MESSAGE):
        open_source(broken).open().whole()


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_every_kind_of_number_is_looked_at(kind, bad):
    array = np.linspace(-3e4, 3e4, 60).astype(kind).reshape(3, 4, 5)
    assert table.all_finite(array) and table.all_finite(array.T) and table.all_finite(array[:0])
    array[2, 3, 4] = bad
    assert not table.all_finite(array) and not table.all_finite(array.swapaxes(0, 1))


def test_a_number_too_large_for_the_new_dtype_is_named():
    tensors = {
        "a.weight": table.LazyTensor((2,), np.dtype(np.float32), lambda: np.float32([1, 1e9]))
    }
    source = table.Source(("a",), (2,), np.dtype(np.float32), ("a.weight",), False, table.same)
    (one,) = table.parameters([source], tensors, lambda *_: np.dtype(np.float16)).values()
    with pytest.raises(CheckpointError, match=r"a\.weight .* too large for float16: convert to"):
        one.whole()


def test_an_edit_names_the_weights_that_are_not_finite(model):
    """Guidance was blamed for them."""
    from kvlock_jax.pipeline import api

    names = registry.not_finite(model.checkpoint)
    assert names == []
    graph, state = nnx.split(model.checkpoint.vae)
    state = jax.tree.map(jnp.copy, state)
    state["decoder"]["conv_in"]["bias"][...] *= jnp.nan
    sick = dataclasses.replace(model.checkpoint, vae=nnx.merge(graph, state))
    assert registry.not_finite(sick) == ["vae.decoder.conv_in.bias"]

    class Trace:
        finite = np.array([False, False])

    with pytest.raises(SamplingError, match=r"after step 1 of 2: .* vae\.decoder\.conv_in\.bias;"):
        api._finite(None, Trace, dataclasses.replace(model, checkpoint=sick))
    with pytest.raises(SamplingError, match="lower the guidance scale"):
        api._finite(None, Trace, model)
