"""Base class of 1-bit Adam and 0/1 Adam; traits that methods with uncompressed rounds reject."""

from dataclasses import KW_ONLY

import jax
import jax.numpy as jnp
import optax

from research.aggregate import composition
from research.aggregate.mean import mean
from research.core import checks
from research.core.base import Aggregator, Array, Params, State, Trait, Tree
from research.core.method import COMMON_MODEL
from research.core.part import hidden
from research.methods._steps import OneGradient, check_rate

# Traits that methods with uncompressed rounds reject.
EXACT_TOO = (
  COMMON_MODEL
  | composition.AROUND
  | {Trait.VOTE: "signs without a scale cannot replace a momentum, step or difference"}
)


class FrozenVariance(OneGradient):
  """Adam whose variance is averaged exactly during a warm-up and frozen afterwards.

  Args:
    learning_rate: a constant or a schedule over rounds.
    aggregator: the aggregator of the compressed exchange.
    warm_up: number of rounds after which the variance is frozen, at least 1.
    b1: decay of the momentum, in [0, 1).
    b2: decay of the variance, in [0, 1).
    eps: above 0; keeps the denominator above zero.
    weight_decay: lambda, at least 0, decoupled from the gradient as in AdamW.

  Raises:
    ValueError: if an argument is out of range, or the aggregator is incompatible.
  """

  learning_rate: float | optax.Schedule
  aggregator: Aggregator
  _: KW_ONLY
  warm_up: int = 100
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  weight_decay: float = 0.0
  exact: Aggregator = hidden(mean())

  refuses = EXACT_TOO

  def check(self):
    check_rate(self.learning_rate)
    checks.at_least("warm_up", self.warm_up)
    checks.in_range("b1", self.b1, "[0, 1)")
    checks.in_range("b2", self.b2, "[0, 1)")
    checks.above("eps", self.eps)
    checks.at_least("weight_decay", self.weight_decay, 0)

  def start(self, params: Params) -> tuple[Tree, State, State, Array]:
    """Returns zeros like the parameters, the states of both exchanges, and the round counter.

    Args:
      params: the initial model.
    """
    links = self.exact.init(params), self.aggregator.init(params)
    return optax.tree.zeros_like(params), *links, jnp.zeros((), jnp.int32)


def if_unseen(variance: Tree, first: Tree) -> Tree:
  """Returns `variance`, or `first` if all of `variance` is zero.

  Args:
    variance: the frozen variance.
    first: the variance to use if no gradient has been seen; its shapes are those of `variance`.
  """
  nothing = jnp.all(jnp.asarray([jnp.all(v == 0) for v in jax.tree.leaves(variance)]))
  return jax.tree.map(lambda v, x: jnp.where(nothing, x, v).astype(v.dtype), variance, first)
