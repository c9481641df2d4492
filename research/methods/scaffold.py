"""SCAFFOLD: federated averaging with control variates that correct client drift."""

from dataclasses import KW_ONLY
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from research.aggregate.presence import kept, unweighted
from research.core import checks
from research.core.base import EVERYONE, Aggregator, Array, Params, State
from research.methods._passes import ByPasses
from research.methods._steps import widened_zeros


class ScaffoldState(NamedTuple):
  params: Params  # x
  control: Params  # c
  own_control: Params  # c_i of this client
  link: State  # state of the models' aggregator
  control_link: State  # state of the controls' aggregator
  warm: Array  # bool, whether the control variates have been set


class ScaffoldLocal(NamedTuple):
  params: Params  # y_i
  slopes: Params  # sum of grad f_i(y_i) over the steps, float32 or wider
  steps: Array  # int32, K_i


class Scaffold(ByPasses, name="scaffold"):
  """Stochastic controlled averaging with option II for the clients' control variates.

      y_i <- y_i - eta (grad f_i(y_i) - c_i + c)                   K_i times, from y_i = x
      c_i+ = c_i - c + (x - y_i) / (K_i eta), the mean of grad f_i(y_i) over the steps
      x <- x + eta_g aggregate_i(weight_i (y_i - x))
      c <- c + (|S| / N) aggregate_i(c_i+ - c_i),   c_i <- c_i+

  The control variates start at zero. With a warm-up, they start at the clients' gradients at the
  initial model, which are computed in a first round that does not move the models. A client that is
  not sampled, or drops out, keeps its c_i. If the aggregator is the mean over workers, c equals the
  mean of all N clients' c_i after every round. As in the paper, the solution minimizes the
  unweighted mean of the clients' objectives. Weighting clients by their examples changes the path,
  not the solution; the paper's algorithm also weights clients equally along the path. Each round
  sends two trees.

  Args:
    learning_rate: eta, the clients' learning rate, a constant.
    aggregator: combines the clients' model changes and, with a separate state, the changes of their
      control variates.
    server_learning_rate: eta_g, the server's learning rate.
    epochs: E, number of passes over a client's examples per round.
    period: K, number of local steps of every client per round; 0 means that `epochs` sets the
      length.
    warm_up: whether to start with a round that only sets the control variates; the control variates
      of clients that this round does not sample start at 0.

  Raises:
    ValueError: if a learning rate is not above 0, epochs < 1, period < 0, both epochs and period
      are set, or the aggregator is incompatible.

  Reference: Karimireddy, Kale, Mohri, Reddi, Stich, Suresh 2020, arXiv 1910.06378, algorithm 1.
  """

  learning_rate: float
  aggregator: Aggregator
  _: KW_ONLY
  server_learning_rate: float = 1.0
  epochs: int = 1
  period: int = 0
  warm_up: bool = False

  def check(self):
    checks.above("learning_rate", self.learning_rate)
    checks.above("server_learning_rate", self.server_learning_rate)
    super().check()

  def init(self, params):
    zeros, link = optax.tree.zeros_like(params), self.aggregator.init(params)
    return ScaffoldState(params, zeros, zeros, link, link, jnp.asarray(not self.warm_up))

  def begin(self, state):
    zeros = widened_zeros(state.params)
    return ScaffoldLocal(state.params, zeros, jnp.zeros((), jnp.int32))

  def step(self, grads, local, state, *, key, grad_fn=None):
    del key, grad_fn
    rate = jnp.where(state.warm, self.learning_rate, 0.0)
    descend = lambda y, g, c_i, c: (y - rate * (g - c_i + c)).astype(y.dtype)
    params = jax.tree.map(descend, local.params, grads, state.own_control, state.control)
    return ScaffoldLocal(params, optax.tree.add(local.slopes, grads), local.steps + 1)

  def sync(self, local, state, *, key, presence=EVERYONE):
    change = optax.tree.sub(local.params, state.params)
    turn = lambda slopes, c_i: (slopes / local.steps - c_i).astype(c_i.dtype)
    control_change = jax.tree.map(turn, local.slopes, state.own_control)
    key, control_key = jax.random.split(key)
    moved, _, link = self.aggregator.aggregate(change, state.link, key, presence)
    turned, _, control_link = self.aggregator.aggregate(
      control_change, state.control_link, control_key, unweighted(presence)
    )
    own = optax.tree.add(state.own_control, control_change)
    return ScaffoldState(
      jax.tree.map(lambda x, d: x + self.server_learning_rate * d, state.params, moved),
      jax.tree.map(lambda c, d: c + self.participation * d, state.control, turned),
      kept(presence.active, own, state.own_control),
      link,
      control_link,
      jnp.ones_like(state.warm),
    )


scaffold = Scaffold
