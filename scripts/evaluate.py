"""Compares presets on a folder of clips, by `kvlock batch`: one table, one CSV and a plot.

    python scripts/evaluate.py DIR --out OUT --ckpt_dir wan-vace --presets cfg,kvlock,hard_lock
    python scripts/evaluate.py DAVIS --out OUT --prompts prompts.json -- --sample_steps 30

DIR is one of

- a folder with a folder for each edit: `src_video.*` and `src_mask.*` (files, or folders of
  pictures), `prompt.txt`, and pictures `src_ref_image*` where there are any, as VACE names them;
- DAVIS 2017: `JPEGImages/480p/NAME`, `Annotations/480p/NAME`, whose objects are all edited.

`--prompts` is a JSON object of prompts by edit, for folders that have none. What comes after `--`
goes to `kvlock batch`. A run that was cut short goes on where it was.

Where the package `vbench` is installed, its dimensions for videos of any kind are measured too.
"""

import argparse
import csv
import importlib
import importlib.util
import json
import pathlib
import subprocess
import sys

import matplotlib
import numpy as np
from study_measures import interval

matplotlib.use("agg")
from matplotlib import pyplot

MEASURES = ("background_psnr", "background_ssim", "ring_error", "ring_flicker")
VBENCH = (
    *("subject_consistency", "background_consistency", "motion_smoothness"),
    *("dynamic_degree", "aesthetic_quality", "imaging_quality"),
)
"""VBench's dimensions that need no prompts of its own."""


def edits_of(folder: pathlib.Path, prompts: dict[str, str]) -> list[dict[str, object]]:
    """The lines of a manifest for a folder's edits, without those that have no prompt."""
    if (folder / "JPEGImages").is_dir():
        found = _davis(folder)
    else:
        found = [line for path in sorted(folder.iterdir()) if (line := _vace(path))]
    edits = []
    for line in found:
        prompt = prompts.get(line["id"]) or line.get("prompt")
        if prompt:
            edits.append({**line, "prompt": prompt})
        else:
            print(f"{line['id']}: left out, it has no prompt")
    if not edits:
        raise SystemExit(f"{folder}: holds no edit: see the head of {__file__}")
    return edits


def _vace(folder: pathlib.Path) -> dict[str, object] | None:
    """The edit of a folder in VACE's names."""
    named = {}
    for name in ("src_video", "src_mask"):
        named[name] = next(iter(sorted(folder.glob(f"{name}*"))), None)
    if None in named.values():
        return None
    line = {"id": folder.name, **{name: str(path) for name, path in named.items()}}
    if pictures := sorted(map(str, folder.glob("src_ref_image*"))):
        line["src_ref_images"] = pictures
    if (text := folder / "prompt.txt").exists():
        line["prompt"] = text.read_text(encoding="utf-8").strip()
    return line


def _davis(folder: pathlib.Path) -> list[dict[str, object]]:
    """The edits of DAVIS; its masks number the objects, so every colour but black is white."""
    lines = []
    for clip in sorted((folder / "JPEGImages" / "480p").iterdir()):
        mask = folder / "Annotations" / "480p" / clip.name
        if mask.is_dir():
            lines.append({"id": clip.name, "src_video": str(clip), "src_mask": str(mask)})
    return lines


def whitened(lines: list[dict[str, object]], folder: pathlib.Path) -> None:
    """Replaces masks whose colours number objects by ones that are white where there is one."""
    from PIL import Image

    for line in lines:
        source = pathlib.Path(str(line["src_mask"]))
        pictures = sorted(source.glob("*.png")) if source.is_dir() else []
        if not pictures:
            continue
        with Image.open(pictures[0]) as first:
            numbers_objects = first.mode == "P"
        if not numbers_objects:
            continue
        target = folder / str(line["id"])
        target.mkdir(parents=True, exist_ok=True)
        for picture in pictures:
            with Image.open(picture) as image:
                white = np.where(np.asarray(image) > 0, 255, 0).astype(np.uint8)
            Image.fromarray(white).save(target / picture.name)
        line["src_mask"] = str(target)


def run(lines: list[dict[str, object]], preset: str, out: pathlib.Path, flags: list[str]) -> None:
    """Edits all with a preset."""
    manifest = out / f"{preset}.jsonl"
    manifest.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    given = ["--manifest", str(manifest), "--save_dir", str(out / preset), "--preset", preset]
    command = [sys.executable, "-m", "kvlock_jax.cli.main", "batch", *given, *flags]
    if subprocess.run(command, check=False).returncode > 1:
        raise SystemExit(f"{preset}: the batch did not run")


def rows_of(folder: pathlib.Path) -> dict[str, dict[str, float]]:
    """The measures of a preset's edits, by edit."""
    rows = {}
    for path in sorted(folder.glob("*.json")):
        about = json.loads(path.read_text(encoding="utf-8"))
        measured = {name: float(about["metrics"][name] or np.nan) for name in MEASURES}
        rows[about["id"]] = {**measured, "seconds": float(sum(about["seconds"].values()))}
    return rows


def vbench(folder: pathlib.Path, out: pathlib.Path) -> dict[str, dict[str, float]]:
    """VBench's dimensions of a preset's videos, by edit; nothing where it is not installed."""
    if importlib.util.find_spec("vbench") is None:
        return {}
    found: dict[str, dict[str, float]] = {}
    info = out / "vbench.json"
    info.write_text("[]", encoding="utf-8")
    judge = importlib.import_module("vbench").VBench("cuda", str(info), str(out))
    judge.evaluate(
        videos_path=str(folder),
        name=folder.name,
        dimension_list=list(VBENCH),
        mode="custom_input",
    )
    results = json.loads((out / f"{folder.name}_eval_results.json").read_text(encoding="utf-8"))
    for name, (_, videos) in results.items():
        for video in videos:
            edit = pathlib.Path(video["video_path"]).stem
            found.setdefault(edit, {})[name] = float(video["video_results"])
    return found


def main() -> None:
    """Runs what is missing, and writes what was measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--ckpt_dir", default="demo")
    parser.add_argument("--presets", default="cfg,kvlock,hard_lock")
    parser.add_argument("--prompts", type=pathlib.Path, help="JSON of prompts by edit")
    given, flags = sys.argv[1:], []
    if "--" in given:
        split = given.index("--")
        given, flags = given[:split], given[split + 1 :]
    args = parser.parse_args(given)
    args.out.mkdir(parents=True, exist_ok=True)
    prompts = json.loads(args.prompts.read_text(encoding="utf-8")) if args.prompts else {}
    lines = edits_of(args.folder.resolve(), prompts)
    whitened(lines, args.out.resolve() / "masks")
    tables = {}
    for preset in args.presets.split(","):
        run(lines, preset, args.out, ["--ckpt_dir", args.ckpt_dir, *flags])
        rows = rows_of(args.out / preset)
        for edit, values in vbench(args.out / preset, args.out).items():
            rows.setdefault(edit, {}).update(values)
        tables[preset] = rows
    write(tables, args.out)


def write(tables: dict[str, dict[str, dict[str, float]]], out: pathlib.Path) -> None:
    """Writes edits.csv, table.md and plot.png."""
    names = list(dict.fromkeys(n for rows in tables.values() for row in rows.values() for n in row))
    with (out / "edits.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["preset", "edit", *names])
        for preset, rows in tables.items():
            for edit, row in rows.items():
                writer.writerow([preset, edit, *(f"{row.get(name, np.nan):.6g}" for name in names)])
    lines = ["| preset | edits | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for preset, rows in tables.items():
        cells = []
        for name in names:
            mean, low, high = interval(np.array([row.get(name, np.nan) for row in rows.values()]))
            cells.append(f"{mean:.4g} ({low:.4g} to {high:.4g})")
        lines.append(f"| {preset} | {len(rows)} | " + " | ".join(cells) + " |")
    (out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    across = "aesthetic_quality" if "aesthetic_quality" in names else "ring_error"
    figure, axis = pyplot.subplots(figsize=(6, 5))
    for preset, rows in tables.items():
        x, y = (
            np.nanmean([row.get(name, np.nan) for row in rows.values()])
            for name in ("background_psnr", across)
        )
        axis.plot(x, y, "o")
        axis.annotate(preset, (x, y), xytext=(4, 3), textcoords="offset points")
    axis.set_xlabel("background PSNR, dB")
    axis.set_ylabel(across.replace("_", " "))
    figure.tight_layout()
    figure.savefig(out / "plot.png", dpi=110)


if __name__ == "__main__":
    main()
