"""Wan 2.2 TI2V-5B at 720p: shift 5.0, guidance 5."""

from ml_collections import ConfigDict

from kvlock_jax.configs import published


def get_config() -> ConfigDict:
    """Of the publisher's `wan/configs/wan_ti2v_5B.py` (Wan-Video/Wan2.2): 50 steps of UniPC.

    The preset gives it the background as known tokens, as its image-to-video loop gives the first
    frame. Trained on 121 frames at 24 a second.
    """
    return published("clean", shift=5.0, guidance_scale=5.0, grid="plain", window=121)
