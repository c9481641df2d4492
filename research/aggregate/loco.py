"""LoCo: error feedback with a moving average of the errors, stored in eight bits."""

from dataclasses import KW_ONLY
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from research.aggregate.composition import BOUNDED, MEMORY
from research.aggregate.presence import kept, unweighted, weighted
from research.core import checks
from research.core.base import EVERYONE, Aggregate, Aggregator, Array, State, Trait, Tree

_LEVELS = 127


class Codes(NamedTuple):
  """Represents an array approximately as codes * units."""

  codes: Array  # int8, of the array's shape
  units: Array  # float32 or wider, one per row: the last dimension is 1


class LoCoState(NamedTuple):
  memory: Tree  # e_i, private, a Codes per leaf
  count: Array  # int32, t
  inner: State


class LoCo(Aggregator, name="loco"):
  """Adds a moving average of earlier compression errors to each value, and clears it regularly.

      h_i = x_i + e_i,   value = A(h)
      e_i <- Q((1 - beta) e_i + beta (h_i - sent_i)),   e_i <- 0 after every T-th round

  With beta = 1, no Q and no clearing, this is `error_feedback`. For a constant x, e integrates beta
  (x - sent), so the mean of the sent values approaches x, as with error feedback; a single error,
  however, is damped before it enters the next messages. Q rounds to 255 levels of max |e| / 127 in
  each row of a leaf (its last dimension), so the memory takes a quarter of the size in float32. If
  a run continues with another number of workers, all of them start from the codes of the first
  worker.

  Args:
    inner: the aggregator; its `sent` is the part of a value that the others received.
    beta: share of the new error in the memory, in (0, 1].
    reset: T, the number of rounds between clearings, at least 1.

  Raises:
    ValueError: if an argument is out of range, or the inner aggregator has a trait in `refuses`.

  Reference: Xie, Lin, Toh, Zhou 2024, arXiv 2407.04480.
  """

  inner: Aggregator
  _: KW_ONLY
  beta: float = 0.2
  reset: int = 512
  adds = Trait.MEMORY
  refuses = MEMORY | BOUNDED

  def check(self):
    checks.in_range("beta", self.beta, "(0, 1]")
    checks.at_least("reset", self.reset)

  def init(self, params):
    memory = jax.tree.map(_rounded, optax.tree.zeros_like(params))
    return LoCoState(memory, jnp.zeros((), jnp.int32), self.inner.init(params))

  def aggregate(self, tree, state, key, presence=EVERYONE):
    memory = jax.tree.map(lambda x, e: (e.codes * e.units).astype(x.dtype), tree, state.memory)
    corrected = optax.tree.add(weighted(tree, presence), memory)
    value, sent, link = self.inner.aggregate(corrected, state.inner, key, unweighted(presence))
    count = state.count + 1
    keep = count % self.reset != 0

    def updated(e: Array, h: Array, s: Array) -> Codes:
      return _rounded(jnp.where(keep, (1 - self.beta) * e + self.beta * (h - s), 0).astype(e.dtype))

    new = jax.tree.map(updated, memory, corrected, sent)
    return Aggregate(value, sent, LoCoState(kept(presence.active, new, state.memory), count, link))


loco = LoCo


def _rounded(x: Array) -> Codes:
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  axis = -1 if x.ndim else None
  units = jnp.max(jnp.abs(wide), axis, keepdims=True, initial=0) / _LEVELS
  levels = wide / jnp.where(units > 0, units, 1)
  return Codes(jnp.clip(jnp.rint(levels), -_LEVELS, _LEVELS).astype(jnp.int8), units)
