"""The mesh of devices and its axes."""

import re
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from kvlock_jax.errors import ConfigError

AXES = ("data", "frames", "model")
"""`data`: edits; `frames`: tokens of a video, frame-major; `model`: heads and feed-forward."""


def make_mesh(
    data: int = 1, frames: int = 1, model: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh of the first `data frames model` devices.

    Raises:
      ConfigError: the mesh takes more devices than are found, or leaves some out on several hosts.
    """
    available = jax.devices() if devices is None else devices
    sizes = dict(zip(AXES, (data, frames, model), strict=True))
    text = ",".join(f"{axis}={size}" for axis, size in sizes.items())
    count = data * frames * model
    if min(sizes.values()) < 1:
        raise ConfigError(f"mesh {text}: every axis must be 1 or more")
    if count > len(available) or (count < len(available) and jax.process_count() > 1):
        raise ConfigError(f"mesh {text} takes {count} devices, found {len(available)}")
    return jax.make_mesh(
        tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * 3, devices=available[:count]
    )


def parse_mesh(text: str, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Parses a mesh such as `"data=1,frames=8,model=1"`; an axis left out has size 1.

    Raises:
      ConfigError: a part cannot be parsed, or as in `make_mesh`.
    """
    sizes = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        axis, _, size = part.partition("=")
        if axis not in AXES or axis in sizes or not re.fullmatch("[0-9]{1,6}", size):
            raise ConfigError(f"mesh {text!r}: cannot read {part!r}; write data=1,frames=8,model=1")
        sizes[axis] = int(size)
    return make_mesh(**sizes, devices=devices)
