"""Recognition of layouts, original folders, inferred sizes, pickles, and every refusal."""

import dataclasses
import json
import pickle
import shutil
import sys
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import originals
import pytest
import torch
from diffusers import AutoencoderKLWan
from etils import epath
from safetensors.numpy import load_file, save_file

from kvlock_jax.checkpoints import format, registry
from kvlock_jax.convert import converter, sizes, source, weights
from kvlock_jax.convert.source import open_source
from kvlock_jax.convert.table import LazyTensor
from kvlock_jax.errors import CheckpointError
from kvlock_jax.models.text.config import UMT5Config
from kvlock_jax.models.vae.config import VAEConfig
from kvlock_jax.models.wan.config import WanConfig

LAYOUTS = Path(__file__).parent / "data" / "layouts"
TRANSFORMER = "diffusion_pytorch_model.safetensors"
VAE, TEXT = "Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"

SMALL = WanConfig(
    num_attention_heads=2,
    attention_head_dim=32,
    num_layers=3,
    ffn_dim=112,
    text_dim=48,
    freq_dim=32,
)
CONFIGS = {"t2v": SMALL, "vace": dataclasses.replace(SMALL, vace_layers=(0, 2))}


@pytest.fixture(scope="module", params=list(CONFIGS))
def family(request):
    return request.param


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return originals.write_folder(tmp_path_factory.mktemp("original") / "wan")


@pytest.fixture
def folder(saved, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(saved, tmp_path / "wan")


def test_original_folder(tmp_path, family):
    opened = open_source(originals.write_folder(tmp_path / "wan", family))
    assert opened.layout == "original"
    assert opened.configs.transformer == CONFIGS[family]
    assert dataclasses.replace(
        opened.configs.vae, latents_mean=(0,) * 16, latents_std=(1,) * 16
    ) == (VAEConfig(base_dim=8, num_res_blocks=1))
    assert opened.configs.text_encoder == UMT5Config(
        vocab_size=97, d_model=48, d_kv=8, d_ff=72, num_layers=2, num_heads=4
    )
    assert opened.tokenizer == tmp_path / "wan" / "google" / "umt5-xxl"
    on_disk = {path for path in (tmp_path / "wan").rglob("*") if path.is_file()}
    assert set(opened.files) == on_disk and len(opened.files) == len(on_disk)
    parameters = opened.parameters()
    assert {name for name in parameters} == set(registry.NETWORKS)
    tensors = load_file(originals.DATA / f"{family}.safetensors")
    kernel = parameters["transformer"]["blocks.ffn.net_0.kernel"]
    want = np.stack([tensors[f"blocks.{i}.ffn.0.weight"].T for i in range(3)])
    np.testing.assert_array_equal(kernel.whole(), want)
    assert opened.describe().family == f"wan2.1-{family}"


def test_sharded_original_folder(folder, saved):
    tensors = load_file(folder / TRANSFORMER)
    keys = sorted(tensors)
    where = {key: f"diffusion_pytorch_model-{i % 3}.safetensors" for i, key in enumerate(keys)}
    for name in set(where.values()):
        save_file({key: tensors[key] for key in keys if where[key] == name}, folder / name)
    (folder / TRANSFORMER).unlink()
    (folder / f"{TRANSFORMER}.index.json").write_text(json.dumps({"weight_map": where}))
    got, want = (open_source(f).parameters()["transformer"] for f in (folder, saved))
    for path in want:
        np.testing.assert_array_equal(got[path].whole(), want[path].whole(), err_msg=path)
    files = {path.name for path in open_source(folder).files}
    assert {f"{TRANSFORMER}.index.json", *where.values()} < files


# -- sizes ---------------------------------------------------------------------------------------


def shapes_of(name: str) -> dict[str, LazyTensor]:
    listed = json.loads((LAYOUTS / f"{name}.original.json").read_text())
    kind = np.dtype(np.float32)
    return {k: LazyTensor(tuple(shape), kind, pytest.fail) for k, shape in listed.items()}


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("wan2.1-t2v-1.3b", WanConfig(12, 128, 30, 8960)),
        ("wan2.1-t2v-14b", WanConfig(40, 128, 40, 13824)),
        ("wan2.1-vace-1.3b", WanConfig(12, 128, 30, 8960, vace_layers=tuple(range(0, 30, 2)))),
        ("wan2.1-vace-14b", WanConfig(40, 128, 40, 13824, vace_layers=tuple(range(0, 40, 5)))),
        ("wan2.2-ti2v-5b", WanConfig(24, 128, 30, 14336, 48, 48)),
    ],
)
def test_published_transformers_need_no_config(name, config):
    assert sizes.transformer(shapes_of(name), {}, Path("wan")) == config


def test_published_vae_and_text_encoder():
    published = sizes.vae(shapes_of("wan2.1-vae"), Path("vae"))
    theirs = AutoencoderKLWan(base_dim=4).config
    mean, std = tuple(theirs.latents_mean), tuple(theirs.latents_std)
    assert published == VAEConfig(latents_mean=mean, latents_std=std)
    assert sizes.umt5(shapes_of("umt5-xxl-encoder"), Path("t5")) == UMT5Config(
        vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64
    )


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("t2v", {"_class_name": "WanI2V"}, "is of a WanI2V, expected a WanModel or VaceWanModel"),
        ("t2v", {"_class_name": "WanTransformer3DModel"}, "give the one with model_index.json"),
        ("t2v", {"model_type": "i2v"}, "is of model type 'i2v', supported are 't2v' and 'vace'"),
        ("t2v", {"ffn_dim": 5}, "config.json has ffn_dim 5, the tensors have 112"),
        ("t2v", {"num_heads": 5}, "width 64 is not of 5 heads"),
        ("vace", {"vace_layers": [0]}, "config.json has 1 vace_layers, the tensors have 2"),
        ("vace", {"vace_layers": [0, 7]}, "WanConfig.vace_layers must be .*found"),
        ("vace", {"vace_layers": None}, "2 context blocks do not stand at even distances among 3"),
    ],
)
def test_config_that_does_not_fit(tmp_path, family, changes, message):
    folder = originals.write_folder(tmp_path / "wan", family)
    originals.write_config(folder, family, **changes)
    with pytest.raises(CheckpointError, match=message):
        open_source(folder)


def test_one_model_of_a_diffusers_folder(tiny_checkpoint):
    with pytest.raises(CheckpointError, match=r"wan/transformer is one model .* model_index\.json"):
        open_source(tiny_checkpoint / "transformer")


def test_unpublished_sizes_need_a_config(folder):
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="width 64 is not of any heads of 128; put the pub"):
        open_source(folder)


def test_image_to_video_is_refused_without_a_config():
    tensors = shapes_of("wan2.1-t2v-1.3b")
    tensors["img_emb.proj.0.bias"] = tensors["blocks.0.ffn.2.bias"]
    with pytest.raises(CheckpointError, match="is of model type 'i2v'"):
        sizes.transformer(tensors, {}, Path("wan"))


def test_other_models_under_the_known_names(folder):
    originals.write_pickle(originals.DATA / "umt5.safetensors", folder / VAE)
    with pytest.raises(CheckpointError, match=rf"{VAE} is no VAE of Wan: it has neither"):
        open_source(folder)


def test_mismatches_of_all_models_at_once(folder):
    for name in (VAE, TEXT):
        tensors = torch.load(folder / name)
        tensors["extra"] = tensors.pop(
            next(k for k in tensors if k.endswith("norm1.weight") or "gamma" in k)
        )
        torch.save(tensors, folder / name)
    with pytest.raises(CheckpointError) as caught:
        open_source(folder).parameters()
    text = str(caught.value)
    assert text.count("unexpected: extra") == 2 and text.count("  missing: ") == 2
    assert VAE in text and TEXT in text


# -- for those who edit --------------------------------------------------------------------------


def test_either_layout_is_loaded_and_described(saved, tiny_checkpoint, tmp_path):
    for folder, layout in ((saved, "original"), (tiny_checkpoint, "diffusers")):
        assert source.is_published(folder) and source.is_published(epath.Path(folder))
        contents, models = source.describe(folder), source.load(folder, compute_dtype=jnp.bfloat16)
        assert contents == open_source(folder).describe()
        assert models.configs == contents.configs and models.transformer.dtype == jnp.bfloat16
        assert models.tokenizer == open_source(folder).tokenizer
        converter.convert(folder, tmp_path / layout)
        assert not source.is_published(tmp_path / layout)
        assert format.describe(tmp_path / layout).models == contents.models
    assert not source.is_published(tmp_path) and not source.is_published(tmp_path / "nothing")


def test_published_folders_are_local():
    with pytest.raises(CheckpointError, match=r"gs://b/wan: .* read from local folders only"):
        open_source(epath.Path("gs://b/wan"))


# -- pickles -------------------------------------------------------------------------------------


def test_bfloat16_of_a_pickle(tmp_path):
    values = np.random.default_rng(0).normal(size=(6, 4)).astype(ml_dtypes.bfloat16)
    tensor = torch.tensor(values.astype(np.float32)).to(torch.bfloat16)
    torch.save({"a": tensor, "t": tensor.T}, tmp_path / "x.pth")
    tensors = weights.open_pickle(tmp_path / "x.pth")
    assert (tensors["a"].shape, tensors["a"].dtype) == ((6, 4), values.dtype)
    got = tensors["a"].read()
    assert got.dtype == values.dtype and got.base is not None  # Torch's memory, not a copy
    np.testing.assert_array_equal(got, values)
    np.testing.assert_array_equal(tensors["a"].rows(2, 5), values[2:5])
    np.testing.assert_array_equal(tensors["t"].read(), values.T)


def test_pickle_of_the_old_format(tmp_path):
    tensor = torch.arange(6.0).to(torch.float16)
    torch.save({"a": tensor}, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    np.testing.assert_array_equal(weights.open_pickle(tmp_path / "x.pth")["a"].read(), range(6))


def test_safetensors_beside_a_pickle_need_no_torch(folder, saved, monkeypatch):
    for name, stem in ((VAE, "vae"), (TEXT, "umt5")):
        shutil.copy(
            originals.DATA / f"{stem}.safetensors", (folder / name).with_suffix(".safetensors")
        )
    (folder / TEXT).unlink()
    want = {
        name: {path: value.whole() for path, value in values.items()}
        for name, values in open_source(saved).parameters().items()
    }
    monkeypatch.setitem(sys.modules, "torch", None)
    opened = open_source(folder)
    assert {p.suffix for p in opened.files} == {".json", ".safetensors"}
    for name, values in opened.parameters().items():
        for path, value in values.items():
            np.testing.assert_array_equal(value.whole(), want[name][path])
    with pytest.raises(CheckpointError, match=rf"{VAE} takes Torch to read: pip install torch, or"):
        open_source(saved)


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-300])


PICKLES = {
    "code": (
        lambda p: p.write_bytes(pickle.dumps({"a": Evil()}, 2)),
        "is damaged, or no file of wei",
    ),
    "code, zipped": (
        lambda p: torch.save({"a": Evil()}, p),
        "is damaged, or no file of weights: W",
    ),
    "cut short": (cut, "is damaged, or no file of weights"),
    "empty": (lambda p: p.write_bytes(b""), "is damaged, or no file of weights"),
    "a list": (lambda p: torch.save([torch.zeros(1)], p), "holds a list, expected tensors by name"),
    "nested": (
        lambda p: torch.save({"state_dict": {"a": torch.zeros(1)}}, p),
        "state_dict is dict, expected a tensor of one of F64",
    ),
    "quantised": (
        lambda p: torch.save({"a": torch.zeros(1, dtype=torch.int8)}, p),
        "a is torch.int8, expected a tensor",
    ),
    "float8 with scales": (
        lambda p: torch.save({"a.scale_weight": torch.zeros(1)}, p),
        "is quantised .it holds a.scale_weight",
    ),
}


@pytest.mark.parametrize("case", PICKLES)
def test_broken_pickle(folder, case, monkeypatch):
    monkeypatch.chdir(folder)
    damage, message = PICKLES[case]
    damage(folder / VAE)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_source(folder)
    assert len(str(caught.value).splitlines()) == 1 and VAE in str(caught.value)
    assert not Path("ran").exists()


# -- refusals ------------------------------------------------------------------------------------


def one(key: str, path: Path, kind=np.float32) -> None:
    save_file({key: np.zeros((2, 2), kind)}, path)


REFUSED = {
    "nothing": (shutil.rmtree, "wan: no such folder"),
    "an empty folder": (
        lambda f: (shutil.rmtree(f), f.mkdir()),
        r"no checkpoint that can be converted: it has neither model_index\.json \(Diffusers' layo",
    ),
    "no parts": (
        lambda f: (shutil.rmtree(f / "google"), (f / VAE).unlink(), (f / TEXT).unlink()),
        rf"has no {VAE}, {TEXT}, google/umt5-xxl/tokenizer\.json",
    ),
    "converted": (
        lambda f: (f / format.METADATA).write_text("{}"),
        "is a converted checkpoint already",
    ),
    "a LoRA in its place": (
        lambda f: one("blocks.0.self_attn.q.lora_A.weight", f / TRANSFORMER),
        f"{TRANSFORMER} is a LoRA .it holds blocks.0.self_attn.q.lora_A.weight",
    ),
    "a LoRA of another maker": (
        lambda f: one("lora_unet_blocks_0_cross_attn_k.alpha", f / TRANSFORMER),
        "is a LoRA",
    ),
    "a folder of a LoRA": (
        lambda f: (
            (f / TRANSFORMER).unlink(),
            one("diffusion_model.blocks.0.ffn.0.lora_down.weight", f / "style.safetensors"),
        ),
        r"style\.safetensors is a LoRA",
    ),
    "int8": (
        lambda f: one("blocks.0.ffn.0.weight", f / TRANSFORMER, np.int8),
        "blocks.0.ffn.0.weight is I8, probably quantised",
    ),
    "bitsandbytes": (
        lambda f: one("blocks.0.ffn.0.weight.absmax", f / TRANSFORMER),
        r"is quantised \(it holds blocks\.0\.ffn\.0\.weight\.absmax\)",
    ),
    "a scale without its weight": (
        lambda f: one("blocks.0.ffn.0.weight_scale", f / TRANSFORMER),
        "has a scale for blocks.0.ffn.0.weight, which it lacks",
    ),
    "an empty GGUF": (
        lambda f: ((f / TRANSFORMER).unlink(), (f / "wan-Q4_K_M.gguf").touch()),
        r"wan-Q4_K_M\.gguf is damaged, or no GGUF file",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(folder, case):
    damage, message = REFUSED[case]
    if case == "converted":
        (folder / TRANSFORMER).unlink()
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_source(folder)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("style.safetensors", r"style\.safetensors is a LoRA"),
        ("wan.gguf", r"wan\.gguf is damaged, or no GGUF file"),
        ("wan.ckpt", r"wan\.ckpt is a file; give the folder of a whole checkpoint"),
    ],
)
def test_a_file_is_no_folder(tmp_path, name, message):
    one("a.lora_up.weight", tmp_path / name)
    with pytest.raises(CheckpointError, match=message):
        open_source(tmp_path / name)
