"""Defines attacks for experiments and tests: wrappers that replace faulty workers' messages.

The first `faulty` workers attack in every round in which they are present; the others are honest.
An attack that depends on other workers' values uses a collective of its own. The traffic of this
collective does not belong to the algorithm, but the byte counts of the wrapped aggregator include
it.
"""

import math
from dataclasses import KW_ONLY
from statistics import NormalDist
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from research.comm import collectives
from research.core import checks
from research.core.base import EVERYONE, WORKER_AXES, Aggregator, Array, Key, Trait, Tree
from research.core.part import required

_NOISE = 0x6C696573


class Attack(Aggregator):
  """Applies `inner` after the first `faulty` workers have replaced their values."""

  inner: ClassVar[Any]
  faulty: ClassVar[Any]
  axis: ClassVar[Any]
  adds = Trait.FORGED

  def check(self):
    checks.in_range("faulty", self.faulty, "[0, inf)")

  @required
  def lie(self, tree: Tree, key: Key, count: int, active: bool | Array) -> Tree:
    """Returns the tree that a faulty worker sends instead of its own tree.

    Args:
      tree: the worker's own values.
      key: a typed key of the exchange, equal on all workers.
      count: W, the number of workers.
      active: whether this worker is present.
    """
    ...

  @property
  def privacy(self):
    return self.inner.privacy

  def init(self, params):
    return self.inner.init(params)

  def aggregate(self, tree, state, key, presence=EVERYONE):
    count = collectives.worker_count(self.axis)
    if self.faulty >= count:
      raise ValueError(f"faulty={self.faulty} leaves no honest worker among {count}")
    is_faulty = collectives.worker_index(self.axis) < self.faulty
    choose = lambda forged, x: jnp.where(is_faulty, forged.astype(x.dtype), x)
    shown = jax.tree.map(choose, self.lie(tree, key, count, presence.active), tree)
    return self.inner.aggregate(shown, state, key, presence)

  def honest_mean(self, tree: Tree, count: int, active: bool | Array) -> Tree:
    """Averages the trees of the honest workers that are present; returns zero if there are none.

    Args:
      tree: this worker's values.
      count: W, the number of workers.
      active: whether this worker is present.
    """
    counts, honest = collectives.worker_index(self.axis) >= self.faulty, count - self.faulty
    if active is not True:
      counts &= active
      honest = jnp.maximum(collectives.total(counts.astype(jnp.float32), self.axis), 1)
    part = lambda x: jnp.where(counts, x / honest, 0).astype(x.dtype)
    return collectives.total(jax.tree.map(part, tree), self.axis)


class SignFlip(Attack, name="sign_flip"):
  """Faulty workers send -scale times their own values.

  Args:
    inner: the aggregator under attack.
    faulty: the number of faulty workers.
    scale: the factor by which values are multiplied, at least 0.
    axis: the worker axes.

  Raises:
    ValueError: if faulty or scale is negative; or, at trace time, if no worker is honest.

  Reference: Li et al. 2018, arXiv 1811.03761 (RSA), the sign-flipping attack of the
  experiments.
  """

  inner: Aggregator
  _: KW_ONLY
  faulty: int
  scale: float = 1.0
  axis: collectives.Axes = WORKER_AXES

  def check(self):
    super().check()
    checks.in_range("scale", self.scale, "[0, inf)")

  def lie(self, tree, key, count, active):
    del key, count, active
    return jax.tree.map(lambda x: -self.scale * x, tree)


sign_flip = SignFlip


class Gaussian(Attack, name="gaussian"):
  """Each faulty worker sends independent noise N(0, deviation^2) in every coordinate.

  Args:
    inner: the aggregator under attack.
    faulty: the number of faulty workers.
    deviation: the standard deviation, at least 0, in the units of the values.
    axis: the worker axes.

  Raises:
    ValueError: if faulty or deviation is negative; or, at trace time, if no worker is honest.

  Reference: Blanchard et al. 2017, arXiv 1703.02757, the Gaussian attack of the experiments.
  """

  inner: Aggregator
  _: KW_ONLY
  faulty: int
  deviation: float
  axis: collectives.Axes = WORKER_AXES

  def check(self):
    super().check()
    checks.in_range("deviation", self.deviation, "[0, inf)")

  def lie(self, tree, key, count, active):
    del count, active
    leaves, treedef = jax.tree.flatten(tree)
    own = collectives.worker_key(jax.random.fold_in(key, _NOISE), self.axis)
    keys = jax.random.split(own, max(len(leaves), 1))
    noise = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=False)]
    return treedef.unflatten([self.deviation * n for n in noise])


gaussian = Gaussian


class ALittleIsEnough(Attack, name="a_little_is_enough"):
  """All faulty workers send the honest mean, shifted by z standard deviations in each coordinate.

      x_i = mu - z sigma,   z = Phi^-1((W - f - s) / (W - f)),   s = floor(W/2 + 1) - f

  With this z, s honest workers are expected to be farther from the mean than the faulty workers,
  and these s workers and the faulty workers together form a majority. A larger z does more damage
  but is easier to detect. Here, mu and sigma are computed exactly from the values of the honest
  workers; in the paper, the attackers estimate mu and sigma from their own values.

  Args:
    inner: the aggregator under attack.
    faulty: f, the number of faulty workers.
    z: the shift in standard deviations; None selects the paper's formula.
    axis: the worker axes.

  Raises:
    ValueError: if faulty is negative; or, at trace time, if no worker is honest, or z is None and
      the formula is undefined because faulty workers are a majority or W < 3.

  Reference: Baruch, Baruch, Goldberg 2019, arXiv 1902.06156, the attack that prevents convergence.
  """

  inner: Aggregator
  _: KW_ONLY
  faulty: int
  z: float | None = None
  axis: collectives.Axes = WORKER_AXES

  def lie(self, tree, key, count, active):
    del key
    distance = largest_unnoticed(count, self.faulty) if self.z is None else self.z
    tree = jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)
    mean = self.honest_mean(tree, count, active)
    squares = jax.tree.map(lambda x, m: (x - m) ** 2, tree, mean)
    variance = self.honest_mean(squares, count, active)
    return jax.tree.map(lambda m, v: m - distance * jnp.sqrt(v), mean, variance)


a_little_is_enough = ALittleIsEnough


def largest_unnoticed(count: int, faulty: int) -> float:
  """Computes z for `a_little_is_enough` by the paper's formula.

  Args:
    count: W, the number of workers.
    faulty: f, the number of faulty workers.

  Raises:
    ValueError: if the formula is undefined.
  """
  supporters = math.floor(count / 2 + 1) - faulty
  honest = count - faulty
  if not 0 < supporters < honest:
    raise ValueError(
      f"a_little_is_enough(faulty={faulty}) has no z of its own among {count} workers: it takes "
      f"three or more and a minority of faulty ones; give z"
    )
  return NormalDist().inv_cdf((honest - supporters) / honest)


class InnerProduct(Attack, name="inner_product"):
  """All faulty workers send -scale times the honest mean, in order to make <value, mean> negative.

      x_i = -scale mu

  Args:
    inner: the aggregator under attack.
    faulty: the number of faulty workers.
    scale: the paper's epsilon, at least 0; distance-based rules do not detect a small scale.
    axis: the worker axes.

  Raises:
    ValueError: if faulty or scale is negative; or, at trace time, if no worker is honest.

  Reference: Xie, Koyejo, Gupta 2019, arXiv 1903.03936, inner product manipulation.
  """

  inner: Aggregator
  _: KW_ONLY
  faulty: int
  scale: float
  axis: collectives.Axes = WORKER_AXES

  def check(self):
    super().check()
    checks.in_range("scale", self.scale, "[0, inf)")

  def lie(self, tree, key, count, active):
    del key
    return jax.tree.map(lambda m: -self.scale * m, self.honest_mean(tree, count, active))


inner_product = InnerProduct
