"""LoRA files: every spelling of one change, what fits nothing, and both ways to merge."""

import json
import re
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import originals
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from test_wan import velocity_of

import kvlock_jax as kvl
from kvlock_jax.batch.fingerprint import checkpoint_identity
from kvlock_jax.checkpoints import format
from kvlock_jax.checkpoints.files import Loras, parse_loras
from kvlock_jax.cli import main
from kvlock_jax.convert import converter, diffusers, lora, original, sizes, table, weights
from kvlock_jax.errors import CheckpointError, InputError
from kvlock_jax.media import encode
from kvlock_jax.models.wan.config import WanConfig
from kvlock_jax.models.wan.transformer import WanTransformer

DATA = Path(__file__).parent / "data"
LORAS = DATA / "lora"
SAME = sorted(path.stem for path in LORAS.glob("*.safetensors") if path.stem != "lightx2v")


@pytest.fixture(scope="module")
def model():
    tensors = weights.open_file(DATA / "original" / "t2v.safetensors")
    config = sizes.transformer(tensors, originals.SIZES["dit"], DATA)
    graph, state = nnx.split(diffusers.abstract(diffusers.TRANSFORMER, config))
    return lambda: nnx.merge(graph, table.fill(state, tensors, original.WAN, "t2v"))


def velocity(model):
    return np.moveaxis(velocity_of(model, *originals.golden_inputs())[0], -1, 0)


def relative(found, key):
    with np.load(LORAS / "expected.npz") as data:
        want, plain = data[key], data["velocity"]
    assert np.linalg.norm(want - plain) > 1e-2 * np.linalg.norm(plain)
    return np.linalg.norm(found - want) / np.linalg.norm(want)


def merged(model, text):
    return lora.merged(model, lora.open_changes(parse_loras(text), model))


@pytest.mark.parametrize("name", SAME)
def test_every_spelling_is_the_publishers(model, name):
    assert relative(velocity(merged(model(), f"{LORAS}/{name}.safetensors")), "same") < 1e-5


def test_differences_of_norms_biases_and_modulation_are_added(model):
    found = velocity(merged(model(), f"{LORAS}/lightx2v.safetensors"))
    assert relative(found, "lightx2v") < 1e-5


@pytest.fixture(scope="module")
def of_14b():
    return nnx.eval_shape(lambda: WanTransformer(WanConfig(40, 128, 40, 13824), rngs=nnx.Rngs(0)))


KEYS = sorted((LORAS / "keys").glob("*.json"))


@pytest.mark.parametrize("keys", KEYS, ids=lambda path: path.stem)
def test_every_key_of_14b_lands_on_a_parameter(of_14b, tmp_path, monkeypatch, keys):
    """Pairs and differences; the list that is not of text-to-video is left out."""
    shapes = json.loads(keys.read_text())
    sizes = {key: tuple(8 if n == "r" else n for n in shape) for key, shape in shapes.items()}
    tensors = {
        key: table.LazyTensor(size, np.dtype(np.float32), lambda: np.float32(4))
        for key, size in sizes.items()
    }
    monkeypatch.setattr(lora, "_open", lambda path: (tensors, {}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = lora.open_changes([(keys, 1.0)], of_14b)
    parts = re.compile(r"(lora_(A|down).*weight|diff\w*)$")
    wanted = 0 if keys.stem.startswith("not") else len(list(filter(parts.search, shapes)))
    assert sum(map(len, found.values())) == wanted


def test_strengths_scale_and_files_add_up(model):
    half = f"{LORAS}/kohya.safetensors:0.5"
    assert relative(velocity(merged(model(), half)), "same_half") < 1e-5
    assert relative(velocity(merged(model(), f"{half}, {half}")), "same") < 1e-5


def changed(tmp_path, **changes):
    tensors = load_file(LORAS / "original-ab.safetensors")
    save_file(tensors | changes, tmp_path / "a.safetensors")
    return f"{tmp_path}/a.safetensors"


@pytest.mark.parametrize(
    "key, shape, message",
    [
        ("diffusion_model.blocks.9.ffn.0.diff", (2, 2), r"blocks\.9\.ffn\.0 \(weight\)"),
        ("diffusion_model.blocks.0.ffn.0.diff_b", (7,), r"\[7\]; the model has"),
        ("diffusion_model.blocks.0.ffn.0.strange", (1,), r"ffn\.0\.strange"),
        ("diffusion_model.blocks.0.norm3.lora_A.weight", (1, 2), r"half of a pair, down"),
        ("blocks.0.ffn.0.hada_w1_a", (1,), "not a plain LoRA"),
        ("blocks.0.ffn.0.dora_scale", (1,), "not a plain LoRA"),
    ],
)
def test_what_fits_nothing_is_listed(model, tmp_path, key, shape, message):
    text = changed(tmp_path, **{key: np.zeros(shape, np.float32)})
    with pytest.raises(CheckpointError, match=message):
        merged(model(), text)


def test_layers_of_image_models_are_named_once_and_left_out(model, tmp_path):
    keys = [f"diffusion_model.blocks.{n}.cross_attn.k_img.diff" for n in (0, 1)]
    text = changed(tmp_path, **dict.fromkeys(keys, np.ones((2, 2), np.float32)))
    with pytest.warns(UserWarning, match="2 layers of image-to-video") as seen:
        found = velocity(merged(model(), text))
    assert len(seen) == 1 and relative(found, "same") < 1e-5


def test_bad_files_and_strengths_get_one_line(model, tmp_path):
    with pytest.raises(InputError, match="no such LoRA file"):
        parse_loras(f"{tmp_path}/none.safetensors")
    with pytest.raises(InputError, match="must be finite"):
        parse_loras(f"{LORAS}/kohya.safetensors:nan")
    (tmp_path / "cut.safetensors").write_bytes((LORAS / "kohya.safetensors").read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="damaged"):
        merged(model(), f"{tmp_path}/cut.safetensors")


def test_peft_names_its_scale_beside_the_file(model, tmp_path):
    tensors = load_file(LORAS / "diffusers.safetensors")
    tensors = {k.replace("transformer.", "base_model.model.", 1): v for k, v in tensors.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    ranks = {len(v) for k, v in tensors.items() if ".lora_A." in k and "ffn" not in k}
    (rank,) = ranks
    patterns = {k.split(".lora_")[0][17:]: 3.0 for k in tensors if "ffn" in k}
    facts = {"r": rank, "lora_alpha": rank**0.5, "alpha_pattern": {}, "use_rslora": True}
    half = {k: 3**0.5 for k in patterns}
    (tmp_path / "adapter_config.json").write_text(json.dumps(facts | {"alpha_pattern": half}))
    found = velocity(merged(model(), f"{tmp_path}/adapter_model.safetensors"))
    assert relative(found, "same") < 1e-5


@pytest.mark.parametrize("dtype", [None, ml_dtypes.bfloat16])
def test_converted_is_loaded_with(tmp_path, dtype):
    """A LoRA merged by `convert` and by `load`; bfloat16 is rounded once."""
    folder = originals.write_folder(tmp_path / "published")
    text = f"{LORAS}/lightx2v.safetensors:0.7"
    converter.convert(folder, tmp_path / "own", dtype, loras=Loras(text))
    own = kvl.load(tmp_path / "own").checkpoint.transformer
    exact = kvl.load(folder, loras=text).checkpoint.transformer
    for found, want in zip(*map(_leaves, (own, exact)), strict=True):
        np.testing.assert_array_equal(found, want.astype(found.dtype))
    converter.convert(folder, tmp_path / "plain", dtype)
    twice = kvl.load(tmp_path / "plain", loras=text).checkpoint.transformer
    for found, want in zip(*map(_leaves, (twice, own)), strict=True):
        # on weights that were rounded before, two roundings
        close = {"rtol": 2**-7, "atol": 2**-9} if dtype else {"rtol": 0, "atol": 0}
        np.testing.assert_allclose(np.float32(found), np.float32(want), **close)
    files = format.describe(tmp_path / "own").source["files"]
    assert "lightx2v.safetensors:0.7" in files


def _leaves(model):
    return [np.asarray(leaf.get_value()) for _, leaf in nnx.to_flat_state(nnx.state(model))]


def test_the_command_line_takes_loras(tmp_path, capsys):
    """An edit by files named by flag; a missing one and one of another model get a line."""
    frames = np.zeros((5, 48, 64, 3), np.uint8)
    encode.write_video(tmp_path / "in.mkv", frames, 12, lossless=True)
    originals.write_folder(tmp_path / "wan")
    flags = [f"--ckpt={tmp_path}/wan", f"--src_video={tmp_path}/in.mkv", "--bbox=0,0,32,32"]
    flags += ["--prompt=a red star", f"--save_file={tmp_path}/out.mkv", "--sample_steps=1"]

    def edit(lora):
        status = main.main(["edit", *flags, f"--lora={lora}", f"--trace={tmp_path}/out.json"])
        return status, capsys.readouterr()

    file = f"{LORAS}/kohya.safetensors:0.5"
    status, said = edit(file)
    assert status == 0 and f"changed  by {file}" in said.out
    assert json.loads((tmp_path / "out.json").read_text())["lora"] == file
    assert edit("none.safetensors")[1].err == "error: none.safetensors: no such LoRA file\n"
    save_file({"blocks.7.ffn.0.diff": np.zeros((1, 1), np.float32)}, tmp_path / "x.safetensors")
    status, said = edit(f"{tmp_path}/x.safetensors")
    assert status == 2 and "does not fit the model, 1 keys:" in said.err


def test_a_lora_is_a_part_of_what_a_batch_made_an_edit_from():
    plain, half, whole = (
        checkpoint_identity("demo", loras=Loras(text))
        for text in ("", f"{LORAS}/kohya.safetensors:0.5", f"{LORAS}/kohya.safetensors")
    )
    assert "loras" not in plain and half["loras"] != whole["loras"]


def test_a_lora_of_text_to_video_changes_the_main_blocks_of_vace(tmp_path):
    folder = originals.write_folder(tmp_path / "vace", "vace")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain, found = (
            kvl.load(folder, loras=text).checkpoint.transformer
            for text in ("", f"{LORAS}/kohya.safetensors")
        )
    pairs = zip(_leaves(plain.vace_blocks), _leaves(found.vace_blocks), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)
    kernel = "blocks.attn1.to_q.kernel".split(".")
    assert not np.array_equal(_at(plain, kernel), _at(found, kernel))


def _at(model, path):
    for name in path:
        model = getattr(model, name)
    return np.asarray(model[...])
