"""Federated averaging and its relatives: clients work from the server's model, the server steps.

A client starts every round anew from the server's model and keeps nothing.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import optax

from research.aggregate.composition import refuse
from research.aggregate.presence import presence_of
from research.core.base import Aggregator, Params, State
from research.core.method import Method
from research.methods.decentralized import check_rate
from research.methods.local import LocalSteps, minus, stepping
from research.methods.passes import in_rounds
from research.optim import server


class FederatedState(NamedTuple):
  params: Params  # x_t
  outer: State  # of the server's optimizer
  link: State  # of the aggregator


def fed_avg(
  inner: optax.GradientTransformation,
  aggregator: Aggregator,
  *,
  epochs: int = 1,
  period: int = 0,
  learning_rate: float = 1.0,
) -> Method:
  """Federated averaging.

      y_{t,0}^i = x_t,   y_{t,k+1}^i = y_{t,k}^i + inner(grad f_i(y_{t,k}^i))     k in [K_i]
      x_{t+1} = x_t + eta_g aggregate_i(weight_i (y_{t,K_i}^i - x_t))

  K_i steps are E passes of client i over its own examples. With one step on all of them, SGD and
  eta_g = 1 it is FedSGD, the whole gradient. A schedule of the inner optimizer begins anew in every
  round.

  Args:
    inner: each client's optimizer, fresh in every round.
    aggregator: how the clients' changes of the model become one.
    epochs: E, passes over a client's examples per round.
    period: K, local steps of every client per round in place of passes; 0: by `epochs`.
    learning_rate: eta_g, of the server; the paper's is 1.

  Raises:
    ValueError: if epochs < 1, period < 0, both are set, or learning_rate <= 0, or for an aggregator
      in `composition.REFUSED`.

  Reference: McMahan, Moore, Ramage, Hampson, Aguera y Arcas 2016, arXiv 1602.05629, algorithm 1.
  """
  check_rate(learning_rate)
  outer = optax.sgd(learning_rate)
  return _federated("fed_avg", inner, stepping(inner), outer, aggregator, epochs, period)


def fed_prox(
  inner: optax.GradientTransformation,
  aggregator: Aggregator,
  *,
  mu: float = 0.01,
  epochs: int = 1,
  period: int = 0,
) -> Method:
  """Federated averaging of clients that are held to the server's model by a proximal term.

      y_{t,k+1}^i = y_{t,k}^i + inner(grad f_i(y_{t,k}^i) + mu (y_{t,k}^i - x_t))
      x_{t+1} = x_t + aggregate_i(weight_i (y_{t,K_i}^i - x_t))

  The steps are the paper's inexact minimization of f_i(y) + mu/2 ||y - x_t||^2, as in its
  experiments. It draws clients by their number of examples and averages them alike; here they are
  drawn alike and averaged by it, as in `fed_avg`, which mu = 0 is.

  Args:
    inner: each client's optimizer, fresh in every round.
    aggregator: how the clients' changes of the model become one.
    mu: strength of the proximal term, in units of curvature; the paper tries 0.001 to 1.
    epochs: E, passes over a client's examples per round.
    period: K, local steps of every client per round in place of passes; 0: by `epochs`.

  Raises:
    ValueError: if mu < 0, or as `fed_avg`.

  Reference: Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith 2018, arXiv 1812.06127, algorithm 2.
  """
  if not mu >= 0:
    raise ValueError(f"mu={mu} is not at least 0")
  ordinary = stepping(inner)

  def step(grads, local, state, *, key, grad_fn=None):
    held = lambda g, y, x: g + mu * (y - x)
    grads = jax.tree.map(held, grads, local.params, state.params)
    return ordinary(grads, local, state, key=key, grad_fn=grad_fn)

  return _federated("fed_prox", inner, step, optax.sgd(1.0), aggregator, epochs, period)


def fed_opt(
  inner: optax.GradientTransformation,
  outer: optax.GradientTransformation,
  aggregator: Aggregator,
  *,
  epochs: int = 1,
  period: int = 0,
) -> Method:
  """Federated optimization: the server's optimizer takes the clients' mean change for a gradient.

      y_{t,0}^i = x_t,   y_{t,k+1}^i = y_{t,k}^i + inner(grad f_i(y_{t,k}^i))     k in [K_i]
      Delta_t = -aggregate_i(weight_i (x_t - y_{t,K_i}^i)),   x_{t+1} = x_t + outer(-Delta_t)

  Clients are weighted by their examples, as in the paper's experiments; its algorithm counts them
  alike. Plain outer `sgd(1.0)` is `fed_avg`.

  Args:
    inner: each client's optimizer, fresh in every round.
    outer: the server's optimizer.
    aggregator: how the clients' changes of the model become one.
    epochs: E, passes over a client's examples per round.
    period: K, local steps of every client per round in place of passes; 0: by `epochs`.

  Raises:
    ValueError: as `fed_avg`.

  Reference: Reddi et al. 2020, arXiv 2003.00295, algorithm 1.
  """
  return _federated("fed_opt", inner, stepping(inner), outer, aggregator, epochs, period)


def fed_adam(
  inner: optax.GradientTransformation,
  aggregator: Aggregator,
  *,
  learning_rate: float = 0.01,
  b1: float = 0.9,
  b2: float = 0.99,
  tau: float = 1e-3,
  epochs: int = 1,
  period: int = 0,
) -> Method:
  """`fed_opt` with the paper's Adam, which has no bias correction, at the server.

      m_t = b1 m_{t-1} + (1 - b1) Delta_t,   v_t = b2 v_{t-1} + (1 - b2) Delta_t^2
      x_{t+1} = x_t + eta m_t / (sqrt(v_t) + tau),                      m_{-1} = 0, v_{-1} = tau^2

  Args:
    inner: each client's optimizer, fresh in every round.
    aggregator: how the clients' changes of the model become one.
    learning_rate: eta, of the server.
    b1: decay of the mean of changes.
    b2: decay of the mean of squares.
    tau: degree of adaptivity, in units of a change of the model.
    epochs: E, passes over a client's examples per round.
    period: K, local steps of every client per round in place of passes; 0: by `epochs`.

  Raises:
    ValueError: if learning_rate or tau is not above 0, or b1 or b2 is outside [0, 1), or as
      `fed_avg`.

  Reference: Reddi et al. 2020, arXiv 2003.00295, algorithm 2, FedAdam.
  """
  outer = server.adam(learning_rate, b1, b2, tau)
  return _federated("fed_adam", inner, stepping(inner), outer, aggregator, epochs, period)


def fed_yogi(
  inner: optax.GradientTransformation,
  aggregator: Aggregator,
  *,
  learning_rate: float = 0.01,
  b1: float = 0.9,
  b2: float = 0.99,
  tau: float = 1e-3,
  epochs: int = 1,
  period: int = 0,
) -> Method:
  """`fed_adam` with v_t = v_{t-1} - (1 - b2) Delta_t^2 sign(v_{t-1} - Delta_t^2).

  Args and raises as there.

  Reference: Reddi et al. 2020, arXiv 2003.00295, algorithm 2, FedYogi.
  """
  outer = server.yogi(learning_rate, b1, b2, tau)
  return _federated("fed_yogi", inner, stepping(inner), outer, aggregator, epochs, period)


def fed_adagrad(
  inner: optax.GradientTransformation,
  aggregator: Aggregator,
  *,
  learning_rate: float = 0.01,
  b1: float = 0.0,
  tau: float = 1e-3,
  epochs: int = 1,
  period: int = 0,
) -> Method:
  """`fed_adam` with v_t = v_{t-1} + Delta_t^2; the paper's experiments have no momentum.

  Args and raises as there.

  Reference: Reddi et al. 2020, arXiv 2003.00295, algorithm 2, FedAdagrad.
  """
  outer = server.adagrad(learning_rate, b1, tau)
  return _federated("fed_adagrad", inner, stepping(inner), outer, aggregator, epochs, period)


def _federated(
  name: str,
  inner: optax.GradientTransformation,
  step: Callable[..., LocalSteps],
  outer: optax.GradientTransformation,
  aggregator: Aggregator,
  epochs: int,
  period: int,
) -> Method:
  refuse(name, aggregator)

  def begin(state):
    return LocalSteps(state.params, inner.init(state.params))

  def build(aggregator: Aggregator, participation: float) -> Method:
    del participation  # the server's model is all that there is

    def init(params):
      return FederatedState(params, outer.init(params), aggregator.init(params))

    def sync(local, state, *, key, weight=1.0, active=True):
      gradient = minus(state.params, local.params)
      value, _, link = aggregator.aggregate(gradient, state.link, key, presence_of(weight, active))
      updates, optimizer = outer.update(value, state.outer, state.params)
      return FederatedState(optax.apply_updates(state.params, updates), optimizer, link)

    return Method(init, begin, step, sync, lambda state: state.params)

  return in_rounds(build, aggregator, epochs, period)
