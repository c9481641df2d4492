"""SCAFFOLD: federated averaging whose clients correct their steps by how their gradients differ."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from research.aggregate.composition import refuse
from research.aggregate.presence import kept, presence_of
from research.core.base import Aggregator, Array, Params, State
from research.core.method import Method
from research.methods.decentralized import check_rate
from research.methods.local import minus, plus
from research.methods.passes import in_rounds


class ScaffoldState(NamedTuple):
  params: Params  # x
  control: Params  # c
  own_control: Params  # c_i of this client
  link: State  # of the models' aggregator
  control_link: State  # of the controls' aggregator
  warm: Array  # bool, whether the controls have been set


class ScaffoldLocal(NamedTuple):
  params: Params  # y_i
  slopes: Params  # sum of grad f_i(y_i) over the steps, float32 or wider
  steps: Array  # int32, K_i


def scaffold(
  learning_rate: float,
  aggregator: Aggregator,
  *,
  server_learning_rate: float = 1.0,
  epochs: int = 1,
  period: int = 0,
  warm_up: bool = False,
) -> Method:
  """Stochastic controlled averaging, with option II for the clients' controls.

      y_i <- y_i - eta (grad f_i(y_i) - c_i + c)                   K_i times, from y_i = x
      c_i+ = c_i - c + (x - y_i) / (K_i eta), the mean of grad f_i(y_i) over the steps
      x <- x + eta_g aggregate_i(weight_i (y_i - x))
      c <- c + (|S| / N) aggregate_i(c_i+ - c_i),   c_i <- c_i+

  from zero controls or, with a warm-up, from those of a first round in which models stay where they
  are: the clients' gradients at the first model. A client that sits a round out, or drops out of
  it, keeps its c_i. With an aggregator that is the mean over the workers, c is the mean of all N
  clients' c_i after every round. It solves the paper's problem, the mean of the clients' objectives
  with each client alike: the clients' weights by their examples change the way there and not the
  solution. The paper's algorithm weighs them alike on the way too. Sends two trees per round.

  Args:
    learning_rate: eta, of the clients, constant.
    aggregator: how the clients' changes of models become one, and again those of controls, each
      with a state of its own.
    server_learning_rate: eta_g.
    epochs: E, passes over a client's examples per round.
    period: K, local steps of every client per round in place of passes; 0: by `epochs`.
    warm_up: begin with a round that only sets the controls. Clients that it leaves out begin at 0.

  Raises:
    ValueError: if a learning rate is not above 0, epochs < 1, period < 0, or both are set, or for
      an aggregator in `composition.REFUSED`.

  Reference: Karimireddy, Kale, Mohri, Reddi, Stich, Suresh 2020, arXiv 1910.06378, algorithm 1.
  """
  check_rate(learning_rate)
  if not server_learning_rate > 0:
    raise ValueError(f"server_learning_rate={server_learning_rate} is not above 0")
  refuse("scaffold", aggregator)

  def begin(state):
    wide = lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32))
    zeros = jax.tree.map(wide, state.params)
    return ScaffoldLocal(state.params, zeros, jnp.zeros((), jnp.int32))

  def step(grads, local, state, *, key, grad_fn=None):
    del key, grad_fn
    rate = jnp.where(state.warm, learning_rate, 0.0)
    descend = lambda y, g, c_i, c: (y - rate * (g - c_i + c)).astype(y.dtype)
    params = jax.tree.map(descend, local.params, grads, state.own_control, state.control)
    return ScaffoldLocal(params, plus(local.slopes, grads), local.steps + 1)

  def build(aggregator: Aggregator, participation: float) -> Method:
    def init(params):
      zeros, link = jax.tree.map(jnp.zeros_like, params), aggregator.init(params)
      return ScaffoldState(params, zeros, zeros, link, link, jnp.asarray(not warm_up))

    def sync(local, state, *, key, weight=1.0, active=True):
      change = minus(local.params, state.params)
      turn = lambda slopes, c_i: (slopes / local.steps - c_i).astype(c_i.dtype)
      control_change = jax.tree.map(turn, local.slopes, state.own_control)
      key, control_key = jax.random.split(key)
      presence, alike = presence_of(weight, active), presence_of(1.0, active)
      moved, _, link = aggregator.aggregate(change, state.link, key, presence)
      turned, _, control_link = aggregator.aggregate(
        control_change, state.control_link, control_key, alike
      )
      return ScaffoldState(
        jax.tree.map(lambda x, d: x + server_learning_rate * d, state.params, moved),
        jax.tree.map(lambda c, d: c + participation * d, state.control, turned),
        kept(active, plus(state.own_control, control_change), state.own_control),
        link,
        control_link,
        jnp.ones_like(state.warm),
      )

    return Method(init, begin, step, sync, lambda state: state.params)

  return in_rounds(build, aggregator, epochs, period)
