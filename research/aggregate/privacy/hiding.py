"""What an aggregator tells the accountant of privacy: the noise that it adds, what else is seen."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from research.comm import collectives
from research.core.base import Compressor


class Sum(NamedTuple):
  """Of an aggregator whose value is a function of the sum of the workers' trees, and no more.

  With a `unit` it is the sum of what elements are after rounding to its multiples.
  """

  axis: collectives.Axes  # the worker axes of the sum
  unit: float = 0.0
  limit: float = float("inf")  # larger elements are cut
  present: Callable[[int], float] = lambda workers: 1.0  # the share of W in the sum, at least


class Noise(NamedTuple):
  """Of an aggregator that clips what each worker has and adds its share of Gaussian noise."""

  clip: float
  noise: float  # the deviation of the sum's noise over `clip`
  axis: collectives.Axes  # the worker axes that share the noise
  seen: Sum | None  # what is seen of the noisy trees; None: each of them


def keeps_floats(compressor: Compressor) -> bool:
  """Whether payloads of a linear compressor are as exact as float32: nothing is rounded."""
  key = jax.eval_shape(lambda: jax.random.key(0))
  like = jax.ShapeDtypeStruct((4096,), jnp.float32)
  payload = jax.eval_shape(compressor.encode, like, key, key)
  return all(is_wide(leaf.dtype) for leaf in jax.tree.leaves(payload))


def is_wide(dtype: jnp.dtype) -> bool:
  """Whether a number has at least the bits of float32."""
  return jnp.issubdtype(dtype, jnp.inexact) and dtype.itemsize >= 4
