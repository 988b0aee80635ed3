"""Wan 2.1 T2V-1.3B at 480p: shift 8, guidance 6."""

from ml_collections import ConfigDict

from kvlock_jax.configs import published


def get_config() -> ConfigDict:
    """As the publisher's README (Wan-Video/Wan2.1) advises for this model.

    It names guidance 6 and a shift of 8 to 12, and runs 8; its `generate.py` alone takes 5 and 5.
    """
    return published("eased", shift=8.0, guidance_scale=6.0)
