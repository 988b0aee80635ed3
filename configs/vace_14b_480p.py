"""Wan 2.1 VACE-14B at 480p: shift 16, guidance 5."""

from ml_collections import ConfigDict

from kvlock_jax.configs import published


def get_config() -> ConfigDict:
    """Defaults of the publisher's `vace_wan_inference.py` (ali-vilab/VACE), for all sizes."""
    return published("eased", shift=16.0, guidance_scale=5.0)
