"""Wan 2.1 T2V-1.3B at 720p, which it was hardly trained on: shift 8, guidance 6."""

from ml_collections import ConfigDict

from kvlock_jax.configs import published


def get_config() -> ConfigDict:
    """As at 480p: the publisher's README (Wan-Video/Wan2.1) has no other advice for 720p.

    It calls that size possible but less stable, and its `generate.py` refuses it for this model.
    """
    return published("eased", shift=8.0, guidance_scale=6.0)
