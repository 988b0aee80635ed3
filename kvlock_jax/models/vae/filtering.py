"""Convolutions of three taps with fewer products: Winograd's minimal filtering.

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (arXiv 1509.09308): a few
products turn a window of inputs `d` and three taps `g` into several outputs,

    y = A^T [(G g) (B^T d)]

Axes nest: a product may itself be a filtered convolution along another axis.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float64, Int

from kvlock_jax.models.precision import precision_for

Product = Callable[[Array, Array], Array]
"""A bilinear function of an input and a tap that keeps all axes of the input but the last."""


@dataclasses.dataclass(frozen=True, eq=False)
class Filter:
    """The matrices that turn a window of inputs into outputs.

    Attributes:
      of_products: matrix `A^T`.
      of_taps: matrix `G`.
      of_inputs: matrix `B^T`.
      stride: inputs from one window to the next.
    """

    of_products: Float64[np.ndarray, "outputs products"]
    of_taps: Float64[np.ndarray, "products 3"]
    of_inputs: Float64[np.ndarray, "products window"]
    stride: int


def _toom_cook(*points: float) -> Filter:
    """`F(n, 3)`: n outputs of n + 2 inputs and products, by polynomials at n + 1 points."""
    outputs, at = len(points) - 1, np.array(points)
    others = [np.delete(at, i) for i in range(len(at))]
    last = np.arange(outputs) == outputs - 1  # from the point at infinity
    of_products = np.concatenate([at ** np.arange(outputs)[:, None], last[:, None]], axis=1)
    scale = np.array([np.prod(p - rest) for p, rest in zip(at, others, strict=True)])
    of_taps = np.concatenate([at[:, None] ** np.arange(3) / scale[:, None], [[0.0, 0.0, 1.0]]])
    rows = [*(np.append(np.poly(rest)[::-1], 0.0) for rest in others), np.poly(at)[::-1]]
    return Filter(of_products, of_taps, np.stack(rows), outputs)


TWO = _toom_cook(0.0, 1.0, -1.0)
"""Two outputs of four inputs by four products instead of six."""

FOUR = _toom_cook(0.0, 2 / 3, -2 / 3, 3 / 2, -3 / 2)
"""Four outputs of six inputs by six products instead of twelve. With the usual points, 0, 1, -1, 2
and -2, rounding errors are over a third larger (`tests/test_filtering.py`)."""

DOUBLED = Filter(
    of_products=np.array([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]]),
    of_taps=np.array([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 1.0]]),
    of_inputs=np.array([[1.0, -1.0, 0.0], [0.0, 1.0, 0.0], [0.0, -1.0, 1.0]]),
    stride=1,
)
"""Two outputs of three inputs, each of which stands for two equal ones, by three products instead
of six: `TWO` of `a b b c`, one of whose products is 0."""

Inputs = Callable[[int], Array]
"""Returns the inputs of all windows at a place in the window. It is called where they are summed:
slices taken before a loop would be copies that the loop holds."""

Each = Callable[[Product, Filter, Inputs, Array], Sequence[Array]]
"""Computes all products of a filter, `(G g) (B^T d)`, of inputs and taps."""


def unrolled(product: Product, form: Filter, inputs: Inputs, taps: Array) -> Sequence[Array]:
    """Computes the products one by one."""
    taps = _tensordot(jnp.asarray(form.of_taps, taps.dtype), taps)
    windows = _windows(form, inputs)
    return [product(_sum(b, windows), g) for b, g in zip(form.of_inputs, taps, strict=True)]


def stacked(product: Product, form: Filter, inputs: Inputs, taps: Array) -> Sequence[Array]:
    """Computes the products in one batch: small ones compile sooner and run as fast."""
    windows = _windows(form, inputs)
    sums = jnp.stack([_sum(row, windows) for row in form.of_inputs])
    return jax.vmap(product)(sums, jnp.stack([_sum(row, taps) for row in form.of_taps]))


def looped(product: Product, form: Filter, inputs: Inputs, taps: Array) -> Sequence[Array]:
    """Computes the products in a loop, with the memory and compile time of one."""
    of_inputs, of_taps = (jnp.asarray(m, taps.dtype) for m in (form.of_inputs, form.of_taps))

    def of_row(row: int | Int[Array, ""]) -> Array:
        """One product, with factors of 0 multiplied like others."""
        windows = enumerate(_windows(form, inputs))
        x = sum(of_inputs[row, place] * each for place, each in windows)
        return product(x, _tensordot(of_taps[row], taps))

    one, rows = jax.eval_shape(of_row, 0), len(form.of_inputs)
    # `lax.map` starts with zeros, which XLA would allocate once for all loops of a program and copy
    # for each before any runs. A number of the inputs ties the buffer to its own loop; it comes
    # from the middle, since edges may be padding.
    middle = inputs(form.of_inputs.shape[1] // 2)
    number = middle[tuple(n // 2 for n in middle.shape)]
    start = jnp.broadcast_to(number, (rows, *one.shape))
    update = jax.lax.dynamic_update_index_in_dim
    return jax.lax.fori_loop(0, rows, lambda row, made: update(made, of_row(row), row, 0), start)


def convolve(
    x: Array,
    taps: Array,
    product: Product,
    form: Filter,
    *,
    axis: int,
    each: Each = unrolled,
) -> Array:
    """`y_i = sum_t product(x_{i + t}, taps_t)` along an axis: two shorter than `x`.

    With `DOUBLED` each input but the first and last stands for two equal ones, and `y` is twice as
    long.

    Args:
      x: inputs, float32, since sums in fewer bits would lose too many.
      taps: three taps along the first axis.
      product: product of the inputs at one place along the axis, and a tap.
      form: filter.
      axis: axis of `x`.
      each: form of the products: `unrolled`, `looped` or `stacked`.
    """
    outputs = len(form.of_products)
    count = x.shape[axis] - 2
    tiles = -(-count // form.stride)
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, tiles * form.stride - count)
    x = jnp.pad(x, padding)
    last = form.stride * (tiles - 1) + 1

    def inputs(place: int) -> Array:
        """The inputs of all windows at a place."""
        return jax.lax.slice_in_dim(x, place, place + last, stride=form.stride, axis=axis)

    products = each(product, form, inputs, taps)
    y = jnp.stack([_sum(row, products) for row in form.of_products], axis=axis + 1)
    y = y.reshape(*y.shape[:axis], tiles * outputs, *y.shape[axis + 2 :])
    return jax.lax.slice_in_dim(y, 0, count * outputs // form.stride, axis=axis)


def _tensordot(factors: Array, taps: Array) -> Array:
    """Weighted sums of taps."""
    return jnp.tensordot(factors, taps, axes=1, precision=precision_for(taps.dtype))


def _windows(form: Filter, inputs: Inputs) -> list[Array]:
    """The inputs at every place of the window."""
    return [inputs(place) for place in range(form.of_inputs.shape[1])]


def _sum(factors: np.ndarray, terms: Sequence[Array]) -> Array:
    """A weighted sum that skips terms whose factor is 0."""
    kept = [(f, x) for f, x in zip(factors, terms, strict=True) if f]
    return functools.reduce(operator.add, (x if f == 1 else x * x.dtype.type(f) for f, x in kept))
