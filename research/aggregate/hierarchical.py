"""Aggregates on two levels: exact averages over fast links, any aggregator over slow links."""

from dataclasses import KW_ONLY
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from research.aggregate.chunks import cut, joined
from research.aggregate.composition import SHARDED
from research.aggregate.mean import Mean
from research.aggregate.presence import weighted
from research.aggregate.privacy.hiding import Sum
from research.analysis import wire
from research.comm import collectives
from research.core.base import (
  EVERYONE,
  Aggregate,
  Aggregator,
  Array,
  Key,
  Presence,
  State,
  Trait,
  Tree,
)

_NO_MEMORY = {Trait.MEMORY: "put the memory around it: the memory of a chunk cannot be stored"}


class TwoLevels(Aggregator):
  """Averages exactly within a slice and applies an inner aggregator between slices."""

  inner: ClassVar[Any]
  fast: ClassVar[Any]
  slow: ClassVar[Any]
  adds = Trait.DENSE

  def check(self):
    if self.fast == self.slow:
      raise ValueError(f"fast='{self.fast}' and slow='{self.slow}' are the same axis")

  @property
  def privacy(self):
    return Sum((self.slow, self.fast)) if self.inner.privacy == Sum(self.slow) else None

  def init(self, params):
    sizes = collectives.worker_count(self.slow), collectives.worker_count(self.fast)
    chunk = jax.tree.map(lambda x: jnp.zeros_like(_split(x, *sizes)[0]), params)
    return self.inner.init(chunk)

  def aggregate(self, tree, state, key, presence=EVERYONE):
    tree, of_slice, fast = weighted(tree, presence), EVERYONE, self.fast
    slices, width = collectives.worker_count(self.slow), collectives.worker_count(fast)
    place = collectives.worker_index(fast)
    parts = jax.tree.map(lambda x: _split(x, slices, width), tree)
    received = collectives.exchange(parts, fast)
    means = jax.tree.map(lambda x: jnp.mean(x, 0), received)
    if self.inner.traits & (Trait.SELECTS | Trait.VOTE) and presence is not EVERYONE:
      means, of_slice = _as_one(means, presence, fast)
    _check_axes(self.inner, means, state, key, fast, self.slow)
    own_key = collectives.worker_key(key, fast)
    value, sent, link = self.inner.aggregate(means, state, own_key, of_slice)

    def less(x, own, m, s):
      owed = lax.dynamic_update_index_in_dim(jnp.zeros_like(own), width * (m - s), place, 0)
      return x - _whole(owed, x, slices)

    back = lambda v, x: _whole(collectives.gather(v, fast), x, slices)
    whole_value = jax.tree.map(back, value, tree)
    if presence.active is True:
      return Aggregate(whole_value, jax.tree.map(less, tree, parts, means, sent), link)
    here = collectives.total(jnp.where(presence.active, 1.0, 0.0), fast)
    share = lambda x, m, s: (x - width / jnp.maximum(here, 1) * back(m - s, x)).astype(x.dtype)
    return Aggregate(whole_value, jax.tree.map(share, tree, means, sent), link)


class Hierarchical(TwoLevels, name="hierarchical"):
  """Reduce-scatters within each slice, aggregates between slices, and all-gathers in each slice.

      m_s[f] = mean over the slice of x[f],   value[f] = A_slow(m_1[f], ..., m_S[f]),   f in [F]

  Each of the F workers of a slice handles one chunk of every leaf: a slow link carries 1 / F of the
  inner payload per worker, and the fast links carry the two halves of an exact all-reduce. F times
  the inner aggregator's error on m_s[f] is attributed to the worker of chunk f: sent_i is x_i - F
  (m_s[f] - sent_s[f]) on this chunk and x_i on all others. The mean of sent_i over the slice is
  then exactly sent_s, so error feedback must wrap this aggregator:
  `error_feedback(hierarchical(two_phase(int8(), axis='slice')))`. If workers may be absent, the
  present workers of a slice share the error of every chunk equally, which requires another gather
  over the fast links. For an inner rule that selects or votes, a slice is one worker, whose value
  is the weighted mean over the present workers of the slice. If no worker of a slice is present,
  the slice counts as absent.

  Args:
    inner: an aggregator over the slow axis only (`axis='slice'`).
    fast: the worker axis within a slice.
    slow: the worker axis between slices.

  Raises:
    ValueError: if the inner aggregator has a trait in `refuses` or the axes are equal; or, at trace
      time, if the mesh lacks one of the axes or the inner aggregator uses the fast axis.

  Reference: Jia et al. 2018, arXiv 1807.11205, section 4.2 (hierarchical all-reduce).
  """

  inner: Aggregator
  _: KW_ONLY
  fast: str = "data"
  slow: str = "slice"
  refuses = _NO_MEMORY | SHARDED


hierarchical = Hierarchical


class HierarchicalMean(TwoLevels, name="hierarchical_mean"):
  """Averages exactly over all workers, as `hierarchical` does, with little traffic on slow links.

  With S slices of F workers, each worker sends 2 (S-1)/(S F) times the bytes of its tree between
  slices, and 2 (F-1)/F times the bytes of its tree within the slice.

  Args:
    fast: the worker axis within a slice.
    slow: the worker axis between slices.

  Raises:
    ValueError: at trace time, if the mesh lacks one of the axes.
  """

  fast: str = "data"
  slow: str = "slice"

  @property
  def inner(self):
    return Mean(self.slow)


hierarchical_mean = HierarchicalMean


def _split(x: Array, slices: int, width: int) -> Array:
  """Splits a leaf into parts [F, chunk].

  If the chunks are then split by slices, worker (s, f) gets part s F + f.
  """
  parts = cut(x, slices * width)
  parts = parts.reshape(slices, width, *parts.shape[1:]).swapaxes(0, 1)
  return parts.reshape(width, slices * parts.shape[2], *parts.shape[3:])


def _whole(parts: Array, like: Array, slices: int) -> Array:
  """Joins parts [F, chunk] into a leaf; the inverse of `_split`."""
  width = parts.shape[0]
  parts = parts.reshape(width, slices, parts.shape[1] // slices, *parts.shape[2:])
  return joined(parts.swapaxes(0, 1), like)


def _as_one(means: Tree, presence: Presence, fast: str) -> tuple[Tree, Presence]:
  """Returns the mean of a slice, computed from weighted trees, and its presence as one worker."""
  own = jnp.where(presence.active, jnp.asarray(presence.weight, jnp.float32), 0)
  weight = collectives.mean(own, fast)
  share = jnp.where(weight > 0, weight, 1)
  own_mean = jax.tree.map(lambda m: (m / share).astype(m.dtype), means)
  return own_mean, Presence(weight, True if presence.active is True else weight > 0)


def _check_axes(
  inner: Aggregator, tree: Tree, state: State, key: Key, fast: str, slow: str
) -> None:
  struct = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
  args = jax.tree.map(struct, (tree, state, key))
  sizes = {axis: collectives.worker_count(axis) for axis in (slow, fast)}
  if fast in wire.axes_of(inner.aggregate, *args, axes=sizes):
    raise ValueError(
      f"the aggregator inside hierarchical also uses '{fast}'; give it the slow axis, axis='{slow}'"
    )
