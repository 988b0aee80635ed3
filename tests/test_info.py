"""What `kvlock info` says of published sizes, without their weights."""

import dataclasses
import hashlib
import re
import subprocess
from collections.abc import Iterable

import pytest

from kvlock_jax.checkpoints.format import Contents, Stored
from kvlock_jax.checkpoints.registry import Configs, family
from kvlock_jax.estimate import costs, info, memory
from kvlock_jax.estimate.costs import Layout, Workload
from kvlock_jax.estimate.info import Plan
from kvlock_jax.media.fit import Fit
from kvlock_jax.models.attention.sharded import overlapped
from kvlock_jax.models.text.config import UMT5Config
from kvlock_jax.models.vae.config import VAEConfig
from kvlock_jax.models.wan.config import WanConfig
from kvlock_jax.pipeline.placement import Placement
from kvlock_jax.pipeline.settings import config, resolve_settings

SMALL, LARGE = WanConfig(12, 128, 30, 8960), WanConfig(40, 128, 40, 13824)
VACE = dataclasses.replace(LARGE, vace_layers=tuple(range(0, 40, 5)))
OTHERS = {"vae": 127_000_000, "text_encoder": 5_681_000_000}


def contents(wan: WanConfig) -> Contents:
    """A checkpoint in bfloat16."""
    configs = Configs(wan, VAEConfig(), UMT5Config(256_384, 4096, 64, 10_240, 24, 64), {})
    count = {"transformer": costs.parameters(wan).total, **OTHERS}
    stored = {name: Stored(n, ("bfloat16",), 2 * n) for name, n in count.items()}
    return Contents(family(configs).name, configs, stored)


def needs(
    wan: WanConfig, run: str = "t2v_1_3b_480p", cache: str = "carried", **changes
) -> list[str]:
    given = {"video": Fit(81, 480, 832), "devices": 1, "dtype": "bfloat16", "dtype_bytes": 2}
    plan, settings = Plan(**(given | changes)), config(run)
    settings.kvlock.cache = cache
    return list(info.needs(contents(wan), resolve_settings(settings), plan))


def words(lines: Iterable[str]) -> dict[str, str]:
    """Lines by their first word, with two spaces before it where the line is indented."""
    found = re.findall(r"(?m)^((?:  )?\S+) +(.+)$", "\n".join(lines))
    assert len(dict(found)) == len(found)
    return dict(found)


def test_what_a_checkpoint_holds():
    held = words(info.holds(contents(VACE)))
    assert held["family"] == "wan2.1-vace"
    assert held["vae"] == "127,000,000 parameters, bfloat16, 242.2 MiB (254,000,000 bytes)"
    assert held["sizes"] == (
        "40 layers, width 5120, 40 heads of 128, feed-forward 13824, "
        "context blocks at 0, 5, 10, 15, 20, 25, 30, 35"
    )
    total = 2 * (costs.parameters(VACE).total + sum(OTHERS.values()))
    assert held["weights"].endswith(f"({total:,} bytes)")
    assert "context blocks" not in "".join(info.holds(contents(SMALL)))


def test_what_a_converted_checkpoint_was_made_of(tmp_path):
    names = ("vae/a.safetensors", "text encoder/b.safetensors")
    for name in names:
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(name)
    files = {n: hashlib.sha256((tmp_path / n).read_bytes()).hexdigest() for n in names}
    source = {"layout": "original", "folder": "Wan2.1-T2V-1.3B", "files": files}
    made = dataclasses.replace(contents(SMALL), version="1.2.3", source=source)
    *others, maker, first, second = info.holds(made)
    assert others == list(info.holds(contents(SMALL)))
    assert maker.split(maxsplit=1) == [
        "converted",
        "by kvlock_jax 1.2.3 from Wan2.1-T2V-1.3B, original layout",
    ]
    check = ["sha256sum", "--check", "--strict", "--quiet"]
    given = f"{first}\n{second}\n"
    subprocess.run(check, input=given, text=True, cwd=tmp_path, check=True)
    (tmp_path / names[1]).write_text("another")
    assert subprocess.run(
        check, input=given, text=True, cwd=tmp_path, capture_output=True
    ).returncode


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"repo": "a/b"}, ["by kvlock_jax 3 from an unknown folder, unknown layout"]),
        ({"folder": "wan", "files": ["a"]}, ["by kvlock_jax 3 from wan, unknown layout"]),
        ("elsewhere", ["by kvlock_jax 3 from an unknown folder, unknown layout"]),
        ({}, []),
    ],
)
def test_a_source_in_others_words(source, said):
    made = dataclasses.replace(contents(SMALL), version="3", source=source)
    assert [line.split(maxsplit=1)[1] for line in info.holds(made) if "converted" in line] == said
    assert list(info.holds(made))[-1].startswith("converted" if said else "weights")


@pytest.mark.parametrize(("wan", "gib"), [(SMALL, "5.6 GiB"), (LARGE, "25.0 GiB")])
def test_cache_of_published_sizes(wan, gib):
    """81 frames of 480x832 in bfloat16, DESIGN.md section 2."""
    whole = needs(wan)[0]
    assert whole.split(maxsplit=1)[1].startswith(gib)
    assert whole.endswith("in bfloat16, of all blocks: 32,760 tokens of 81 frames of 832x480")


def test_a_fused_pass_keeps_one_block():
    size = 2 * 2 * 32_760 * 1536
    line = words(needs(SMALL, cache="fused"))["cache"]
    assert f"({size:,} bytes) in bfloat16, of a block: 32,760 tokens" in line
    assert words(needs(SMALL, cache="fused", devices=8))["  cache"].startswith("24.0 MiB")


def test_memory_per_device():
    lines = words(needs(SMALL, devices=8))
    assert lines["per"] == "device, of 8 in all"
    # 5.681 / 8, 0.127, 1.419 billion parameters of 2 bytes; 32,768 tokens' keys and values by 8
    assert lines["  text"] == "1.3 GiB  encoder's weights, 1/8 of it"
    assert lines["  VAE's"] == "242.2 MiB  weights" and lines["  transformer"] == "2.6 GiB  weights"
    assert lines["  cache"] == "720.0 MiB  4,096 tokens of 32,768, padding and all"
    carried = resolve_settings(config("t2v_1_3b_480p")).lock
    carried = dataclasses.replace(carried, cache="carried")
    workload = Workload(SMALL, 81, 480, 832)
    size = costs.activations(workload, Layout(8, False, 128), carried).total
    assert lines["  activations"] == f"{size / 2**20:.1f} MiB  of the sampling loop: an estimate"
    kept, transformer = 4.2026 * 2**30 + 720 * 2**20 + size, 2 * costs.parameters(SMALL).total
    assert lines["  kept"].startswith(f"{kept / 2**30:.1f} GiB  all stay, with --keep_in_memory")
    peak = transformer + 720 * 2**20 + size
    assert lines["  peak"].startswith(f"{peak / 2**30:.1f} GiB  each network leaves")
    assert not {"step", "scaling"} & set(lines)
    alone = words(needs(SMALL))
    assert alone["  text"] == "10.6 GiB  encoder's weights"
    assert alone["  cache"] == "5.6 GiB  32,760 tokens"


def test_a_chip_that_cannot_hold_all_weights_gets_a_part():
    lines = words(needs(SMALL, devices=8, chip="v5e"))
    assert lines["  transformer"] == "2.6 GiB  weights"
    assert lines["  kept"].endswith("; fits in 14.9 GiB")
    large = words(needs(LARGE, "t2v_14b_480p", devices=8, chip="v5e"))
    assert large["  transformer"] == "3.3 GiB  weights, 1/8 of it"
    assert large["  kept"].endswith("; fits in 14.9 GiB")
    one = words(needs(LARGE, "t2v_14b_480p", chip="v5e"))  # one has no other to share with
    assert one["  transformer"] == "26.6 GiB  weights"
    for name in ("  peak", "  kept"):
        assert one[name].endswith("; does not fit in 14.9 GiB")


def test_two_experts_take_turns():
    networks = contents(LARGE)
    configs = dataclasses.replace(networks.configs, transformer_2=LARGE, experts=("high", "low"))
    stored = {**networks.models, "transformer_2": networks.models["transformer"]}
    both = dataclasses.replace(networks, configs=configs, models=stored)
    workload, lock = Workload(LARGE, 81, 480, 832), resolve_settings(config("t2v_a14b")).lock
    alone, pair = (memory.per_device(c, workload, Layout(), lock) for c in (networks, both))
    assert pair.leaving == alone.leaving and pair.on_host == alone.on_host
    assert pair.kept == alone.kept + stored["transformer"].size
    loop = alone.cache + alone.activations
    blocks = 2 * costs.parameters(LARGE).blocks
    assert alone.blocks == pytest.approx(blocks) and alone.block == pytest.approx(blocks / 40)
    rest = stored["transformer"].size - alone.blocks
    encoder = stored["text_encoder"].size
    assert alone.on_host == max(encoder, rest + 2 * alone.block + loop)
    assert words(info.holds(both))["experts"] == "for high and low noise"


@pytest.mark.parametrize(
    ("run", "wan", "share"),
    [
        ("vace_14b_480p", VACE, "eased: 50 of 50 steps with a source pass"),
        ("t2v_14b_480p", LARGE, "eased: 50 of 50 steps with a source pass"),
    ],
)
def test_bound_of_a_run(run, wan, share):
    lines = words(needs(wan, run, devices=8, chip="v6e"))
    seconds = float(lines["step"].split()[2])
    assert lines["step"] == f"at least {seconds:g} s, by compute ({share}, every token computed)"
    assert lines["  compute"] == f"{seconds:g} s"
    assert float(lines["  interconnect"].split()[0]) < seconds
    assert float(lines["all"].split()[3]) == pytest.approx(50 * seconds, rel=0.01)
    count = int(lines["scaling"].split()[4])
    assert lines["scaling"] == f"the interconnect binds from {count} chips on"
    assert 8 < count < 64


def test_interconnect_that_never_binds(monkeypatch):
    monkeypatch.setattr(info.roofline, "interconnect_binds_from", lambda *_, **__: None)
    assert words(needs(SMALL, chip="a100"))["scaling"].endswith("binds at no number of chips")


def test_kernels_of_8_bits_take_a_byte():
    workload, lock = Workload(LARGE, 81, 480, 832), resolve_settings(config("t2v_14b_480p")).lock
    wide, small = (
        memory.per_device(contents(LARGE), workload, Layout(), lock, in_8_bits=kept)
        for kept in (False, True)
    )
    blocks = costs.parameters(LARGE).blocks
    assert small.blocks == blocks and wide.blocks == pytest.approx(2 * blocks)
    assert wide.leaving - small.leaving == pytest.approx(blocks, rel=1e-6)
    assert words(needs(LARGE, weights="int8"))["  transformer"] == "13.5 GiB  weights"


@pytest.mark.parametrize(
    ("limit", "asked", "where", "said"),
    [
        (80e9, "device", "device", ""),
        (20e9, "device", "host", "blocks stay in the host's memory"),
        (5e9, "device", "device", "it may not fit; try --weights int8"),
        (5e9, "host", "host", "it may not fit"),
        (20e9, "host", "host", ""),
    ],
)
def test_an_edit_takes_the_leanest_way_that_it_needs(limit, asked, where, said):
    workload, lock = Workload(LARGE, 81, 480, 832), resolve_settings(config("t2v_14b_480p")).lock
    need = memory.per_device(contents(LARGE), workload, Layout(), lock)
    placed = Placement(None, False, overlapped, weights_on=asked)
    found, line = memory.fitted(placed, need, int(limit))
    assert found.weights_on == where and said in line and bool(said) == bool(line)
    if asked == "device":  # networks that the user keeps stay where they are
        found, line = memory.fitted(placed, need, int(limit), keep_in_memory=True)
        assert found == placed and bool(line) == (need.kept > limit)


def test_a_long_clip_costs_its_windows():
    """Only latents grow with the clip; a step takes each window's time."""
    short, long = (
        words(needs(SMALL, video=Fit(frames, 480, 832), chip="v6e")) for frames in (81, 213)
    )
    assert long["windows"] == "3 of 81 frames, one after another" and "windows" not in short
    seconds = float(short["step"].split()[2])
    assert float(long["step"].split()[2]) == pytest.approx(3 * seconds, rel=0.01)
    assert long["cache"] == short["cache"] and long["  transformer"] == short["  transformer"]
    assert long["  activations"] != short["  activations"]
