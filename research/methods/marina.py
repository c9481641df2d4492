"""MARINA: compressed differences of gradients, and now and then a whole gradient."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from research.aggregate.composition import refuse
from research.aggregate.mean import mean
from research.aggregate.presence import presence_of
from research.core.base import Aggregator, Array, Params, State, Tree
from research.core.method import Method
from research.methods.local import minus, plus
from research.methods.signum import check_rate, moved, rate_at


class MarinaState(NamedTuple):
  params: Params  # x^k
  previous: Params  # x^{k-1}
  estimate: Tree  # g^{k-1}
  exact: State  # of the mean
  link: State  # of the aggregator
  count: Array  # int32, k


class MarinaLocal(NamedTuple):
  params: Params
  grads: Tree  # grad f_i(x^k)
  change: Tree  # grad f_i(x^k) - grad f_i(x^{k-1}), of the same mini-batch


def marina(
  learning_rate: float | optax.Schedule,
  aggregator: Aggregator,
  *,
  probability: float = 0.1,
  seed: int = 0,
) -> Method:
  """Gradient descent along an estimate that compressed differences of gradients keep up to date.

      g^k = 1/W sum_i weight_i grad f_i(x^k)                                 with probability p
      g^k = g^{k-1} + aggregate_i(weight_i (grad f_i(x^k) - grad f_i(x^{k-1})))     otherwise
      x^{k+1} = x^k - gamma_k g^k

  with g^0 whole. While g^{k-1} is zero, what is left of it is the gradient itself. The coin is a
  hash of (k, seed), so that all workers have the same one and what a round sends is known without
  running it. The differences vanish as the method converges, and with them what compression loses:
  with whole local gradients the optimum is reached exactly. With mini-batches both gradients are of
  the same one, and g stays as noisy as they are.

  Args:
    learning_rate: gamma, constant or a schedule by rounds.
    aggregator: of the differences, with an unbiased compressor, such as `gather_mean(qsgd())`.
    probability: p, in (0, 1]; 1 is distributed gradient descent.
    seed: of the coin.

  Raises:
    ValueError: for arguments out of range, or an aggregator in `composition.REFUSED`; when it runs,
      if there is no `grad_fn`.

  Reference: Gorbunov, Burlachenko, Li, Richtarik 2021, arXiv 2102.07845, algorithm 1.
  """
  check_rate(learning_rate)
  if not 0 < probability <= 1:
    raise ValueError(f"probability={probability} is not in (0, 1]")
  refuse("marina", aggregator)
  return _marina(learning_rate, mean(), aggregator, probability, seed)


def _marina(
  learning_rate: float | optax.Schedule,
  exact: Aggregator,
  aggregator: Aggregator,
  probability: float,
  seed: int,
) -> Method:
  def init(params):
    zeros, count = jax.tree.map(jnp.zeros_like, params), jnp.zeros((), jnp.int32)
    return MarinaState(params, params, zeros, exact.init(params), aggregator.init(params), count)

  def begin(state):
    zeros = jax.tree.map(jnp.zeros_like, state.params)
    return MarinaLocal(state.params, zeros, zeros)

  def step(grads, local, state, *, key, grad_fn=None):
    del key
    if grad_fn is None:
      raise ValueError("marina needs gradients at its previous parameters too: pass grad_fn")
    return local._replace(grads=grads, change=minus(grads, grad_fn(state.previous)))

  def sync(local, state, *, key, weight=1.0, active=True):
    presence = presence_of(weight, active)

    def whole(state):
      estimate, _, link = exact.aggregate(local.grads, state.exact, key, presence)
      return state._replace(estimate=estimate, exact=link)

    def corrected(state):
      begun = jnp.any(jnp.asarray([jnp.any(g != 0) for g in jax.tree.leaves(state.estimate)]))
      missing = jax.tree.map(lambda d, g: jnp.where(begun, d, g), local.change, local.grads)
      value, _, link = aggregator.aggregate(missing, state.link, key, presence)
      return state._replace(estimate=plus(state.estimate, value), link=link)

    is_whole = (state.count == 0) | coin(state.count, probability, seed)
    after = lax.cond(is_whole, whole, corrected, state)
    params = moved(state.params, rate_at(learning_rate, state.count), after.estimate)
    return after._replace(params=params, previous=state.params, count=state.count + 1)

  over = lambda wrap: _marina(learning_rate, wrap(exact), wrap(aggregator), probability, seed)
  return Method(init, begin, step, sync, lambda state: state.params, 1, over)


def coin(count: Array, probability: float, seed: int) -> Array:
  """Heads in a round, equal on all workers: from whole numbers alone, as rounds are read ahead."""
  salt = _mixed(np.asarray([seed % 2**32], np.uint32))[0]
  bits = _mixed(_mixed(count.astype(jnp.uint32)) ^ salt)
  return (bits >> np.uint32(8)).astype(jnp.float32) * 2.0**-24 < probability


def _mixed(bits):
  """A permutation of the 32-bit numbers that looks random (the end of Appleby's MurmurHash3)."""
  bits = (bits ^ (bits >> np.uint32(16))) * np.uint32(0x85EBCA6B)
  bits = (bits ^ (bits >> np.uint32(13))) * np.uint32(0xC2B2AE35)
  return bits ^ (bits >> np.uint32(16))
