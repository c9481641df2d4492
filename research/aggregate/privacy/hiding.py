"""Defines what aggregators declare to the privacy accountant: added noise and visible values."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from research.comm import collectives
from research.core.base import Compressor


class Sum(NamedTuple):
  """Declares that an aggregator's value depends only on the sum of the workers' trees.

  If `unit` is given, the elements are rounded to multiples of the unit before the sum.
  """

  axis: collectives.Axes  # the worker axes of the sum
  unit: float = 0.0
  limit: float = float("inf")  # larger elements are clipped
  present: Callable[[int], float] = lambda workers: 1.0  # minimum fraction of the W workers summed


class Noise(NamedTuple):
  """Declares that each worker's tree is clipped and gets a share of Gaussian noise."""

  clip: float
  noise: float  # standard deviation of the noise in the sum, divided by `clip`
  axis: collectives.Axes  # the worker axes that share the noise
  seen: Sum | None  # which function of the noisy trees is visible; None: each tree is visible


def keeps_floats(compressor: Compressor) -> bool:
  """Returns whether a linear compressor does not round: its payloads are float32 or wider.

  Args:
    compressor: the compressor.
  """
  key = jax.eval_shape(lambda: jax.random.key(0))
  like = jax.ShapeDtypeStruct((4096,), jnp.float32)
  payload = jax.eval_shape(compressor.encode, like, key, key)
  return all(is_wide(leaf.dtype) for leaf in jax.tree.leaves(payload))


def is_wide(dtype: jnp.dtype) -> bool:
  """Returns whether a dtype is inexact and has at least as many bits as float32.

  Args:
    dtype: the dtype.
  """
  return jnp.issubdtype(dtype, jnp.inexact) and dtype.itemsize >= 4
