"""Masks of every frame, from boxes or masks of a few.

masks.boxes({0: (8, 8, 40, 40), 20: (30, 8, 62, 40)}, 33, 96, 96)  # moves in a line
masks.shapes({0: mask, 20: other}, 33)                             # one becomes the other
masks.follow(video, {0: mask})                                     # goes where the object goes

`keyframes` reads what users write, `between` blends shapes, `follow` goes after an object by the
`motion` of its points and by its `appearance`.
"""

from kvlock_jax.masks.between import shapes
from kvlock_jax.masks.follow import Followed, follow
from kvlock_jax.masks.keyframes import Boxes, boxes, spans

__all__ = ["Boxes", "Followed", "boxes", "follow", "shapes", "spans"]
