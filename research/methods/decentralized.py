"""Decentralized descent: every worker averages its own model with its neighbours' models.

The deployed model is the mean of the workers' models. If the workers' objectives differ, a constant
step size leaves an error proportional to that step size; the methods in `methods/consensus.py` have
no such error.
"""

from collections.abc import Mapping
from dataclasses import KW_ONLY
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from research.aggregate.gossip import push
from research.aggregate.presence import alike, kept, need_everyone, weighted
from research.comm.topology import Topology
from research.core import checks
from research.core.base import EVERYONE, Aggregator, Array, Params, State, Trait, Tree
from research.core.part import hidden
from research.methods._steps import LocalStepping, LocalSteps, OneGradient, descended

# Traits that methods reject if they average models among neighbours.
AMONG_NEIGHBOURS = {
  Trait.WEIGHTED: "a worker's steps would be weighted by its position in the graph; use sgp"
}


class DPSGDState(NamedTuple):
  params: Params  # x_k^i
  inner: State  # state of this worker's optimizer
  link: State  # state of the aggregator


class DPSGD(LocalStepping, name="d_psgd"):
  """Decentralized parallel SGD with any inner optimizer: a local step, then a neighbour average.

      x_{k+1}^i = sum_j w_ij (x_k^j + weight_j inner(grad f_j(x_k^j)))

  This is the paper's algorithm 1 with lines 4 and 5 swapped, as a remark in the paper allows: each
  worker adapts, then combines. The complete graph, or `mean()`, therefore gives parallel SGD.
  `choco` gives CHOCO-SGD, and a period of H steps gives local decentralized SGD. The mean model
  moves by the mean of the workers' steps.

  Args:
    inner: each worker's optimizer; its momentum is private.
    aggregator: averages the workers' models, such as `gossip(ring())`.
    period: H, number of local steps per average.

  Raises:
    ValueError: if period < 1, or the aggregator is incompatible.

  Reference: Lian, Zhang, Zhang, Hsieh, Zhang, Liu 2017, arXiv 1705.09056, algorithm 1; with local
    steps Koloskova, Loizou, Boreiri, Jaggi, Stich 2020, arXiv 2003.10422, algorithm 1.
  """

  inner: optax.GradientTransformation
  aggregator: Aggregator
  _: KW_ONLY
  period: int = 1

  refuses = AMONG_NEIGHBOURS

  def init(self, params):
    return DPSGDState(params, self.inner.init(params), self.aggregator.init(params))

  def message(self, local, state, *, key, presence=EVERYONE):
    del key
    change = weighted(optax.tree.sub(local.params, state.params), presence)
    own = kept(presence.active, local.inner, state.inner)
    return optax.tree.add(state.params, change), state._replace(inner=own)

  def receive(self, value, sent, state, *, key, presence=EVERYONE):
    del sent, key
    return state._replace(params=kept(presence.active, value, state.params))

  def counted(self, presence):
    return alike(presence.active)


d_psgd = DPSGD


class SGPState(NamedTuple):
  numerator: Params  # x_k^i
  weight: Array  # w_k^i; the sum over workers is W
  inner: State  # state of this worker's optimizer
  link: State  # state of the exchange


class SGP(LocalStepping, name="sgp"):
  """Stochastic gradient push for directed and time-varying graphs, with any inner optimizer.

      x_{k+1}^i = sum_j a_ij (x_k^j + weight_j inner(grad f_j(z_k^j)))
      w_{k+1}^i = sum_j a_ij w_k^j,     z_k^i = x_k^i / w_k^i

  where the columns of (a_ij) sum to one and w_0 = 1. Even if the graph favours some workers, their
  steps do not count more: the mean of x moves by the mean of the steps.

  Args:
    inner: each worker's optimizer, applied at z.
    topology: any topology; on a balanced topology, w stays 1 and the method equals `d_psgd`.
    period: H, number of local steps per exchange.

  Raises:
    ValueError: if period < 1.

  Reference: Assran, Loizou, Ballas, Rabbat 2019, arXiv 1811.10792, algorithm 1.
  """

  inner: optax.GradientTransformation
  topology: Topology
  _: KW_ONLY
  period: int = 1
  aggregator: Any = hidden(None)

  refuses: ClassVar[Mapping[Trait, str]] = {}

  def __post_init__(self):
    if self.aggregator is None:
      object.__setattr__(self, "aggregator", push(self.topology))
    super().__post_init__()

  def init(self, params):
    weight = jnp.ones(())
    return SGPState(params, weight, self.inner.init(params), self.aggregator.init((params, weight)))

  def params(self, state):
    return jax.tree.map(lambda x: (x / state.weight).astype(x.dtype), state.numerator)

  def begin(self, state):
    return LocalSteps(self.params(state), state.inner)

  def message(self, local, state, *, key, presence=EVERYONE):
    del key
    need_everyone("sgp", EVERYONE if presence.active is True else presence)
    change = weighted(optax.tree.sub(local.params, self.params(state)), presence)
    pushed = optax.tree.add(state.numerator, change), state.weight
    return pushed, state._replace(inner=local.inner)

  def receive(self, value, sent, state, *, key, presence=EVERYONE):
    del sent, key, presence
    numerator, weight = value
    return state._replace(numerator=numerator, weight=weight)

  def counted(self, presence):
    del presence
    return EVERYONE


sgp = SGP


class DGDState(NamedTuple):
  params: Params  # x_k^i
  grads: Tree  # weight_i grad f_i(x_k^i), of the exchange in flight
  link: State


class DGD(OneGradient, name="dgd"):
  """Decentralized gradient descent: an average over neighbours, minus a local gradient step.

      x_{k+1}^i = sum_j w_ij x_k^j - alpha weight_i grad f_i(x_k^i)

  Args:
    learning_rate: alpha, constant.
    aggregator: averages the workers' models, such as `gossip(ring())`.

  Raises:
    ValueError: if learning_rate <= 0, or the aggregator is incompatible.

  Reference: Nedic, Ozdaglar 2009, IEEE Trans. Automatic Control 54(1); Yuan, Ling, Yin
    2016, arXiv 1310.7063, for the error that a constant step size leaves.
  """

  learning_rate: float
  aggregator: Aggregator

  refuses = AMONG_NEIGHBOURS

  def check(self):
    checks.above("learning_rate", self.learning_rate)

  def init(self, params):
    return DGDState(params, optax.tree.zeros_like(params), self.aggregator.init(params))

  def message(self, local, state, *, key, presence=EVERYONE):
    del key
    return state.params, state._replace(grads=weighted(local.grads, presence))

  def receive(self, value, sent, state, *, key, presence=EVERYONE):
    del sent, key
    params = descended(value, self.learning_rate, state.grads)
    params = kept(presence.active, params, state.params)
    return state._replace(params=params, grads=optax.tree.zeros_like(params))

  def counted(self, presence):
    return alike(presence.active)


dgd = DGD
