"""Who takes part in an exchange, what that weighs, and what becomes of those who do not."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from research.base import EVERYONE, Array, Presence, Tree
from research.comm import collectives


def presence_of(weight: float | Array, active: bool | Array) -> Presence:
  """A worker's presence, `EVERYONE` where all take part and count alike."""
  same = active is True and isinstance(weight, (int, float)) and weight == 1
  return EVERYONE if same else Presence(weight, active)


def weighted(tree: Tree, presence: Presence) -> Tree:
  """A worker's part of a mean over workers: weight_i x_i in x's dtypes, zero if it is absent."""
  if presence is EVERYONE:
    return tree
  weight, active = presence
  share = lambda x: jnp.where(active, (weight * x).astype(x.dtype), jnp.zeros((), x.dtype))
  return jax.tree.map(share, tree)


def unweighted(presence: Presence) -> Presence:
  """The presence of a value that holds its weight already."""
  return EVERYONE if presence.active is True else Presence(1.0, presence.active)


def alike(active: bool | Array) -> Presence:
  """The presence of a worker that counts as much as any other of those present."""
  if active is True:
    return EVERYONE
  there = jnp.asarray(active, jnp.float32)
  share = collectives.mean(there)
  return Presence(there / jnp.where(share > 0, share, 1), active)


def kept(active: bool | Array, new: Tree, old: Tree) -> Tree:
  """What a worker keeps for itself after a round: what it had before, if it was absent."""
  if active is True:
    return new
  return jax.tree.map(lambda a, b: jnp.where(active, a, b), new, old)


class Roll(NamedTuple):
  """Who of W workers is present, known to all of them."""

  present: Array  # bool [W]
  count: Array  # int32, how many
  scale: Array  # float32, the mean weight over all W


def call_roll(presence: Presence, axis: collectives.Axes) -> Roll | None:
  """Who is present: every worker tells the others its weight, in 4 bytes. None: everyone is."""
  if presence.active is True:
    return None
  own = jnp.where(presence.active, presence.weight, 0).astype(jnp.float32)
  weights = collectives.gather(own, axis)
  present = weights > 0
  return Roll(present, jnp.sum(present, dtype=jnp.int32), jnp.mean(weights))


def need_everyone(name: str, presence: Presence) -> None:
  """Refuses an exchange among neighbours of which some may be absent or count more than others.

  Raises:
    ValueError: if the presence is not `EVERYONE`.
  """
  if presence is not EVERYONE:
    raise ValueError(
      f"{name} averages neighbours, who must all be present and count alike: one that drops out "
      f"would leave its links empty; leave out the dropout and the sampling"
    )
