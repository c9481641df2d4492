"""Methods on old models: a law of delays, a correction for the age of a gradient, a method inside.

delays       which old model x_{t - tau} a worker computes with
correction   what becomes of its gradient, given tau and x_t - x_{t - tau}
inner        any method, which makes of it what it makes of any gradient
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import optax

from research.aggregate.presence import presence_of, weighted
from research.comm import collectives
from research.core.base import Params, State, Tree
from research.core.method import Local, Method
from research.methods.local import minus, plus
from research.sim.delays import Delays


class Correction(NamedTuple):
  """What is done to a gradient g(x_{t - tau}) before the inner method sees it, in round t."""

  init: Callable[[Params], State]  # a memory that is common to all workers
  correct: Callable[..., tuple[Tree, State]]  # (g, tau, x_t - x_{t - tau}, memory)


NOTHING = Correction(lambda params: (), lambda grads, tau, moved, memory: (grads, memory))


def correcting(correction: Correction) -> optax.GradientTransformationExtraArgs:
  """The same on a server, before its optimizer: tau and what has moved come with each message.

  `update(g, state, params, staleness=tau, moved=x_t - x_{t - tau})`.
  """

  def init(params):
    return correction.init(params)

  def update(updates, state, params=None, **told):
    del params
    tau = jax.tree.broadcast(told["staleness"], updates)
    return correction.correct(updates, tau, told["moved"], state)

  return optax.GradientTransformationExtraArgs(init, update)


class StaleState(NamedTuple):
  inner: State  # of the inner method, which has x_t
  held: State  # of the delays: what may still be read
  memory: State  # of the correction


class StaleLocal(NamedTuple):
  params: Params  # from x_{t - tau} on
  rest: Local  # of the inner method; its params are left out
  memory: State


def stale(inner: Method, delays: Delays, correction: Correction = NOTHING) -> Method:
  """The inner method from old models: a round starts at x_{t - tau}, and its change goes to x_t.

  What the inner method keeps from round to round, but for the model, is as new as without delays.

  Args:
    inner: any method whose Local is a NamedTuple.
    delays: which model a worker starts from.
    correction: what is done to its gradients. Its memory is averaged over the workers, exactly and
      past the inner method's aggregator: where there is one, that is a second tree to send.
  """
  of_round = lambda local, memory: StaleLocal(local.params, local._replace(params=None), memory)
  current = lambda state: inner.begin(state.inner).params

  def init(params):
    state = inner.init(params)
    model = inner.begin(state).params
    return StaleState(state, delays.init(model), correction.init(model))

  def begin(state):
    local = inner.begin(state.inner)
    return of_round(local._replace(params=delays.read(state.held).params), state.memory)

  def step(grads, local, state, *, key, grad_fn=None):
    then, tau = delays.read(state.held)
    moved = minus(current(state), then)
    corrected = lambda g: correction.correct(g, tau, moved, local.memory)
    grads, memory = corrected(grads)
    elsewhere = grad_fn and (lambda params: corrected(grad_fn(params))[0])
    own = local.rest._replace(params=local.params)
    own = inner.step(grads, own, state.inner, key=key, grad_fn=elsewhere)
    return of_round(own, memory)

  def sync(local, state, *, key, weight=1.0, active=True):
    moved = minus(current(state), delays.read(state.held).params)
    own = local.rest._replace(params=plus(local.params, moved))
    after = inner.sync(own, state.inner, key=key, weight=weight, active=active)
    held = delays.after(state.held, inner.begin(after).params, key=key, active=active)
    learnt = weighted(minus(local.memory, state.memory), presence_of(weight, active))
    return StaleState(after, held, plus(state.memory, collectives.mean(learnt)))

  served = inner.served if delays.one_by_one else None
  if served and correction is not NOTHING:
    served = served._replace(server=optax.chain(correcting(correction), served.server))
  inner_over, inner_of_rounds = inner.over, inner.of_rounds
  again = lambda method: stale(method, delays, correction)
  return inner._replace(
    init=init,
    begin=begin,
    step=step,
    sync=sync,
    params=lambda state: inner.params(state.inner),
    over=inner_over and (lambda wrap: again(inner_over(wrap))),
    of_rounds=inner_of_rounds and (lambda *rounds: again(inner_of_rounds(*rounds))),
    one_by_one=delays.one_by_one,
    served=served,
  )
