"""Asynchronous methods, made deterministic: workers compute with old models, by a law of delays."""

from dataclasses import KW_ONLY
from functools import cached_property
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from research.aggregate import composition
from research.comm import collectives
from research.core import checks
from research.core.base import EVERYONE, Aggregator
from research.core.method import COMMON_MODEL, Method
from research.methods._steps import check_rate
from research.methods.data_parallel import data_parallel
from research.methods.stale import NOTHING, Correction, Stale
from research.sim.delays import Delays, by_coordinate, last_pull


class Delayed(Stale, name="delayed"):
  """Workers that compute with old models.

      x_{t+1} = x_t + (what the inner method makes of a round that began at x_{t - tau_i})

  With `data_parallel(sgd(eta), mean())` that is x_{t+1} = x_t - eta mean_i g_i(x_{t - tau_i}).
  On a quadratic of curvature h a constant delay of tau is stable for
  0 < eta h < 2 sin(pi / (4 tau + 2)), about pi / (2 tau).

  Args:
    inner: any method. The change of a worker's model over its round is applied to the current one.
    delays: tau_i, in rounds.

  Reference: Agarwal and Duchi 2011, arXiv 1104.5525.
  """

  inner: Method
  delays: Delays


delayed = Delayed


class StalenessAware(Stale, name="staleness_aware"):
  """Delayed, with a step size that falls with the staleness.

      g <- g / max(tau_i, 1)^power

  The paper divides the step size, which for SGD is the same; an inner optimizer that does not
  depend on the scale of one worker's gradient does not see it.

  Args:
    inner: any method, of the synchronous step size.
    delays: tau_i, in rounds.
    power: 1 in the paper; 0 is `delayed`.

  Raises:
    ValueError: if power < 0.

  Reference: Zhang, Gupta, Lian, Liu 2016, arXiv 1511.05950.
  """

  inner: Method
  delays: Delays
  _: KW_ONLY
  power: float = 1.0

  def check(self):
    checks.at_least("power", self.power, 0)

  @cached_property
  def correction(self) -> Correction:
    """g / max(tau, 1)^power."""

    def correct(grads, tau, moved, memory):
      del moved
      slower = lambda g, tau: g * jnp.maximum(tau, 1).astype(g.dtype) ** -self.power
      return jax.tree.map(slower, grads, tau), memory

    return NOTHING._replace(correct=correct)


staleness_aware = StalenessAware


class Compensating(Stale):
  """SGD with gradients corrected for how far the model has moved on."""

  learning_rate: ClassVar[Any]
  lam: ClassVar[float]

  def check(self):
    checks.at_least("lam", self.lam, 0)
    check_rate(self.learning_rate)

  @cached_property
  def method(self) -> Method:
    """SGD by the aggregated gradients."""
    return data_parallel(optax.sgd(self.learning_rate), self.aggregator)


class DCASGD(Compensating, name="dc_asgd"):
  """Delay-compensated SGD, with the adaptive lambda (DC-ASGD-a).

      g_i = grad f_i(x_{t - tau_i}),   s_t = decay s_{t-1} + (1 - decay) g_i^2
      x_{t+1} = x_t - eta aggregate_i(g_i + lambda / sqrt(s_t + eps) g_i^2 (x_t - x_{t - tau_i}))

  elementwise: a first-order estimate of g_i(x_t), with g^2 for the Hessian's diagonal. The server
  of the paper receives one gradient at a time, as here with `last_pull` and one worker that serves
  a population. Where several arrive in a round, each is compensated with its own s_t, and the mean
  of these is kept: a second tree is sent, past the aggregator.

  Args:
    learning_rate: eta.
    aggregator: how the workers' gradients become one.
    delays: tau_i, in rounds.
    lam: lambda_0; 0 is `delayed`.
    decay: m, of the mean square.
    eps: under the root.

  Raises:
    ValueError: if learning_rate <= 0, lam < 0, decay is outside [0, 1), eps <= 0, or for an
      aggregator that it refuses.

  Reference: Zheng et al. 2017, arXiv 1609.08326, algorithms 1 and 2 (DC-ASGD-a).
  """

  learning_rate: float | optax.Schedule
  aggregator: Aggregator
  delays: Delays
  _: KW_ONLY
  lam: float = 2.0
  decay: float = 0.95
  eps: float = 1e-7

  refuses = COMMON_MODEL | composition.AROUND  # the squares are averaged past the aggregator

  def check(self):
    checks.in_range("decay", self.decay, "[0, 1)")
    checks.above("eps", self.eps)
    super().check()

  @cached_property
  def correction(self) -> Correction:
    """g + lambda / sqrt(s + eps) g^2 (x_t - x_{t - tau})."""

    def correct(grads, tau, moved, square):
      del tau
      follow = lambda s, g: self.decay * s + (1 - self.decay) * g**2
      square = jax.tree.map(follow, square, grads)
      lams = jax.tree.map(lambda s: self.lam / jnp.sqrt(s + self.eps), square)
      return jax.tree.map(_compensated, grads, moved, lams), square

    return Correction(optax.tree.zeros_like, correct, remembers=True)


dc_asgd = DCASGD


class DCASGDConstant(Compensating, name="dc_asgd_constant"):
  """Delay-compensated SGD, with a constant lambda (DC-ASGD-c).

      g_i = grad f_i(x_{t - tau_i})
      x_{t+1} = x_t - eta aggregate_i(g_i + lambda g_i^2 (x_t - x_{t - tau_i}))

  Args:
    learning_rate: eta.
    aggregator: how the workers' gradients become one.
    delays: tau_i, in rounds.
    lam: lambda; 0 is `delayed`.

  Raises:
    ValueError: if learning_rate <= 0, lam < 0, or for an aggregator that it refuses.

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
    """g + lambda g^2 (x_t - x_{t - tau})."""

    def correct(grads, tau, moved, memory):
      del tau
      return jax.tree.map(lambda g, dx: _compensated(g, dx, self.lam), grads, moved), memory

    return NOTHING._replace(correct=correct)


dc_asgd_constant = DCASGDConstant


def _compensated(g, moved, lam):
  return g + lam * g * g * moved


class Summed(Aggregator):
  """W times what the inner aggregator makes of the workers' values: their sum."""

  inner: Aggregator

  def init(self, params):
    return self.inner.init(params)

  def aggregate(self, tree, state, key, presence=EVERYONE):
    out = self.inner.aggregate(tree, state, key, presence)
    count = collectives.worker_count()
    return out._replace(value=jax.tree.map(lambda x: count * x, out.value))


class Hogwild(Stale, name="hogwild"):
  """Lock-free SGD on a shared model, as its analysis sees it: inconsistent reads, added updates.

      xhat_i[v] = x_{t - tau_iv}[v],   tau_iv uniform on [0, bound), for each coordinate v
      x_{t+1} = x_t - eta sum_i weight_i grad f_i(xhat_i)

  Nothing is averaged: where the workers' gradients are sparse and hardly meet, a round of W workers
  is W steps of SGD. With dense gradients it is one step, W times as long. Sparse gradients stay
  sparse on the wire with an aggregator that sends few values. Where a worker sees all of one old
  model it is `delayed(..., uniform(bound))`.

  Args:
    learning_rate: eta, of a single worker's update.
    aggregator: how the workers' gradients become one mean, of which W times is added.
    bound: rounds; what a worker reads is less old than that. 1: all of it is new.

  Raises:
    ValueError: if learning_rate <= 0, bound < 1, or for an aggregator that it refuses.

  Reference: Recht, Re, Wright, Niu 2011, arXiv 1106.5730, algorithm 1; inconsistent reads: Mania et
    al. 2015, arXiv 1507.06970.
  """

  learning_rate: float | optax.Schedule
  aggregator: Aggregator
  _: KW_ONLY
  bound: int

  refuses = COMMON_MODEL

  def check(self):
    check_rate(self.learning_rate)
    checks.at_least("bound", self.bound)

  @cached_property
  def method(self) -> Method:
    """SGD by the sum of the gradients."""
    return data_parallel(optax.sgd(self.learning_rate), Summed(self.aggregator))

  @cached_property
  def delays(self) -> Delays:
    """Of each coordinate its own."""
    return by_coordinate(self.bound)

  def on_server(self):
    return data_parallel(optax.sgd(self.learning_rate), self.aggregator), None


hogwild = Hogwild


class ASGD(Stale, name="asgd"):
  """Asynchronous SGD: a server, and clients that it serves in the order in which they are done.

      g_i = grad f_i(x_{t - tau_i}),   x_{t+1} = x_t + inner(g_i),   client i pulls x_{t+1}

  With one worker and a population, a round is one such event, and the order of the clients decides
  how old a gradient is. With several workers a round serves a client of each, whose gradients are
  averaged; where all clients are served in each round it is synchronous data parallelism. The same
  with a step size that falls with the age: `staleness_aware(..., last_pull())`; with compensation:
  `dc_asgd(..., last_pull())`.

  Args:
    inner: the server's optimizer.
    aggregator: how the gradients of a round become one.

  Raises:
    ValueError: for an aggregator that it refuses.

  Reference: Lian et al. 2015, arXiv 1506.08272, algorithm 1 (AsySG-con).
  """

  inner: optax.GradientTransformation
  aggregator: Aggregator

  refuses = COMMON_MODEL

  @cached_property
  def method(self) -> Method:
    """The server's optimizer, by the gradients of a round."""
    return data_parallel(self.inner, self.aggregator)

  @cached_property
  def delays(self) -> Delays:
    """As old as a client's last round."""
    return last_pull()


asgd = ASGD
