"""Decentralized descent: every worker keeps a model of its own and averages it with neighbours.

What one deploys is the mean of the workers' models. On objectives that differ between workers a
constant step size leaves these methods at a distance from the optimum that is proportional to it;
`methods/consensus.py` has those that are exact.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from research.aggregate.composition import refuse
from research.aggregate.gossip import push
from research.aggregate.presence import alike, kept, need_everyone, presence_of, weighted
from research.comm.topology import Topology
from research.core.base import Aggregator, Array, Params, State, Tree
from research.core.method import Method
from research.methods.local import LocalSteps, begin, check_steps, minus, plus, stepping


class DPSGDState(NamedTuple):
  params: Params  # x_k^i
  inner: State  # of this worker's optimizer
  link: State  # of the aggregator


def d_psgd(
  inner: optax.GradientTransformation, aggregator: Aggregator, *, period: int = 1
) -> Method:
  """Decentralized parallel SGD, with any inner optimizer: a step, then an average of neighbours.

      x_{k+1}^i = sum_j w_ij (x_k^j + weight_j inner(grad f_j(x_k^j)))

  This is the paper's algorithm 1 with its lines 4 and 5 in the other order, as its remark allows:
  adapt, then combine. So the complete graph, or `mean()`, is parallel SGD. With `choco` it is
  CHOCO-SGD, with a period of H steps it is local decentralized SGD. The mean model moves by the
  mean of the workers' steps alone.

  Args:
    inner: each worker's optimizer; its momentum stays with the worker.
    aggregator: how the workers' models are averaged, such as `gossip(ring())`.
    period: H, local steps per average.

  Raises:
    ValueError: if period < 1, or for an aggregator in `composition.REFUSED`.

  Reference: Lian, Zhang, Zhang, Hsieh, Zhang, Liu 2017, arXiv 1705.09056, algorithm 1; with local
    steps Koloskova, Loizou, Boreiri, Jaggi, Stich 2020, arXiv 2003.10422, algorithm 1.
  """
  check_steps("period", period)
  refuse("d_psgd", aggregator)

  def init(params):
    return DPSGDState(params, inner.init(params), aggregator.init(params))

  def sync(local, state, *, key, weight=1.0, active=True):
    change = weighted(minus(local.params, state.params), presence_of(weight, active))
    moved = plus(state.params, change)
    params, _, link = aggregator.aggregate(moved, state.link, key, alike(active))
    after = DPSGDState(params, local.inner, link)
    return kept(active, after, state._replace(link=link))

  over = lambda wrap: d_psgd(inner, wrap(aggregator), period=period)
  return Method(init, begin, stepping(inner), sync, lambda state: state.params, period, over)


class SGPState(NamedTuple):
  numerator: Params  # x_k^i
  weight: Array  # w_k^i; they sum to W
  inner: State  # of this worker's optimizer
  link: State  # of the exchange


def sgp(inner: optax.GradientTransformation, topology: Topology, *, period: int = 1) -> Method:
  """Stochastic gradient push, for directed and time-varying graphs, with any inner optimizer.

      x_{k+1}^i = sum_j a_ij (x_k^j + weight_j inner(grad f_j(z_k^j)))
      w_{k+1}^i = sum_j a_ij w_k^j,     z_k^i = x_k^i / w_k^i

  with columns of (a_ij) that sum to one and w_0 = 1. Every worker's steps count alike, however the
  graph favours some: the mean of x moves by the mean of the steps.

  Args:
    inner: each worker's optimizer, at its z.
    topology: any; on a balanced one w stays 1 and this is `d_psgd`.
    period: H, local steps per exchange.

  Raises:
    ValueError: if period < 1.

  Reference: Assran, Loizou, Ballas, Rabbat 2019, arXiv 1811.10792, algorithm 1.
  """
  check_steps("period", period)
  return _sgp(inner, push(topology), period)


def _sgp(inner: optax.GradientTransformation, exchange: Aggregator, period: int) -> Method:
  def init(params):
    weight = jnp.ones(())
    return SGPState(params, weight, inner.init(params), exchange.init((params, weight)))

  def unbiased(state):
    return jax.tree.map(lambda x: (x / state.weight).astype(x.dtype), state.numerator)

  def begin(state):
    return LocalSteps(unbiased(state), state.inner)

  def sync(local, state, *, key, weight=1.0, active=True):
    need_everyone("sgp", presence_of(1.0, active))
    change = weighted(minus(local.params, unbiased(state)), presence_of(weight, active))
    pushed = plus(state.numerator, change), state.weight
    (numerator, total), _, link = exchange.aggregate(pushed, state.link, key)
    return SGPState(numerator, total, local.inner, link)

  over = lambda wrap: _sgp(inner, wrap(exchange), period)
  return Method(init, begin, stepping(inner), sync, unbiased, period, over)


class GradientLocal(NamedTuple):
  params: Params
  grads: Tree  # at params


def gradient_at(state) -> GradientLocal:
  """The begin of a method that only needs the gradient at its model."""
  return GradientLocal(state.params, jax.tree.map(jnp.zeros_like, state.params))


def kept_gradient(grads, local, state, *, key, grad_fn=None) -> GradientLocal:
  """The step of such a method."""
  del state, key, grad_fn
  return local._replace(grads=grads)


class DGDState(NamedTuple):
  params: Params  # x_k^i
  link: State


def dgd(learning_rate: float, aggregator: Aggregator) -> Method:
  """Decentralized gradient descent: an average of the neighbours, less a gradient of one's own.

      x_{k+1}^i = sum_j w_ij x_k^j - alpha weight_i grad f_i(x_k^i)

  Args:
    learning_rate: alpha, constant.
    aggregator: how the workers' models are averaged, such as `gossip(ring())`.

  Raises:
    ValueError: if learning_rate <= 0, or for an aggregator in `composition.REFUSED`.

  Reference: Nedic, Ozdaglar 2009, IEEE Trans. Automatic Control 54(1); Yuan, Ling, Yin
    2016, arXiv 1310.7063, for what a constant step size leaves.
  """
  check_rate(learning_rate)
  refuse("dgd", aggregator)

  def init(params):
    return DGDState(params, aggregator.init(params))

  def sync(local, state, *, key, weight=1.0, active=True):
    grads = weighted(local.grads, presence_of(weight, active))
    mixed, _, link = aggregator.aggregate(state.params, state.link, key, alike(active))
    params = descended(mixed, learning_rate, grads)
    return DGDState(kept(active, params, state.params), link)

  over = lambda wrap: dgd(learning_rate, wrap(aggregator))
  return Method(init, gradient_at, kept_gradient, sync, lambda state: state.params, 1, over)


def descended(params: Params, rate: float, direction: Tree) -> Params:
  """x - rate d."""
  return jax.tree.map(lambda x, d: x - rate * d, params, direction)


def check_rate(learning_rate: float) -> None:
  """Refuses step sizes that are not above zero.

  Raises:
    ValueError: with the value.
  """
  if not learning_rate > 0:
    raise ValueError(f"learning_rate={learning_rate} is not above 0")
