"""The embedded demo model: 9 frames of 96x96, one coloured shape."""

from ml_collections import ConfigDict

from kvlock_jax.settings.schema import run_config


def get_config() -> ConfigDict:
    """Settings under which the demo's figures are measured."""
    windows = {"window": 9, "window_overlap": 4}
    return run_config("eased", steps=50, shift=3.0, guidance_scale=4.0, **windows)
