"""Two experts in folders and files: which is whose, and what becomes of it in a checkpoint."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import originals
import pytest
import tiny
from flax import nnx
from safetensors.numpy import load_file, save_file

import kvlock_jax as kvl
from kvlock_jax.checkpoints import format
from kvlock_jax.checkpoints.files import Files, Loras, by_role
from kvlock_jax.checkpoints.registry import Configs
from kvlock_jax.cli import main
from kvlock_jax.cli.loading import shift_note
from kvlock_jax.convert import converter, sizes, source
from kvlock_jax.errors import CheckpointError, InputError
from kvlock_jax.media import decode, encode
from kvlock_jax.models.text.config import UMT5Config
from kvlock_jax.models.vae.config import VAEConfig
from kvlock_jax.models.wan.config import WanConfig

LORA = originals.DATA.parent / "lora" / "kohya.safetensors"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def scaled(path, by: float) -> dict[str, np.ndarray]:
    return {key: np.asarray(x) * np.float32(by) for key, x in load_file(path).items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The publisher's layout of two experts; all numbers of the low-noise one are doubled."""
    folder = originals.write_folder(tmp_path_factory.mktemp("a14b") / "wan")
    for name, by in (("high_noise_model", 1.0), ("low_noise_model", 2.0)):
        (folder / name).mkdir()
        save_file(scaled(folder / WEIGHTS, by), folder / name / WEIGHTS)
        shutil.copy(folder / "config.json", folder / name / "config.json")
    (folder / WEIGHTS).unlink()
    (folder / "config.json").unlink()
    return folder


def copied(folder, target):
    shutil.copytree(folder, target)
    return target


def kernel(checkpoint, name: str = "transformer") -> np.ndarray:
    return np.asarray(getattr(checkpoint, name).proj_out.kernel[...])


def test_a_folder_of_two_experts(folder):
    networks = source.load(folder)
    assert networks.configs.experts == ("high", "low")
    np.testing.assert_array_equal(2 * kernel(networks), kernel(networks, "transformer_2"))
    contents = source.describe(folder)
    assert contents.family == "wan2.2-t2v"
    names = ["transformer", "vae", "text_encoder", "transformer_2"]
    assert sorted(contents.models) == sorted(names)


def test_a_conversion_keeps_the_roles(folder, tmp_path):
    converter.convert(folder, tmp_path / "own", loras=Loras(low=f"{LORA}:0.5"))
    text = json.loads((tmp_path / "own" / format.METADATA).read_text())
    assert text["configs"]["experts"] == ["high", "low"]
    assert f"low:{LORA.name}:0.5" in text["source"]["files"]
    own, want = format.load(tmp_path / "own"), source.load(folder, loras=Loras(low=f"{LORA}:0.5"))
    for name in own.configs.networks:
        equal = [
            np.array_equal(*pair)
            for pair in zip(
                *(jax.tree.leaves(nnx.state(getattr(c, name))) for c in (own, want)), strict=True
            )
        ]
        assert all(equal)
    plain = source.load(folder)
    np.testing.assert_array_equal(kernel(own), kernel(plain))
    changed = own.transformer_2.blocks.attn1.to_q.kernel[...]
    assert not np.array_equal(changed, plain.transformer_2.blocks.attn1.to_q.kernel[...])


@pytest.mark.parametrize("change", ["role", "roles", "second", "size"])
def test_roles_of_a_checkpoint_are_checked(folder, tmp_path, change):
    converter.convert(folder, tmp_path / "own")
    path = tmp_path / "own" / format.METADATA
    text = json.loads(path.read_text())
    match change:
        case "role":
            text["configs"]["experts"] = "high"
        case "roles":
            text["configs"]["experts"] = ["low", "high"]
        case "second":
            text["configs"]["transformer_2"] = None
        case "size":
            text["configs"]["transformer_2"]["eps"] = 1e-5
    path.write_text(json.dumps(text))
    with pytest.raises(CheckpointError, match=r"kvlock\.json: experts must be"):
        format.load(tmp_path / "own")


@pytest.mark.parametrize("role", ["high", "low"])
def test_one_expert_alone(folder, tmp_path, role):
    there = copied(folder, tmp_path / "wan")
    other = {"high": "low", "low": "high"}[role]
    shutil.rmtree(there / f"{other}_noise_model")
    networks = source.load(there)
    assert networks.configs.experts == (role,) and networks.transformer_2 is None
    both = source.load(folder)
    name = "transformer" if role == "high" else "transformer_2"
    np.testing.assert_array_equal(kernel(networks), kernel(both, name))
    with pytest.raises(CheckpointError, match=f"--lora_{other}: the checkpoint has no {other}"):
        source.load(there, loras=Loras(**{other: str(LORA)}))


def test_a_diffusers_folder_with_one_of_two(tmp_path):
    pipeline = tiny.make_experts_pipeline(tmp_path)
    pipeline.save_pretrained(tmp_path / "both")
    pipeline.register_modules(transformer=None)
    pipeline.save_pretrained(tmp_path / "low")
    both, low = source.load(tmp_path / "both"), source.load(tmp_path / "low")
    assert both.configs.experts == ("high", "low") and low.configs.experts == ("low",)
    np.testing.assert_array_equal(kernel(low), kernel(both, "transformer_2"))


def test_the_layout_of_videox_fun_has_its_names_reversed(folder, tmp_path):
    there = tmp_path / "fun"
    shutil.copytree(folder / "high_noise_model", there / "transformer_2")
    shutil.copytree(folder / "low_noise_model", there / "transformer")
    for name, stem, file in (
        ("vae", "diffusion_pytorch_model", "vae"),
        ("text_encoder", "model", "umt5"),
    ):
        (there / name).mkdir()
        shutil.copy(originals.DATA / f"{file}.safetensors", there / name / f"{stem}.safetensors")
    shutil.copytree(folder / "google" / "umt5-xxl", there / "tokenizer")
    index = {"_class_name": "Wan2_2VaceFunPipeline"}
    (there / "model_index.json").write_text(json.dumps(index))
    found, want = source.load(there), source.load(folder)
    assert found.configs == want.configs
    for name in ("transformer", "transformer_2"):
        np.testing.assert_array_equal(kernel(found, name), kernel(want, name))


# -- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        ([], []),
        (["wan2.1_high_quality.safetensors"], ["transformer"]),
        (["Wan2.2-T2V-A14B-HighNoise-Q4_K_M.gguf"], ["transformer_high"]),
        (["wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors"], ["transformer_low"]),
        (["a/Wan2_2-T2V-A14B_HIGH.safetensors", "b/low.gguf"], ["transformer_high", "_low"]),
        (["low_noise.safetensors", "high_noise.safetensors"], ["transformer_low", "_high"]),
    ],
)
def test_names_tell_experts_apart(names, parts):
    wanted = [part if part.startswith("t") else f"transformer{part}" for part in parts]
    assert by_role(names) == dict(zip(wanted, names, strict=True))


@pytest.mark.parametrize("names", [["a", "b"], ["high_a", "high_b"], ["high", "low", "c"]])
def test_names_that_do_not(names):
    with pytest.raises(InputError, match=r"--transformer_high and --transformer_low"):
        by_role(names)


def test_files_of_experts_beside_a_folder(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sizes, "HEAD", 32)
    parts = copied(folder, tmp_path / "wan")
    save_file(scaled(parts / "low_noise_model" / WEIGHTS, 2.0), tmp_path / "low.safetensors")
    found = kvl.load(parts, files=Files(transformer_low=tmp_path / "low.safetensors")).checkpoint
    np.testing.assert_array_equal(4 * kernel(found), kernel(found, "transformer_2"))
    with pytest.raises(CheckpointError, match="give it as --transformer_high or --transformer_low"):
        kvl.load(parts, files=Files(tmp_path / "low.safetensors"))
    for role in ("high", "low"):
        shutil.rmtree(parts / f"{role}_noise_model")
    alone = kvl.load(parts, files=Files(transformer_low=tmp_path / "low.safetensors")).checkpoint
    assert alone.configs.experts == ("low",)
    np.testing.assert_array_equal(kernel(alone), kernel(found, "transformer_2"))


def test_an_edit_over_two_experts(folder, tmp_path, capsys):
    """Networks come and go by default; kept, they make the same video."""
    encode.write_video(tmp_path / "in.mkv", tiny.clip(), 8, lossless=True)
    argv = ["edit", "--ckpt_dir", str(folder), "--src_video", str(tmp_path / "in.mkv")]
    argv += ["--bbox", "8,8,16,16", "--prompt", "a star", "--sample_steps", "4", "--lossless"]
    videos = []
    for flags in ([], ["--keep_in_memory"], ["--boundary", "0"], ["--sample_guide_scale", "1"]):
        out = tmp_path / f"out{len(videos)}.mkv"
        assert main.main([*argv, "--save_file", str(out), *flags]) == 0
        videos.append(decode.read_video(out).frames.tobytes())
    said = capsys.readouterr()
    assert "wan2.2-t2v" in said.out
    assert videos[0] == videos[1] and len(set(videos)) == 3


def test_networks_leave_when_their_stage_ends(folder, monkeypatch):
    read, alive = [], []

    def reading(model):
        """Notes what is read, and which parameters of networks read before are still there."""

        def network(name):
            alive.append([part for part, leaf in read if not leaf.is_deleted()])
            found = model.read(name)
            read.append((name, jax.tree.leaves(nnx.state(found))[0]))
            return found

        return dataclasses.replace(model, read=network)

    model = reading(kvl.load(folder, keep_in_memory=False))
    config = kvl.config("t2v_a14b")
    config.sample.steps = 3
    noise = jnp.zeros((1, 2, 4, 6, 16), jnp.float32)
    kvl.edit(model, tiny.clip(), (8, 8, 16, 16), "a star", config=config, noise=noise)
    order = ["text_encoder", "vae", "transformer", "transformer_2", "vae"]
    assert [name for name, _ in read] == order
    assert not any(alive) and all(leaf.is_deleted() for _, leaf in read)


@pytest.mark.parametrize(("found", "said"), [(3.0, "12 by default"), (12.0, ""), (None, "")])
def test_another_shift_in_the_scheduler_is_named(found, said):
    wan = WanConfig(40, 128, 40, 13824)
    scheduler = {} if found is None else {"flow_shift": found}
    sizes_of = (wan, VAEConfig(), UMT5Config(16, 16, 4, 24, 1, 2), scheduler)
    configs = Configs(*sizes_of, transformer_2=wan, experts=("high", "low"))
    line = shift_note("folder", format.Contents("wan2.2-t2v", configs, {}))
    assert line.startswith(said) and bool(line) == bool(said)
    alone = dataclasses.replace(configs, transformer_2=None, experts=())
    assert shift_note("folder", format.Contents("wan2.1-t2v", alone, {})) == ""
