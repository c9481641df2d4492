"""Defines policies that select, fuse and schedule the leaves for an aggregator."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY
from functools import reduce
from operator import and_, or_
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from research.aggregate.composition import AROUND
from research.aggregate.mean import Mean
from research.comm import collectives
from research.core import checks
from research.core.base import (
  EVERYONE,
  WORKER_AXES,
  Aggregate,
  Aggregator,
  Array,
  Presence,
  State,
  Trait,
  Tree,
)


class OnlyLarge(Aggregator, name="only_large"):
  """Averages leaves of fewer than `min_size` elements exactly, and applies `inner` to the others.

  Args:
    inner: the aggregator of the large leaves.
    min_size: the minimum size of a large leaf, in elements.
    axis: the worker axes over which small leaves are averaged.

  Raises:
    ValueError: if min_size is negative, or the inner aggregator has a trait in `refuses`.
  """

  inner: Aggregator
  _: KW_ONLY
  min_size: int = 1024
  axis: collectives.Axes = WORKER_AXES
  adds = Trait.DENSE
  refuses = AROUND

  def check(self):
    checks.at_least("min_size", self.min_size, 0)

  def init(self, params):
    return self.inner.init(self._parts(params)[0])

  def aggregate(self, tree, state, key, presence=EVERYONE):
    large, small, join = self._parts(tree)
    out = Aggregate(large, large, state)
    if large:
      out = self.inner.aggregate(large, state, key, presence)
    exact = Mean(self.axis).aggregate(small, (), key, presence)
    return Aggregate(join(out.value, exact.value), join(out.sent, exact.sent), out.state)

  def _parts(self, tree: Tree) -> tuple[list[Array], list[Array], Callable[..., Tree]]:
    """Returns the large leaves, the small leaves, and a function that joins both into a tree."""
    leaves, treedef = jax.tree.flatten(tree)
    large = [x.size >= self.min_size for x in leaves]
    of = lambda wanted: [x for x, is_large in zip(leaves, large, strict=True) if is_large == wanted]

    def join(big: Sequence[Array], small: Sequence[Array]) -> Tree:
      big_, small_ = iter(big), iter(small)
      return treedef.unflatten([next(big_ if is_large else small_) for is_large in large])

    return of(True), of(False), join


only_large = OnlyLarge


class Bucketed(Aggregator, name="bucketed"):
  """Concatenates small leaves, in the order of the tree, into flat buckets of up to `bytes` bytes.

  Leaves of at least `bytes` bytes are not changed. For the inner aggregator, a bucket is a leaf:
  scales, k and supports belong to buckets, not to the original leaves. Leaves of different dtypes
  do not share a bucket.

  Args:
    inner: the aggregator of the buckets and of the large leaves.
    bytes: the maximum size of a bucket, in bytes.

  Raises:
    ValueError: if bytes is below 1.

  Reference: Li et al. 2020, arXiv 2006.15704 (gradient bucketing).
  """

  inner: Aggregator
  _: KW_ONLY
  bytes: int = 2**20

  def check(self):
    checks.at_least("bytes", self.bytes)

  @property
  def privacy(self):
    return self.inner.privacy

  def init(self, params):
    return self.inner.init(self._fused(params))

  def aggregate(self, tree, state, key, presence=EVERYONE):
    out = self.inner.aggregate(self._fused(tree), state, key, presence)
    return Aggregate(self._split(out.value, tree), self._split(out.sent, tree), out.state)

  def _fused(self, tree: Tree) -> list[Array]:
    """Returns the messages, each of which is a bucket of small leaves or a single large leaf."""
    leaves = jax.tree.leaves(tree)
    joined = lambda bucket: jnp.concatenate([leaves[i].reshape(-1) for i in bucket])
    buckets = _buckets(leaves, self.bytes)
    return [leaves[b[0]] if len(b) == 1 else joined(b) for b in buckets]

  def _split(self, parts: Sequence[Array], like: Tree) -> Tree:
    """Splits messages into a tree with the structure of `like`; the inverse of `_fused`."""
    leaves, treedef = jax.tree.flatten(like)
    found = list(leaves)
    for part, bucket in zip(parts, _buckets(leaves, self.bytes), strict=True):
      ends = list(itertools.accumulate(leaves[i].size for i in bucket))
      for i, end in zip(bucket, ends, strict=True):
        found[i] = part.reshape(-1)[end - leaves[i].size : end].reshape(leaves[i].shape)
    return treedef.unflatten(found)


bucketed = Bucketed


def _buckets(leaves: Sequence[Array], bytes: int) -> list[list[int]]:
  """Returns the indices of the leaves in each message; empty leaves are not sent."""
  buckets: list[list[int]] = []
  open_: dict[jnp.dtype, tuple[list[int], int]] = {}  # by dtype: the open bucket and its bytes
  for i, leaf in enumerate(leaves):
    size = leaf.size * leaf.dtype.itemsize
    if not size:
      continue
    bucket, filled = open_.get(leaf.dtype, ([], bytes))
    if filled + size > bytes:
      bucket, filled = [], 0
      buckets.append(bucket)
    bucket.append(i)
    if size < bytes:
      open_[leaf.dtype] = (bucket, filled + size)
  return buckets


class WarmUpState(NamedTuple):
  count: Array  # int32, number of completed rounds
  stages: tuple[State, ...]


class WarmUp(Aggregator, name="warm_up"):
  """Uses other aggregators in the first rounds: the exact mean, or a sequence of stages.

  Each stage lasts steps / len(stages) rounds; after the last stage, `inner` is used. For example,
  deep gradient compression reduces the density of top-k from 25% to 0.1% during the first epochs.
  Error feedback must wrap all stages, as in `error_feedback(warm_up(...))`.

  Args:
    inner: the aggregator to use after the warm-up.
    steps: the number of rounds of the warm-up.
    stages: the aggregators of the warm-up, in order; the default is the exact mean.

  Raises:
    ValueError: if there are no stages, there are fewer steps than stages, or some but not all
      stages have a trait in `refuses`.

  Reference: Lin et al. 2018, arXiv 1712.01887, section 3.3; Tang et al. 2021, arXiv 2102.02888 (the
    warm-up of 1-bit Adam).
  """

  inner: Aggregator
  _: KW_ONLY
  steps: int
  stages: Sequence[Aggregator] | None = None
  refuses = AROUND  # unless all stages have the trait

  def check(self):
    stages = len(self.every) - 1
    if not stages or self.steps < stages:
      raise ValueError(
        f"steps={self.steps} for {stages} stages: one or more, of a step or more each"
      )

  @property
  def every(self) -> tuple[Aggregator, ...]:
    """All stages in order; the last one is `inner`."""
    return (*((Mean(),) if self.stages is None else self.stages), self.inner)

  def aggregators(self):
    return list(self.every)

  @property
  def traits(self):
    return reduce(or_, (stage.traits for stage in self.every))

  def refuse(self, traits):
    common = reduce(and_, (stage.traits for stage in self.every))
    super().refuse(traits & ~common)

  def init(self, params):
    states = tuple(stage.init(params) for stage in self.every)
    return WarmUpState(jnp.zeros((), jnp.int32), states)

  def aggregate(self, tree, state, key, presence=EVERYONE):
    last = len(self.every) - 1
    ends = jnp.asarray([self.steps * (i + 1) // last for i in range(last)])
    number = jnp.sum(state.count >= ends)
    branches = [self._of_stage(i, presence) for i in range(len(self.every))]
    value, sent, states = lax.switch(number, branches, tree, state.stages, key)
    return Aggregate(value, sent, WarmUpState(state.count + 1, states))

  def _of_stage(self, number: int, presence: Presence) -> Callable[..., Aggregate]:
    def run(tree, states, key):
      value, sent, state = self.every[number].aggregate(tree, states[number], key, presence)
      return Aggregate(value, sent, (*states[:number], state, *states[number + 1 :]))

    return run


warm_up = WarmUp
