"""Federated averaging and its variants: clients take local steps, then the server takes one step.

A client starts every round from the server's model and keeps no state.
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
  outer: State  # state of the server's optimizer
  link: State  # state of the aggregator


class Federated(ByPasses, LocalStepping):
  """Base class: the mean change of clients' local steps is the server optimizer's gradient."""

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
  """Federated averaging (FedAvg).

      y_{t,0}^i = x_t,   y_{t,k+1}^i = y_{t,k}^i + inner(grad f_i(y_{t,k}^i))     k in [K_i]
      x_{t+1} = x_t + eta_g aggregate_i(weight_i (y_{t,K_i}^i - x_t))

  The K_i steps are E passes of client i over its own examples. With eta_g = 1 and one SGD step per
  client on all of its examples, the method is FedSGD, which is full gradient descent. A schedule of
  the inner optimizer restarts every round.

  Args:
    inner: each client's optimizer, re-initialized every round.
    aggregator: combines the clients' model changes.
    epochs: E, number of passes over a client's examples per round.
    period: K, number of local steps of every client per round; 0 means that `epochs` sets the
      length.
    learning_rate: eta_g, the server's learning rate; the paper uses 1.

  Raises:
    ValueError: if epochs < 1, period < 0, both epochs and period are set, learning_rate <= 0, or
      the aggregator is incompatible.

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
    """The server's optimizer: SGD with the learning rate eta_g."""
    return optax.sgd(self.learning_rate)


fed_avg = FedAvg


class FedProx(Federated, name="fed_prox"):
  """Federated averaging with a proximal term that pulls clients towards the server's model.

      y_{t,k+1}^i = y_{t,k}^i + inner(grad f_i(y_{t,k}^i) + mu (y_{t,k}^i - x_t))
      x_{t+1} = x_t + aggregate_i(weight_i (y_{t,K_i}^i - x_t))

  The local steps minimize f_i(y) + mu/2 ||y - x_t||^2 inexactly, as in the paper's experiments. The
  paper samples clients in proportion to their number of examples and averages them with equal
  weights. Here clients are sampled uniformly and weighted by their number of examples, as in
  `fed_avg`. With mu = 0, the method is `fed_avg`.

  Args:
    inner: each client's optimizer, re-initialized every round.
    aggregator: combines the clients' model changes.
    mu: strength of the proximal term, in curvature units; the paper tries 0.001 to 1.
    epochs: E, number of passes over a client's examples per round.
    period: K, number of local steps of every client per round; 0 means that `epochs` sets the
      length.

  Raises:
    ValueError: if mu < 0, or `fed_avg` would reject the other arguments.

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
  """Federated optimization: the clients' mean change is the gradient of the server's optimizer.

      y_{t,0}^i = x_t,   y_{t,k+1}^i = y_{t,k}^i + inner(grad f_i(y_{t,k}^i))     k in [K_i]
      Delta_t = -aggregate_i(weight_i (x_t - y_{t,K_i}^i)),   x_{t+1} = x_t + outer(-Delta_t)

  Clients are weighted by their number of examples, as in the paper's experiments; the paper's
  algorithm weights clients equally. With the outer optimizer `sgd(1.0)`, the method is `fed_avg`.

  Args:
    inner: each client's optimizer, re-initialized every round.
    outer: the server's optimizer.
    aggregator: combines the clients' model changes.
    epochs: E, number of passes over a client's examples per round.
    period: K, number of local steps of every client per round; 0 means that `epochs` sets the
      length.

  Raises:
    ValueError: if `fed_avg` would reject the arguments.

  Reference: Reddi et al. 2020, arXiv 2003.00295, algorithm 1.
  """

  inner: optax.GradientTransformation
  outer: optax.GradientTransformation
  aggregator: Aggregator
  _: KW_ONLY
  epochs: int = 1
  period: int = 0


fed_opt = FedOpt


class FedAdaptive(Federated):
  """Base class: `fed_opt` with one of the paper's adaptive optimizers on the server."""

  inner: optax.GradientTransformation
  aggregator: Aggregator
  _: KW_ONLY
  learning_rate: float = 0.01
  b1: float = 0.9
  tau: float = 1e-3
  epochs: int = 1
  period: int = 0

  def check(self):
    super().check()
    _ = self.outer  # building the optimizer rejects out-of-range hyper-parameters


class FedAdam(FedAdaptive, name="fed_adam"):
  """`fed_opt` with Adam on the server; as in the paper, there is no bias correction.

      m_t = b1 m_{t-1} + (1 - b1) Delta_t,   v_t = b2 v_{t-1} + (1 - b2) Delta_t^2
      x_{t+1} = x_t + eta m_t / (sqrt(v_t) + tau),                      m_{-1} = 0, v_{-1} = tau^2

  Args:
    inner: each client's optimizer, re-initialized every round.
    aggregator: combines the clients' model changes.
    learning_rate: eta, the server's learning rate.
    b1: decay of the mean of changes.
    b2: decay of the mean of squares.
    tau: degree of adaptivity, in the units of a model change.
    epochs: E, number of passes over a client's examples per round.
    period: K, number of local steps of every client per round; 0 means that `epochs` sets the
      length.

  Raises:
    ValueError: if learning_rate or tau is not above 0, b1 or b2 is outside [0, 1), or `fed_avg`
      would reject the other arguments.

  Reference: Reddi et al. 2020, arXiv 2003.00295, algorithm 2, FedAdam.
  """

  _: KW_ONLY
  b2: float = 0.99

  @cached_property
  def outer(self) -> optax.GradientTransformation:
    """The server's Adam."""
    return server.adam(self.learning_rate, self.b1, self.b2, self.tau)


fed_adam = FedAdam


class FedYogi(FedAdam, name="fed_yogi"):
  """`fed_adam` with v_t = v_{t-1} - (1 - b2) Delta_t^2 sign(v_{t-1} - Delta_t^2).

  Args:
    inner: each client's optimizer, re-initialized every round.
    aggregator: combines the clients' model changes.
    learning_rate: eta, the server's learning rate.
    b1: decay of the mean of changes.
    b2: decay of the mean of squares.
    tau: degree of adaptivity, in the units of a model change.
    epochs: E, number of passes over a client's examples per round.
    period: K, number of local steps of every client per round; 0 means that `epochs` sets the
      length.

  Raises:
    ValueError: if `fed_adam` would reject the arguments.

  Reference: Reddi et al. 2020, arXiv 2003.00295, algorithm 2, FedYogi.
  """

  @cached_property
  def outer(self) -> optax.GradientTransformation:
    """The server's Yogi."""
    return server.yogi(self.learning_rate, self.b1, self.b2, self.tau)


fed_yogi = FedYogi


class FedAdagrad(FedAdaptive, name="fed_adagrad"):
  """`fed_adam` with v_t = v_{t-1} + Delta_t^2; the paper's experiments use no momentum.

  Args:
    inner: each client's optimizer, re-initialized every round.
    aggregator: combines the clients' model changes.
    learning_rate: eta, the server's learning rate.
    b1: decay of the mean of changes.
    tau: degree of adaptivity, in the units of a model change.
    epochs: E, number of passes over a client's examples per round.
    period: K, number of local steps of every client per round; 0 means that `epochs` sets the
      length.

  Raises:
    ValueError: if `fed_adam` would reject the arguments.

  Reference: Reddi et al. 2020, arXiv 2003.00295, algorithm 2, FedAdagrad.
  """

  _: KW_ONLY
  b1: float = 0.0

  @cached_property
  def outer(self) -> optax.GradientTransformation:
    """The server's AdaGrad."""
    return server.adagrad(self.learning_rate, self.b1, self.tau)


fed_adagrad = FedAdagrad
