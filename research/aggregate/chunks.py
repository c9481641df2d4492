"""Splits a leaf into one chunk per worker, and joins the chunks."""

import jax.numpy as jnp

from research.core.base import Array


def cut(x: Array, count: int) -> Array:
  """Splits a leaf into chunks [W, ...]; flattens it if W does not divide its first dimension.

  Args:
    x: the leaf, of any shape; a flattened leaf is padded with zeros to a multiple of W.
    count: W, the number of workers.
  """
  if x.ndim > 1 and x.shape[0] % count == 0:
    return x.reshape(count, x.shape[0] // count, *x.shape[1:])
  flat = jnp.pad(x.reshape(-1), (0, -x.size % count))
  return flat.reshape(count, -1)


def joined(chunks: Array, like: Array) -> Array:
  """Joins the chunks of a leaf; the inverse of `cut`.

  Args:
    chunks: the chunks [W, ...].
    like: an array with the shape of the leaf.
  """
  return chunks.reshape(-1)[: like.size].reshape(like.shape)
