"""Asynchronous methods, made deterministic: workers compute with old models, by a law of delays."""

import jax
import jax.numpy as jnp
import optax

from research.aggregate.composition import refuse
from research.comm import collectives
from research.core.base import EVERYONE, Aggregator
from research.core.method import Method
from research.methods.data_parallel import data_parallel
from research.methods.stale import NOTHING, Correction, stale
from research.sim.delays import Delays, by_coordinate, last_pull


def delayed(inner: Method, delays: Delays) -> Method:
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
  return stale(inner, delays)


def staleness_aware(inner: Method, delays: Delays, *, power: float = 1.0) -> Method:
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
  if not power >= 0:
    raise ValueError(f"power={power} is not at least 0")

  def correct(grads, tau, moved, memory):
    del moved
    slower = lambda g, tau: g * jnp.maximum(tau, 1).astype(g.dtype) ** -power
    return jax.tree.map(slower, grads, tau), memory

  return stale(inner, delays, NOTHING._replace(correct=correct))


def dc_asgd(
  learning_rate: float | optax.Schedule,
  aggregator: Aggregator,
  delays: Delays,
  *,
  lam: float = 2.0,
  decay: float = 0.95,
  eps: float = 1e-7,
) -> Method:
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
      aggregator in `composition.REFUSED`.

  Reference: Zheng et al. 2017, arXiv 1609.08326, algorithms 1 and 2 (DC-ASGD-a).
  """
  if not 0 <= decay < 1:
    raise ValueError(f"decay={decay} is not in [0, 1)")
  if not eps > 0:
    raise ValueError(f"eps={eps} is not above 0")
  refuse("dc_asgd", aggregator)

  def correct(grads, tau, moved, square):
    del tau
    square = jax.tree.map(lambda s, g: decay * s + (1 - decay) * g**2, square, grads)
    lams = jax.tree.map(lambda s: lam / jnp.sqrt(s + eps), square)
    return jax.tree.map(_compensated, grads, moved, lams), square

  zeros = lambda params: jax.tree.map(jnp.zeros_like, params)
  return _compensating(learning_rate, aggregator, delays, lam, Correction(zeros, correct))


def dc_asgd_constant(
  learning_rate: float | optax.Schedule,
  aggregator: Aggregator,
  delays: Delays,
  *,
  lam: float = 0.04,
) -> Method:
  """Delay-compensated SGD, with a constant lambda (DC-ASGD-c).

      g_i = grad f_i(x_{t - tau_i})
      x_{t+1} = x_t - eta aggregate_i(g_i + lambda g_i^2 (x_t - x_{t - tau_i}))

  Args:
    learning_rate: eta.
    aggregator: how the workers' gradients become one.
    delays: tau_i, in rounds.
    lam: lambda; 0 is `delayed`.

  Raises:
    ValueError: if learning_rate <= 0, lam < 0, or for an aggregator in `composition.REFUSED`.

  Reference: Zheng et al. 2017, arXiv 1609.08326, algorithms 1 and 2 (DC-ASGD-c).
  """

  def correct(grads, tau, moved, memory):
    del tau
    return jax.tree.map(lambda g, dx: _compensated(g, dx, lam), grads, moved), memory

  correction = NOTHING._replace(correct=correct)
  return _compensating(learning_rate, aggregator, delays, lam, correction)


def _compensated(g, moved, lam):
  return g + lam * g * g * moved


def _compensating(learning_rate, aggregator, delays, lam, correction) -> Method:
  if not lam >= 0:
    raise ValueError(f"lam={lam} is not at least 0")
  return stale(_sgd(learning_rate, aggregator), delays, correction)


def _sgd(learning_rate: float | optax.Schedule, aggregator: Aggregator) -> Method:
  if not callable(learning_rate) and not learning_rate > 0:
    raise ValueError(f"learning_rate={learning_rate} is not above 0")
  return data_parallel(optax.sgd(learning_rate), aggregator)


def hogwild(learning_rate: float | optax.Schedule, aggregator: Aggregator, *, bound: int) -> Method:
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
    ValueError: if learning_rate <= 0, bound < 1, or for an aggregator in `composition.REFUSED`.

  Reference: Recht, Re, Wright, Niu 2011, arXiv 1106.5730, algorithm 1; inconsistent reads: Mania et
    al. 2015, arXiv 1507.06970.
  """

  def added(tree, state, key, presence=EVERYONE):
    out = aggregator.aggregate(tree, state, key, presence)
    count = collectives.worker_count()
    return out._replace(value=jax.tree.map(lambda x: count * x, out.value))

  total = aggregator._replace(aggregate=added)
  served = _sgd(learning_rate, aggregator).served
  return stale(_sgd(learning_rate, total), by_coordinate(bound))._replace(served=served)


def asgd(inner: optax.GradientTransformation, aggregator: Aggregator) -> Method:
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
    ValueError: for an aggregator in `composition.REFUSED`.

  Reference: Lian et al. 2015, arXiv 1506.08272, algorithm 1 (AsySG-con).
  """
  return stale(data_parallel(inner, aggregator), last_pull())
