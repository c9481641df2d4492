"""Runs an inner method with stale models, a delay model and a staleness correction.

delays       choose the old model x_{t - tau} at which a worker computes
correction   adjusts the worker's gradient, given tau and x_t - x_{t - tau}
method       processes the corrected gradient like any other gradient
"""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import optax

from research.aggregate.presence import weighted
from research.comm import collectives
from research.core.base import Params, State, Tree
from research.methods._around import Around
from research.sim.delays import Delays


class Correction(NamedTuple):
  """Corrects a stale gradient g(x_{t - tau}) in round t, before the inner method receives it."""

  init: Callable[[Params], State]  # creates a memory that is shared by all workers
  correct: Callable[..., tuple[Tree, State]]  # (g, tau, x_t - x_{t - tau}, memory)
  remembers: bool = False  # whether the correction has a memory


NOTHING = Correction(lambda params: (), lambda grads, tau, moved, memory: (grads, memory))


class StaleState(NamedTuple):
  inner: State  # state of the inner method, includes x_t
  held: State  # state of the delays: the models that may still be read
  memory: State  # state of the correction


class StaleLocal(NamedTuple):
  params: Params  # starts at x_{t - tau}
  rest: Any  # Local of the inner method, without the params
  memory: State


class Stale(Around):
  """Runs the inner method with stale models: a round starts at x_{t - tau} and changes x_t.

  Only the model is stale; all other state of the inner method is current. The inner method's Local
  must be a NamedTuple. A correction's memory is averaged exactly over the workers, bypassing the
  inner method's aggregator, so a second tree is sent.
  """

  delays: ClassVar[Any]  # chooses the model at which a worker starts
  correction: ClassVar[Any] = NOTHING

  def init(self, params):
    state = self.method.init(params)
    model = self.method.begin(state).params
    return StaleState(state, self._delays.init(model), self.correction.init(model))

  def begin(self, state):
    local = self.method.begin(state.inner)
    read = self._delays.read(state.held).params
    return _of_round(local._replace(params=read), state.memory)

  def step(self, grads, local, state, *, key, grad_fn=None):
    then, tau = self._delays.read(state.held)
    moved = optax.tree.sub(self._current(state), then)
    corrected = lambda g: self.correction.correct(g, tau, moved, local.memory)
    grads, memory = corrected(grads)
    elsewhere = grad_fn and (lambda params: corrected(grad_fn(params))[0])
    own = local.rest._replace(params=local.params)
    own = self.method.step(grads, own, state.inner, key=key, grad_fn=elsewhere)
    return _of_round(own, memory)

  def inner_local(self, local, state):
    moved = optax.tree.sub(self._current(state), self._delays.read(state.held).params)
    return local.rest._replace(params=optax.tree.add(local.params, moved))

  def finished(self, after, local, state, *, key, presence):
    model = self.method.begin(after).params
    held = self._delays.after(state.held, model, key=key, active=presence.active)
    memory = state.memory
    if self.correction.remembers:
      learnt = weighted(optax.tree.sub(local.memory, memory), presence)
      memory = optax.tree.add(memory, collectives.mean(learnt))
    return StaleState(after, held, memory)

  def _current(self, state: StaleState) -> Params:
    return self.method.begin(state.inner).params

  @property
  def _delays(self) -> Delays:
    return self.delays

  @property
  def splits(self):
    return super().splits and not self.correction.remembers

  @property
  def one_by_one(self):
    return self._delays.one_by_one

  def on_server(self):
    if not self.one_by_one:
      raise ValueError(
        f"{self.spec_name} draws delays, but a server has those of its workers; use last_pull()"
      )
    method, _ = self.method.on_server()
    return method, None if self.correction is NOTHING else self.correction


def _of_round(local: Any, memory: State) -> StaleLocal:
  return StaleLocal(local.params, local._replace(params=None), memory)
