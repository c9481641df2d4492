"""MARINA: sends compressed gradient differences and, occasionally, a full gradient."""

from dataclasses import KW_ONLY
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from research.aggregate.mean import mean
from research.core import checks
from research.core.base import EVERYONE, Aggregator, Array, Params, State, Trait, Tree
from research.core.method import Method
from research.core.part import hidden
from research.methods._exact_rounds import EXACT_TOO
from research.methods._steps import check_rate, moved, rate_at


class MarinaState(NamedTuple):
  params: Params  # x^k
  previous: Params  # x^{k-1}
  estimate: Tree  # g^{k-1}
  exact: State  # state of the mean
  link: State  # state of the aggregator
  count: Array  # int32, k


class MarinaLocal(NamedTuple):
  params: Params
  grads: Tree  # grad f_i(x^k)
  change: Tree  # grad f_i(x^k) - grad f_i(x^{k-1}), on the same mini-batch


class Marina(Method, name="marina"):
  """Gradient descent along an estimate that is updated by compressed gradient differences.

      g^k = 1/W sum_i weight_i grad f_i(x^k)                                 with probability p
      g^k = g^{k-1} + aggregate_i(weight_i (grad f_i(x^k) - grad f_i(x^{k-1})))     otherwise
      x^{k+1} = x^k - gamma_k g^k

  Here, g^0 is a full gradient. While g^{k-1} is zero, the gradient replaces the difference. The
  coin is a hash of (k, seed): all workers draw the same value, and a round's traffic is known
  before the round runs. As the method converges, the differences and the compression error vanish;
  with full local gradients, the method reaches the optimum exactly. With mini-batches, both
  gradients use the same mini-batch, and g remains as noisy as the mini-batch gradients.

  Args:
    learning_rate: gamma, a constant or a schedule over rounds.
    aggregator: combines the differences; use an unbiased compressor, such as `gather_mean(qsgd())`.
    probability: p, in (0, 1]; 1 is distributed gradient descent.
    seed: seed of the coin.

  Raises:
    ValueError: if an argument is out of range or the aggregator is incompatible; in `step`, if
      `grad_fn` is None.

  Reference: Gorbunov, Burlachenko, Li, Richtarik 2021, arXiv 2102.07845, algorithm 1.
  """

  learning_rate: float | optax.Schedule
  aggregator: Aggregator
  _: KW_ONLY
  probability: float = 0.1
  seed: int = 0
  exact: Aggregator = hidden(mean())

  refuses = EXACT_TOO | {
    Trait.MEMORY: "full gradients already correct earlier errors; a memory would send these again"
  }

  def check(self):
    check_rate(self.learning_rate)
    checks.in_range("probability", self.probability, "(0, 1]")

  def init(self, params):
    zeros, count = optax.tree.zeros_like(params), jnp.zeros((), jnp.int32)
    links = self.exact.init(params), self.aggregator.init(params)
    return MarinaState(params, params, zeros, *links, count)

  def begin(self, state):
    zeros = optax.tree.zeros_like(state.params)
    return MarinaLocal(state.params, zeros, zeros)

  def step(self, grads, local, state, *, key, grad_fn=None):
    del key
    if grad_fn is None:
      raise ValueError("marina needs gradients at its previous parameters too: pass grad_fn")
    change = optax.tree.sub(grads, grad_fn(state.previous))
    return local._replace(grads=grads, change=change)

  def sync(self, local, state, *, key, presence=EVERYONE):
    def whole(state):
      estimate, _, link = self.exact.aggregate(local.grads, state.exact, key, presence)
      return state._replace(estimate=estimate, exact=link)

    def corrected(state):
      begun = jnp.any(jnp.asarray([jnp.any(g != 0) for g in jax.tree.leaves(state.estimate)]))
      missing = jax.tree.map(lambda d, g: jnp.where(begun, d, g), local.change, local.grads)
      value, _, link = self.aggregator.aggregate(missing, state.link, key, presence)
      return state._replace(estimate=optax.tree.add(state.estimate, value), link=link)

    is_whole = (state.count == 0) | coin(state.count, self.probability, self.seed)
    after = lax.cond(is_whole, whole, corrected, state)
    params = moved(state.params, rate_at(self.learning_rate, state.count), after.estimate)
    return after._replace(params=params, previous=state.params, count=state.count + 1)


marina = Marina


def coin(count: Array, probability: float, seed: int) -> Array:
  """Returns whether a round sends a full gradient; depends only on the round and the seed.

  Args:
    count: k, int32 scalar.
    probability: p, in (0, 1].
    seed: seed of the coin, equal on all workers.

  Returns:
    A bool scalar, equal on all workers.
  """
  salt = _mixed(np.asarray([seed % 2**32], np.uint32))[0]
  bits = _mixed(_mixed(count.astype(jnp.uint32)) ^ salt)
  return (bits >> np.uint32(8)).astype(jnp.float32) * 2.0**-24 < probability


def _mixed(bits):
  """Permutes the 32-bit numbers pseudo-randomly (the finalizer of Appleby's MurmurHash3)."""
  bits = (bits ^ (bits >> np.uint32(16))) * np.uint32(0x85EBCA6B)
  bits = (bits ^ (bits >> np.uint32(13))) * np.uint32(0xC2B2AE35)
  return bits ^ (bits >> np.uint32(16))
