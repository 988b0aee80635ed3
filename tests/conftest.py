"""Eight CPU devices, quick compilation, strict dtype promotion, and fixtures that modules share."""

import asyncio
import gc
import os
import re
from pathlib import Path

import jax
import pytest
from filelock import FileLock
from jax.experimental.compilation_cache import compilation_cache
from jaxtyping import config as jaxtyping_config
from jaxtyping import install_import_hook

# Small programs that run a few times: compiling them takes most of the suite's time, which LLVM's
# optimisations would double, and MLIR's emitters of fused operations again. XLA's own passes stay.
# AVX has no fused multiply-add: one formula gives the same bits in every program, however fused.
# `test_optimised.py`, `test_demo.py` and CI's demo run as a user's edit. A caller's flags win.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_max_isa=AVX " + os.environ.get("XLA_FLAGS", "")
)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["JAX_PLATFORMS"] = "cpu"  # of processes that tests start

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_compilation_cache_dir", None)  # until the run has a folder of its own
jax.config.update("jax_numpy_dtype_promotion", "strict")
# Programs name no lines of Python, a tenth of the time to make one.
jax.config.update("jax_traceback_in_locations_limit", 0)

# Before any of them is imported. The command line alone has no arrays.
CHECKED = (
    "grid lock models sampling parallel pipeline evaluate demo media masks batch checkpoints "
    "estimate settings runtime convert configs app"
).split()
install_import_hook([f"kvlock_jax.{name}" for name in CHECKED], "annotations.arrays")


def pytest_report_header(config):
    """Says which tests do not run, and why."""
    if config.option.markexpr == "not nightly":
        return "nightly: deselected, since they take long; run with -m nightly"


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(config, items):
    """Marks the tests of `nightly.txt`; a whole run refuses names that are no tests."""
    lines = Path(__file__).with_name("nightly.txt").read_text().splitlines()
    listed = {line for line in lines if not line.startswith("#")}
    for item in items:
        if item.nodeid in listed:
            item.add_marker(pytest.mark.nightly)
    unknown = listed - {item.nodeid for item in items}
    if unknown and config.args == config.getini("testpaths"):
        raise pytest.UsageError(f"nightly.txt: no tests: {', '.join(sorted(unknown))}")


@pytest.fixture
def unchecked():
    """Lets arrays of any kind and shape reach functions, which are to refuse them by name."""
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory) -> Path:
    """The folder of this run, the same one for all workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session", autouse=True)
def compiled_programs(shared_folder):
    """Workers, modules and processes share compiled programs: many run the same ones.

    The user's own cache is left alone.
    """
    os.environ["XDG_CACHE_HOME"] = str(shared_folder / "cache")
    settings = {
        "jax_enable_compilation_cache": True,
        "jax_compilation_cache_dir": str(shared_folder / "programs"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    os.environ.update({name.upper(): str(value) for name, value in settings.items()})
    use_cache(settings)
    return settings


@pytest.fixture
def compiled():
    """Names of programs as they are compiled."""
    names: list[str] = []

    def listener(event, seconds, **about):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(about.get("fun_name", "?").removeprefix("jit(").removesuffix(")"))

    jax.monitoring.register_event_duration_secs_listener(listener)
    yield names
    jax.monitoring.unregister_event_duration_listener(listener)


def use_cache(settings: dict) -> None:
    """Sets JAX's cache of compiled programs, which otherwise stays with its first folder."""
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(autouse=True)
def restored_cache(compiled_programs):
    """Restores the cache's settings, which a test, or a command that it runs, may change."""
    yield
    if any(getattr(jax.config, name) != value for name, value in compiled_programs.items()):
        use_cache(compiled_programs)


@pytest.fixture(scope="module", autouse=True)
def cleared_caches():
    """Frees a module's programs: each takes memory maps, and a process may have 65,530 of them.

    Garbage waits until then: looking for it slows tracing, which makes objects by the million.
    """
    gc.disable()
    yield
    jax.clear_caches()
    gc.collect()


def written_once(folder: Path, write) -> Path:
    """What `write` returns for a new folder; the first worker writes, the others wait."""
    with FileLock(f"{folder}.lock"):
        done = folder / "done"
        if not done.exists():
            folder.mkdir(exist_ok=True)
            done.write_text(str(write(folder)))
        return Path(done.read_text())


@pytest.fixture(scope="session")
def tiny_checkpoint(shared_folder):
    """A tiny Wan 2.1 in a Diffusers folder (tests/tiny.py); a test that damages it copies it."""
    import tiny

    return written_once(shared_folder / "tiny", tiny.write_folder)


@pytest.fixture(scope="session")
def tiny_vace_checkpoint(shared_folder):
    """A tiny Wan 2.1 VACE in a Diffusers folder (tests/tiny.py)."""
    import tiny

    return written_once(shared_folder / "tiny_vace", tiny.write_vace_folder)


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


@pytest.fixture(scope="module")
def swept():
    """Collects an event loop that a module's libraries left open, while its filters ignore it."""
    yield
    asyncio.set_event_loop(None)
    gc.collect()


@pytest.fixture
def no_gcsfs(monkeypatch):
    """Hides gcsfs, which the extra `tpu` installs."""
    import importlib
    import sys

    monkeypatch.setitem(sys.modules, "gcsfs", None)
    loaded = importlib.import_module("fsspec.registry")._registry
    for scheme in ("gs", "gcs"):
        monkeypatch.delitem(loaded, scheme, raising=False)
