"""Error feedback: wrappers that store the compression error and send it in later rounds."""

from dataclasses import KW_ONLY
from typing import NamedTuple

import jax
import optax

from research.aggregate.composition import BOUNDED, MEMORY, PARTIAL, SENDERS
from research.aggregate.link import remembering
from research.aggregate.presence import kept, unweighted, weighted
from research.core import checks
from research.core.base import EVERYONE, Aggregate, Aggregator, State, Trait, Tree


class ErrorFeedbackState(NamedTuple):
  memory: Tree  # e_i, private
  inner: State


class ErrorFeedback(Aggregator, name="error_feedback"):
  """Adds the compression error of earlier rounds to each value.

      p_i = x_i + decay e_i,   value = A(p),   e_i <- p_i - sent_i

  Args:
    inner: the aggregator; its `sent` is the part of a value that the others received.
    decay: the decay of the memory, in [0, 1].

  Raises:
    ValueError: if decay is not in [0, 1], or the inner aggregator has a trait in `refuses`.

  Reference: Karimireddy et al. 2019, arXiv 1901.09847, algorithm 2.
  """

  inner: Aggregator
  _: KW_ONLY
  decay: float = 1.0
  adds = Trait.MEMORY
  refuses = MEMORY | BOUNDED

  def check(self):
    checks.in_range("decay", self.decay, "[0, 1]")

  @property
  def uplink(self):
    inner = self.inner.uplink
    return inner and remembering(inner, self.decay)

  def init(self, params):
    return ErrorFeedbackState(optax.tree.zeros_like(params), self.inner.init(params))

  def aggregate(self, tree, state, key, presence=EVERYONE):
    own = weighted(tree, presence)
    corrected = jax.tree.map(lambda x, e: x + self.decay * e, own, state.memory)
    value, sent, link = self.inner.aggregate(corrected, state.inner, key, unweighted(presence))
    memory = kept(presence.active, optax.tree.sub(corrected, sent), state.memory)
    return Aggregate(value, sent, ErrorFeedbackState(memory, link))


error_feedback = ErrorFeedback


class EF21State(NamedTuple):
  local: Tree  # g_i, private
  total: Tree  # g, the mean of all g_i
  inner: State


class EF21(Aggregator, name="ef21"):
  """Compresses the change of each worker's value instead of the value.

      g_i <- g_i + C(x_i - g_i),   g <- g + 1/W sum_i C(x_i - g_i),   value = g

  Initially, g_i = 0; the paper also allows a first round without compression.

  Args:
    inner: the aggregator of the compressed changes.

  Raises:
    ValueError: if the inner aggregator has a trait in `refuses`.

  Reference: Richtarik, Sokolov, Fatkhullin 2021, arXiv 2106.05203, algorithm 2.
  """

  inner: Aggregator
  adds = Trait.MEMORY | Trait.EVERYONE
  refuses = MEMORY | BOUNDED | PARTIAL | SENDERS

  def init(self, params):
    zeros = optax.tree.zeros_like(params)
    return EF21State(zeros, zeros, self.inner.init(params))

  def aggregate(self, tree, state, key, presence=EVERYONE):
    change = optax.tree.sub(weighted(tree, presence), state.local)
    value, sent, link = self.inner.aggregate(change, state.inner, key, unweighted(presence))
    local = kept(presence.active, optax.tree.add(state.local, sent), state.local)
    total = optax.tree.add(state.total, value)
    return Aggregate(total, local, EF21State(local, total, link))


ef21 = EF21


class DianaState(NamedTuple):
  shift: Tree  # h_i, private
  mean_shift: Tree  # h, the mean of all h_i
  inner: State


class Diana(Aggregator, name="diana"):
  """Compresses the difference between a worker's value and a shift that tracks it.

      d_i = C(x_i - h_i),   value = h + 1/W sum_i d_i,   h_i <- h_i + alpha d_i
      h <- h + alpha/W sum_i d_i

  Args:
    inner: the aggregator of the differences, with an unbiased compressor.
    alpha: the step size of the shifts, in (0, 1]; should be at most 1 / (1 + omega) for a
      compressor with relative variance omega.

  Raises:
    ValueError: if alpha is not in (0, 1], or the inner aggregator has a trait in `refuses`.

  Reference: Mishchenko et al. 2019, arXiv 1901.09269, algorithm 1.
  """

  inner: Aggregator
  _: KW_ONLY
  alpha: float
  adds = Trait.MEMORY | Trait.EVERYONE
  refuses = MEMORY | PARTIAL | SENDERS

  def check(self):
    checks.in_range("alpha", self.alpha, "(0, 1]")

  def init(self, params):
    zeros = optax.tree.zeros_like(params)
    return DianaState(zeros, zeros, self.inner.init(params))

  def aggregate(self, tree, state, key, presence=EVERYONE):
    change = optax.tree.sub(weighted(tree, presence), state.shift)
    delta, sent, link = self.inner.aggregate(change, state.inner, key, unweighted(presence))
    learn = lambda h, d: h + self.alpha * d
    value = optax.tree.add(state.mean_shift, delta)
    received = optax.tree.add(state.shift, sent)
    shift = kept(presence.active, jax.tree.map(learn, state.shift, sent), state.shift)
    mean_shift = jax.tree.map(learn, state.mean_shift, delta)
    return Aggregate(value, received, DianaState(shift, mean_shift, link))


diana = Diana
