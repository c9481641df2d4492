"""Robust averages of whole vectors: Krum, the geometric median, centered clipping.

A worker's vector is all its leaves. Worker j holds chunk j of everyone, as in `robust.py`, and
only sums over chunks travel besides: W numbers per iteration, or for Krum W distances to each of W
workers, whatever the model's size. Distances are of differences, in float32 or wider. A distance
that is not finite (a worker sent NaN, infinity, or more than the square root of the largest float)
counts as infinite: that worker is never near, and weighs nothing. As in `robust.py` the rules are
over the n workers present.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from research.aggregate.chunks import cut
from research.aggregate.presence import Roll, call_roll
from research.aggregate.robust.coordinates import TRAITS, exchanged, middle, restored, scaled
from research.comm import collectives
from research.core.base import EVERYONE, WORKER_AXES, Aggregate, Aggregator, Array, Tree


def krum(faulty: int, axis: collectives.Axes = WORKER_AXES) -> Aggregator:
  """The vector of one worker: the one that is nearest to its n - f - 2 nearest others.

      s(i) = sum_{j near i} ||x_i - x_j||^2,   value = x_i*,   i* = argmin_i s(i)

  Of equal scores the first worker's counts. With at most f faulty workers the value is finite, and
  is an honest worker's or as near to its neighbours as one. That holds of rounds in which more than
  2 f + 2 workers are present; where n - f - 2 < 1 the nearest one counts.

  Args:
    faulty: f, the number of faulty workers to withstand.
    axis: the worker axes.

  Raises:
    ValueError: if faulty < 0, or when traced if not 2 f + 2 < W.

  Reference: Blanchard et al. 2017, arXiv 1703.02757, the Krum function.
  """
  return _krum("krum", faulty, 1, axis)


def multi_krum(faulty: int, selected: int, axis: collectives.Axes = WORKER_AXES) -> Aggregator:
  """The mean of the vectors with the m best scores of `krum`.

      value = 1/m sum_{i in the m smallest s(i)} x_i

  or of all present if those are fewer. m = 1 is Krum, m = W the mean. With at most f faulty workers
  the value is finite if m <= W - f.

  Args:
    faulty: f, the number of faulty workers to withstand.
    selected: m, the number of vectors to average.
    axis: the worker axes.

  Raises:
    ValueError: if faulty < 0 or selected < 1, or when traced if not 2 f + 2 < W or selected > W.

  Reference: Blanchard et al. 2017, arXiv 1703.02757, Multi-Krum.
  """
  return _krum("multi_krum", faulty, selected, axis)


def _krum(name: str, faulty: int, selected: int, axis: collectives.Axes) -> Aggregator:
  if faulty < 0:
    raise ValueError(f"faulty={faulty}; it is at least 0")
  if selected < 1:
    raise ValueError(f"selected={selected}; it is at least 1")

  def aggregate(tree, state, key, presence=EVERYONE):
    del key
    count = collectives.worker_count(axis)
    if 2 * faulty + 2 >= count:
      raise ValueError(
        f"{name}(faulty={faulty}) needs more than {2 * faulty + 2} workers and there are {count}"
      )
    if selected > count:
      raise ValueError(f"{name}(selected={selected}) selects among {count} workers")
    everyone, roll = exchanged(tree, axis), call_roll(presence, axis)
    scores = _scores(everyone, faulty, roll, axis)
    if roll is None:
      best = jnp.argsort(scores, stable=True)[:selected]
      chunk = jax.tree.map(lambda x: jnp.mean(x[best], 0), everyone)
    else:
      rank = jnp.argsort(jnp.lexsort((scores, ~roll.present)))
      chosen = jnp.minimum(selected, roll.count)
      weights = (rank < chosen) / jnp.maximum(chosen, 1)
      chunk = jax.tree.map(lambda x: _weighted(weights, x), everyone)
    return Aggregate(restored(scaled(chunk, roll), tree, axis), tree, state)

  return Aggregator(lambda params: (), aggregate, TRAITS)


def _scores(everyone: Tree, faulty: int, roll: Roll | None, axis: collectives.Axes) -> Array:
  """s [W]: worker i adds up the distances from its own vector, and tells its score."""
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


def geometric_median(
  axis: collectives.Axes = WORKER_AXES, *, iterations: int = 3, smoothing: float = 1e-6
) -> Aggregator:
  """The point with the least sum of distances to the workers' vectors, by Weiszfeld's iteration.

      beta_i = 1 / max(nu, ||v - x_i||),   v <- sum_i beta_i x_i / sum_i beta_i

  We start at the coordinate-wise median, which costs nothing on the wire here: from the mean, one
  worker far away takes more iterations than the few that suffice otherwise. While fewer than half
  of the workers are faulty the value is finite, and nears a point whose distance from the honest
  workers is bounded by their spread.

  Args:
    axis: the worker axes.
    iterations: R, at least 1.
    smoothing: nu, in the units of the values; below it a distance weighs as if it were nu.

  Raises:
    ValueError: if iterations < 1 or smoothing is not above 0.

  Reference: Pillutla, Kakade, Harchaoui 2019, arXiv 1912.13445, the smoothed Weiszfeld algorithm.
  """
  _check_iterations(iterations)
  if not smoothing > 0:
    raise ValueError(f"smoothing={smoothing} is not in (0, inf)")

  def aggregate(tree, state, key, presence=EVERYONE):
    del key
    count = collectives.worker_count(axis)
    everyone, roll = exchanged(tree, axis), call_roll(presence, axis)
    counts = True if roll is None else roll.present

    def move(v, _):
      distances = _distances(everyone, v, count, axis)
      near = jnp.isfinite(distances) & counts
      beta = jnp.where(near, 1 / jnp.maximum(smoothing, distances), 0)
      total = jnp.sum(beta)
      nowhere = (total == 0) & (True if roll is None else roll.count > 0)
      weights = beta / jnp.where(total > 0, total, 1)
      visible = lambda x: jnp.where(nowhere, jnp.nan, _weighted(weights, x))
      return jax.tree.map(visible, everyone), None

    start = jax.tree.map(lambda x: middle(x, lambda n: (n - 1) // 2, roll), everyone)
    v, _ = lax.scan(move, start, length=iterations)
    return Aggregate(restored(scaled(v, roll), tree, axis), tree, state)

  return Aggregator(lambda params: (), aggregate, TRAITS)


class CenteredClipState(NamedTuple):
  v: Tree  # the last round's value, equal on all workers


def centered_clip(
  radius: float, axis: collectives.Axes = WORKER_AXES, *, iterations: int = 1
) -> Aggregator:
  """The mean of the differences to the last round's value, each clipped to a norm.

      v <- v + 1/n sum_i (x_i - v) min(1, tau / ||x_i - v||)

  v starts at zero, and in a round where the last one ended. One worker moves it by at most
  tau / n per iteration; one whose distance is not finite does not move it.

  Args:
    radius: tau, in the units of the values: about the spread of honest workers.
    axis: the worker axes.
    iterations: L per round, at least 1.

  Raises:
    ValueError: if radius is not above 0 or iterations < 1.

  Reference: Karimireddy, He, Jaggi 2021, arXiv 2012.10333, centered clipping.
  """
  _check_iterations(iterations)
  if not radius > 0:
    raise ValueError(f"radius={radius} is not in (0, inf)")

  def aggregate(tree, state, key, presence=EVERYONE):
    del key
    count = collectives.worker_count(axis)
    everyone, roll = exchanged(tree, axis), call_roll(presence, axis)
    counts = True if roll is None else roll.present
    present = count if roll is None else jnp.maximum(roll.count, 1)

    def move(v, _):
      distances = _distances(everyone, v, count, axis)
      share = jnp.minimum(1, radius / distances) / present
      weights = jnp.where(jnp.isfinite(distances) & counts, share, 0)
      return jax.tree.map(lambda v, x: v + _weighted(weights, x - v[None]), v, everyone), None

    chunk_of = lambda v, x: cut(v, count)[collectives.worker_index(axis)].astype(x.dtype)
    start = jax.tree.map(chunk_of, state.v, everyone)
    v, _ = lax.scan(move, start, length=iterations)
    value = restored(v, tree, axis)
    return Aggregate(scaled(value, roll), tree, CenteredClipState(value))

  zeros = lambda params: CenteredClipState(jax.tree.map(jnp.zeros_like, params))
  return Aggregator(zeros, aggregate, TRAITS | {"memory"})


def _check_iterations(iterations: int) -> None:
  if iterations < 1:
    raise ValueError(f"iterations={iterations}; it is at least 1")


def _distances(everyone: Tree, v: Tree, count: int, axis: collectives.Axes) -> Array:
  """||x_i - v|| [W], equal on all workers, from the chunks of both."""
  return jnp.sqrt(collectives.total(_squares(everyone, v, count), axis))


def _squares(everyone: Tree, v: Tree, count: int) -> Array:
  """||x_i - v||^2 [W] over this worker's chunks alone."""
  one = lambda x, v: jnp.sum((x - v[None]) ** 2, tuple(range(1, x.ndim)))
  return sum(jax.tree.leaves(jax.tree.map(one, everyone, v)), jnp.zeros(count, jnp.float32))


def _weighted(weights: Array, x: Array) -> Array:
  """sum_i w_i x_i over [W, ...]; what weighs nothing may be NaN."""
  weights = weights.astype(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
  return jnp.sum(jnp.where(weights > 0, weights * x, 0), 0)
