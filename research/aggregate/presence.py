"""Handles partial participation: weights of active workers and private state of absent workers."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from research.comm import collectives
from research.core.base import EVERYONE, Array, Presence, Tree


def presence_of(weight: float | Array, active: bool | Array) -> Presence:
  """Builds the presence of a worker: `EVERYONE` if all workers participate with equal weights.

  Args:
    weight: the worker's weight, a number or a float scalar.
    active: whether the worker participates, True or a bool scalar.
  """
  same = active is True and isinstance(weight, (int, float)) and weight == 1
  return EVERYONE if same else Presence(weight, active)


def weighted(tree: Tree, presence: Presence) -> Tree:
  """Multiplies a tree by the weight of this worker, or by zero if it is absent; keeps dtypes.

  Args:
    tree: this worker's arrays x_i.
    presence: this worker's participation and weight.

  Returns:
    weight_i x_i, the worker's term of a weighted mean.
  """
  if presence is EVERYONE:
    return tree
  weight, active = presence
  share = lambda x: jnp.where(active, (weight * x).astype(x.dtype), jnp.zeros((), x.dtype))
  return jax.tree.map(share, tree)


def unweighted(presence: Presence) -> Presence:
  """Returns the presence to pass with a tree that has already been multiplied by the weight.

  Args:
    presence: this worker's participation and weight.
  """
  return EVERYONE if presence.active is True else Presence(1.0, presence.active)


def alike(active: bool | Array) -> Presence:
  """Returns a presence in which active workers have equal weights and the mean weight is one.

  Args:
    active: whether this worker participates, True or a bool scalar.
  """
  if active is True:
    return EVERYONE
  there = jnp.asarray(active, jnp.float32)
  share = collectives.mean(there)
  return Presence(there / jnp.where(share > 0, share, 1), active)


def kept(active: bool | Array, new: Tree, old: Tree) -> Tree:
  """Returns the private state of a worker after a round, which changes only if it was active.

  Args:
    active: whether this worker participated, True or a bool scalar.
    new: the updated state.
    old: the state before the round.

  Returns:
    The new state if the worker was active; otherwise the old state.
  """
  if active is True:
    return new
  return jax.tree.map(lambda a, b: jnp.where(active, a, b), new, old)


class Roll(NamedTuple):
  """The workers that are present in a round; all W workers have the same Roll."""

  present: Array  # bool [W]
  count: Array  # int32, number of present workers
  scale: Array  # float32, mean weight over all W workers


def gathered_weights(presence: Presence, axis: collectives.Axes) -> Array:
  """Gathers the weights of all workers, 4 bytes each, unless all are known to be present.

  Args:
    presence: this worker's presence.
    axis: the worker axes.

  Returns:
    The weights, float32 [W], equal on all workers: 0 for an absent worker, and ones if all workers
    are statically known to be present.
  """
  if presence.active is True:
    return jnp.ones(collectives.worker_count(axis), jnp.float32)
  own = jnp.where(presence.active, presence.weight, 0).astype(jnp.float32)
  return collectives.gather(own, axis)


def call_roll(presence: Presence, axis: collectives.Axes) -> Roll | None:
  """Gathers all workers' weights, 4 bytes each, to determine which workers are present.

  Args:
    presence: this worker's presence.
    axis: the worker axes.

  Returns:
    The Roll, equal on all workers; None if all workers are statically known to be present.
  """
  if presence.active is True:
    return None
  weights = gathered_weights(presence, axis)
  present = weights > 0
  return Roll(present, jnp.sum(present, dtype=jnp.int32), jnp.mean(weights))


def need_everyone(name: str, presence: Presence) -> None:
  """Rejects partial participation and unequal weights in an exchange between neighbours.

  Args:
    name: the name of the aggregator or method, for the error message.
    presence: this worker's presence.

  Raises:
    ValueError: if the presence is not `EVERYONE`.
  """
  if presence is not EVERYONE:
    raise ValueError(
      f"{name} averages neighbours, which must all be present with equal weights: an absent one "
      "would leave its links empty; leave out dropout, sampling and churn"
    )
