"""Eight CPU devices and strict dtype promotion, set before JAX starts."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"  # it is the user's

import jax
import pytest

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
