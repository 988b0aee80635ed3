"""Models and workloads whose costs are counted."""

import dataclasses
import functools
import math
import re
from pathlib import Path

from flax import nnx

from kvlock_jax import lock
from kvlock_jax.estimate.costs import Workload
from kvlock_jax.models.attention import kernels
from kvlock_jax.models.wan.config import WanConfig
from kvlock_jax.models.wan.vace import wan_transformer

SMALL, LARGE = WanConfig(12, 128, 30, 8960), WanConfig(40, 128, 40, 13824)
PUBLISHED = {
    "wan2.1-t2v-1.3b": SMALL,
    "wan2.1-t2v-14b": LARGE,
    "wan2.1-vace-1.3b": dataclasses.replace(SMALL, vace_layers=tuple(range(0, 30, 2))),
    "wan2.1-vace-14b": dataclasses.replace(LARGE, vace_layers=tuple(range(0, 40, 5))),
}
LAYOUTS = Path(__file__).parent / "data" / "layouts"

# Wide enough that matrix products are nearly all there is to compute.
T2V = WanConfig(2, 128, 2, 640, in_channels=4, out_channels=4, text_dim=64, freq_dim=32)
VACE = dataclasses.replace(T2V, vace_layers=(0,), vace_in_channels=12)
ROWS = 2
LOCK = lock.preset("kvlock", 5.0)


def small(config: WanConfig, **changes: int) -> Workload:
    return Workload(
        config, **{"frames": 5, "height": 256, "width": 256, "text_tokens": 48} | changes
    )


def full(name: str, height: int = 480, width: int = 832, **changes: int) -> Workload:
    return Workload(PUBLISHED[name], 81, height, width, **changes)


def softmax(q, k, v, keys=None):
    """Attention that the compiler sees through, whatever kernel the program takes."""
    return kernels.plain(q, k, v, keys)[0]


@functools.cache
def sizes(config: WanConfig) -> dict[str, int]:
    """Numbers of each parameter of the abstract transformer."""
    model = nnx.eval_shape(lambda: wan_transformer(config, rngs=nnx.Rngs(0)))
    flat = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): math.prod(leaf.get_value().shape) for path, leaf in flat}


def count(config: WanConfig, pattern: str) -> int:
    return sum(size for name, size in sizes(config).items() if re.match(pattern, name))
