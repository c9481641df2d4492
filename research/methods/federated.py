"""Federated averaging and its relatives: clients work from the server's model, the server steps.

A client starts every round anew from the server's model and keeps nothing.
"""

from dataclasses import KW_ONLY
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import jax
import optax

from research.core import checks
from research.core.base import EVERYONE, Aggregator, Params, State
from research.methods._passes import ByPasses
from research.methods._steps import LocalStepping, LocalSteps
from research.optim import server


class FederatedState(NamedTuple):
  params: Params  # x_t
  outer: State  # of the server's optimizer
  link: State  # of the aggregator


class Federated(ByPasses, LocalStepping):
  """Fresh local steps from the server's model, whose optimizer takes their mean for a gradient."""

  outer: ClassVar[Any]  # an optax transformation

  def init(self, params):
    return FederatedState(params, self.outer.init(params), self.aggregator.init(params))

  def begin(self, state):
    return LocalSteps(state.params, self.inner.init(state.params))

  def message(self, local, state, *, key, presence=EVERYONE):
    del key, presence
    return optax.tree.sub(state.params, local.params), state

  def receive(self, value, sent, state, *, key, presence=EVERYONE):
    del sent, key, presence
    updates, optimizer = self.outer.update(value, state.outer, state.params)
    return state._replace(params=optax.apply_updates(state.params, updates), outer=optimizer)


class FedAvg(Federated, name="fed_avg"):
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
      that it refuses.

  Reference: McMahan, Moore, Ramage, Hampson, Aguera y Arcas 2016, arXiv 1602.05629, algorithm 1.
  """

  inner: optax.GradientTransformation
  aggregator: Aggregator
  _: KW_ONLY
  epochs: int = 1
  period: int = 0
  learning_rate: float = 1.0

  def check(self):
    checks.above("learning_rate", self.learning_rate)
    super().check()

  @cached_property
  def outer(self) -> optax.GradientTransformation:
    """The server's step."""
    return optax.sgd(self.learning_rate)


fed_avg = FedAvg


class FedProx(Federated, name="fed_prox"):
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

  inner: optax.GradientTransformation
  aggregator: Aggregator
  _: KW_ONLY
  mu: float = 0.01
  epochs: int = 1
  period: int = 0

  outer = optax.sgd(1.0)

  def check(self):
    checks.at_least("mu", self.mu, 0)
    super().check()

  def step(self, grads, local, state, *, key, grad_fn=None):
    held = lambda g, y, x: g + self.mu * (y - x)
    grads = jax.tree.map(held, grads, local.params, state.params)
    return super().step(grads, local, state, key=key, grad_fn=grad_fn)


fed_prox = FedProx


class FedOpt(Federated, name="fed_opt"):
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

  inner: optax.GradientTransformation
  outer: optax.GradientTransformation
  aggregator: Aggregator
  _: KW_ONLY
  epochs: int = 1
  period: int = 0


fed_opt = FedOpt


class FedAdam(Federated, name="fed_adam"):
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

  inner: optax.GradientTransformation
  aggregator: Aggregator
  _: KW_ONLY
  learning_rate: float = 0.01
  b1: float = 0.9
  b2: float = 0.99
  tau: float = 1e-3
  epochs: int = 1
  period: int = 0

  def check(self):
    super().check()
    server.adam(self.learning_rate, self.b1, self.b2, self.tau)

  @cached_property
  def outer(self) -> optax.GradientTransformation:
    """The server's Adam."""
    return server.adam(self.learning_rate, self.b1, self.b2, self.tau)


fed_adam = FedAdam


class FedYogi(Federated, name="fed_yogi"):
  """`fed_adam` with v_t = v_{t-1} - (1 - b2) Delta_t^2 sign(v_{t-1} - Delta_t^2).

  Args and raises as there.

  Reference: Reddi et al. 2020, arXiv 2003.00295, algorithm 2, FedYogi.
  """

  inner: optax.GradientTransformation
  aggregator: Aggregator
  _: KW_ONLY
  learning_rate: float = 0.01
  b1: float = 0.9
  b2: float = 0.99
  tau: float = 1e-3
  epochs: int = 1
  period: int = 0

  def check(self):
    super().check()
    server.yogi(self.learning_rate, self.b1, self.b2, self.tau)

  @cached_property
  def outer(self) -> optax.GradientTransformation:
    """The server's Yogi."""
    return server.yogi(self.learning_rate, self.b1, self.b2, self.tau)


fed_yogi = FedYogi


class FedAdagrad(Federated, name="fed_adagrad"):
  """`fed_adam` with v_t = v_{t-1} + Delta_t^2; the paper's experiments have no momentum.

  Args and raises as there.

  Reference: Reddi et al. 2020, arXiv 2003.00295, algorithm 2, FedAdagrad.
  """

  inner: optax.GradientTransformation
  aggregator: Aggregator
  _: KW_ONLY
  learning_rate: float = 0.01
  b1: float = 0.0
  tau: float = 1e-3
  epochs: int = 1
  period: int = 0

  def check(self):
    super().check()
    server.adagrad(self.learning_rate, self.b1, self.tau)

  @cached_property
  def outer(self) -> optax.GradientTransformation:
    """The server's AdaGrad."""
    return server.adagrad(self.learning_rate, self.b1, self.tau)


fed_adagrad = FedAdagrad
