"""The runs in `configs/`: the publisher's settings, and which of them a checkpoint gets."""

import ast
import dataclasses
import hashlib
from pathlib import Path

import pytest

from kvlock_jax.checkpoints.registry import Configs
from kvlock_jax.configs import NEGATIVE_PROMPT
from kvlock_jax.errors import CheckpointError
from kvlock_jax.models.text.config import UMT5Config
from kvlock_jax.models.vae.config import VAEConfig
from kvlock_jax.models.wan.config import WanConfig
from kvlock_jax.pipeline.settings import config, default_config_name, resolve_settings

FOLDER = Path(__file__).parents[1] / "configs"
PUBLISHED = {  # shift, guidance of the high-noise expert and of the low-noise one
    "t2v_1_3b_480p": (8.0, 6.0),
    "t2v_1_3b_720p": (8.0, 6.0),
    "t2v_14b_480p": (3.0, 5.0),
    "t2v_14b_720p": (5.0, 5.0),
    "vace_1_3b_480p": (16.0, 5.0),
    "vace_1_3b_720p": (16.0, 5.0),
    "vace_14b_480p": (16.0, 5.0),
    "vace_14b_720p": (16.0, 5.0),
    "t2v_a14b": (12.0, 4.0),
    "vace_fun_a14b": (12.0, 5.0),
    "ti2v_5b_480p": (3.0, 5.0),
    "ti2v_5b_720p": (5.0, 5.0),
}
SOLVERS = {"t2v_a14b": (40, "unipc", "plain"), "vace_fun_a14b": (50, "euler", "diffusers")}
SOLVERS |= dict.fromkeys(["ti2v_5b_480p", "ti2v_5b_720p"], (50, "unipc", "plain"))
PRESETS = {"vace": "eased", "ti2v": "clean", "t2v": "eased"}


def test_all_runs_are_known():
    assert {p.stem for p in FOLDER.glob("*.py")} == {"__init__", "demo", *PUBLISHED}


@pytest.mark.parametrize("name", PUBLISHED)
def test_settings_are_the_publishers(name):
    settings = resolve_settings(config(name))
    sample = settings.sample
    assert (sample.shift, sample.guidance_scale) == PUBLISHED[name]
    low = 3.0 if name == "t2v_a14b" else sample.guidance_scale
    assert sample.guidance_scales["low"] == low and sample.boundary == 0.875
    solver = SOLVERS.get(name, (50, "unipc", "diffusers"))
    assert (sample.steps, sample.solver, sample.grid) == solver
    assert settings.preset == PRESETS[name.split("_")[0]]
    assert settings.edit.negative_prompt == NEGATIVE_PROMPT
    assert settings.edit.size == ""  # the video keeps its own


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_run_says_where_its_settings_come_from(name):
    (function,) = (
        node
        for node in ast.parse((FOLDER / f"{name}.py").read_text()).body
        if isinstance(node, ast.FunctionDef)
    )
    words = " ".join(ast.get_docstring(function).split())
    sources = ("Wan-Video/Wan2.1", "Wan-Video/Wan2.2", "ali-vilab/VACE", "aigc-apps/VideoX-Fun")
    assert any(source in words for source in sources)


def test_negative_prompt_is_the_publishers_to_the_letter():
    """Of `sample_neg_prompt` as several copies of the publisher's repository have it."""
    digest = hashlib.sha256(NEGATIVE_PROMPT.encode()).hexdigest()
    assert digest == "ce96e0324e4b54ce4b6e867f669ca520952e1a34cc116543516b1897f0d3c47e"


def test_every_call_gives_a_config_of_its_own():
    first = config("t2v_14b_480p")
    first.sample.steps = 3
    assert config("t2v_14b_480p").sample.steps == 50


SMALL = WanConfig(12, 128, 30, 8960)
LARGE = WanConfig(40, 128, 40, 13824)


@pytest.mark.parametrize(
    "source, wan, name",
    [
        ("folder", SMALL, "t2v_1_3b_480p"),
        ("folder", LARGE, "t2v_14b_720p"),
        ("folder", dataclasses.replace(SMALL, vace_layers=(0, 2)), "vace_1_3b_480p"),
        (Path("folder"), dataclasses.replace(LARGE, vace_layers=(0, 5)), "vace_14b_720p"),
        ("demo", SMALL, "demo"),
        ("demo", dataclasses.replace(SMALL, vace_layers=(0,)), "demo"),
    ],
)
def test_a_checkpoint_gets_the_run_of_its_family_and_width(source, wan, name):
    configs = Configs(wan, VAEConfig(), UMT5Config(16, 16, 4, 24, 1, 2), {})
    assert default_config_name(source, configs) == name
    resolve_settings(config(name))


@pytest.mark.parametrize("layers, name", [((), "t2v_a14b"), ((0, 5), "vace_fun_a14b")])
@pytest.mark.parametrize("experts", [("high", "low"), ("low",)])
def test_experts_get_the_runs_of_wan_2_2(layers, name, experts):
    wan = dataclasses.replace(LARGE, vace_layers=layers)
    second = wan if len(experts) == 2 else None
    networks = (wan, VAEConfig(), UMT5Config(16, 16, 4, 24, 1, 2))
    configs = Configs(*networks, {}, transformer_2=second, experts=experts)
    assert default_config_name("folder", configs) == name
    assert configs.unit == (4, 16, 16)


def test_the_5b_gets_its_own():
    vae = VAEConfig(base_dim=160, decoder_base_dim=256, is_residual=True, patch_size=2)
    wan = WanConfig(24, 128, 30, 14336, 48, 48)
    configs = Configs(wan, vae, UMT5Config(16, 16, 4, 24, 1, 2), {})
    assert default_config_name("folder", configs) == "ti2v_5b_720p"
    assert configs.unit == (4, 32, 32)
    mixed = dataclasses.replace(configs, transformer=dataclasses.replace(wan, vace_layers=(0,)))
    with pytest.raises(CheckpointError, match=r"of no one family, of wan2\.1-t2v"):
        default_config_name("folder", mixed)
