"""A leaf cut into as many chunks as there are workers, and put together again."""

import jax.numpy as jnp

from research.core.base import Array


def cut(x: Array, count: int) -> Array:
  """W chunks [W, ...] of a leaf: along its first dimension where W divides it, else flattened."""
  if x.ndim > 1 and x.shape[0] % count == 0:
    return x.reshape(count, x.shape[0] // count, *x.shape[1:])
  flat = jnp.pad(x.reshape(-1), (0, -x.size % count))
  return flat.reshape(count, -1)


def joined(chunks: Array, like: Array) -> Array:
  """The leaf that `cut` made chunks of."""
  return chunks.reshape(-1)[: like.size].reshape(like.shape)
