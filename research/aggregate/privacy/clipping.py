"""Clipping by the norm of a whole tree."""

import jax
import jax.numpy as jnp
import optax

from research.core.base import Tree


def clipped(tree: Tree, norm: float) -> Tree:
  """x min(1, norm / ||x||), over all leaves together, in their dtypes.

  The norm is taken in float32 or wider, since squares of float16 beyond 256 are out of its range.

  Args:
    tree: arrays.
    norm: the largest L2 norm, greater than 0.
  """
  wide = jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)
  found, _ = optax.clip_by_global_norm(norm).update(wide, optax.EmptyState())
  return jax.tree.map(lambda c, x: c.astype(x.dtype), found, tree)
