"""Wan 2.2 VACE-Fun-A14B, two experts: shift 12, guidance 5 for both."""

from ml_collections import ConfigDict

from kvlock_jax.configs import published


def get_config() -> ConfigDict:
    """Of the publisher's `examples/wan2.2_vace_fun` (aigc-apps/VideoX-Fun): 50 steps of Euler."""
    return published("eased", solver="euler", shift=12.0, guidance_scale=5.0, boundary=0.875)
