"""Converted checkpoints: bit-equal restores, placement, interruption, every kind of damage."""

import dataclasses
import importlib.metadata
import json
import shutil
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import whole
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from kvlock_jax.checkpoints import format, registry, store
from kvlock_jax.checkpoints.registry import NETWORKS, Checkpoint, Configs
from kvlock_jax.checkpoints.store import Parameter
from kvlock_jax.errors import CheckpointError
from kvlock_jax.models.text.config import UMT5Config
from kvlock_jax.models.text.tokenizer import Tokenizer, write_word_tokenizer
from kvlock_jax.models.vae.config import VAEConfig
from kvlock_jax.models.wan.config import WanConfig

CONFIGS = Configs(
    WanConfig(2, 12, 2, 16, in_channels=4, out_channels=4, text_dim=8, freq_dim=8),
    VAEConfig(
        base_dim=2,
        z_dim=4,
        num_res_blocks=1,
        latents_mean=(0.1, -0.2, 0.3, 0.0),
        latents_std=(1.5, 1.0, 0.5, 2.0),
    ),
    UMT5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2),
    {"flow_shift": 3.0, "use_flow_sigmas": True},
)
SOURCE = {"layout": "diffusers", "folder": "tiny", "files": {"a.safetensors": "0" * 64}}


def values(model) -> dict:
    return {
        ".".join(map(str, path)): np.asarray(variable[...])
        for path, variable in nnx.to_flat_state(nnx.state(model))
    }


def random_model(name: str, seed: int) -> nnx.Module:
    """Random parameters, kernels in bfloat16 and the rest in float32."""
    rng = np.random.default_rng(seed)
    graph, state = nnx.split(registry.abstract(getattr(CONFIGS, name)))
    full = [
        (
            path,
            variable.replace(
                jnp.asarray(
                    rng.normal(size=variable.shape).astype(
                        ml_dtypes.bfloat16 if path[-1] == "kernel" else np.float32
                    )
                )
            ),
        )
        for path, variable in nnx.to_flat_state(state)
    ]
    return nnx.merge(graph, nnx.from_flat_state(full))


def random_checkpoint(tokenizer, seed: int) -> Checkpoint:
    return Checkpoint(CONFIGS, **{n: random_model(n, seed) for n in NETWORKS}, tokenizer=tokenizer)


def in_memory(array: np.ndarray) -> Parameter:
    """A parameter that is stored a row at a time."""
    return Parameter(array.shape, array.dtype, 1, lambda first, last: array[first:last])


def save(folder, models: Checkpoint, on_bytes=lambda _: None) -> None:
    parameters = {
        name: {path: in_memory(array) for path, array in values(getattr(models, name)).items()}
        for name in NETWORKS
    }
    format.save(folder, models.configs, parameters, models.tokenizer, lambda: SOURCE, on_bytes)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    write_word_tokenizer(folder, ["a", "red", "star"], 12)
    return folder


@pytest.fixture(scope="module")
def original(tokenizer):
    return random_checkpoint(tokenizer, 0)


@pytest.fixture(scope="module")
def saved(original, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "out" / "wan"
    save(folder, original)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(saved, tmp_path / "wan")


def assert_same(got: Checkpoint, want: Checkpoint) -> None:
    for name in NETWORKS:
        left, right = values(getattr(got, name)), values(getattr(want, name))
        assert left.keys() == right.keys()
        for path in right:
            assert left[path].dtype == right[path].dtype
            np.testing.assert_array_equal(left[path], right[path], err_msg=path)


def data_of(folder):
    return folder / json.loads((folder / format.METADATA).read_text())["data"]


def test_restored_is_bit_equal(folder, original):
    got = format.load(folder)
    assert_same(got, original)
    assert got.configs == CONFIGS
    prompts = ["a red star", "red"]
    for want, have in zip(
        Tokenizer(original.tokenizer)(prompts),
        Tokenizer(got.tokenizer)(prompts),
        strict=True,
    ):
        np.testing.assert_array_equal(have, want)


def test_restored_models_compute_the_same(folder, original):
    got = format.load(folder)
    latents = jnp.asarray(np.random.default_rng(1).normal(size=(1, 2, 2, 4, 4)), jnp.float32)
    context = jnp.ones((1, 3, 8), jnp.float32)

    @nnx.jit
    def velocity(model):
        return whole.velocity(model, latents, jnp.full((1,), 500.0), context)

    np.testing.assert_array_equal(velocity(got.transformer), velocity(original.transformer))


def test_dtypes(folder, original):
    got = format.load(folder, jnp.bfloat16, compute_dtype=jnp.bfloat16)
    for name in NETWORKS:
        wide = name == "vae"  # as the publisher and Diffusers run it
        assert getattr(got, name).dtype == (jnp.float32 if wide else jnp.bfloat16)
        want = values(getattr(original, name))
        for path, array in values(getattr(got, name)).items():
            rounded = path == "shared.embedding" or want[path].dtype == ml_dtypes.bfloat16
            assert array.dtype == (ml_dtypes.bfloat16 if rounded else np.float32), path
            np.testing.assert_array_equal(array, want[path].astype(array.dtype))
    assert format.load(folder).transformer.dtype == jnp.float32


def test_parameters_go_where_they_are_placed(folder, original):
    mesh = jax.make_mesh((8,), ("model",))
    asked = {}

    def place(name, shape):
        """Shards an inner axis of stacked blocks, or else the last axis that divides."""
        axes = [i for i in range(1 if ".blocks." in name else 0, len(shape)) if shape[i] % 8 == 0]
        spec = [None] * len(shape)
        if axes:
            spec[axes[0] if ".blocks." in name else axes[-1]] = "model"
        asked[name] = NamedSharding(mesh, PartitionSpec(*spec))
        return asked[name]

    got = format.load(folder, place_for=lambda configs: place)
    assert_same(got, original)
    for name in NETWORKS:
        for path, variable in nnx.to_flat_state(nnx.state(getattr(got, name))):
            assert variable.sharding == asked.pop(".".join(map(str, (name, *path))))
    assert not asked
    kernel = got.transformer.proj_out.kernel
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(24, 2)}
    stacked = got.transformer.blocks.attn1.to_q.kernel
    assert stacked.sharding.spec == PartitionSpec(None, "model", None)
    expected = np.asarray(original.transformer.blocks.attn1.to_q.kernel[...])
    for shard in stacked.addressable_shards:
        rows = slice(3 * shard.device.id, 3 * shard.device.id + 3)
        np.testing.assert_array_equal(shard.data, expected[:, rows], strict=True)

    by_default = format.load(folder).transformer.proj_out.kernel
    assert by_default.sharding == SingleDeviceSharding(jax.devices()[0])


def test_metadata(folder):
    got = format.read_metadata(folder)
    assert (got.family, got.source, got.configs) == ("wan2.1-t2v", SOURCE, CONFIGS)
    on_disk = {p for p in (folder / got.data).rglob("*") if p.is_file()}
    assert {folder / got.data / name for name in got.files} == on_disk
    assert format.is_checkpoint(folder) and not format.is_checkpoint(folder.parent)


def test_describe(folder, original):
    got = format.describe(folder)
    assert (got.family, got.configs, got.source) == ("wan2.1-t2v", CONFIGS, SOURCE)
    assert got.version == importlib.metadata.version("kvlock-jax")
    for name in NETWORKS:
        arrays = values(getattr(original, name)).values()
        assert got.models[name].parameters == sum(array.size for array in arrays)
        assert got.models[name].size == sum(array.nbytes for array in arrays)
        assert got.models[name].dtypes == ("bfloat16", "float32")
    (data_of(folder) / "vae" / "manifest.ocdbt").unlink()
    with pytest.raises(CheckpointError, match=r"missing: vae/manifest\.ocdbt"):
        format.describe(folder)


def test_save_again_replaces(folder, tokenizer):
    (folder / "notes").mkdir()
    (folder / "notes" / "mine.txt").write_text("kept")
    second = random_checkpoint(tokenizer, 1)
    save(folder, second)
    assert_same(format.load(folder), second)
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        ["kvlock.json", "notes", data_of(folder).name]
    )
    assert (folder / "notes" / "mine.txt").read_text() == "kept"


def test_the_data_of_another_version_stay_until_the_new_are_complete(folder, original, monkeypatch):
    rewrite(folder, family="wan9")
    data = data_of(folder)
    monkeypatch.setattr(store, "write", lambda *_: pytest.fail("stop"))
    with pytest.raises(pytest.fail.Exception):
        save(folder, original)
    assert data.is_dir()


def test_save_onto_itself(folder, original):
    """The save replaces the data that hold its tokenizer."""
    save(folder, format.load(folder))
    assert_same(format.load(folder), original)


class Killed(BaseException):
    """Nothing in the package catches it, so the disk is left as by a kill."""


@pytest.mark.parametrize("at", ["vae", "text_encoder", "kvlock.json"])
def test_interrupted_save(folder, original, tokenizer, tmp_path, monkeypatch, at):
    write, second = store.write, random_checkpoint(tokenizer, 1)

    def until(target, arrays, on_bytes):
        if target.name == at:
            raise Killed
        write(target, arrays, on_bytes)

    with monkeypatch.context() as patch:
        patch.setattr(store, "write", until)
        if at == format.METADATA:
            patch.setattr(store, "sums", lambda data: until(folder / at, None, None))
        for target in (folder, tmp_path / "new"):
            with pytest.raises(Killed):
                save(target, second)
    assert_same(format.load(folder), original)
    assert not format.is_checkpoint(tmp_path / "new")
    with pytest.raises(
        CheckpointError, match=r"new/kvlock\.json: the conversion .* did not finish"
    ):
        format.load(tmp_path / "new")
    for target in (folder, tmp_path / "new"):
        save(target, second)
        assert_same(format.load(target), second)
        assert len(list(target.iterdir())) == 2  # the first attempt left nothing


def test_missing_cut_and_changed_files_are_all_named(folder):
    data = data_of(folder)
    (data / "tokenizer" / "tokenizer.json").unlink()
    cut, flipped = (
        max((data / name / "ocdbt.process_0" / "d").iterdir(), key=lambda p: p.stat().st_size)
        for name in ("vae", "transformer")
    )
    cut.write_bytes(cut.read_bytes()[:-1])
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1  # Orbax alone would give back another weight
    flipped.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        format.load(folder)
    _, *lines = str(caught.value).splitlines()
    assert lines[0] == "  missing: tokenizer/tokenizer.json"
    assert sorted(line.split(": ")[1].split()[0] for line in lines[1:]) == sorted(
        path.relative_to(data).as_posix() for path in (cut, flipped)
    )


def test_missing_data(folder):
    shutil.rmtree(data_of(folder))
    with pytest.raises(CheckpointError, match=r"missing: vae/_METADATA"):
        format.load(folder)


def rewrite(folder, **changes) -> None:
    path = folder / format.METADATA
    found = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in found.items() if v != "drop"}))


def test_parameters_that_do_not_fit_are_all_listed(folder):
    configs = dataclasses.asdict(CONFIGS)
    configs["transformer"] |= {"ffn_dim": 20, "cross_attn_norm": False}
    configs["vae"] |= {"num_res_blocks": 2}
    rewrite(folder, configs=configs)
    with pytest.raises(CheckpointError) as caught:
        format.load(folder)
    lines = str(caught.value).splitlines()
    assert (
        "  misshapen: transformer.blocks.ffn.net_0.bias is (2, 16), the model has (2, 20)" in lines
    )
    assert "  unexpected: transformer.blocks.norm2.bias" in lines
    assert "  missing: vae.decoder.up_blocks.3.resnets.2.conv1.bias" in lines


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "wan2.2"}, r"kvlock\.json is of family 'wan2\.2', expected 'wan2\.1-t2v'"),
        ({"data": "drop", "files": "drop"}, r"kvlock\.json has no data, files"),
        ({"configs": {"vae": {}}}, r"kvlock\.json does not describe transformer, vae"),
        ({"configs": []}, r"kvlock\.json does not describe transformer, vae"),
        ({"models": {"vae": {}}}, r"kvlock\.json does not describe transformer, vae"),
        (
            {"configs": dataclasses.asdict(CONFIGS) | {"vae": {"depth": 3}}},
            r"kvlock\.json: unknown key 'depth' of VAEConfig",
        ),
    ],
)
def test_metadata_that_does_not_fit(folder, changes, message):
    rewrite(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        format.load(folder)


@pytest.mark.parametrize("content", ["", "{", "[1]", "3"])
def test_metadata_that_is_not_json(folder, content):
    (folder / format.METADATA).write_text(content)
    with pytest.raises(CheckpointError, match=r"kvlock\.json does not hold a JSON object"):
        format.load(folder)


def test_folder_that_cannot_be_made(original, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write to .*file/wan: Not a directory"):
        save(tmp_path / "file" / "wan", original)


def test_tokenizer_that_cannot_be_read(original, tmp_path):
    absent = dataclasses.replace(original, tokenizer=tmp_path / "words")
    with pytest.raises(CheckpointError, match=rf"cannot read {tmp_path}/words: No such file"):
        save(tmp_path / "wan", absent)


def test_files_are_checked_while_they_are_read(folder, monkeypatch):
    """The error names a damaged file, even if Orbax has read it or failed on it before."""
    check, read, order = store.check, store.read, []

    def slow(*args):
        time.sleep(0.2)
        check(*args)

    def noted(*args):
        order.append(args)
        return read(*args)

    monkeypatch.setattr(store, "check", slow)
    monkeypatch.setattr(store, "read", noted)
    format.load(folder)
    assert len(order) == len(NETWORKS)
    (data_of(folder) / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer/tokenizer\.json has CRC-32"):
        format.load(folder)
    assert len(order) == len(NETWORKS)
    (data_of(folder) / "vae" / "_METADATA").write_text("{")
    with pytest.raises(CheckpointError, match=r"not as it was written: vae/_METADATA has"):
        format.load(folder)


def test_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot read .*nothing/kvlock\.json"):
        format.load(tmp_path / "nothing")


def test_import_leaves_orbax_alone():
    program = "import sys, kvlock_jax.checkpoints.format; print('orbax.checkpoint' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.stdout.strip() == "False", ran.stderr
