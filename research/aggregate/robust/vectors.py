"""Computes robust averages of full vectors: Krum, the geometric median, centered clipping.

A worker's vector consists of all its leaves. As in `coordinates.py`, worker j receives chunk j of
all workers. Apart from the chunks, workers send only sums over chunks: W numbers per iteration or,
for Krum, W distances to each of the W workers. Neither amount depends on the size of the model.
Distances are norms of differences, computed in float32 or wider. A distance that is not finite
(because a worker sent NaN, infinity, or more than the square root of the largest float) counts as
infinite: that worker is never a nearest neighbour and has weight zero. As in `coordinates.py`, the
rules apply to the n workers that are present.
"""

from dataclasses import KW_ONLY
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from research.aggregate.chunks import cut
from research.aggregate.presence import Roll, call_roll
from research.aggregate.robust.coordinates import (
  Robust,
  around_middle,
  exchanged,
  middle,
  restored,
  scaled,
)
from research.comm import collectives
from research.core import checks
from research.core.base import EVERYONE, WORKER_AXES, Aggregate, Array, Trait, Tree


class Best(Robust):
  """Averages the `selected` vectors that are closest to their n - f - 2 nearest neighbours."""

  faulty: ClassVar[Any]
  selected: ClassVar[Any]

  def check(self):
    checks.at_least("faulty", self.faulty, 0)
    checks.at_least("selected", self.selected)

  def of_chunks(self, everyone, roll):
    self._check_count(collectives.worker_count(self.axis))
    scores = _scores(everyone, self.faulty, roll, self.axis)
    if roll is None:
      best = jnp.argsort(scores, stable=True)[: self.selected]
      return jax.tree.map(lambda x: jnp.mean(x[best], 0), everyone)
    rank = jnp.argsort(jnp.lexsort((scores, ~roll.present)))
    chosen = jnp.minimum(self.selected, roll.count)
    weights = (rank < chosen) / jnp.maximum(chosen, 1)
    return jax.tree.map(lambda x: _weighted(weights, x), everyone)

  def _check_count(self, count: int) -> None:
    name, needed = self.title, 2 * self.faulty + 2
    if needed >= count:
      raise ValueError(
        f"{name}(faulty={self.faulty}) needs more than {needed} workers and there are {count}"
      )
    if self.selected > count:
      raise ValueError(f"{name}(selected={self.selected}) selects among {count} workers")


class Krum(Best, name="krum"):
  """Selects the vector with the smallest total distance to its n - f - 2 nearest neighbours.

      s(i) = sum_{j near i} ||x_i - x_j||^2,   value = x_i*,   i* = argmin_i s(i)

  In a tie, the first worker is selected. If at most f workers are faulty, the value is finite. It
  is either an honest worker's vector or as close to its neighbours as an honest worker's vector is.
  This guarantee requires that more than 2 f + 2 workers are present in the round. If n - f - 2 < 1,
  the score uses the single nearest neighbour.

  Args:
    faulty: f, the number of faulty workers to tolerate.
    axis: the worker axes.

  Raises:
    ValueError: if faulty is negative; or, at trace time, if 2 f + 2 >= W.

  Reference: Blanchard et al. 2017, arXiv 1703.02757, the Krum function.
  """

  faulty: int
  axis: collectives.Axes = WORKER_AXES
  selected = 1


krum = Krum


class MultiKrum(Best, name="multi_krum"):
  """Averages the vectors with the m smallest scores of `krum`.

      value = 1/m sum_{i in the m smallest s(i)} x_i

  If fewer than m workers are present, the value is the mean of all vectors. m = 1 gives Krum, and
  m = W gives the mean. If at most f workers are faulty and m <= W - f, the value is finite.

  Args:
    faulty: f, the number of faulty workers to tolerate.
    selected: m, the number of vectors to average.
    axis: the worker axes.

  Raises:
    ValueError: if faulty is negative or selected is below 1; or, at trace time, if 2 f + 2 >= W or
      selected > W.

  Reference: Blanchard et al. 2017, arXiv 1703.02757, Multi-Krum.
  """

  faulty: int
  selected: int
  axis: collectives.Axes = WORKER_AXES


multi_krum = MultiKrum


def _scores(everyone: Tree, faulty: int, roll: Roll | None, axis: collectives.Axes) -> Array:
  """Computes the scores s [W]; worker i computes s(i) and sends it to all workers."""
  count = collectives.worker_count(axis)
  to_all = lambda i: _squares(everyone, jax.tree.map(lambda x: x[i], everyone), count)
  parts = lax.map(to_all, jnp.arange(count))
  mine = jnp.sum(collectives.exchange(parts, axis), 0)
  is_other = jnp.arange(count) != collectives.worker_index(axis)
  if roll is not None:
    is_other &= roll.present
  distances = jnp.sort(jnp.where(is_other & jnp.isfinite(mine), mine, jnp.inf))
  if roll is None:
    return collectives.gather(jnp.sum(distances[: count - faulty - 2]), axis)
  near = jnp.clip(roll.count - faulty - 2, jnp.minimum(roll.count - 1, 1), count)
  return collectives.gather(jnp.sum(jnp.where(jnp.arange(count) < near, distances, 0)), axis)


class GeometricMedian(Robust, name="geometric_median"):
  """Minimizes the sum of distances to the workers' vectors by Weiszfeld's iteration.

      beta_i = 1 / max(nu, ||v - x_i||),   v <- sum_i beta_i x_i / sum_i beta_i

  The iteration starts at the coordinate-wise median, which costs no extra traffic here. A few
  iterations then suffice; if the iteration started at the mean, one distant worker would increase
  the number of iterations needed. If fewer than half of the workers are faulty, the value is finite
  and approaches a point whose distance from the honest workers is bounded by their spread.

  Args:
    axis: the worker axes.
    iterations: R, the number of iterations, at least 1.
    smoothing: nu, in the units of the values; smaller distances are treated as nu.

  Raises:
    ValueError: if iterations is below 1 or smoothing is not above 0.

  Reference: Pillutla, Kakade, Harchaoui 2019, arXiv 1912.13445, the smoothed Weiszfeld algorithm.
  """

  axis: collectives.Axes = WORKER_AXES
  _: KW_ONLY
  iterations: int = 3
  smoothing: float = 1e-6

  def check(self):
    checks.at_least("iterations", self.iterations)
    checks.in_range("smoothing", self.smoothing, "(0, inf)")

  def of_chunks(self, everyone, roll):
    count = collectives.worker_count(self.axis)
    counts = True if roll is None else roll.present

    def move(v, _):
      distances = _distances(everyone, v, count, self.axis)
      near = jnp.isfinite(distances) & counts
      beta = jnp.where(near, 1 / jnp.maximum(self.smoothing, distances), 0)
      total = jnp.sum(beta)
      nowhere = (total == 0) & (True if roll is None else roll.count > 0)
      weights = beta / jnp.where(total > 0, total, 1)
      visible = lambda x: jnp.where(nowhere, jnp.nan, _weighted(weights, x))
      return jax.tree.map(visible, everyone), None

    start = jax.tree.map(lambda x: middle(x, around_middle, roll), everyone)
    return lax.scan(move, start, length=self.iterations)[0]


geometric_median = GeometricMedian


class CenteredClipState(NamedTuple):
  v: Tree  # the value of the last round, equal on all workers


class CenteredClip(Robust, name="centered_clip"):
  """Averages the workers' vectors after clipping their differences from the last round's value.

      v <- v + 1/n sum_i (x_i - v) min(1, tau / ||x_i - v||)

  Initially, v is zero; each round continues from the previous value. One worker moves v by at most
  tau / n per iteration, and not at all if its distance is not finite.

  Args:
    radius: tau, in the units of the values; it should be about the spread of the honest workers.
    axis: the worker axes.
    iterations: L, the number of iterations per round, at least 1.

  Raises:
    ValueError: if radius is not above 0 or iterations is below 1.

  Reference: Karimireddy, He, Jaggi 2021, arXiv 2012.10333, centered clipping.
  """

  radius: float
  axis: collectives.Axes = WORKER_AXES
  _: KW_ONLY
  iterations: int = 1
  adds = Robust.adds | Trait.MEMORY

  def check(self):
    checks.at_least("iterations", self.iterations)
    checks.in_range("radius", self.radius, "(0, inf)")

  def init(self, params):
    return CenteredClipState(optax.tree.zeros_like(params))

  def aggregate(self, tree, state, key, presence=EVERYONE):
    del key
    count = collectives.worker_count(self.axis)
    everyone, roll = exchanged(tree, self.axis), call_roll(presence, self.axis)
    counts = True if roll is None else roll.present
    present = count if roll is None else jnp.maximum(roll.count, 1)

    def move(v, _):
      distances = _distances(everyone, v, count, self.axis)
      share = jnp.minimum(1, self.radius / distances) / present
      weights = jnp.where(jnp.isfinite(distances) & counts, share, 0)
      return jax.tree.map(lambda v, x: v + _weighted(weights, x - v[None]), v, everyone), None

    chunk_of = lambda v, x: cut(v, count)[collectives.worker_index(self.axis)].astype(x.dtype)
    start = jax.tree.map(chunk_of, state.v, everyone)
    v, _ = lax.scan(move, start, length=self.iterations)
    value = restored(v, tree, self.axis)
    return Aggregate(scaled(value, roll), tree, CenteredClipState(value))


centered_clip = CenteredClip


def _distances(everyone: Tree, v: Tree, count: int, axis: collectives.Axes) -> Array:
  """Computes ||x_i - v|| [W] from chunks; the result is equal on all workers."""
  return jnp.sqrt(collectives.total(_squares(everyone, v, count), axis))


def _squares(everyone: Tree, v: Tree, count: int) -> Array:
  """Computes ||x_i - v||^2 [W] over this worker's chunks only."""
  one = lambda x, v: jnp.sum((x - v[None]) ** 2, tuple(range(1, x.ndim)))
  return sum(jax.tree.leaves(jax.tree.map(one, everyone, v)), jnp.zeros(count, jnp.float32))


def _weighted(weights: Array, x: Array) -> Array:
  """Computes sum_i w_i x_i for x [W, ...]; x_i may be NaN if w_i is zero."""
  weights = weights.astype(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
  return jnp.sum(jnp.where(weights > 0, weights * x, 0), 0)
