"""EDiT's penalty: leaves out outlying workers, and weights the other workers by their norms."""

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from research.aggregate.presence import call_roll, kept, unweighted
from research.aggregate.privacy.clipping import clipped
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
)


class EditPenaltyState(NamedTuple):
  mean: Array  # mu_i, private
  variance: Array  # sigma_i^2, private
  count: Array  # int32, t_i, private: rounds with a finite norm
  inner: State


class EditPenalty(Aggregator, name="edit_penalty"):
  """Weights workers by the norms of their values; workers with an unusually large norm get zero.

      G_i = ||x_i||,   i is an outlier if t_i >= warm_up and G_i > mu_i + delta sigma_i
      w_i = exp(-G_i / tau) / sum_{j not an outlier} exp(-G_j / tau), and 0 for outliers
      value = A(W w_i x_i),   value <- value min(1, phi / ||value||)
      G_i' = min(G_i, mu_i + delta sigma_i),   mu_i' = mu_i + alpha (G_i' - mu_i)
      sigma_i'^2 = (1 - alpha) (sigma_i^2 + alpha (G_i' - mu_i)^2)

  This wrapper is EDiT's penalty on pseudo-gradients: use it around the aggregator of `diloco`. With
  `mean()`, the value is sum_i w_i x_i. If all workers are outliers, the value is zero. A worker
  whose norm is not finite is an outlier, and its norm does not enter the statistics. During the
  warm-up, only workers with a non-finite norm are left out. Besides the inner aggregator's
  messages, a worker sends its norm, 4 bytes.

  Our implementation differs from the paper in three ways: a norm is taken over all leaves instead
  of over each module; mu starts at the first norm instead of zero; and an outlier's norm is clipped
  before it enters the statistics, so that the statistics eventually follow a lasting change of the
  norms.

  Args:
    inner: the aggregator of the weighted values.
    threshold: delta, the threshold for outliers in standard deviations, above 0.
    decay: alpha, the share of a new norm in the statistics, in (0, 1).
    warm_up: the number of rounds of a worker before its outliers are left out, at least 1.
    temperature: tau, in the units of the norms, above 0; infinity weights workers equally.
    clip: phi, the maximum norm of the value; may be infinity.
    axis: the worker axes.

  Raises:
    ValueError: if an argument is out of range, or the inner aggregator has a trait in `refuses`.

  Reference: Cheng, Gao, Yue, Ye, Jiang, Sha 2024, arXiv 2412.07210, pseudo gradient penalty.
  """

  inner: Aggregator
  _: KW_ONLY
  threshold: float = 3.0
  decay: float = 0.02
  warm_up: int = 120
  temperature: float = 1.0
  clip: float = 10.0
  axis: collectives.Axes = WORKER_AXES
  adds = Trait.SELECTS | Trait.WHOLE
  refuses: ClassVar[Mapping[Trait, str]] = {
    Trait.VOTE: "signs do not depend on the workers' weights",
    Trait.SELECTS: "the rule would see values that are scaled by the workers' weights",
    Trait.NOISE: "a worker's weight would depend on the others' norms, which are not hidden",
    Trait.SECRET: "the norms are sent unmasked",
    Trait.LOCAL: "weights are normalized over all workers, not over neighbours",
  }

  def check(self):
    checks.above("threshold", self.threshold)
    checks.in_range("decay", self.decay, "(0, 1)")
    checks.at_least("warm_up", self.warm_up)
    checks.above("temperature", self.temperature)
    checks.above("clip", self.clip)

  def init(self, params):
    zero = jnp.zeros(())
    return EditPenaltyState(zero, zero, jnp.zeros((), jnp.int32), self.inner.init(params))

  def aggregate(self, tree, state, key, presence=EVERYONE):
    wide = jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)
    norm = optax.tree.norm(wide).astype(jnp.float32)
    limit = state.mean + self.threshold * jnp.sqrt(state.variance)
    limit = jnp.where((state.count >= self.warm_up) & (state.variance > 0), limit, jnp.inf)
    finite = jnp.isfinite(norm) & presence.active
    usual = finite & (norm <= limit)
    share = self._share(jnp.where(usual, -norm / self.temperature, -jnp.inf), presence)
    own = jax.tree.map(lambda x: jnp.where(usual, share * x, 0).astype(x.dtype), tree)
    value, sent, inner = self.inner.aggregate(own, state.inner, key, unweighted(presence))
    value = clipped(value, self.clip) if math.isfinite(self.clip) else value
    before = state._replace(inner=())
    after = kept(finite, self._updated(before, jnp.minimum(norm, limit)), before)
    return Aggregate(value, sent, after._replace(inner=inner))

  def _share(self, logit: Array, presence: Presence) -> Array:
    """Returns W w_i, multiplied by the workers' mean weight."""
    everyone, roll = collectives.gather(logit, self.axis), call_roll(presence, self.axis)
    best = jnp.max(everyone)
    best = jnp.where(jnp.isfinite(best), best, 0)
    total = jnp.mean(jnp.exp(everyone - best))
    share = jnp.exp(logit - best) / jnp.where(total > 0, total, 1)
    return share if roll is None else roll.scale * share

  def _updated(self, state: EditPenaltyState, norm: Array) -> EditPenaltyState:
    """Returns the statistics updated with a finite norm."""
    change = jnp.where(state.count > 0, norm - state.mean, 0)
    mean = jnp.where(state.count > 0, state.mean + self.decay * change, norm)
    variance = (1 - self.decay) * (state.variance + self.decay * change**2)
    return EditPenaltyState(mean, variance, state.count + 1, ())


edit_penalty = EditPenalty
