"""Averages where the workers agree on the direction."""

import jax
import jax.numpy as jnp

import research as dx
from research.aggregate.presence import weighted
from research.comm import collectives


@dx.register("aggregator")
class Agreeing(dx.Aggregator, name="agreeing"):
  """The mean, but zero where the mean of the workers' signs is below a threshold.

  Args:
    threshold: in [0, 1].

  Reference: Parascandolo et al. 2020, arXiv 2009.00329, the AND-mask.
  """

  threshold: float = 0.5
  adds = dx.Trait.DENSE | dx.Trait.SELECTS

  def check(self):
    if not 0 <= self.threshold <= 1:
      raise ValueError(f"threshold={self.threshold} is not in [0, 1]")

  def aggregate(self, tree, state, key, presence=dx.EVERYONE):
    mean = collectives.mean(tree, presence=presence)
    agreement = collectives.mean(jax.tree.map(jnp.sign, tree), presence=presence)
    keep = lambda x, a: jnp.where(jnp.abs(a) >= self.threshold, x, jnp.zeros_like(x))
    return dx.Aggregate(jax.tree.map(keep, mean, agreement), weighted(tree, presence), state)
