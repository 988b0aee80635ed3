"""A causal convolution frame by frame, as on CPU, is the convolution over frames at once."""

import jax
import numpy as np
import pytest
from flax import nnx

from kvlock_jax.models.convolutions import CausalConv3d


def made(c_in, size, time_stride):
    layer = CausalConv3d(c_in, 5, size, time_stride, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 7, 6, 9, c_in))
    return layer, x


@pytest.mark.parametrize("c_in", [3, 32, 33])  # three frames' channels at once, and one's
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("time_stride", [1, 2])
def test_frame_by_frame_is_all_at_once(c_in, size, time_stride):
    layer, x = made(c_in, size, time_stride)
    kernel = layer.kernel[...]
    want = layer._whole(x, kernel)
    assert want.shape == (2, 5 if time_stride == 1 else 3, 6, 9, 5)
    np.testing.assert_allclose(layer._by_frames(x, kernel), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("c_in", [32, 33])
def test_a_cpu_convolves_no_more_than_a_frame(c_in):
    layer, x = made(c_in, 3, 1)
    by_platform = {
        platform: jax.jit(layer.valid).trace(x).lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cpu", "tpu")
    }
    found = {platform: "[b, 0, 1, 2, f]" in text for platform, text in by_platform.items()}
    assert found == {"cpu": False, "tpu": True}
