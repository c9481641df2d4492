"""Delay-compensated SGD: corrects stale gradients, to first order, for the model's change."""

from dataclasses import KW_ONLY
from functools import cached_property
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from research.aggregate import composition
from research.core import checks
from research.core.base import Aggregator
from research.core.method import COMMON_MODEL, Method
from research.methods._steps import check_rate
from research.methods.data_parallel import data_parallel
from research.methods.stale import NOTHING, Correction, Stale
from research.sim.delays import Delays


class Compensating(Stale):
  """SGD that corrects each gradient for the change from the stale to the current model."""

  learning_rate: ClassVar[Any]
  lam: ClassVar[float]

  def check(self):
    checks.at_least("lam", self.lam, 0)
    check_rate(self.learning_rate)

  @cached_property
  def method(self) -> Method:
    """The inner method: SGD on the aggregated gradients."""
    return data_parallel(optax.sgd(self.learning_rate), self.aggregator)


class DCASGD(Compensating, name="dc_asgd"):
  """Delay-compensated SGD with an adaptive lambda (DC-ASGD-a).

      g_i = grad f_i(x_{t - tau_i}),   s_t = decay s_{t-1} + (1 - decay) g_i^2
      x_{t+1} = x_t - eta aggregate_i(g_i + lambda / sqrt(s_t + eps) g_i^2 (x_t - x_{t - tau_i}))

  All operations are elementwise. The corrected gradient is a first-order estimate of g_i(x_t), in
  which g^2 approximates the Hessian's diagonal. The paper's server receives one gradient at a time;
  `last_pull` with one worker and a population of clients does the same. If a round has several
  gradients, each is compensated with its own s_t, and the state keeps the mean of the s_t. The
  exchange of this mean sends a second tree, which bypasses the aggregator.

  Args:
    learning_rate: eta.
    aggregator: combines the workers' gradients.
    delays: tau_i, in rounds.
    lam: lambda_0; 0 gives `delayed`.
    decay: m, decay of the mean square.
    eps: number added under the square root.

  Raises:
    ValueError: if learning_rate <= 0, lam < 0, decay is outside [0, 1), eps <= 0, or the
      aggregator is incompatible.

  Reference: Zheng et al. 2017, arXiv 1609.08326, algorithms 1 and 2 (DC-ASGD-a).
  """

  learning_rate: float | optax.Schedule
  aggregator: Aggregator
  delays: Delays
  _: KW_ONLY
  lam: float = 2.0
  decay: float = 0.95
  eps: float = 1e-7

  refuses = COMMON_MODEL | composition.AROUND  # averaging the squares bypasses the aggregator

  def check(self):
    checks.in_range("decay", self.decay, "[0, 1)")
    checks.above("eps", self.eps)
    super().check()

  @cached_property
  def correction(self) -> Correction:
    """The corrected gradient: g + lambda / sqrt(s + eps) g^2 (x_t - x_{t - tau})."""

    def correct(grads, tau, moved, square):
      del tau
      follow = lambda s, g: self.decay * s + (1 - self.decay) * g**2
      square = jax.tree.map(follow, square, grads)
      lams = jax.tree.map(lambda s: self.lam / jnp.sqrt(s + self.eps), square)
      return jax.tree.map(_compensated, grads, moved, lams), square

    return Correction(optax.tree.zeros_like, correct, remembers=True)


dc_asgd = DCASGD


class DCASGDConstant(Compensating, name="dc_asgd_constant"):
  """Delay-compensated SGD with a constant lambda (DC-ASGD-c).

      g_i = grad f_i(x_{t - tau_i})
      x_{t+1} = x_t - eta aggregate_i(g_i + lambda g_i^2 (x_t - x_{t - tau_i}))

  Args:
    learning_rate: eta.
    aggregator: combines the workers' gradients.
    delays: tau_i, in rounds.
    lam: lambda; 0 gives `delayed`.

  Raises:
    ValueError: if learning_rate <= 0, lam < 0, or the aggregator is incompatible.

  Reference: Zheng et al. 2017, arXiv 1609.08326, algorithms 1 and 2 (DC-ASGD-c).
  """

  learning_rate: float | optax.Schedule
  aggregator: Aggregator
  delays: Delays
  _: KW_ONLY
  lam: float = 0.04

  refuses = COMMON_MODEL

  @cached_property
  def correction(self) -> Correction:
    """The corrected gradient: g + lambda g^2 (x_t - x_{t - tau})."""

    def correct(grads, tau, moved, memory):
      del tau
      return jax.tree.map(lambda g, dx: _compensated(g, dx, self.lam), grads, moved), memory

    return NOTHING._replace(correct=correct)


dc_asgd_constant = DCASGDConstant


def _compensated(g, moved, lam):
  return g + lam * g * g * moved
