"""Wan 2.1 T2V-14B at 480p: shift 3, guidance 5."""

from ml_collections import ConfigDict

from kvlock_jax.configs import published


def get_config() -> ConfigDict:
    """Of the publisher's README (Wan-Video/Wan2.1), where it runs Diffusers: 3 at 480p.

    Its `generate.py` takes 5 at either size: that is `t2v_14b_720p`.
    """
    return published("eased", shift=3.0, guidance_scale=5.0)
