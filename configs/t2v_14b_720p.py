"""Wan 2.1 T2V-14B at 720p: shift 5, guidance 5."""

from ml_collections import ConfigDict

from kvlock_jax.configs import published


def get_config() -> ConfigDict:
    """Defaults of the publisher's `generate.py` (Wan-Video/Wan2.1) for videos from text."""
    return published("eased", shift=5.0, guidance_scale=5.0)
