"""Arrays in Orbax: pieces, memory, sharded reads, and a full disk."""

import resource
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from kvlock_jax.checkpoints import store
from kvlock_jax.checkpoints.store import Parameter
from kvlock_jax.errors import CheckpointError

LAYERS, ROWS, COLUMNS = 12, 512, 1024  # 1 MiB of bfloat16 a layer


def array() -> np.ndarray:
    values = np.random.default_rng(0).normal(size=(LAYERS, ROWS, COLUMNS))
    return values.astype(ml_dtypes.bfloat16)


def rows_of(values: np.ndarray, rows: int) -> Parameter:
    return Parameter(values.shape, values.dtype, rows, lambda first, last: values[first:last])


def restored(folder, values, spec=None, dtype=None):
    mesh = jax.make_mesh((8,), ("model",))
    single = SingleDeviceSharding(jax.devices()[0])
    place = single if spec is None else NamedSharding(mesh, spec)
    target = jax.ShapeDtypeStruct(values.shape, dtype or values.dtype, sharding=place)
    return dict(store.read(folder, {"x": target}))["x"]


@pytest.fixture(scope="module")
def values():
    return array()


@pytest.fixture(scope="module")
def folder(values, tmp_path_factory):
    folder = epath.Path(tmp_path_factory.mktemp("store") / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "CHUNK", 1 << 16)
        store.write(folder, {"x": rows_of(values, 1)})
    return folder


def read_from_disk() -> int:
    (metric,) = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return metric["values"][0]["value"]


@pytest.mark.parametrize(
    ("spec", "shard"),
    [
        (None, (LAYERS, ROWS, COLUMNS)),
        (PartitionSpec(None, "model"), (LAYERS, ROWS // 8, COLUMNS)),
        (PartitionSpec(None, None, "model"), (LAYERS, ROWS, COLUMNS // 8)),
    ],
)
def test_shards_read_only_their_part(folder, values, spec, shard):
    before = read_from_disk()
    got = restored(folder, values, spec)
    read = read_from_disk() - before
    assert values.nbytes <= read < 1.05 * values.nbytes  # not once for each device
    assert {piece.data.shape for piece in got.addressable_shards} == {shard}
    np.testing.assert_array_equal(got, values)


def test_another_dtype(folder, values):
    got = restored(folder, values, PartitionSpec(None, "model"), jnp.float32)
    np.testing.assert_array_equal(got, values.astype(np.float32))


def peak_of(work) -> int:
    """Peak bytes of Python's and NumPy's memory during a call."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_restore_holds_few_shards_on_the_host(values, tmp_path, monkeypatch):
    folder = epath.Path(tmp_path / "data")
    store.write(folder, {f"x{i}": rows_of(layer, ROWS) for i, layer in enumerate(values)})
    place = NamedSharding(jax.make_mesh((8,), ("model",)), PartitionSpec("model"))
    target = jax.ShapeDtypeStruct(values.shape[1:], values.dtype, sharding=place)
    targets = {f"x{i}": target for i in range(LAYERS)}
    every = peak_of(lambda: dict(store.read(folder, targets)))
    monkeypatch.setattr(store, "RESTORING", 1)
    few = peak_of(lambda: dict(store.read(folder, targets)))
    assert few < 0.5 * values.nbytes < values.nbytes < every


def test_parameters_are_read_in_pieces_while_writing(values, tmp_path, monkeypatch):
    layer = values[0].nbytes
    monkeypatch.setattr(store, "IN_FLIGHT", 2 * layer)
    asked = []

    def read(first, last):
        asked.append((first, last))
        return np.array(values[first:last])

    piecewise = Parameter(values.shape, values.dtype, 1, read)
    sizes = []
    peak = peak_of(
        lambda: store.write(epath.Path(tmp_path / "data"), {"x": piecewise}, sizes.append)
    )
    assert asked == [(i, i + 1) for i in range(LAYERS)]
    assert sizes == [layer] * LAYERS
    assert 3 * layer <= peak < 6 * layer
    np.testing.assert_array_equal(restored(epath.Path(tmp_path / "data"), values), values)


@pytest.mark.parametrize("rows", [5, 64])
def test_pieces_that_do_not_divide_an_array(tmp_path, rows):
    odd = np.random.default_rng(1).normal(size=(64, 7)).astype(np.float32)
    store.write(epath.Path(tmp_path / "data"), {"x": rows_of(odd, rows)})
    np.testing.assert_array_equal(restored(epath.Path(tmp_path / "data"), odd), odd)


def test_chunks(values):
    assert rows_of(values, 1).chunk == (1, ROWS, COLUMNS)  # 1 MiB is stored in one
    assert rows_of(values, 2).chunk == (2, ROWS // 8, COLUMNS // 8)
    assert rows_of(np.zeros((30, 30, 4099), np.float32), 15).chunk == (15, 30, 4099)
    assert rows_of(values, 1).nbytes == 2 * ROWS * COLUMNS * LAYERS


def test_a_full_disk(values, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            store.write(epath.Path(tmp_path / "data"), {"x": rows_of(values, 4)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_sums(tmp_path):
    folder = epath.Path(tmp_path)
    (folder / "deep").mkdir()
    (folder / "deep" / "a").write_text("123456789")
    (folder / "b").write_text("")
    sums = store.sums(folder)
    assert sums == {"deep/a": "cbf43926", "b": "00000000"}  # the check value of CRC-32
    store.check(folder, sums)
    (folder / "deep" / "a").write_text("123456788")
    (folder / "b").unlink()
    with pytest.raises(CheckpointError) as caught:
        store.check(folder, sums)
    _, missing, changed = str(caught.value).splitlines()
    assert missing == "  missing: b"
    assert changed.startswith("  not as it was written: deep/a has CRC-32 ")
