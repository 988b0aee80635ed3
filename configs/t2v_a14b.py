"""Wan 2.2 T2V-A14B, two experts: shift 12, guidance 4 at high noise and 3 at low."""

from ml_collections import ConfigDict

from kvlock_jax.configs import published


def get_config() -> ConfigDict:
    """Of the publisher's `wan/configs/wan_t2v_A14B.py` (Wan-Video/Wan2.2): 40 steps of UniPC.

    A Diffusers folder may say shift 3, which gives the high-noise expert half of its steps.
    """
    return published(
        "eased",
        steps=40,
        shift=12.0,
        guidance_scale=4.0,
        guidance_scale_low=3.0,
        boundary=0.875,
        grid="plain",
    )
