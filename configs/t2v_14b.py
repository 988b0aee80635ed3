"""Wan 2.1 T2V-14B: the publisher's defaults, shift 5 and guidance 5."""

from ml_collections import ConfigDict

from kvlock_jax.config import run_config


def get_config() -> ConfigDict:
    """Settings from the publisher's `generate.py` (Wan-Video/Wan2.1)."""
    return run_config("kvlock_anchor", steps=50, shift=5.0, guidance_scale=5.0)
