"""The mechanism of tables on small tables, and weight files of one or more shards."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from kvlock_jax.convert import table, weights
from kvlock_jax.errors import CheckpointError


def lazy(arrays):
    return {
        key: table.LazyTensor(array.shape, array.dtype, lambda array=array: array)
        for key, array in arrays.items()
    }


def state(**shapes):
    return nnx.State(
        {k: nnx.Param(jax.ShapeDtypeStruct(s, jnp.float32)) for k, s in shapes.items()}
    )


def test_transforms_by_hand():
    linear = np.arange(6.0).reshape(2, 3)
    conv = np.arange(2 * 3 * 4 * 5 * 6.0).reshape(2, 3, 4, 5, 6)
    assert table.kernel(linear)[2, 1] == linear[1, 2]
    assert table.kernel(conv).shape == (4, 5, 6, 3, 2)
    assert table.kernel(conv)[3, 2, 5, 1, 0] == conv[0, 1, 3, 2, 5]
    assert table.kernel(conv[..., 0])[3, 2, 1, 0] == conv[0, 1, 3, 2, 0]
    np.testing.assert_array_equal(table.pointwise(linear.reshape(2, 3, 1, 1, 1)), linear.T)
    np.testing.assert_array_equal(table.pointwise(np.ones((1, 1, 1, 1))), [[1.0]])
    assert table.patches(conv).shape == (4 * 5 * 6 * 3, 2)
    assert table.patches(conv)[((3 * 5 + 2) * 6 + 5) * 3 + 1, 0] == conv[0, 1, 3, 2, 5]
    np.testing.assert_array_equal(table.unbatched(linear[None]), linear)
    assert table.per_channel(np.ones((1, 1, 1, 1))).shape == (1,)
    assert table.per_channel(np.ones((7, 1, 1))).shape == (7,)


def counted(shapes) -> tuple[dict, list]:
    """Tensors of ascending numbers that record each read."""
    read = []

    def tensor(key, shape):
        array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
        return table.LazyTensor(
            shape,
            array.dtype,
            lambda: read.append(key) or array,
            lambda first, last: read.append((key, first, last)) or array[first:last],
        )

    return {key: tensor(key, shape) for key, shape in shapes.items()}, read


def test_parameters_are_read_as_they_are_asked_for(monkeypatch):
    tensors, read = counted({"a.0.weight": (2, 3), "a.1.weight": (2, 3), "b.weight": (2, 3)})
    rows = (table.Row("a", "a.*.weight", table.kernel), table.Row("b", "b.weight"))
    sources = table.plan(state(a=(2, 3, 2), b=(2, 3)), tensors, rows, "it")
    values = table.parameters(sources, tensors)
    assert read == [] and values["a"].rows == 2
    assert values["a"].whole().shape == (2, 3, 2) and read == ["a.0.weight", "a.1.weight"]
    assert values["b"].whole().shape == (2, 3)
    monkeypatch.setattr(table, "TOGETHER", 10)
    read.clear()
    one = table.parameters(sources, tensors, lambda path, found: np.float64)["a"]
    assert (one.rows, one.dtype, one.nbytes) == (1, np.float64, 2 * 2 * 3 * 8)
    np.testing.assert_array_equal(one.read(1, 2), [[[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]])
    assert read == ["a.1.weight"]


def test_a_large_tensor_is_read_by_rows(monkeypatch):
    monkeypatch.setattr(table, "ROWS", 40)
    tensors, read = counted({"e": (12, 3), "odd": (11, 3), "k": (12, 3)})
    rows = (table.Row("k", "k", table.kernel), table.Row("(.*)", r"\1"))
    sources = table.plan(state(e=(12, 3), odd=(11, 3), k=(3, 12)), tensors, rows, "it")
    values = table.parameters(sources, tensors)
    # 144 bytes: 4 parts of 3 rows; 132: 4 parts, the last one smaller; nothing transformed in parts
    assert [values[name].rows for name in ("e", "odd", "k")] == [3, 3, 3]
    np.testing.assert_array_equal(values["e"].read(3, 6), np.arange(9, 18).reshape(3, 3))
    assert read == [("e", 3, 6)]
    assert values["k"].whole().shape == (3, 12) and read[1:] == ["k"]


def test_layers_of_unlike_dtype_are_not_rounded():
    wide = np.array([1.0 + 2**-20], np.float32)
    tensors = lazy({"a.0": wide.astype(ml_dtypes.bfloat16), "a.1": wide})
    filled = table.fill(state(a=(2, 1)), tensors, (table.Row("a", "a.*"),), "it")
    np.testing.assert_array_equal(filled["a"][...], [[1.0], wide])


def test_float64_becomes_what_jax_has():
    filled = table.fill(state(a=(3,)), lazy({"a": np.arange(3.0)}), (table.Row("a", "a"),), "it")
    assert filled["a"][...].dtype == np.float32
    np.testing.assert_array_equal(filled["a"][...], [0, 1, 2])


def test_every_mismatch_at_once():
    tensors = lazy({
        "a.0": np.zeros((3, 2)), "a.2": np.zeros((3, 2)), "b": np.zeros(5), "x": np.zeros(1)
    })  # fmt: skip
    rows = (table.Row("a", "a.*", table.kernel), table.Row("b", "b", table.kernel))
    with pytest.raises(CheckpointError) as caught:
        table.fill(state(a=(2, 2, 4), b=(5, 1)), tensors, rows, "transformer/")
    assert str(caught.value).splitlines() == [
        "transformer/ does not fit the model that its config describes: "
        "1 missing, 2 unexpected, 2 misshapen",
        "  missing: a.1",
        "  unexpected: a.2",
        "  unexpected: x",
        "  misshapen: a.0 is [3, 2], which becomes [2, 3]; the model has [2, 4]",
        "  misshapen: b is [5]; the model has [5, 1]",
    ]


@pytest.fixture
def shards(tmp_path):
    for i in (1, 2, 3):
        save_file({f"key{i}": np.ones(i, np.float32)}, tmp_path / f"w-{i}.safetensors")
    index = tmp_path / "w.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": {f"key{i}": f"w-{i}.safetensors" for i in (1, 2, 3)}})
    )
    return index


def test_shards(shards):
    tensors = weights.open_folder(shards.parent, "w")
    assert {key: tensor.shape for key, tensor in tensors.items()} == {
        "key1": (1,), "key2": (2,), "key3": (3,)
    }  # fmt: skip
    assert tensors["key2"].read().tolist() == [1.0, 1.0]


def test_missing_shards_are_all_named(shards):
    for i in (1, 3):
        (shards.parent / f"w-{i}.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"3 shards.*: w-1\.safetensors, w-3\.safetensors$"):
        weights.open_folder(shards.parent, "w")


def test_shard_without_its_tensor(shards):
    save_file({"other": np.ones(2, np.float32)}, shards.parent / "w-2.safetensors")
    with pytest.raises(CheckpointError, match=r"not in their shard.*key2 \(w-2\.safetensors\)"):
        weights.open_folder(shards.parent, "w")


def test_index_without_a_map(shards):
    shards.write_text('{"metadata": {}}')
    with pytest.raises(CheckpointError, match=r"index\.json has no weight_map"):
        weights.open_folder(shards.parent, "w")
