"""Kernels in 8 bits, and kernels in the host's memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import originals
import pytest
import tiny
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_wan import velocity_of

import kvlock_jax as kvl
from kvlock_jax.checkpoints import registry
from kvlock_jax.cli import main
from kvlock_jax.convert import converter
from kvlock_jax.media import encode
from kvlock_jax.models import small
from kvlock_jax.models.layout import ParameterRules
from kvlock_jax.parallel.mesh import make_mesh

BOTH = {"weights": "int8", "weights_on": "host"}
BOX = (8, 8, 24, 24)
LORA = originals.DATA.parent / "lora" / "kohya.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return originals.write_folder(tmp_path_factory.mktemp("small") / "wan")


@pytest.fixture(scope="module")
def converted(folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("small") / "own"
    converter.convert(folder, target)
    return target


def kernels(model: nnx.Module) -> dict:
    flat = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in flat}


def widened(model: nnx.Module) -> nnx.Module:
    """The model of the numbers that its 8-bit kernels stand for."""
    found = kernels(model)
    for path in [path for path in found if path.endswith(".scale")]:
        kernel = f"{path.removesuffix('scale')}kernel"
        if kernel in found:
            found[kernel] = found[kernel].astype(jnp.float32) * found.pop(path)[..., None, :]
    return registry.fill(registry.abstract(model.config), found)


def velocity(model):
    return np.asarray(velocity_of(model, *originals.golden_inputs()))


def relative(found, want) -> float:
    return np.linalg.norm(found - want) / np.linalg.norm(want)


@pytest.mark.parametrize(("kind", "step"), [("int8", 0.5 / 127), ("float8", 2**-4)])
def test_a_channel_is_off_by_half_a_step(kind, step):
    rng = np.random.default_rng(0)
    kernel = (rng.normal(size=(2, 24, 6)) * rng.uniform(0.01, 100, 6)).astype(np.float32)
    kernel[1, :, 3] = 0  # a channel without weights
    values, scale = small.narrowed(jnp.asarray(kernel), kind)
    assert values.dtype == small.KINDS[kind][0] and scale.shape == (2, 6)
    off = np.abs(np.asarray(values, np.float32) * np.asarray(scale)[:, None] - kernel)
    if kind == "int8":  # of the channel's largest
        assert (off <= 1.001 * step * np.abs(kernel).max(axis=1, keepdims=True)).all()
    else:  # of each number, but where it is smaller than the least normal one
        floor = np.asarray(scale)[:, None] * 2.0**-10
        assert (off <= 1.001 * np.maximum(step * np.abs(kernel), floor)).all()


@pytest.mark.parametrize("kind", small.KINDS)
@pytest.mark.parametrize("layout", ["published", "converted"])
def test_kernels_of_8_bits_are_the_numbers_that_they_stand_for(folder, converted, kind, layout):
    source = folder if layout == "published" else converted
    model = kvl.load(source, weights=kind, loras=f"{LORA}:0.5").checkpoint.transformer
    found = kernels(model)
    assert found["blocks.ffn.net_0.kernel"].dtype == small.KINDS[kind][0]
    assert found["proj_out.kernel"].dtype == jnp.float32  # not of a block
    got = velocity(model)
    assert relative(got, velocity(widened(model))) < 1e-6
    wide = velocity(kvl.load(source, loras=f"{LORA}:0.5").checkpoint.transformer)
    assert 1e-5 < relative(got, wide) < 0.05


def test_kernels_in_the_hosts_memory_change_nothing(folder, converted):
    near = velocity(kvl.load(folder).checkpoint.transformer)
    for source in (folder, converted):
        model = kvl.load(source, weights_on="host").checkpoint.transformer
        kinds = {path: x.sharding.memory_kind for path, x in kernels(model).items()}
        assert kinds["blocks.attn1.to_q.kernel"] == "pinned_host"
        assert kinds["blocks.attn1.to_q.bias"] == kinds["proj_out.kernel"] == "device"
        np.testing.assert_array_equal(velocity(model), near)


@pytest.mark.parametrize("kind", small.KINDS)
def test_kernels_of_8_bits_in_the_hosts_memory_lie_in_rows_of_8(folder, kind):
    model = kvl.load(folder, weights=kind, weights_on="host").checkpoint.transformer
    near = kvl.load(folder, weights=kind).checkpoint.transformer
    kernel, flat = (m.blocks.ffn.net_0.kernel.get_value() for m in (model, near))
    layers, inputs, outputs = flat.shape
    assert kernel.shape == (layers, inputs // 8, 8, outputs)
    assert kernel.sharding.memory_kind == "pinned_host"
    np.testing.assert_array_equal(kernel.reshape(flat.shape), flat)
    np.testing.assert_array_equal(velocity(model), velocity(near))


def test_context_blocks_of_two_experts(tmp_path):
    tiny.make_vace_experts_pipeline(tmp_path).save_pretrained(tmp_path / "wan")
    near, far = (kvl.load(tmp_path / "wan", **rest) for rest in ({"weights": "int8"}, BOTH))
    for name in ("transformer", "transformer_2"):
        kernel = getattr(far.checkpoint, name).vace_blocks.proj_out.kernel.get_value()
        assert kernel.dtype == jnp.int8 and kernel.sharding.memory_kind == "pinned_host"
    config = kvl.default_config(near)
    config.sample.steps = 2
    videos = (kvl.edit(m, tiny.clip(), BOX, "a star", config=config).video for m in (near, far))
    np.testing.assert_array_equal(*videos)


def test_rows_that_a_mesh_cuts_short_stay_a_matrix():
    mesh = make_mesh(frames=2, devices=jax.devices()[:2])
    place = NamedSharding(mesh, P(None, "frames"), memory_kind="pinned_host")
    rules = ParameterRules(large="kernel")
    for inputs, lies in ((32, (4, 4, 8, 6)), (24, (4, 24, 6))):
        wide = jax.device_put(jnp.ones((4, inputs, 6)), place)
        found = small.parts("kernel", wide, rules, "int8")["kernel"]
        assert found.shape == lies and found.sharding.memory_kind == "pinned_host"
        assert found.sharding.shard_shape(lies)[1] == lies[1] // 2


@pytest.mark.parametrize("rest", [{}, {"weights": "int8"}, {"weights_on": "host"}, BOTH])
def test_a_mesh_shares_them(folder, rest):
    mesh = make_mesh(frames=2, devices=jax.devices()[:2])
    config = kvl.config("t2v_1_3b_480p")
    config.sample.steps = 2
    given = (tiny.clip(), BOX, "a star")
    alone = kvl.edit(kvl.load(folder, **rest), *given, config=config).video
    spread = kvl.load(folder, mesh=mesh, spread=True, **rest)
    shared = kvl.edit(spread, *given, config=config).video
    assert np.abs(alone.astype(int) - shared).max() <= 1


def test_flags(folder, tmp_path, capsys):
    encode.write_video(tmp_path / "in.mkv", tiny.clip(), 8, lossless=True)
    argv = ["edit", "--ckpt_dir", str(folder), "--src_video", str(tmp_path / "in.mkv")]
    argv += ["--bbox", "8,8,16,16", "--prompt", "a star", "--sample_steps", "1"]
    argv += ["--save_file", str(tmp_path / "out.mkv"), "--weights", "int8", "--weights_on", "host"]
    assert main.main(argv) == 0
    assert "blocks in int8, blocks in the host's memory" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [{"weights": "int4"}, {"weights_on": "disk"}])
def test_words_that_are_none(folder, wrong):
    (name,) = wrong
    with pytest.raises(kvl.Error, match=f"{name} must be"):
        kvl.load(folder, **wrong)


def test_shapes_tell_of_them(folder):
    seen = []
    kvl.load(folder, weights="int8", on_shapes=seen.append)
    model = seen[0].checkpoint.transformer
    kernel = model.blocks.ffn.net_2.kernel.get_value()
    assert dataclasses.is_dataclass(seen[0]) and kernel.dtype == jnp.int8
    assert model.blocks.ffn.net_2.scale.get_value().dtype == jnp.float32


@pytest.mark.parametrize("weights", [None, "int8"])
def test_shapes_of_the_hosts_memory_make_the_program_that_runs(folder, weights):
    """Taken for the device's, they had another program compiled ahead than runs, or none."""
    seen = []
    rest = {"weights": weights, "weights_on": "host"}
    model = kvl.load(folder, on_shapes=seen.append, **rest).checkpoint.transformer
    shapes = seen[0].checkpoint.transformer
    spaces = {
        path: jax.typeof(leaf).memory_space
        for path, leaf in kernels(shapes).items()
        if path.startswith("blocks.") and path.endswith(".kernel")
    }
    assert set(spaces.values()) == {jax.memory.Space.Host}
    given = originals.golden_inputs()
    texts = [velocity_of.lower(one, *given).as_text() for one in (model, shapes)]
    assert texts[0] == texts[1]
