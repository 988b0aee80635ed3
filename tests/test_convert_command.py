"""`kvlock convert` from end to end: values, metadata, interruption, refusals, and output."""

import dataclasses
import hashlib
import importlib.metadata
import random
import resource
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import originals
import pytest
import whole
from flax import nnx
from peers import relative_l2
from rich.console import Console

from kvlock_jax.checkpoints import format, registry
from kvlock_jax.checkpoints.registry import NETWORKS
from kvlock_jax.cli import convert as convert_command
from kvlock_jax.cli import main
from kvlock_jax.convert import source, table
from kvlock_jax.convert.converter import convert
from kvlock_jax.errors import CheckpointError
from kvlock_jax.models.vae.autoencoder import WanVAE


def values(model) -> dict:
    return {
        ".".join(map(str, path)): np.asarray(variable[...])
        for path, variable in nnx.to_flat_state(nnx.state(model))
    }


def assert_same(got, want) -> None:
    for name in NETWORKS:
        left, right = values(getattr(got, name)), values(getattr(want, name))
        assert left.keys() == right.keys()
        for path in right:
            assert left[path].dtype == right[path].dtype
            np.testing.assert_array_equal(left[path], right[path], err_msg=path)


@pytest.fixture(params=["together", "layer by layer"])
def pieces(request, monkeypatch):
    """Lowers the limits, so that tiny parameters are read in pieces as large ones are."""
    if request.param == "layer by layer":
        monkeypatch.setattr(table, "TOGETHER", 0)
        monkeypatch.setattr(table, "ROWS", 64)


def test_a_diffusers_folder(tiny_checkpoint, tmp_path, pieces):
    contents = convert(tiny_checkpoint, tmp_path / "own")
    assert_same(format.load(tmp_path / "own"), source.load(tiny_checkpoint))
    assert contents == format.describe(tmp_path / "own")
    assert contents.version == importlib.metadata.version("kvlock-jax")
    assert (contents.source["layout"], contents.source["folder"]) == ("diffusers", "wan")
    on_disk = {p.relative_to(tiny_checkpoint).as_posix(): p for p in tiny_checkpoint.rglob("*.*")}
    assert contents.source["files"] == {
        name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in on_disk.items()
    }
    assert {model.dtypes for model in contents.models.values()} == {("float32",)}


# -- what the publisher's own code gave ----------------------------------------------------------


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(originals.DATA / f"{name}_io.npz") as arrays:
        return dict(arrays)


def channels_last(array: np.ndarray) -> jax.Array:
    return jnp.asarray(np.moveaxis(array, 0, -1)[None])


@nnx.jit
def velocity(model, latents, timestep, context):
    return whole.velocity(model, latents, timestep, context)[0]


@pytest.fixture(scope="module", params=list(originals.CLASSES))
def published(request, tmp_path_factory):
    """A family, and the publisher's models of it after conversion."""
    folder = tmp_path_factory.mktemp("published")
    convert(originals.write_folder(folder / "source", request.param), folder / "own")
    return request.param, format.load(folder / "own")


def test_the_publishers_transformer(published):
    family, models = published
    data = golden(family)
    latents, timestep = channels_last(data["latents"]), jnp.asarray(data["timestep"])
    padding = originals.SIZES["dit"]["text_len"] - len(data["context"])
    context = jnp.asarray(np.pad(data["context"], ((0, padding), (0, 0))))[None]
    runs = [(context, "velocity")]
    if family == "vace":
        control = channels_last(data["vace_context"])
        runs = [
            (
                whole.WholeContext(context, control, jnp.array([scale], jnp.float32)),
                f"velocity_{key}",
            )
            for scale, key in ((0.7, "scale_0p7"), (1.0, "scale_1p0"))
        ]
    for context, key in runs:
        got = velocity(models.transformer, latents, timestep, context)
        assert relative_l2(np.moveaxis(got, -1, 0), data[key]) < 1e-5


def test_the_publishers_vae(published):
    _, models = published
    data = golden("vae")
    # the recording has other statistics; the converter gives every VAE the published ones
    statistics = {name: tuple(data[name].tolist()) for name in ("latents_mean", "latents_std")}
    vae = nnx.clone(models.vae)
    vae.config = dataclasses.replace(vae.config, **statistics)
    video, latents, decoded = (
        jnp.asarray(np.moveaxis(data[key], 1, -1)) for key in ("video", "latents", "decoded")
    )
    assert relative_l2(nnx.jit(WanVAE.encode)(vae, video), latents) < 1e-5
    assert relative_l2(nnx.jit(WanVAE.decode)(vae, latents), decoded) < 1e-5


def test_the_publishers_text_encoder(published):
    _, models = published
    data = golden("umt5")
    ids, mask = jnp.asarray(data["ids"], jnp.int32), jnp.asarray(data["mask"])
    got = nnx.jit(lambda model, *text: model(*text))(models.text_encoder, ids, mask)
    real = data["mask"] != 0
    assert relative_l2(np.asarray(got)[real], data["hidden"][real]) < 1e-5


# -- interruption --------------------------------------------------------------------------------

KILLED = """
import os, signal, sys, threading, time
import ml_dtypes, numpy as np
from kvlock_jax.convert.converter import convert

source, target, moment = sys.argv[1], sys.argv[2], float(sys.argv[3])
convert(source, target + "-warm")
start = time.perf_counter()
convert(source, target, np.dtype(ml_dtypes.bfloat16))
seconds = time.perf_counter() - start
print("old", flush=True)
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
threading.Timer(moment * seconds, kill).start()
convert(source, target)
kill()
"""


def test_killed_at_random_moments(tiny_checkpoint, tmp_path, capsys):
    rng, want = random.Random(), source.load(tiny_checkpoint)
    moments = [rng.uniform(0.02, 0.4), rng.uniform(0.4, 0.8), rng.uniform(0.8, 1.1)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tiny_checkpoint), str(tmp_path / str(i)), f"{at}"],
            stdout=subprocess.PIPE,
            text=True,
        )
        for i, at in enumerate(moments)
    ]
    for i, process in enumerate(processes):
        out, _ = process.communicate()
        assert (process.returncode, out) == (-signal.SIGKILL, "old\n")
        target = tmp_path / str(i)
        left = sorted(p.name for p in target.iterdir())
        dtype, *_ = format.describe(target).models["transformer"].dtypes
        with capsys.disabled():
            print(f"\nkilled at {moments[i]:.2f} of a conversion: {dtype}, {', '.join(left)}")
        kept = format.load(target)
        for name in NETWORKS:  # the old one or the new one, and nothing of the other
            theirs = values(getattr(want, name))
            for path, array in values(getattr(kept, name)).items():
                rules = registry.network(getattr(want.configs, name)).parameters
                kind = rules.dtype(path, theirs[path].dtype, dtype)
                np.testing.assert_array_equal(array, theirs[path].astype(kind), strict=True)
        convert(tiny_checkpoint, target)
        assert_same(format.load(target), want)
        assert len(list(target.glob("kvlock-*"))) == 1 and (target / format.METADATA).is_file()


class Stopped(BaseException):
    """Nothing in the package catches it."""


def test_stopped_after_each_model(tiny_checkpoint, tmp_path):
    """Stops at a number of bytes, as Ctrl-C would."""
    convert(tiny_checkpoint, tmp_path, np.dtype(ml_dtypes.bfloat16))
    old = format.load(tmp_path)

    def start(published, total):
        left = [total // 2]

        def on_bytes(count):
            left[0] -= count
            if left[0] < 0:
                raise Stopped

        return on_bytes

    with pytest.raises(Stopped):
        convert(tiny_checkpoint, tmp_path, on_start=start)
    assert_same(format.load(tmp_path), old)
    assert len(list(tmp_path.glob("kvlock-*"))) == 2
    convert(tiny_checkpoint, tmp_path)
    assert len(list(tmp_path.glob("kvlock-*"))) == 1


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["", "deep/own", "../wan/own"])
def test_into_the_source(tiny_checkpoint, tmp_path, where):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "wan")
    before = sorted(folder.rglob("*"))
    with pytest.raises(CheckpointError, match=r"lies in the source folder|is a Diffusers folder"):
        convert(folder, folder / where)
    assert sorted(folder.rglob("*")) == before


def test_into_another_diffusers_folder(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "wan")
    with pytest.raises(CheckpointError, match="wan is a Diffusers folder; give another --dst"):
        convert(tiny_checkpoint, folder)


def test_files_of_others_stay(tiny_checkpoint, tmp_path):
    for name in ("notes.txt", "kvlock-notes", "kvlock-0000000g"):
        (tmp_path / name).write_text(name)
    (tmp_path / "mine").mkdir()
    convert(tiny_checkpoint, tmp_path)
    for name in ("notes.txt", "kvlock-notes", "kvlock-0000000g"):
        assert (tmp_path / name).read_text() == name
    assert (tmp_path / "mine").is_dir() and len(list(tmp_path.iterdir())) == 6


def test_all_is_checked_before_anything_is_written(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "wan")
    (folder / "tokenizer" / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a tokenizer"):
        convert(folder, tmp_path / "own")
    shard = next((folder / "vae").glob("*.safetensors"))
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        convert(folder, tmp_path / "own")
    assert not (tmp_path / "own").exists()


def test_source_that_vanishes(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "wan")

    def start(published, total):
        shutil.rmtree(folder / "vae")
        return lambda count: None

    with pytest.raises(CheckpointError, match=r"cannot read .* of .*wan/vae/.*safetensors"):
        convert(folder, tmp_path / "own", on_start=start)


# -- the command ---------------------------------------------------------------------------------


def test_the_command(capsys, tiny_checkpoint, tmp_path):
    flags = [f"--src={tiny_checkpoint}", f"--dst={tmp_path / 'own'}", "--dtype=bfloat16"]
    assert main.main(["convert", *flags]) == 0
    read, wrote = capsys.readouterr().out.splitlines()
    assert read == f"source   {tiny_checkpoint}: wan2.1-t2v, diffusers layout"
    assert wrote.startswith(f"wrote    {tmp_path / 'own'}: 0.00 GB in bfloat16, float32, ")
    assert main.main(["info", str(tmp_path / "own")]) == 0
    shown = capsys.readouterr().out
    for path in tiny_checkpoint.rglob("*.safetensors"):
        assert hashlib.sha256(path.read_bytes()).hexdigest() in shown


def test_the_bar_counts_all_bytes(capsys, monkeypatch, tiny_checkpoint, tmp_path):
    monkeypatch.setattr(
        convert_command,
        "Console",
        lambda stderr: Console(stderr=stderr, force_terminal=True, width=120),
    )
    assert main.main(["convert", f"--src={tiny_checkpoint}", f"--dst={tmp_path / 'own'}"]) == 0
    shown = capsys.readouterr().err
    sizes = format.describe(tmp_path / "own").models
    total = f"{sum(model.size for model in sizes.values()) / 1000:.1f}"
    assert f"{total}/{total} kB" in shown and "converting" in shown


def test_a_full_disk_is_one_line(capsys, tiny_checkpoint, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 13, hard))
    try:
        status = main.main(["convert", f"--src={tiny_checkpoint}", f"--dst={tmp_path / 'own'}"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 2
    assert capsys.readouterr().err == f"error: cannot write to {tmp_path / 'own'}: File too large\n"
    assert not format.is_checkpoint(tmp_path / "own")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--src=a"], "the following arguments are required: --dst"),
        (["--src=a", "--dst=b", "--dtype=int8"], "--dtype: invalid choice: 'int8'"),
        (["--src=a", "--dst=b", "--fast"], "unknown argument --fast"),
        (["--src=no/where", "--dst=b"], "no/where: no such folder"),
    ],
)
def test_flags(capsys, flags, message):
    assert main.main(["convert", *flags]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
