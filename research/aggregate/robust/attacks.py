"""What faulty workers send, for studies and tests: wrappers that put it in the place of a value.

The first `faulty` workers lie where they are present, the others are honest. What an attacker knows
of the others it learns by a collective of its own: that is the attack's knowledge, not traffic of
the algorithm, but whoever counts the bytes of the wrapped aggregator counts it too.
"""

import math
from collections.abc import Callable
from statistics import NormalDist

import jax
import jax.numpy as jnp

from research.comm import collectives
from research.core.base import EVERYONE, WORKER_AXES, Aggregate, Aggregator, Array, Key, Tree

_NOISE = 0x6C696573


def sign_flip(
  inner: Aggregator, *, faulty: int, scale: float = 1.0, axis: collectives.Axes = WORKER_AXES
) -> Aggregator:
  """Faulty workers send -scale times their own value.

  Args:
    inner: the aggregator under attack.
    faulty: how many workers lie.
    scale: at least 0.
    axis: the worker axes.

  Raises:
    ValueError: if faulty < 0 or scale < 0, or when traced if no worker is honest.

  Reference: Li et al. 2018, arXiv 1811.03761 (RSA), the sign-flipping attack of the
  experiments.
  """
  _check("scale", scale)

  def lie(tree, key, count, active):
    del key, count, active
    return jax.tree.map(lambda x: -scale * x, tree)

  return _attacked(inner, faulty, lie, axis)


def gaussian(
  inner: Aggregator, *, faulty: int, deviation: float, axis: collectives.Axes = WORKER_AXES
) -> Aggregator:
  """Each faulty worker sends noise of its own, N(0, deviation^2) in every coordinate.

  Args:
    inner: the aggregator under attack.
    faulty: how many workers lie.
    deviation: at least 0, in the units of the values.
    axis: the worker axes.

  Raises:
    ValueError: if faulty < 0 or deviation < 0, or when traced if no worker is honest.

  Reference: Blanchard et al. 2017, arXiv 1703.02757, the Gaussian attack of the experiments.
  """
  _check("deviation", deviation)

  def lie(tree, key, count, active):
    del count, active
    leaves, treedef = jax.tree.flatten(tree)
    own = collectives.worker_key(jax.random.fold_in(key, _NOISE), axis)
    keys = jax.random.split(own, max(len(leaves), 1))
    noise = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=False)]
    return treedef.unflatten([deviation * n for n in noise])

  return _attacked(inner, faulty, lie, axis)


def a_little_is_enough(
  inner: Aggregator,
  *,
  faulty: int,
  z: float | None = None,
  axis: collectives.Axes = WORKER_AXES,
) -> Aggregator:
  """Faulty workers all send the honest mean, moved in each coordinate by z standard deviations.

      x_i = mu - z sigma,   z = Phi^-1((W - f - s) / (W - f)),   s = floor(W/2 + 1) - f

  With this z, s honest workers are expected to be further from the mean than the faulty ones are,
  and with them the faulty are a majority. A larger z hurts more, and more visibly. mu and sigma are
  of the honest workers, who here share them with the attackers; the paper's attackers estimate them
  from what they hold themselves.

  Args:
    inner: the aggregator under attack.
    faulty: f, how many workers lie.
    z: in standard deviations; None takes the paper's.
    axis: the worker axes.

  Raises:
    ValueError: if faulty < 0, or when traced if no worker is honest, or z is None and the formula
      has no value since the faulty are a majority or W < 3.

  Reference: Baruch, Baruch, Goldberg 2019, arXiv 1902.06156, the attack that prevents convergence.
  """

  def lie(tree, key, count, active):
    del key
    distance = largest_unnoticed(count, faulty) if z is None else z
    tree = jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)
    mean = _honest_mean(tree, faulty, count, active, axis)
    squares = jax.tree.map(lambda x, m: (x - m) ** 2, tree, mean)
    variance = _honest_mean(squares, faulty, count, active, axis)
    return jax.tree.map(lambda m, v: m - distance * jnp.sqrt(v), mean, variance)

  return _attacked(inner, faulty, lie, axis)


def largest_unnoticed(count: int, faulty: int) -> float:
  """z of `a_little_is_enough` for W workers of which so many are faulty.

  Raises:
    ValueError: if the formula has no value.
  """
  supporters = math.floor(count / 2 + 1) - faulty
  honest = count - faulty
  if not 0 < supporters < honest:
    raise ValueError(
      f"a_little_is_enough(faulty={faulty}) has no z of its own among {count} workers: it takes "
      f"three or more and a minority of faulty ones; give z"
    )
  return NormalDist().inv_cdf((honest - supporters) / honest)


def inner_product(
  inner: Aggregator, *, faulty: int, scale: float, axis: collectives.Axes = WORKER_AXES
) -> Aggregator:
  """Faulty workers all send the honest mean turned round, to make <value, mean> negative.

      x_i = -scale mu

  Args:
    inner: the aggregator under attack.
    faulty: how many workers lie.
    scale: the paper's epsilon, at least 0; small ones go unnoticed by distances.
    axis: the worker axes.

  Raises:
    ValueError: if faulty < 0 or scale < 0, or when traced if no worker is honest.

  Reference: Xie, Koyejo, Gupta 2019, arXiv 1903.03936, inner product manipulation.
  """
  _check("scale", scale)

  def lie(tree, key, count, active):
    del key
    return jax.tree.map(lambda m: -scale * m, _honest_mean(tree, faulty, count, active, axis))

  return _attacked(inner, faulty, lie, axis)


def _attacked(
  inner: Aggregator,
  faulty: int,
  lie: Callable[[Tree, Key, int, bool | Array], Tree],
  axis: collectives.Axes,
) -> Aggregator:
  """`inner`, where the first `faulty` workers have lie(tree, key, W, active) in place of theirs."""
  _check("faulty", faulty)

  def aggregate(tree, state, key, presence=EVERYONE) -> Aggregate:
    count = collectives.worker_count(axis)
    if faulty >= count:
      raise ValueError(f"faulty={faulty} leaves no honest worker among {count}")
    is_faulty = collectives.worker_index(axis) < faulty
    choose = lambda forged, x: jnp.where(is_faulty, forged.astype(x.dtype), x)
    shown = jax.tree.map(choose, lie(tree, key, count, presence.active), tree)
    return inner.aggregate(shown, state, key, presence)

  return Aggregator(inner.init, aggregate, inner.traits | {"forged"}, privacy=inner.privacy)


def _honest_mean(
  tree: Tree, faulty: int, count: int, active: bool | Array, axis: collectives.Axes
) -> Tree:
  """The mean over the honest workers present; zero where there are none."""
  counts, honest = collectives.worker_index(axis) >= faulty, count - faulty
  if active is not True:
    counts &= active
    honest = jnp.maximum(collectives.total(counts.astype(jnp.float32), axis), 1)
  part = lambda x: jnp.where(counts, x / honest, 0).astype(x.dtype)
  return collectives.total(jax.tree.map(part, tree), axis)


def _check(name: str, value: float) -> None:
  if value < 0:
    raise ValueError(f"{name}={value} is not in [0, inf)")
