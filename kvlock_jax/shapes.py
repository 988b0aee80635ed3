"""The letters that shape annotations, einsum strings and sharding rules share.

| letter | counts |
|---|---|
| `B` | edits in a batch |
| `T H W` | latent frames, rows and columns; those of a token grid where a docstring says so |
| `L` | tokens, `T*H*W` of the token grid, frame-major |
| `S` | key tokens; text tokens in cross-attention |
| `D` | width of the model |
| `N` | attention heads |
| `K` | channels of one head |
| `F` | width of the feed-forward layer |
| `C` | latent channels |

Pixel space writes its sizes out: `frames height width`. Shapes are channels-last throughout.
"""

import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

Latents = Float[Array, "B T H W C"]
LatentMask = Bool[Array, "B T H W"]
TokenMask = Bool[Array, "B L"]
Cells = Float[Array, "B *space C"]
"""Latents in either order: whole, `B T H W C`, or as patches, `B L cells C`."""
CellMask = Bool[Array, "B *space"]
Heads = Float[Array, "B L N K"]
PerEdit = Float[Array, "B"]

Frames = UInt8[np.ndarray, "frames height width 3"]
"""A video's pixels, RGB."""
Mask = Bool[np.ndarray, "frames height width"]
"""True where the video is edited."""
Image = UInt8[np.ndarray, "height width 3"]
NewFrames = UInt8[np.ndarray, "new_frames new_height new_width 3"]
"""Frames of another size than those that a function takes; so `NewMask` and `NewImage`."""
NewMask = Bool[np.ndarray, "new_frames new_height new_width"]
NewImage = UInt8[np.ndarray, "new_height new_width 3"]

VAE_STRIDES = (4, 8, 8)
"""Pixels per latent cell along time, height and width of Wan 2.1's VAE (METHOD.md section 2), which
VACE's masks are folded by; another VAE's are in its config."""

PATCH = (1, 2, 2)
"""Latent cells per token along time, height and width (Wan 2.1's transformer)."""
