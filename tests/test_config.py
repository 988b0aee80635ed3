"""Settings: every range at both of its ends, unknown keys, wrong types, what errors name."""

import dataclasses
import math
import re

import pytest
from ml_collections import ConfigDict

from kvlock_jax.errors import ConfigError
from kvlock_jax.models.text.config import UMT5Config
from kvlock_jax.models.vae.config import VAEConfig
from kvlock_jax.models.wan.config import WanConfig
from kvlock_jax.settings.fields import from_config_dict
from kvlock_jax.settings.schema import EditConfig, LockConfig, SampleConfig, run_config

WAN = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "ffn_dim": 20}
UMT5 = {"vocab_size": 8, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 3}
GIVEN = {WanConfig: WAN, UMT5Config: UMT5}

FINE = [
    (SampleConfig, {"steps": 1}),
    (SampleConfig, {"steps": 10_000}),
    (SampleConfig, {"shift": 1e-3}),
    (SampleConfig, {"guidance_scale": 0.0}),
    (SampleConfig, {"guidance_scale_low": 0.0}),
    (SampleConfig, {"boundary": 0.0}),
    (SampleConfig, {"boundary": 1.0}),
    (SampleConfig, {"grid": "plain"}),
    (SampleConfig, {"solver": "unipc"}),
    (SampleConfig, {"solver": "euler"}),
    (SampleConfig, {"solver": "dpm++"}),
    (SampleConfig, {"seed": 0}),
    (SampleConfig, {"long": "whole"}),
    (SampleConfig, {"long": "windows"}),
    (SampleConfig, {"window": 5, "window_overlap": 4}),
    (SampleConfig, {"window_overlap": 80}),
    (SampleConfig, {"window_shift": True}),
    (SampleConfig, {"seed": 4294967295}),
    (LockConfig, {"warmup_fusion_ratio": 1.0}),
    (LockConfig, {"fusion_ratio": 0.0}),
    (LockConfig, {"omega_floor": 2.0}),
    (LockConfig, {"omega_floor": 3.0, "omega_ceiling": 3.0}),
    (LockConfig, {"background": "source"}),
    (LockConfig, {"detection": "global"}),
    (LockConfig, {"tau": 1e-6}),
    (LockConfig, {"window": 2}),
    (LockConfig, {"kappa": 0}),
    (LockConfig, {"guidance": "apg", "rescale_uncond": False, "apg_eta": 1.0}),
    (LockConfig, {"apg_momentum": -0.75}),
    (LockConfig, {"zero_init_steps": 2}),
    (LockConfig, {"injected_steps": 17, "foreground_ratio": 1.0, "start_shift": 1.0}),
    (LockConfig, {"pool_seeds": 4}),
    (LockConfig, {"apg_norm": math.inf}),
    (LockConfig, {"cache": "carried", "cache_every": 5}),
    (LockConfig, {"cache": "fused", "skip_background": False}),
    (EditConfig, {"dilate": 3, "frame_num": 81, "size": "832*480"}),
    (EditConfig, {"size": "832x480"}),
    (EditConfig, {"size": "8192*1"}),
    *((EditConfig, {"fit": fit}) for fit in ("crop", "pad", "stretch")),
    (EditConfig, {"context_scale": 0.0}),
    (EditConfig, {"fps": 23.976}),
    (WanConfig, {"patch_size": (1, 2, 2)}),
    (WanConfig, {"vace_layers": (), "num_layers": 1}),
    (WanConfig, {"vace_layers": (0, 2, 3), "num_layers": 4}),
    (VAEConfig, {"temperal_downsample": (True,), "dim_mult": (1, 2)}),
    (UMT5Config, {"relative_attention_num_buckets": 4}),
]

BAD = [
    (SampleConfig, "steps", 0),
    (SampleConfig, "steps", 10_001),
    (SampleConfig, "guidance_scale_low", -0.1),
    (SampleConfig, "boundary", 1.1),
    (SampleConfig, "grid", "wan"),
    (SampleConfig, "shift", 0.0),
    (SampleConfig, "shift", math.inf),
    (SampleConfig, "guidance_scale", -0.1),
    (SampleConfig, "guidance_scale", math.nan),
    (SampleConfig, "guidance_scale", math.inf),
    (SampleConfig, "solver", "heun"),
    (SampleConfig, "seed", -1),
    (SampleConfig, "long", "yes"),
    (SampleConfig, "window", 80),
    (SampleConfig, "window", 1),
    (SampleConfig, "window_overlap", 0),
    (SampleConfig, "window_overlap", 6),
    (SampleConfig, "window_overlap", 84),
    (SampleConfig, "seed", 4294967296),
    (LockConfig, "warmup_fusion_ratio", -0.01),
    (LockConfig, "warmup_fusion_ratio", 1.01),
    (LockConfig, "fusion_ratio", -0.01),
    (LockConfig, "fusion_ratio", 1.01),
    (LockConfig, "fusion_ratio", math.nan),
    (LockConfig, "omega_floor", -0.01),
    (LockConfig, "omega_floor", 2.01),
    (LockConfig, "guidance_ratio", -0.01),
    (LockConfig, "guidance_ratio", math.inf),
    (LockConfig, "omega_ceiling", math.inf),
    (LockConfig, "background", "keep"),
    (LockConfig, "detection", "none"),
    (LockConfig, "tau", 0.0),
    (LockConfig, "window", 1),
    (LockConfig, "kappa", -1),
    (LockConfig, "guidance", "cfg_zero"),
    (LockConfig, "zero_init_steps", -1),
    (LockConfig, "injected_steps", -1),
    (LockConfig, "foreground_ratio", -0.01),
    (LockConfig, "foreground_ratio", 1.01),
    (LockConfig, "start_shift", -0.01),
    (LockConfig, "start_shift", 1.01),
    (LockConfig, "pool_seeds", 0),
    (LockConfig, "apg_norm", 0.0),
    (LockConfig, "cache", "kept"),
    (LockConfig, "cache_every", 0),
    (LockConfig, "cache_every", 2),
    (LockConfig, "apg_eta", math.nan),
    (LockConfig, "apg_momentum", math.inf),
    (EditConfig, "dilate", -1),
    (EditConfig, "frame_num", -1),
    (EditConfig, "fps", -1.0),
    (EditConfig, "fps", math.inf),
    (EditConfig, "context_scale", -0.5),
    (EditConfig, "context_scale", float("inf")),
    (EditConfig, "size", "832"),
    (EditConfig, "size", "0*480"),
    (EditConfig, "size", "8192*8193"),
    (EditConfig, "size", "9" * 5000 + "*480"),
    (EditConfig, "size", "832*-480"),
    (EditConfig, "size", "832*480*3"),
    (EditConfig, "size", "83 2*480"),
    (EditConfig, "fit", "letterbox"),
    (WanConfig, "attention_head_dim", 11),
    (WanConfig, "patch_size", (1, 2)),
    *((WanConfig, "vace_layers", layers) for layers in ((1,), (0, 0), (0, 1, 0), (0, 2))),
    (WanConfig, "vace_in_channels", 0),
    *((WanConfig, name, 0) for name in (*WAN, "in_channels", "text_dim", "freq_dim")),
    (VAEConfig, "dim_mult", (1, 2, 4)),
    (VAEConfig, "latents_mean", (0.0,) * 15),
    (VAEConfig, "latents_std", (1.0,) * 17),
    *((VAEConfig, name, 0) for name in ("base_dim", "z_dim", "num_res_blocks")),
    (UMT5Config, "relative_attention_num_buckets", 30),
    *((UMT5Config, name, 0) for name in (*UMT5, "relative_attention_max_distance")),
]

WRONG_TYPE = [
    (SampleConfig, "steps", 4.0, "int"),
    (SampleConfig, "steps", True, "int"),
    (SampleConfig, "steps", "4", "int"),
    (SampleConfig, "shift", "3", "float"),
    (SampleConfig, "shift", False, "float"),
    (SampleConfig, "solver", 3, "str"),
    (LockConfig, "enabled", 1, "bool"),
    (LockConfig, "enabled", "yes", "bool"),
    (LockConfig, "tau", [0.01], "float"),
    (WanConfig, "patch_size", 2, "a sequence of int"),
    (VAEConfig, "latents_mean", "0123456789abcdef", "a sequence of float"),
]


@pytest.mark.parametrize(("kind", "values"), FINE)
def test_ends_of_ranges(kind, values):
    made = from_config_dict(kind, GIVEN.get(kind, {}) | values)
    for name, value in values.items():
        assert getattr(made, name) == value


@pytest.mark.parametrize(("kind", "name", "value"), BAD)
def test_out_of_range(kind, name, value):
    message = rf"{kind.__name__}\.{name} must .*found {re.escape(repr(value))}"
    with pytest.raises(ConfigError, match=message):
        from_config_dict(kind, GIVEN.get(kind, {}) | {name: value})


@pytest.mark.parametrize("kind", [SampleConfig, LockConfig, EditConfig])
def test_every_field_is_tested(kind):
    """A new field needs a line in FINE, BAD or WRONG_TYPE, unless it is a free switch or text."""
    listed = {name for k, values in FINE if k is kind for name in values}
    listed |= {name for k, name, *_ in (*BAD, *WRONG_TYPE) if k is kind}
    free = {
        field.name
        for field in dataclasses.fields(kind)
        if field.type is bool or (field.type is str and field.default == "")
    }
    assert {field.name for field in dataclasses.fields(kind)} - free <= listed


@pytest.mark.parametrize(("kind", "name", "value", "expected"), WRONG_TYPE)
def test_wrong_type(kind, name, value, expected):
    message = rf"{kind.__name__}\.{name} must be {expected}, found {re.escape(repr(value))}"
    with pytest.raises(ConfigError, match=message):
        from_config_dict(kind, GIVEN.get(kind, {}) | {name: value})


@pytest.mark.parametrize(("name", "entry"), [("dim_mult", 1.5), ("temperal_downsample", 1)])
def test_wrong_type_in_a_sequence_names_its_place(name, entry):
    value = [*getattr(VAEConfig(), name)[:-1], entry]
    message = rf"VAEConfig\.{name}\[{len(value) - 1}\] must be (int|bool), found {entry}"
    with pytest.raises(ConfigError, match=message):
        from_config_dict(VAEConfig, {name: value})


def test_unknown_key_is_named_with_those_there_are():
    with pytest.raises(ConfigError, match=r"unknown key 'step' of SampleConfig; it has steps, "):
        from_config_dict(SampleConfig, {"step": 4})


def test_missing_size_is_named():
    with pytest.raises(ConfigError, match=r"WanConfig: .*'num_layers'.*'ffn_dim'"):
        from_config_dict(WanConfig, {"num_attention_heads": 2, "attention_head_dim": 12})


def test_from_a_config_dict():
    values = ConfigDict({"steps": 8, "shift": 3, "solver": "euler"})
    got = from_config_dict(SampleConfig, values)
    assert got == SampleConfig(steps=8, shift=3.0, solver="euler")
    assert isinstance(got.shift, float)


def test_none_leaves_the_default():
    got = from_config_dict(LockConfig, {"tau": None, "kappa": 5})
    assert got == LockConfig(kappa=5)


def test_lists_become_tuples():
    got = from_config_dict(VAEConfig, {"z_dim": 2, "latents_mean": [0, 1], "latents_std": [1, 2.5]})
    assert got.latents_mean == (0.0, 1.0) and got.latents_std == (1.0, 2.5)
    assert hash(got) == hash(dataclasses.replace(got))


def test_nothing_of_the_input_is_kept():
    means = [0.0] * 16
    got = from_config_dict(VAEConfig, {"latents_mean": means})
    means[0] = 9.0
    assert got.latents_mean[0] == 0.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        got.z_dim = 4


def test_width_is_heads_times_their_size():
    assert WanConfig(40, 128, 40, 13824).dim == 5120  # 14B as published


def test_published_lock():
    """METHOD.md sections 5 and 6."""
    lock = LockConfig()
    assert (lock.tau, lock.omega_ceiling, lock.kappa, lock.window) == (0.01, 2.0, 20, 10)
    assert (lock.omega_floor, lock.warmup_fusion_ratio) == (0.0, 0.0)


@pytest.mark.parametrize("text", ["832*480", "832x480", " 832 * 480 ", "832 X 480", "832\u00d7480"])
def test_size_is_width_first(text):
    assert EditConfig(size=text).height_width == (480, 832)
    assert EditConfig().height_width is None


def test_run_config_is_complete_and_checked():
    run = run_config("hard_lock", steps=8, shift=3.0)
    assert run.preset == "hard_lock"
    assert from_config_dict(SampleConfig, run.sample) == SampleConfig(steps=8, shift=3.0)
    assert from_config_dict(EditConfig, run.edit) == EditConfig()
    assert from_config_dict(LockConfig, run.kvlock) == LockConfig()  # all are left to the preset
    run.kvlock.tau = 0.02
    assert from_config_dict(LockConfig, run.kvlock) == LockConfig(tau=0.02)
    with pytest.raises(ConfigError, match=r"SampleConfig\.steps"):
        run_config("hard_lock", steps=0)


def test_apg_has_no_factor_of_the_unconditional_velocity():
    with pytest.raises(ConfigError, match=r"LockConfig\.rescale_uncond must be off"):
        LockConfig(guidance="apg")
