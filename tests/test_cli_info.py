"""`kvlock info` on a tiny model of random weights."""

import dataclasses
import hashlib
import importlib.metadata
import re
import shutil

import pytest
from safetensors.numpy import load_file

from kvlock_jax.checkpoints import store
from kvlock_jax.cli import main
from kvlock_jax.convert import converter, weights
from kvlock_jax.pipeline import load


def info(capsys, *arguments: str) -> dict[str, str]:
    """Lines by their first word, with two spaces before it where the line is indented."""
    assert main.main(["info", *arguments]) == 0, capsys.readouterr().err
    found = re.findall(r"(?m)^((?:  )?\S+) +(.+)$", capsys.readouterr().out)
    assert len(dict(found)) == len(found)
    return dict(found)


def test_info_of_a_diffusers_folder(capsys, monkeypatch, tiny_checkpoint):
    lazy = weights._lazy

    def unread(*tensor):
        return dataclasses.replace(lazy(*tensor), read=pytest.fail, rows=pytest.fail)

    count = {
        part: sum(
            a.size
            for f in tiny_checkpoint.glob(f"{part}/*.safetensors")
            for a in load_file(f).values()
        )
        for part in ("transformer", "vae", "text_encoder")
    }
    monkeypatch.setattr(weights, "_lazy", unread)
    lines = info(capsys, str(tiny_checkpoint))
    assert lines["family"] == "wan2.1-t2v"
    for part, parameters in count.items():
        assert lines[part].startswith(f"{parameters:,} parameters, float32, ")
        assert f"{4 * parameters:,} bytes" in lines[part]
    assert lines["sizes"] == "2 layers, width 24, 2 heads of 12, feed-forward 20"
    assert f"({4 * sum(count.values()):,} bytes)" in lines["weights"]


def test_info_of_demo_is_that_of_its_folder(capsys, monkeypatch, tiny_checkpoint):
    monkeypatch.setattr(load, "_DEMO", tiny_checkpoint)
    frames = "--frame_num=9"  # a window of the demo's
    assert info(capsys, "demo", frames) == info(capsys, str(tiny_checkpoint), frames)


def test_info_of_a_converted_checkpoint(capsys, monkeypatch, tmp_path, tiny_checkpoint):
    converter.convert(tiny_checkpoint, tmp_path / "own")
    monkeypatch.setattr(store, "read", pytest.fail)
    lines, published = (info(capsys, str(f)) for f in (tmp_path / "own", tiny_checkpoint))
    assert published.items() <= lines.items()
    version = importlib.metadata.version("kvlock-jax")
    assert lines["converted"] == f"by kvlock_jax {version} from wan, diffusers layout"
    for file in tiny_checkpoint.glob("*/*.safetensors"):
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        assert lines[f"  {digest}"] == file.relative_to(tiny_checkpoint).as_posix()
    data = next(p for p in (tmp_path / "own").iterdir() if p.is_dir())
    shutil.rmtree(data / "vae")
    assert main.main(["info", str(tmp_path / "own")]) == 2
    assert re.match(r"error: .* is damaged:\n(  missing: vae/.*\n)+$", capsys.readouterr().err)


def test_info_of_a_run_on_several_devices(capsys, tiny_checkpoint):
    flags = "--size=45*31 --frame_num=4 --devices=2 --dtype=bfloat16"
    lines = info(capsys, str(tiny_checkpoint), *flags.split(), "--chip=v6e")
    # padded to 5 frames of 32x48, 2 x 2 x 3 tokens; a layer of width 24, keys and values
    assert lines["cache"].endswith("of a block: 12 tokens of 5 frames of 48x32")
    assert lines["  cache"] == f"{2 * 6 * 24 * 2} bytes  6 tokens of 12"
    assert lines["  peak"].endswith("fits in 29.8 GiB")
    assert "eased: 50 of 50 steps" in lines["step"]
    without = info(capsys, str(tiny_checkpoint), *flags.split())
    assert without["  cache"] == lines["  cache"] and "step" not in without


@pytest.mark.parametrize(
    "flag", ["--size=832", "--frame_num=0", "--preset=cfg", "--devices=0", "--chip=v9"]
)
def test_info_that_cannot_be(capsys, flag):
    assert main.main(["info", "demo", flag]) == 2
    assert re.fullmatch(r"error: [^\n]+\n", capsys.readouterr().err)
