"""Averages compressed values: each worker receives and decodes the payloads of all workers."""

from collections.abc import Iterable
from dataclasses import KW_ONLY
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from research.aggregate.link import compressed, leaf_keys, struct_of
from research.aggregate.presence import gathered_weights, weighted
from research.comm import collectives
from research.core import checks
from research.core.base import (
  EVERYONE,
  WORKER_AXES,
  Aggregate,
  Aggregator,
  Array,
  Compressor,
  Key,
  Trait,
  Tree,
)


class GatherMean(Aggregator, name="gather_mean"):
  """Gathers all workers' payloads on every worker, which decodes and averages them.

      value = 1/W sum_i D(C(x_i))

  Each worker sends W - 1 payloads, so traffic grows with W: at W = 8, payloads of one byte per
  element cost as much as a float32 ring all-reduce. `two_phase` avoids this growth.

  With over="senders", the sum of an element is divided by the number of its senders, the workers
  whose D(C(x_i)) is not 0 at that element, instead of by W. If workers send different elements, as
  with a sparse compressor, the mean over all workers would scale each step by the share of senders.

  Args:
    compressor: any compressor.
    axis: the worker axes to average over.
    over: "workers", or "senders" for a sparse compressor.

  Raises:
    ValueError: if `over` is neither "workers" nor "senders", or if it is "senders" and the
      compressor is not sparse.

  Reference: Alistarh et al. 2017, arXiv 1610.02132, algorithm 1; over senders: Peng, Quesnelle,
    Kingma 2024, arXiv 2411.19870 (DeMo), in the authors' code.
  """

  compressor: Compressor
  axis: collectives.Axes = WORKER_AXES
  _: KW_ONLY
  over: str = "workers"

  def check(self):
    checks.one_of("over", self.over, ("workers", "senders"))
    if self.over == "senders" and not self.compressor.sparse:
      raise ValueError(
        "over='senders' needs a sparse compressor, such as top_k or block_top_k; every worker "
        f"sends every element with {self.compressor!r}"
      )

  @property
  def traits(self):
    return super().traits | (Trait.SENDERS if self.over == "senders" else Trait(0))

  @property
  def uplink(self):
    return compressed(self.compressor) if self.over == "workers" else None

  def aggregate(self, tree, state, key, presence=EVERYONE):
    leaves, treedef = jax.tree.flatten(weighted(tree, presence))
    keys = leaf_keys(key, len(leaves))
    own = [collectives.worker_key(k, self.axis) for k in keys]
    payloads = list(map(self.compressor.encode, leaves, keys, own))
    everyone = collectives.gather(payloads, self.axis)
    values: Iterable[Array] = map(self._mean_of, leaves, keys, everyone)
    if self.over == "senders":
      of_senders = partial(self._mean_of_senders, gathered_weights(presence, self.axis))
      values = map(of_senders, leaves, keys, everyone)
    sent = map(self._decode, leaves, keys, payloads)
    return Aggregate(treedef.unflatten(values), treedef.unflatten(sent), state)

  def _mean_of(self, x: Array, key: Key, everyone: Tree) -> Array:
    count, wide = collectives.worker_count(self.axis), jnp.promote_types(x.dtype, jnp.float32)
    part = lambda payload: self._decode(x, key, payload).astype(wide) / count
    add = lambda sum_, payload: (sum_ + part(payload), None)
    return lax.scan(add, jnp.zeros(x.shape, wide), everyone)[0].astype(x.dtype)

  def _mean_of_senders(self, weights: Array, x: Array, key: Key, everyone: Tree) -> Array:
    """Computes mean(weights) sum_i x_i / sum_i weight_i, both sums over the element's senders."""
    wide = jnp.promote_types(x.dtype, jnp.float32)

    def add(sums, one):
      payload, weight = one
      part = self._decode(x, key, payload).astype(wide)
      return (sums[0] + part, sums[1] + jnp.where(part == 0, 0, weight)), None

    zeros = jnp.zeros(x.shape, wide)
    (total, shares), _ = lax.scan(add, (zeros, zeros), (everyone, weights.astype(wide)))
    scale = jnp.mean(weights).astype(wide)
    return (scale * total / jnp.where(shares > 0, shares, 1)).astype(x.dtype)

  def _decode(self, x: Array, key: Key, payload: Tree) -> Array:
    return self.compressor.decode(payload, struct_of(x), key)


gather_mean = GatherMean
