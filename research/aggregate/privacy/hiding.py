"""Privacy declarations of aggregators for the accountant: added noise and visible values."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from research.comm import collectives
from research.core.base import Compressor


class Sum(NamedTuple):
  """Declares that an aggregator's value is a function of the sum of the workers' trees only.

  If `unit` is given, the elements are rounded to multiples of the unit before they are summed.
  """

  axis: collectives.Axes  # the worker axes of the sum
  unit: float = 0.0
  limit: float = float("inf")  # larger elements are clipped
  present: Callable[[int], float] = lambda workers: 1.0  # minimum fraction of the W workers summed


class Noise(NamedTuple):
  """Declares that each worker's tree is clipped and gets a share of Gaussian noise."""

  clip: float
  noise: float  # deviation of the sum's noise divided by `clip`
  axis: collectives.Axes  # the worker axes that share the noise
  seen: Sum | None  # the visible function of the noisy trees; None: each tree is visible


def keeps_floats(compressor: Compressor) -> bool:
  """Returns whether a linear compressor rounds nothing: its payloads are float32 or wider.

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
