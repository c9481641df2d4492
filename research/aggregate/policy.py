"""Which leaves an aggregator is given, in what pieces, and from when: policy, not mathematics."""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from research.aggregate.composition import refuse
from research.aggregate.mean import mean
from research.comm import collectives
from research.core.base import (
  EVERYONE,
  WORKER_AXES,
  Aggregate,
  Aggregator,
  Array,
  Presence,
  State,
  Tree,
)


def only_large(
  inner: Aggregator, *, min_size: int = 1024, axis: collectives.Axes = WORKER_AXES
) -> Aggregator:
  """Leaves of fewer than `min_size` elements are averaged exactly, the others by `inner`.

  Args:
    inner: the aggregator of the large leaves.
    min_size: in elements.
    axis: the worker axes over which small leaves are averaged.

  Raises:
    ValueError: if min_size < 0, or for an inner aggregator in `composition.REFUSED`.
  """
  if min_size < 0:
    raise ValueError(f"min_size={min_size} is not at least 0")
  refuse("only_large", inner)

  def parts(tree):
    leaves, treedef = jax.tree.flatten(tree)
    large = [x.size >= min_size for x in leaves]
    of = lambda wanted: [x for x, is_large in zip(leaves, large, strict=True) if is_large == wanted]
    join = lambda big, small: treedef.unflatten(
      [(big if is_large else small).pop(0) for is_large in large]
    )
    return of(True), of(False), lambda big, small: join(list(big), list(small))

  def aggregate(tree, state, key, presence=EVERYONE):
    big, small, join = parts(tree)
    out = inner.aggregate(big, state, key, presence) if big else Aggregate(big, big, state)
    exact = mean(axis).aggregate(small, (), key, presence)
    return Aggregate(join(out.value, exact.value), join(out.sent, exact.sent), out.state)

  init = lambda params: inner.init(parts(params)[0])
  return Aggregator(init, aggregate, inner.traits | {"dense"})


def bucketed(inner: Aggregator, *, bytes: int = 2**20) -> Aggregator:
  """Small leaves travel together: flat messages of up to `bytes`, in the order of the tree.

  A leaf of at least `bytes` stays as it is. The inner aggregator sees the buckets as its leaves, so
  that a scale, a k or a support is a bucket's and not a leaf's. Leaves of different dtypes do not
  share a bucket.

  Args:
    inner: the aggregator of the buckets and of the large leaves.
    bytes: of a bucket, at most.

  Raises:
    ValueError: if bytes < 1.

  Reference: Li et al. 2020, arXiv 2006.15704 (gradient bucketing).
  """
  if bytes < 1:
    raise ValueError(f"bytes={bytes} is not at least 1")

  def fused(tree: Tree) -> list[Array]:
    leaves = jax.tree.leaves(tree)
    joined = lambda bucket: jnp.concatenate([leaves[i].reshape(-1) for i in bucket])
    return [leaves[b[0]] if len(b) == 1 else joined(b) for b in _buckets(leaves, bytes)]

  def split(parts: Sequence[Array], like: Tree) -> Tree:
    leaves, treedef = jax.tree.flatten(like)
    found = list(leaves)
    for part, bucket in zip(parts, _buckets(leaves, bytes), strict=True):
      ends = list(itertools.accumulate(leaves[i].size for i in bucket))
      for i, end in zip(bucket, ends, strict=True):
        found[i] = part.reshape(-1)[end - leaves[i].size : end].reshape(leaves[i].shape)
    return treedef.unflatten(found)

  def aggregate(tree, state, key, presence=EVERYONE):
    out = inner.aggregate(fused(tree), state, key, presence)
    return Aggregate(split(out.value, tree), split(out.sent, tree), out.state)

  init = lambda params: inner.init(fused(params))
  return Aggregator(init, aggregate, inner.traits, privacy=inner.privacy)


def _buckets(leaves: Sequence[Array], bytes: int) -> list[list[int]]:
  """Numbers of the leaves that share a message; those without elements have none to send."""
  buckets: list[list[int]] = []
  open_: dict[jnp.dtype, tuple[list[int], int]] = {}  # by dtype: the bucket being filled, its bytes
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
  count: Array  # int32, rounds so far
  stages: tuple[State, ...]


def warm_up(
  inner: Aggregator, *, steps: int, stages: Sequence[Aggregator] | None = None
) -> Aggregator:
  """Other aggregators for the first rounds: the exact mean, or a ramp of several.

  Each stage lasts steps / len(stages) rounds, then `inner` takes over. Deep gradient compression
  ramps the density of top-k from 25% to 0.1% over the first epochs. A memory belongs around all
  stages: `error_feedback(warm_up(...))`.

  Args:
    inner: the aggregator after the warm-up.
    steps: rounds of warm-up.
    stages: the aggregators before, one after the other; the exact mean by default.

  Raises:
    ValueError: if there are no stages or fewer steps than stages, or for aggregators in
      `composition.REFUSED`.

  Reference: Lin et al. 2018, arXiv 1712.01887, section 3.3; 1-bit Adam's warm-up: Tang et al. 2021,
    arXiv 2102.02888.
  """
  every = (*([mean()] if stages is None else stages), inner)
  if len(every) == 1 or steps < len(every) - 1:
    raise ValueError(
      f"steps={steps} for {len(every) - 1} stages: one or more, of a step or more each"
    )
  common = frozenset.intersection(*(a.traits for a in every))
  for stage in every:
    refuse("warm_up", stage._replace(traits=stage.traits - common))
  ends = jnp.asarray([steps * (i + 1) // (len(every) - 1) for i in range(len(every) - 1)])

  def run_stage(number: int, presence: Presence) -> Callable[..., Aggregate]:
    def run(tree, states, key):
      value, sent, state = every[number].aggregate(tree, states[number], key, presence)
      return Aggregate(value, sent, (*states[:number], state, *states[number + 1 :]))

    return run

  def init(params):
    return WarmUpState(jnp.zeros((), jnp.int32), tuple(a.init(params) for a in every))

  def aggregate(tree, state, key, presence=EVERYONE):
    number = jnp.sum(state.count >= ends)
    branches = [run_stage(i, presence) for i in range(len(every))]
    value, sent, states = lax.switch(number, branches, tree, state.stages, key)
    return Aggregate(value, sent, WarmUpState(state.count + 1, states))

  return Aggregator(init, aggregate, frozenset().union(*(a.traits for a in every)))
