"""Asynchronous methods in deterministic form: a delay model makes workers use stale models."""

from dataclasses import KW_ONLY
from functools import cached_property

import jax
import jax.numpy as jnp
import optax

from research.comm import collectives
from research.core import checks
from research.core.base import EVERYONE, Aggregator
from research.core.method import COMMON_MODEL, Method
from research.methods._steps import check_rate
from research.methods.data_parallel import data_parallel
from research.methods.stale import NOTHING, Correction, Stale
from research.sim.delays import Delays, by_coordinate, last_pull


class Delayed(Stale, name="delayed"):
  """Runs any method with workers that compute with stale models.

      x_{t+1} = x_t + (the inner method's update for a round that started at x_{t - tau_i})

  With `data_parallel(sgd(eta), mean())` as the inner method, the recursion is

      x_{t+1} = x_t - eta mean_i g_i(x_{t - tau_i})

  On a quadratic of curvature h, the recursion with a constant delay tau is stable if eta h is above
  0 and below 2 sin(pi / (4 tau + 2)), which is about pi / (2 tau).

  Args:
    inner: any method. A worker's model change over its round is applied to the current model.
    delays: tau_i, in rounds.

  Reference: Agarwal and Duchi 2011, arXiv 1104.5525.
  """

  inner: Method
  delays: Delays


delayed = Delayed


class StalenessAware(Stale, name="staleness_aware"):
  """Runs `delayed` with a step size that decreases with staleness.

      g <- g / max(tau_i, 1)^power

  The paper divides the step size instead of the gradient, which is equivalent for SGD. The
  correction has no effect on an inner optimizer that is invariant to the scale of one worker's
  gradient.

  Args:
    inner: any method, with the step size of synchronous training.
    delays: tau_i, in rounds.
    power: exponent, at least 0; the paper uses 1, and 0 gives `delayed`.

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
    """The division of a gradient: g / max(tau, 1)^power."""

    def correct(grads, tau, moved, memory):
      del moved
      slower = lambda g, tau: g * jnp.maximum(tau, 1).astype(g.dtype) ** -self.power
      return jax.tree.map(slower, grads, tau), memory

    return NOTHING._replace(correct=correct)


staleness_aware = StalenessAware


class Summed(Aggregator):
  """Sums the workers' values: multiplies the inner aggregator's value by W.

  Args:
    inner: aggregator whose value is a mean over workers.
  """

  inner: Aggregator

  def init(self, params):
    return self.inner.init(params)

  def aggregate(self, tree, state, key, presence=EVERYONE):
    out = self.inner.aggregate(tree, state, key, presence)
    count = collectives.worker_count()
    return out._replace(value=jax.tree.map(lambda x: count * x, out.value))


class Hogwild(Stale, name="hogwild"):
  """Simulates lock-free SGD on a shared model, with inconsistent reads and summed updates.

      xhat_i[v] = x_{t - tau_iv}[v],   tau_iv uniform on [0, bound), for each coordinate v
      x_{t+1} = x_t - eta sum_i weight_i grad f_i(xhat_i)

  Updates are added, not averaged. If the workers' gradients are sparse and rarely overlap, a round
  of W workers equals W steps of SGD; with dense gradients, a round is one step with W times the
  step size. An aggregator that sends few values keeps sparse gradients sparse on the wire. For
  consistent reads of one stale model use `delayed(..., uniform(bound))`.

  Args:
    learning_rate: eta, the step size of a single worker's update.
    aggregator: averages the workers' gradients; W times this mean is applied.
    bound: delays are below this number of rounds; 1 means every read is current.

  Raises:
    ValueError: if learning_rate <= 0, bound < 1, or the aggregator is incompatible.

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
    """The inner method: SGD on the sum of the gradients."""
    return data_parallel(optax.sgd(self.learning_rate), Summed(self.aggregator))

  @cached_property
  def delays(self) -> Delays:
    """The delay model: an independent delay for each coordinate."""
    return by_coordinate(self.bound)

  def on_server(self):
    return data_parallel(optax.sgd(self.learning_rate), self.aggregator), None


hogwild = Hogwild


class ASGD(Stale, name="asgd"):
  """Asynchronous SGD: a server applies the clients' gradients in the order in which they arrive.

      g_i = grad f_i(x_{t - tau_i}),   x_{t+1} = x_t + inner(g_i),   client i pulls x_{t+1}

  With one worker and a population of clients, each round applies one gradient, and the order of the
  clients determines the staleness of each gradient. With several workers, a round averages the
  gradients of one client per worker; if every round includes all clients, the method is synchronous
  data parallelism. For a step size that decreases with staleness, use
  `staleness_aware(..., last_pull())`; for delay compensation, use `dc_asgd(..., last_pull())`.

  Args:
    inner: the server's optimizer.
    aggregator: combines the gradients of a round.

  Raises:
    ValueError: if the aggregator is incompatible.

  Reference: Lian et al. 2015, arXiv 1506.08272, algorithm 1 (AsySG-con).
  """

  inner: optax.GradientTransformation
  aggregator: Aggregator

  refuses = COMMON_MODEL

  @cached_property
  def method(self) -> Method:
    """The inner method: the server's optimizer, applied to the gradients of a round."""
    return data_parallel(self.inner, self.aggregator)

  @cached_property
  def delays(self) -> Delays:
    """The delay model: the number of rounds since the client's last pull."""
    return last_pull()


asgd = ASGD
