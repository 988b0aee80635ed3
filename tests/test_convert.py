"""Conversion of folders that Diffusers wrote, of full-size key lists, and every error."""

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
import whole
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from flax import nnx
from safetensors.numpy import load_file, save_file

from kvlock_jax.checkpoints import format, registry
from kvlock_jax.convert import converter, diffusers, original, source, table
from kvlock_jax.errors import CheckpointError
from kvlock_jax.models.text import tokenizer
from kvlock_jax.models.text.config import UMT5Config
from kvlock_jax.models.text.prompts import encode_prompts
from kvlock_jax.models.vae.config import VAEConfig
from kvlock_jax.models.wan.config import WanConfig
from kvlock_jax.models.wan.vace import WanVACETransformer

LAYOUTS = Path(__file__).parent / "data" / "layouts"


def randomized(model):
    """Gives every parameter distinct random numbers, no zeros and no ones."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def tiny_pipeline(folder: Path) -> WanPipeline:
    torch.manual_seed(0)
    tokenizer.write_word_tokenizer(folder / "words", "a red blue star circle".split(), 12)
    return WanPipeline(
        tokenizer=transformers.AutoTokenizer.from_pretrained(folder / "words"),
        text_encoder=randomized(
            transformers.UMT5EncoderModel(
                transformers.UMT5Config(
                    vocab_size=8, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=3
                )
            )
        ),
        vae=randomized(
            AutoencoderKLWan(
                base_dim=4,
                z_dim=4,
                num_res_blocks=1,
                latents_mean=[0.1, -0.2, 0.3, 0.0],
                latents_std=[1.5, 1.0, 0.5, 2.0],
            )
        ),
        transformer=randomized(
            WanTransformer3DModel(
                num_attention_heads=2,
                attention_head_dim=12,
                in_channels=4,
                out_channels=4,
                text_dim=16,
                freq_dim=8,
                ffn_dim=20,
                num_layers=2,
            )
        ),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return tiny_pipeline(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def saved(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(saved, tmp_path / "wan")


def edit_json(path: Path, **changes) -> None:
    values = json.loads(path.read_text())
    values.update(changes)
    path.write_text(json.dumps({k: v for k, v in values.items() if v != "drop"}))


def edit_tensors(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def parameters(model) -> dict:
    return {path: variable[...] for path, variable in nnx.to_flat_state(nnx.state(model))}


# -- full published sizes ------------------------------------------------------------------------

XXL = UMT5Config(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
SMALL = WanConfig(num_attention_heads=12, attention_head_dim=128, num_layers=30, ffn_dim=8960)
LARGE = WanConfig(num_attention_heads=40, attention_head_dim=128, num_layers=40, ffn_dim=13824)
FULL = {
    "wan2.1-t2v-1.3b": SMALL,
    "wan2.1-t2v-14b": LARGE,
    "wan2.1-vace-1.3b": dataclasses.replace(SMALL, vace_layers=tuple(range(0, 30, 2))),
    "wan2.1-vace-14b": dataclasses.replace(LARGE, vace_layers=tuple(range(0, 40, 5))),
    "wan2.2-ti2v-5b": WanConfig(24, 128, 30, 14336, 48, 48),
    "wan2.1-vae": VAEConfig(),
    "umt5-xxl-encoder": XXL,
}
TABLES = {
    "diffusers": {WanConfig: diffusers.WAN, VAEConfig: diffusers.VAE, UMT5Config: diffusers.UMT5},
    "original": {
        WanConfig: original.WAN,
        VAEConfig: original.vae(VAEConfig()),
        UMT5Config: original.UMT5,
    },
}


# The experts of Wan 2.2's A14B have the names and shapes of Wan 2.1's 14B, one for one.
@pytest.mark.parametrize("layout", TABLES)
@pytest.mark.parametrize("name", FULL)
def test_every_published_key_lands_on_one_parameter(name, layout):
    config = FULL[name]
    shapes = json.loads((LAYOUTS / f"{name}.{layout}.json").read_text())
    tensors = {
        key: table.LazyTensor(tuple(shape), np.dtype(np.float32), pytest.fail)
        for key, shape in shapes.items()
    }
    model = nnx.state(registry.abstract(config))
    sources = table.plan(model, tensors, TABLES[layout][type(config)], name)
    tied = [key for key in shapes if key == "encoder.embed_tokens.weight"]
    keys = [key for found in sources for key in found.keys]
    assert sorted(keys + tied) == sorted(shapes)
    assert len(sources) == len(jax.tree.leaves(model))
    assert len({found.path for found in sources}) == len(sources)
    for found in sources:
        assert math.prod(found.shape) == sum(math.prod(shapes[key]) for key in found.keys)


# -- folders -------------------------------------------------------------------------------------


def test_configs(saved):
    configs = source.open_source(saved).configs
    assert configs.transformer == WanConfig(
        2, 12, num_layers=2, ffn_dim=20, in_channels=4, out_channels=4, text_dim=16, freq_dim=8
    )
    assert configs.vae == VAEConfig(
        base_dim=4,
        z_dim=4,
        num_res_blocks=1,
        latents_mean=(0.1, -0.2, 0.3, 0.0),
        latents_std=(1.5, 1.0, 0.5, 2.0),
    )
    assert configs.text_encoder == UMT5Config(
        vocab_size=8, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=3
    )
    assert configs.scheduler["flow_shift"] == 3.0


def test_loaded_text_encoder_equals_the_pipeline(pipeline, saved):
    encoder = diffusers.load_model(saved / "text_encoder", diffusers.TEXT_ENCODER)
    prompts = ["a red star", "", "blue circle"]
    with torch.no_grad():
        want, _ = pipeline.encode_prompt(prompts, None, False, max_sequence_length=12)
    got = encode_prompts(encoder, tokenizer.Tokenizer(saved / "tokenizer"), prompts)
    np.testing.assert_allclose(got, want.numpy(), atol=1e-5)


def test_loaded_vae_equals_the_pipeline(pipeline, saved):
    vae = diffusers.load_model(saved / "vae", diffusers.AUTOENCODER)
    video = np.random.default_rng(0).uniform(-1, 1, (1, 5, 16, 24, 3)).astype(np.float32)
    with torch.no_grad():
        posterior = pipeline.vae.encode(torch.tensor(video).permute(0, 4, 1, 2, 3)).latent_dist
    want = posterior.mean.permute(0, 2, 3, 4, 1).numpy()
    mean, _ = nnx.jit(lambda vae, x: vae.moments(x))(vae, jnp.asarray(video))
    np.testing.assert_allclose(mean, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


def test_loaded_transformer_equals_the_pipeline(pipeline, saved):
    model = diffusers.load_model(saved / "transformer", diffusers.TRANSFORMER)
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(2, 2, 4, 6, 4)).astype(np.float32)
    context = rng.normal(size=(2, 7, 16)).astype(np.float32)
    timestep = np.array([900.0, 30.0], np.float32)
    with torch.no_grad():
        want = pipeline.transformer(
            torch.tensor(latents).permute(0, 4, 1, 2, 3),
            torch.tensor(timestep),
            torch.tensor(context),
        ).sample.permute(0, 2, 3, 4, 1)

    got = nnx.jit(whole.velocity)(model, *map(jnp.asarray, (latents, timestep, context)))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want.numpy()).max())


def test_shards_give_the_same(pipeline, saved, tmp_path):
    pipeline.save_pretrained(tmp_path, max_shard_size="10KB")
    pipeline.text_encoder.save_pretrained(tmp_path / "text_encoder", max_shard_size="5KB")
    for component in diffusers.components(saved):
        assert len(list((tmp_path / component.name).glob("*.safetensors"))) > 1
    one, many = source.load(saved), source.load(tmp_path)
    for component in diffusers.components(saved):
        want = parameters(getattr(one, component.name))
        got = parameters(getattr(many, component.name))
        assert want.keys() == got.keys()
        for path in want:
            np.testing.assert_array_equal(got[path], want[path])


def test_bfloat16_is_kept_and_read_without_torch(folder):
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    arrays = {k: v.astype(ml_dtypes.bfloat16) for k, v in load_file(path).items()}
    save_file(arrays, path)
    program = (
        "import sys, jax; from kvlock_jax.convert import diffusers;"
        f"vae = diffusers.load_model({str(path.parent)!r}, diffusers.AUTOENCODER);"
        "print('torch' in sys.modules, vae.encoder.conv_in.bias.dtype)"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.stdout.split() == ["False", "bfloat16"], ran.stderr
    vae = diffusers.load_model(path.parent, diffusers.AUTOENCODER)
    bias = vae.encoder.conv_in.bias[...]
    np.testing.assert_array_equal(bias, arrays["encoder.conv_in.bias"])


@pytest.mark.parametrize("kept", ["shared.weight", "encoder.embed_tokens.weight"])
def test_tied_embedding_under_either_name(folder, saved, kept):
    def rename(tensors):
        tensors[kept] = tensors.pop("shared.weight")

    edit_tensors(folder / "text_encoder" / "model.safetensors", rename)
    want, got = (
        diffusers.load_model(f / "text_encoder", diffusers.TEXT_ENCODER).shared.embedding[...]
        for f in (saved, folder)
    )
    np.testing.assert_array_equal(got, want)


# -- errors, case by case ------------------------------------------------------------------------


def test_mismatches_of_all_models_at_once(folder):
    def spoil(tensors):
        tensors["extra"] = tensors.pop("quant_conv.bias")

    edit_tensors(folder / "vae" / "diffusion_pytorch_model.safetensors", spoil)
    edit_json(folder / "transformer" / "config.json", num_layers=1, ffn_dim=21)
    with pytest.raises(CheckpointError) as caught:
        source.load(folder)
    lines = str(caught.value).splitlines()
    assert "  missing: quant_conv.bias" in lines and "  unexpected: extra" in lines
    assert "  unexpected: blocks.1.attn1.to_q.weight" in lines
    assert any("blocks.0.ffn.net.0.proj.bias is [20]; the model has [21]" in x for x in lines)
    edit_json(folder / "transformer" / "config.json", num_layers=3, ffn_dim=20)
    with pytest.raises(CheckpointError, match=r"missing: blocks\.2\.attn2\.norm_q\.weight"):
        source.load(folder)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _quantise(path: Path) -> None:
    arrays = {k: v.astype(np.int8) for k, v in load_file(path).items()}
    save_file(arrays, path)


WEIGHTS = "vae/diffusion_pytorch_model.safetensors"
BROKEN = {
    "no folder": (shutil.rmtree, "", "no such folder"),
    "index not JSON": (lambda p: p.write_text("{"), "model_index.json", "is not JSON"),
    "index a list": (lambda p: p.write_text("[]"), "model_index.json", "found a list"),
    "another pipeline": (
        lambda p: edit_json(p, _class_name="StableDiffusionPipeline"),
        "model_index.json",
        r"of a StableDiffusionPipeline, expected a WanPipeline or a WanVACEPipeline",
    ),
    "half of Wan 2.2": (
        lambda p: edit_json(p, transformer_2=["diffusers", "WanTransformer3DModel"]),
        "model_index.json",
        "has no transformer_2/",
    ),
    "no vae": (shutil.rmtree, "vae", "has no vae/"),
    "no scheduler": (shutil.rmtree, "scheduler", "has no scheduler/"),
    "no config": (Path.unlink, "vae/config.json", r"cannot read .*vae/config\.json"),
    "another transformer": (
        lambda p: edit_json(p, _class_name="WanVACETransformer3DModel"),
        "transformer/config.json",
        "of a WanVACETransformer3DModel, expected a WanTransformer3DModel",
    ),
    "a transformer that is no pipeline's own": (
        lambda p: edit_json(p, _class_name="WanVACEPipeline"),
        "model_index.json",
        "of a WanTransformer3DModel, expected a WanVACETransformer3DModel",
    ),
    "image to video": (
        lambda p: edit_json(p, image_dim=1280),
        "transformer/config.json",
        "image_dim is 1280, supported is only None",
    ),
    "another text encoder": (
        lambda p: edit_json(p, architectures=["T5EncoderModel"]),
        "text_encoder/config.json",
        "of a T5EncoderModel, expected a UMT5EncoderModel",
    ),
    "no size": (
        lambda p: edit_json(p, latents_mean="drop", z_dim="drop"),
        "vae/config.json",
        r"vae/config\.json has no z_dim, latents_mean",
    ),
    "wrong size": (
        lambda p: edit_json(p, ffn_dim="wide"),
        "transformer/config.json",
        r"config\.json: WanConfig\.ffn_dim must be int, found 'wide'",
    ),
    "no weights": (Path.unlink, WEIGHTS, r"vae has neither diffusion_pytorch_model\.safetensors"),
    "cut short": (_cut, WEIGHTS, rf"{WEIGHTS} is damaged or cut short"),
    "empty": (lambda p: p.write_bytes(b""), WEIGHTS, rf"{WEIGHTS} is damaged or cut short"),
    "quantised": (_quantise, WEIGHTS, "is I8, probably quantised"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folder(folder, case):
    damage, where, message = BROKEN[case]
    damage(folder / where)
    with pytest.raises(CheckpointError, match=message):
        source.load(folder)


# -- VACE ----------------------------------------------------------------------------------------


def test_vace_folder(tiny_vace_checkpoint, tmp_path):
    configs = source.open_source(tiny_vace_checkpoint).configs
    assert configs.transformer.vace_layers == (0, 2)
    assert configs.transformer.vace_in_channels == 72
    assert source.describe(tiny_vace_checkpoint).family == "wan2.1-vace"
    loaded = source.load(tiny_vace_checkpoint)
    assert type(loaded.transformer) is WanVACETransformer
    converter.convert(tiny_vace_checkpoint, tmp_path)
    assert format.describe(tmp_path).family == "wan2.1-vace"
    restored = format.load(tmp_path)
    assert restored.configs.transformer == configs.transformer
    assert type(restored.transformer) is WanVACETransformer
    want, got = parameters(loaded.transformer), parameters(restored.transformer)
    assert want.keys() == got.keys()
    for path in want:
        np.testing.assert_array_equal(got[path], want[path])


@pytest.mark.parametrize("key", ["vace_layers", "vace_in_channels"])
def test_vace_folder_must_say_its_own(tiny_vace_checkpoint, tmp_path, key):
    copy = shutil.copytree(tiny_vace_checkpoint, tmp_path / "wan")
    edit_json(copy / "transformer" / "config.json", **{key: "drop"})
    with pytest.raises(CheckpointError, match=rf"config\.json has no {key}"):
        source.load(copy)
