"""Wan 2.1 T2V-1.3B at 480x832: shift 8 and guidance 6 are the publisher's advice for this size."""

from ml_collections import ConfigDict

from kvlock_jax.config import run_config


def get_config() -> ConfigDict:
    """Settings from the publisher's README (Wan-Video/Wan2.1, text-to-video 1.3B)."""
    return run_config("kvlock_anchor", steps=50, shift=8.0, guidance_scale=6.0)
