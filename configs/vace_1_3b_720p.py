"""Wan 2.1 VACE-1.3B at 720p, which it was not trained for: shift 16, guidance 5."""

from ml_collections import ConfigDict

from kvlock_jax.configs import published


def get_config() -> ConfigDict:
    """As at 480p: `vace_wan_inference.py` (ali-vilab/VACE) has one shift for all sizes.

    The publisher's README (Wan-Video/Wan2.1) lists 480p alone for this model.
    """
    return published("eased", shift=16.0, guidance_scale=5.0)
