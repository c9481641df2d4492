"""What compression leaves out, kept and sent later: wrappers around any aggregator."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from research.aggregate.composition import refuse
from research.aggregate.link import remembering
from research.aggregate.presence import kept, unweighted, weighted
from research.core.base import EVERYONE, Aggregate, Aggregator, State, Tree


class ErrorFeedbackState(NamedTuple):
  memory: Tree  # e_i, private
  inner: State


def error_feedback(inner: Aggregator, *, decay: float = 1.0) -> Aggregator:
  """Adds to each value what earlier rounds did not send.

      p_i = x_i + decay e_i,   value = A(p),   e_i <- p_i - sent_i

  Args:
    inner: the aggregator; its `sent` says what of a value was received.
    decay: of the memory, in [0, 1].

  Raises:
    ValueError: if decay is not in [0, 1], or for an inner aggregator in `composition.REFUSED`.

  Reference: Karimireddy et al. 2019, arXiv 1901.09847, algorithm 2.
  """
  if not 0 <= decay <= 1:
    raise ValueError(f"decay={decay} is not in [0, 1]")
  refuse("error_feedback", inner)

  def init(params):
    return ErrorFeedbackState(jax.tree.map(jnp.zeros_like, params), inner.init(params))

  def aggregate(tree, state, key, presence=EVERYONE):
    own = weighted(tree, presence)
    corrected = jax.tree.map(lambda x, e: x + decay * e, own, state.memory)
    value, sent, link = inner.aggregate(corrected, state.inner, key, unweighted(presence))
    memory = kept(presence.active, jax.tree.map(jnp.subtract, corrected, sent), state.memory)
    return Aggregate(value, sent, ErrorFeedbackState(memory, link))

  way = inner.link and remembering(inner.link, decay)
  return Aggregator(init, aggregate, inner.traits | {"memory"}, way)


class EF21State(NamedTuple):
  local: Tree  # g_i, private
  total: Tree  # g, the mean of all g_i
  inner: State


def ef21(inner: Aggregator) -> Aggregator:
  """Compresses the change of each worker's value instead of the value.

      g_i <- g_i + C(x_i - g_i),   g <- g + 1/W sum_i C(x_i - g_i),   value = g

  Starts from g_i = 0; the paper also allows a first round without compression.

  Args:
    inner: the aggregator of the compressed changes.

  Raises:
    ValueError: for an inner aggregator in `composition.REFUSED`.

  Reference: Richtarik, Sokolov, Fatkhullin 2021, arXiv 2106.05203, algorithm 2.
  """

  refuse("ef21", inner)

  def init(params):
    zeros = jax.tree.map(jnp.zeros_like, params)
    return EF21State(zeros, zeros, inner.init(params))

  def aggregate(tree, state, key, presence=EVERYONE):
    change = jax.tree.map(jnp.subtract, weighted(tree, presence), state.local)
    value, sent, link = inner.aggregate(change, state.inner, key, unweighted(presence))
    local = kept(presence.active, jax.tree.map(jnp.add, state.local, sent), state.local)
    total = jax.tree.map(jnp.add, state.total, value)
    return Aggregate(total, local, EF21State(local, total, link))

  return Aggregator(init, aggregate, inner.traits | {"memory", "everyone"})


class DianaState(NamedTuple):
  shift: Tree  # h_i, private
  mean_shift: Tree  # h, the mean of all h_i
  inner: State


def diana(inner: Aggregator, *, alpha: float) -> Aggregator:
  """Compresses the difference to a shift that learns the worker's gradient.

      d_i = C(x_i - h_i),   value = h + 1/W sum_i d_i,   h_i <- h_i + alpha d_i
      h <- h + alpha/W sum_i d_i

  Args:
    inner: the aggregator of the differences, with an unbiased compressor.
    alpha: how fast shifts learn, in (0, 1]; at most 1 / (1 + omega) for a compressor of relative
      variance omega.

  Raises:
    ValueError: if alpha is not in (0, 1], or for an inner aggregator in `composition.REFUSED`.

  Reference: Mishchenko et al. 2019, arXiv 1901.09269, algorithm 1.
  """
  if not 0 < alpha <= 1:
    raise ValueError(f"alpha={alpha} is not in (0, 1]")
  refuse("diana", inner)

  def init(params):
    zeros = jax.tree.map(jnp.zeros_like, params)
    return DianaState(zeros, zeros, inner.init(params))

  def aggregate(tree, state, key, presence=EVERYONE):
    change = jax.tree.map(jnp.subtract, weighted(tree, presence), state.shift)
    delta, sent, link = inner.aggregate(change, state.inner, key, unweighted(presence))
    learn = lambda h, d: h + alpha * d
    value = jax.tree.map(jnp.add, state.mean_shift, delta)
    received = jax.tree.map(jnp.add, state.shift, sent)
    shift = kept(presence.active, jax.tree.map(learn, state.shift, sent), state.shift)
    mean_shift = jax.tree.map(learn, state.mean_shift, delta)
    return Aggregate(value, received, DianaState(shift, mean_shift, link))

  return Aggregator(init, aggregate, inner.traits | {"memory", "everyone"})
