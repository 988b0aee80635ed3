"""Eight CPU devices, quick compilation and strict dtype promotion, set before JAX starts."""

import os
import re

import jax
import pytest

# Small programs that run a few times: most of the suite's time would be LLVM's optimisations. They
# come after XLA's own, which stay; the demo, which CI runs too, has both. A caller's flags win.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    + os.environ.get("XLA_FLAGS", "")
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"  # it is the user's


jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(scope="module", autouse=True)
def forgotten():
    """Lets go of a module's programs: each is memory maps, of which a process has 65,530."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """A tiny Wan 2.1 in a Diffusers folder (tests/tiny.py); a test that damages it copies it."""
    import tiny

    return tiny.write_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_vace_checkpoint(tmp_path_factory):
    """A tiny Wan 2.1 VACE in a Diffusers folder (tests/tiny.py)."""
    import tiny

    return tiny.write_vace_folder(tmp_path_factory.mktemp("tiny_vace"))


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    """The tiny Wan 2.1, loaded; modules may have another."""
    from kvlock_jax import load

    return load(tiny_checkpoint)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, with a clip and its mask."""
    import tiny

    from kvlock_jax.media import encode

    monkeypatch.chdir(tmp_path)
    encode.write_video("in.mkv", tiny.clip(), 12, lossless=True)
    encode.write_video("mask.mkv", tiny.mask(), 12, lossless=True)
    return tmp_path


@pytest.fixture
def loads(monkeypatch, model):
    """Puts `model` in place of loading, so that its loop compiles once; lists what was loaded."""
    from kvlock_jax.cli import loading

    calls = []
    monkeypatch.setattr(loading, "load", lambda *args, **where: calls.append(args) or model)
    return calls


@pytest.fixture
def kvlock(folder, loads, tiny_checkpoint, capsys):
    """Runs `kvlock edit`; flags of the defaults are set by keyword, and left out by None."""
    from kvlock_jax.cli import main

    def run(*flags: str, **changes: str | None) -> tuple[int, str, str]:
        defaults = {
            "ckpt_dir": str(tiny_checkpoint),
            "src_video": "in.mkv",
            "src_mask": "mask.mkv",
            "prompt": "a red star",
            "save_file": "out.mkv",
            "sample_steps": "2",
        }
        named = [f"--{k}={v}" for k, v in (defaults | changes).items() if v is not None]
        status = main.main(["edit", *named, *flags])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def fails(kvlock, folder, loads):
    """Runs what must fail before a model is loaded; returns the one line of its error."""
    from clips import only

    def run(*flags: str, **changes: str | None) -> str:
        before = only(folder)
        status, _, errors = kvlock(*flags, **changes)
        assert status == 2
        assert re.fullmatch(r"error: [^\n]+\n", errors), errors
        assert loads == []
        assert only(folder) == before
        return errors

    return run


@pytest.fixture
def no_gcsfs(monkeypatch):
    """Hides gcsfs, which the extra `tpu` installs."""
    import importlib
    import sys

    monkeypatch.setitem(sys.modules, "gcsfs", None)
    loaded = importlib.import_module("fsspec.registry")._registry
    for scheme in ("gs", "gcs"):
        monkeypatch.delitem(loaded, scheme, raising=False)
