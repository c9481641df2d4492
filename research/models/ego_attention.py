"""Implements attention of one vehicle over its neighbours, in any number and order."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.core import checks
from research.core.base import Array


def ego_attention(width: int = 32, heads: int = 2) -> Callable[[int], nn.Module]:
  """Builds a network in which the ego vehicle attends to all visible vehicles, including itself.

  The order of the vehicles does not matter.

  Args:
    width: the width of the layers, a multiple of `heads`.
    heads: the number of attention heads.

  Returns:
    A function that makes the module for a given number of outputs. The module takes x [batch,
    vehicles, features]: row 0 is the ego vehicle, and a row whose first feature is zero is padding.

  Raises:
    ValueError: if width or heads is not a positive integer, or width is not a multiple of heads.

  Reference: Leurent, Mercat, 2019, Social attention for autonomous decision-making in dense
    traffic, arXiv:1911.12250.
  """
  checks.positive_integer("width", width)
  checks.positive_integer("heads", heads)
  if width % heads:
    raise ValueError(f"width={width} is not a multiple of heads={heads}")
  return lambda outputs: EgoAttention(outputs, width, heads)


class EgoAttention(nn.Module):
  """Encodes all vehicles, lets the ego vehicle attend to them, and decodes the result."""

  outputs: int
  width: int
  heads: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    x = jnp.asarray(x).reshape(*x.shape[:2], -1)
    dense = lambda name, size: nn.Dense(size, kernel_init=nn.initializers.he_normal(), name=name)
    encode = lambda name, y: nn.relu(
      dense(f"{name}_1", self.width)(nn.relu(dense(f"{name}_0", self.width)(y)))
    )
    ego = encode("ego", x[:, :1])
    everyone = jnp.concatenate([ego, encode("other", x[:, 1:])], 1)
    split = lambda y: y.reshape(*y.shape[:2], self.heads, -1)
    query, key, value = (
      split(dense(name, self.width)(y))
      for name, y in (("query", ego), ("key", everyone), ("value", everyone))
    )
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) * (self.width // self.heads) ** -0.5
    there = (x[:, :, 0] != 0).at[:, 0].set(True)
    shares = jax.nn.softmax(jnp.where(there[:, None, None], scores, -jnp.inf), -1)
    seen = jnp.einsum("bhqk,bkhd->bqhd", shares, value).reshape(len(x), self.width)
    y = jnp.concatenate([ego[:, 0], seen], 1)
    return dense("output", self.outputs)(nn.relu(dense("decode", self.width)(y)))
