"""Clips a tree by its global norm."""

import jax
import jax.numpy as jnp
import optax

from research.core.base import Tree


def clipped(tree: Tree, norm: float) -> Tree:
  """Computes x min(1, norm / ||x||), where ||x|| is the norm over all leaves; keeps dtypes.

  The norm is computed in float32 or wider, since squares of float16 above 256 overflow.

  Args:
    tree: x, a tree of floating-point arrays.
    norm: the maximum L2 norm, greater than 0.
  """
  wide = jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)
  found, _ = optax.clip_by_global_norm(norm).update(wide, optax.EmptyState())
  return jax.tree.map(lambda c, x: c.astype(x.dtype), found, tree)
