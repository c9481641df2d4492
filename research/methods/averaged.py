"""Polyak-Juditsky averaging: deploys the mean of a method's iterates, not the last iterate."""

from dataclasses import KW_ONLY
from typing import NamedTuple

import jax
import jax.numpy as jnp

from research.core import checks
from research.core.base import Array, Params, State
from research.core.method import Method
from research.methods._around import Around


class AveragedState(NamedTuple):
  inner: State
  mean: Params  # of the iterates after the burn-in, float32 or wider
  count: Array  # int32, completed rounds


class Averaged(Around, name="averaged"):
  """Keeps the running mean of the inner method's parameters, one term per round.

      m_t = m_{t-1} + (x_t - m_{t-1}) / max(1, t - burn_in)

  With step sizes that decay more slowly than 1/t, the mean is asymptotically optimal: its
  covariance is H^-1 S H^-1 / t, where H is the Hessian at the optimum and S is the covariance of
  the stochastic gradients there.

  Args:
    inner: any method; the averaging does not change its iterates.
    burn_in: number of initial rounds to exclude; during these rounds, the mean is the last iterate.

  Raises:
    ValueError: if burn_in < 0.

  Reference: Polyak and Juditsky 1992, SIAM J. Control Optim. 30(4).
  """

  inner: Method
  _: KW_ONLY
  burn_in: int = 0

  def check(self):
    checks.at_least("burn_in", self.burn_in, 0)

  def init(self, params):
    wide = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32))
    zero = jnp.zeros((), jnp.int32)
    return AveragedState(self.inner.init(params), jax.tree.map(wide, params), zero)

  def finished(self, after, local, state, *, key, presence):
    del local, key, presence
    count = state.count + 1
    terms = jnp.maximum(1, count - self.burn_in)
    mean = jax.tree.map(lambda m, x: m + (x - m) / terms, state.mean, self.inner.params(after))
    return AveragedState(after, mean, count)

  def params(self, state):
    narrowed = lambda m, x: m.astype(x.dtype)
    return jax.tree.map(narrowed, state.mean, self.inner.params(state.inner))


averaged = Averaged
