"""A convolution whose gradient is fast on CPUs.

XLA:CPU computes the gradient with respect to a kernel by a convolution with the images as kernels.
It calls its library for this convolution only outside of loops, and every training program of this
library is a loop over rounds: there, the step of a small network takes 10 times as long. Here, the
gradient is a matrix product for each position in the kernel. Other devices compute it as usual.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from research.core.base import Array

_LAYOUT = ("NHWC", "HWIO", "NHWC")
_ONES = ("lhs_dilation", "rhs_dilation", "feature_group_count", "batch_group_count")
_Pads = tuple[tuple[int, int], ...]


def conv_general_dilated(
  x: Array,
  kernel: Array,
  window_strides: Sequence[int],
  padding: str | Sequence[tuple[int, int]],
  **rest: Any,
) -> Array:
  """Computes `lax.conv_general_dilated`, for the argument of this name of Flax's `Conv`.

  The gradient differs only for images [batch, height, width, channels] and kernels [height, width,
  inputs, outputs], without groups and dilation. It has no forward mode (`jax.jvp`).

  Args:
    x: the images.
    kernel: the kernel.
    window_strides: the strides.
    padding: 'SAME', 'VALID', or the rows and columns to add at each side.
    **rest: further arguments of `lax.conv_general_dilated`.
  """
  if not _is_plain(x, kernel, rest):
    return lax.conv_general_dilated(x, kernel, window_strides, padding, **rest)
  strides = tuple(window_strides)
  if isinstance(padding, str):
    padding = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
  pads = tuple((int(low), int(high)) for low, high in padding)
  return _convolved(strides, pads, rest.get("precision"), x, kernel)


def _is_plain(x: Array, kernel: Array, rest: dict[str, Any]) -> bool:
  given = {name for name, value in rest.items() if value is not None}
  if x.ndim != 4 or kernel.ndim != 4 or given - {*_ONES, "dimension_numbers", "precision"}:
    return False
  numbers = lax.conv_dimension_numbers(x.shape, kernel.shape, rest.get("dimension_numbers"))
  ones = (rest.get(name) or 1 for name in _ONES)
  plain = all(set(one if isinstance(one, Sequence) else (one,)) == {1} for one in ones)
  return plain and numbers == lax.conv_dimension_numbers(x.shape, kernel.shape, _LAYOUT)


def _plain(strides: tuple[int, ...], pads: _Pads, precision: Any, x: Array, kernel: Array) -> Array:
  return lax.conv_general_dilated(
    x, kernel, strides, pads, dimension_numbers=_LAYOUT, precision=precision
  )


_convolved = jax.custom_vjp(_plain, nondiff_argnums=(0, 1, 2))


def _forward(strides: tuple[int, ...], pads: _Pads, precision: Any, x: Array, kernel: Array):
  return _plain(strides, pads, precision, x, kernel), (x, kernel)


def _backward(strides: tuple[int, ...], pads: _Pads, precision: Any, kept: Any, out: Array):
  x, kernel = kept
  convolve = functools.partial(_plain, strides, pads, precision)

  def products(x: Array, out: Array) -> Array:
    padded = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *((*p, 0) for p in pads), (0, 0, 0)))
    batch, *size, outputs = out.shape
    inputs = x.shape[-1]

    def seen(*position: int) -> Array:
      """What one position of the kernel is multiplied by, [batch, height, width, inputs]."""
      ends = (p + (n - 1) * s + 1 for p, n, s in zip(position, size, strides, strict=True))
      start, limit = (0, *position, 0), (batch, *ends, inputs)
      return lax.slice(padded, start, limit, (1, *strides, 1))

    product = lambda a: jnp.einsum("bhwi,bhwo->io", a, out, precision=precision)
    positions = itertools.product(*map(range, kernel.shape[:2]))
    found = jnp.stack([product(seen(*position)) for position in positions])
    return found.reshape(*kernel.shape[:2], inputs, outputs)

  def convolutions(x: Array, out: Array) -> Array:
    return jax.linear_transpose(lambda kernel: convolve(x, kernel), kernel)(out)[0]

  (of_x,) = jax.linear_transpose(lambda x: convolve(x, kernel), x)(out)
  return of_x, lax.platform_dependent(x, out, cpu=products, default=convolutions)


_convolved.defvjp(_forward, _backward)
