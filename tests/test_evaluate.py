"""A folder of clips, presets on it, and one table: by the command, and VBench by a stub."""

import csv
import json
import pathlib
import sys
import types

import numpy as np
import pytest
from PIL import Image

from kvlock_jax.media import encode

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "scripts"))

import evaluate

VIDEO = np.random.default_rng(0).integers(0, 256, (5, 48, 48, 3), np.uint8)


def png(path, picture):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def test_layouts(tmp_path, capsys):
    edit = tmp_path / "vace" / "fox"
    (edit / "src_mask").mkdir(parents=True)
    for name in ("src_video.mp4", "src_ref_image_1.png", "prompt.txt"):
        (edit / name).write_text(" a fox\n")
    (tmp_path / "vace" / "notes").mkdir()
    (line,) = evaluate.edits_of(tmp_path / "vace", {})
    assert (line["id"], line["prompt"]) == ("fox", "a fox")
    assert line["src_ref_images"] == [str(edit / "src_ref_image_1.png")]
    davis = tmp_path / "davis"
    numbers = Image.fromarray(np.array([[0, 1], [2, 0]], np.uint8), "L").convert("P")
    for name in ("bear", "camel"):
        png(davis / "JPEGImages" / "480p" / name / "00000.jpg", Image.new("RGB", (2, 2)))
        png(davis / "Annotations" / "480p" / name / "00000.png", numbers)
    (line,) = evaluate.edits_of(davis, {"bear": "a tiger"})
    assert "camel: left out, it has no prompt" in capsys.readouterr().out
    evaluate.whitened([line], tmp_path / "masks")
    with Image.open(pathlib.Path(line["src_mask"]) / "00000.png") as white:
        np.testing.assert_array_equal(np.asarray(white), [[0, 255], [255, 0]])
    with pytest.raises(SystemExit, match="holds no edit"):
        evaluate.edits_of(davis, {})


def test_presets_on_the_demo_model(tmp_path, monkeypatch, capsys):
    mask = np.zeros((5, 48, 48, 3), np.uint8)
    mask[:, 8:32, 8:32] = 255
    for name in ("one", "two"):
        edit = tmp_path / "clips" / name
        edit.mkdir(parents=True)
        encode.write_video(edit / "src_video.mkv", VIDEO, 8, lossless=True)
        encode.write_video(edit / "src_mask.mkv", mask, 8, lossless=True)
        (edit / "prompt.txt").write_text("a red circle")

    class VBench:
        """Writes what the package writes."""

        def __init__(self, device, info, out):
            self.out = pathlib.Path(out)

        def evaluate(self, videos_path, name, dimension_list, mode):
            paths = sorted(pathlib.Path(videos_path).glob("*.mp4"))
            videos = [{"video_path": str(path), "video_results": 0.5} for path in paths]
            found = {dimension: [0.5, videos] for dimension in dimension_list}
            (self.out / f"{name}_eval_results.json").write_text(json.dumps(found))

    monkeypatch.setattr(evaluate.importlib.util, "find_spec", lambda name: name == "vbench")
    monkeypatch.setitem(sys.modules, "vbench", types.SimpleNamespace(VBench=VBench))
    flags = ["--out", str(tmp_path / "out"), "--presets", "cfg,hard_lock", "--", "--sample_steps=2"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(tmp_path / "clips"), *flags])
    evaluate.main()
    rows = list(csv.DictReader((tmp_path / "out" / "edits.csv").read_text().splitlines()))
    assert [(row["preset"], row["edit"]) for row in rows] == [
        *(("cfg", "one"), ("cfg", "two"), ("hard_lock", "one"), ("hard_lock", "two"))
    ]
    kept = {row["preset"]: float(row["background_psnr"]) for row in rows}
    assert kept["hard_lock"] != kept["cfg"] and min(kept.values()) > 0  # of two runs, on noise
    assert rows[0]["imaging_quality"] == "0.5"
    assert "| hard_lock | 2 |" in capsys.readouterr().out
    assert (tmp_path / "out" / "plot.png").stat().st_size > 1000
