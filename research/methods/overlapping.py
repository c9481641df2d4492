"""Base class of methods whose workers receive the result of an exchange after further steps."""

from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import partial_eval

from research.aggregate.presence import kept
from research.core import checks
from research.core.base import EVERYONE, Aggregator, Array, Params, Presence, State, Trait, Tree
from research.core.method import Method
from research.core.part import hidden
from research.methods._around import Around
from research.methods._steps import LocalStepping
from research.methods.fragments import Fragments, fragments_of


class LateState(NamedTuple):
  params: Params  # x_t^i of this worker
  own: State  # with several fragments, the state of this worker's optimizer
  inner: tuple[State, ...]  # states of the inner method, by fragment, with the last received params
  sent: tuple[tuple[Tree, ...], ...]  # x_t^i when each exchange in flight started, oldest first
  air: tuple[tuple[Tree, ...], ...]  # values of the exchanges in flight, oldest first
  count: Array  # int32, completed rounds


class LateLocal(NamedTuple):
  params: Params
  rest: Any  # Local of the inner method, without the params
  inner: tuple[State, ...]  # as in LateState, once the due value is received; no aggregator state
  sent: tuple[tuple[Tree, ...], ...]
  number: Array  # int32, completed steps of this round


class Overlapping(Around):
  """Base class of methods whose exchange may take tau local steps; see `Late`.

  Subclasses have a field `delay` and may have `fragments` and `mixing`. Executors either run `sync`
  as usual, or run the exchange elsewhere while the workers compute: `depart` and `arrive` are the
  two halves of a round.
  """

  delay: ClassVar[int]  # tau
  fragments: ClassVar[int] = 1  # P
  mixing: ClassVar[float | None] = None  # alpha
  receives: bool = hidden(True)  # False: the executor receives values, not `begin` and `step`

  def check(self):
    checks.at_least("delay", self.delay, 0)
    checks.at_least("fragments", self.fragments)
    if self.mixing is not None:
      checks.in_range("mixing", self.mixing, "[0, 1]")
    method, whole = self.method, self.method.local_steps
    if not method.splits or method.one_by_one:
      raise ValueError(f"{method.title} does not have one exchange per round, unlike {self.title}")
    if method.eager:
      raise ValueError(f"{method.title} overlaps without {self.title}")
    if method.later:
      raise ValueError(f"{self.title} needs a constant period")
    if any(Trait.LOCAL in one.traits for one in method.parts(Aggregator)):
      raise ValueError(f"{self.title} needs one value for all workers; neighbours' values differ")
    if whole % self.fragments:
      raise ValueError(f"period={whole} is not a multiple of fragments={self.fragments}")
    if self.fragments > 1 and type(method).begin is not LocalStepping.begin:
      raise ValueError(
        f"fragments={self.fragments} is for methods whose workers keep an optimizer, such as "
        f"diloco and local_sgd, not for {method.title}"
      )
    if self.fragments > 1 or self.mixing is not None:
      checks.in_range("delay", self.delay, f"[0, {whole})", note=", a period")

  @property
  def local_steps(self):
    return self.method.local_steps // self.fragments

  def in_rounds(self, steps, participation):
    inner = self.fields().get("inner")
    if not isinstance(inner, Method):
      return self
    return self.replace(inner=inner.in_rounds(steps * self.fragments, participation))

  def onto(self, project):
    del project

  @property
  def hidden_steps(self):
    return self.delay

  @property
  def rounds_late(self) -> int:
    """Number of full rounds in the delay, and of exchanges that start while one is in flight."""
    return self.delay // self.local_steps

  @property
  def steps_late(self) -> int:
    """Number of local steps of a round before the worker receives the value that is due."""
    return self.delay % self.local_steps

  @property
  def flights(self) -> int:
    """Number of exchanges of one fragment that are in flight at once."""
    return self.rounds_late // self.fragments + 1

  def cut(self, params: Params) -> Fragments:
    """Partitions a model into fragments."""
    return fragments_of(params, self.fragments)

  # ---- one worker

  def init(self, params):
    cut, several = self.cut(params), self.fragments > 1
    parts = [cut.take(params, p) for p in range(self.fragments)]
    states = [self.method.init(part) for part in parts]
    own = self.method.init(params).inner if several else ()
    states = [state._replace(inner=()) for state in states] if several else states
    if not hasattr(states[0], "params"):
      raise ValueError(
        f"{self.title} needs a method with one model per worker: {self.method.title}"
      )
    sent = tuple((part,) * self.flights if self.mixing is None else () for part in parts)
    shapes = list(map(partial(jax.eval_shape, self._message_of), states, parts))
    nothing = lambda tree: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)
    air = tuple((nothing(shape),) * self.flights for shape in shapes)
    return LateState(params, own, tuple(states), sent, air, jnp.zeros((), jnp.int32))

  def _message_of(self, state: State, part: Tree) -> Tree:
    """Returns a fragment's message; callers use only the message's shapes."""
    local = self.method.begin(self._with_own(state, ()))._replace(params=part)
    return self.method.message(local, state, key=jax.random.key(0))[0]

  def _with_own(self, state: State, own: State) -> State:
    return state._replace(inner=own) if self.fragments > 1 else state

  def begin(self, state):
    inner = self.without_links(state.inner)
    rest = self.method.begin(self._with_own(inner[0], state.own))._replace(params=None)
    local = LateLocal(state.params, rest, inner, state.sent, jnp.zeros((), jnp.int32))
    return local if self.steps_late or not self.receives else self._received(local, state)

  def step(self, grads, local, state, *, key, grad_fn=None):
    own = local.rest._replace(params=local.params)
    own = self.method.step(grads, own, local.inner[0], key=key, grad_fn=grad_fn)
    rest, number = own._replace(params=None), local.number + 1
    local = local._replace(params=own.params, rest=rest, number=number)
    if not self.steps_late or not self.receives:
      return local
    now, receive = local.number == self.steps_late, lambda local: self._received(local, state)
    return lax.cond(now, receive, lambda local: local, local)

  def _received(self, local: LateLocal, state: LateState) -> LateLocal:
    """Receives the value that is due in this round, if any."""
    number = state.count - 1 - self.rounds_late  # the round in which the exchange started
    halves = [
      lambda local, value, p=p: self.arrive(p, local, value[p]) for p in range(self.fragments)
    ]
    nothing = lambda local, value: local
    which = jnp.where(number < 0, self.fragments, number % self.fragments)
    oldest = tuple(values[0] for values in state.air)
    return lax.switch(which, [*halves, nothing], local, oldest)

  def arrive(self, fragment: int, local: LateLocal, value: Tree) -> LateLocal:
    """Receives the oldest value of a fragment in flight, and updates the worker's model.

    Args:
      fragment: index of the fragment, static.
      local: the worker's Local.
      value: the aggregate of the messages.
    """
    cut, sent = self.cut(local.params), local.sent[fragment]
    state = self._receive(value, local.inner[fragment])
    x = cut.take(local.params, fragment)
    if self.mixing is None:
      shift = lambda tree: jax.tree.map(lambda n, a, s: n + (a - s), state.params, tree, sent[0])
      x, sent = shift(x), (state.params, *map(shift, sent[1:]))
    else:
      alpha = self.mixing
      x = jax.tree.map(lambda a, n: alpha * a + (1 - alpha) * n, x, state.params)
    return local._replace(
      params=cut.put(local.params, fragment, x),
      inner=_put(local.inner, fragment, state),
      sent=_put(local.sent, fragment, sent),
    )

  def _receive(self, value: Tree, state: State) -> State:
    """Calls the inner method's `receive`, which may depend only on the value and the state.

    Raises:
      ValueError: at trace time, if `receive` depends on anything else.
    """
    key = jax.random.key(0)

    def receive(value, sent, weight, active, state):
      presence = Presence(weight, active)
      return self.method.receive(value, sent, state, key=key, presence=presence)

    program = jax.make_jaxpr(receive)(value, value, jnp.float32(1), jnp.bool_(True), state).jaxpr
    _, used = partial_eval.dce_jaxpr(program, [True] * len(program.outvars))
    size = len(jax.tree.leaves(value))
    if any(used[size : 2 * size + 2]):
      raise ValueError(
        f"{self.title} cannot be combined with {self.method.title}: what it does with a result "
        "depends on the worker's own message or participation"
      )
    return self.method.receive(value, value, state, key=key)

  def without_links(self, inner: tuple[State, ...]) -> tuple[State, ...]:
    """Returns the states of the inner method, by fragment, without the aggregator's state."""
    return tuple(self.method.with_link(one, ()) for one in inner)

  def depart(
    self, fragment: int, local: LateLocal, state: LateState, *, key: Array, presence: Presence
  ) -> tuple[Tree, LateState]:
    """Ends a round: returns a fragment's message, and the state without the result of its exchange.

    Args:
      fragment: index of the fragment, static.
      local: the Local after the round's last step.
      state: the state at the round's start.
      key: a typed key of the round, equal on all workers.
      presence: this worker's participation and weight.
    """
    cut, held = self.cut(local.params), local.inner[fragment]
    x = cut.take(local.params, fragment)
    counted = held._replace(params=local.sent[fragment][-1]) if self.mixing is None else held
    rest = local.rest if self.fragments == 1 else self.method.begin(held)
    own = rest._replace(params=x)
    tree, after = self.method.message(own, counted, key=key, presence=presence)
    inner = _put(local.inner, fragment, after._replace(params=held.params))
    inner = tuple(map(self.method.with_link, inner, map(self.method.link, state.inner)))
    rest = local.rest.inner if self.fragments > 1 else ()
    # an absent worker keeps its model; the next theta also contains a value that arrived now
    x, rest = kept(presence.active, (local.params, rest), (state.params, state.own))
    sent = self._marked(fragment, local, state, cut.take(x, fragment), presence)
    return tree, LateState(x, rest, inner, sent, state.air, state.count + 1)

  def _marked(self, fragment, local, state, x, presence) -> tuple[tuple[Tree, ...], ...]:
    """Returns the models at which the exchanges in flight started, including the new exchange."""
    if self.mixing is not None:
      return state.sent
    now = _put(local.sent, fragment, (*local.sent[fragment][1:], x))
    before = state.sent
    if self.flights > 1:
      before = _put(before, fragment, (*before[fragment][1:], x))
    return kept(presence.active, now, before)

  def landed(self, fragment: int, state: LateState, value: Tree) -> LateState:
    """Adds a value to the values in flight.

    Args:
      fragment: index of the fragment, static.
      state: the result of `depart`.
      value: the aggregate of the messages.
    """
    air = _put(state.air, fragment, (*state.air[fragment][1:], value))
    return state._replace(air=air)

  # ---- rounds that wait for their exchange

  def message(self, local, state, *, key, presence=EVERYONE):
    return self.depart(0, local, state, key=key, presence=presence)

  def receive(self, value, sent, state, *, key, presence=EVERYONE):
    del sent, key, presence
    return self.landed(0, state, value)

  def sync(self, local, state, *, key, presence=EVERYONE):
    if self.fragments == 1:
      return Method.sync(self, local, state, key=key, presence=presence)

    def one(fragment, local, state):
      tree, state = self.depart(fragment, local, state, key=key, presence=presence)
      held = state.inner[fragment]
      value, _, link = self.exchange.aggregate(
        tree, self.method.link(held), key, self.counted(presence)
      )
      held = self.method.with_link(held, link)
      state = state._replace(inner=_put(state.inner, fragment, held))
      return self.landed(fragment, state, value)

    branches = [partial(one, p) for p in range(self.fragments)]
    return lax.switch(state.count % self.fragments, branches, local, state)

  def link(self, state):
    return self.method.link(state.inner[0])

  def with_link(self, state, link):
    return state._replace(inner=(self.method.with_link(state.inner[0], link), *state.inner[1:]))

  @property
  def splits(self):
    return self.fragments == 1

  def params(self, state):
    """Returns the inner method's model after all exchanges in flight are received."""
    cut, model = self.cut(state.params), state.params
    for p in range(self.fragments):
      last = state.count - 1 - (state.count - 1 - p) % self.fragments  # round of p's last exchange
      inner = state.inner[p]
      for place, value in enumerate(state.air[p]):
        number = last - (self.flights - 1 - place) * self.fragments
        pending = (number >= 0) & (number >= state.count - 1 - self.rounds_late)
        inner = kept(pending, self._receive(value, inner), inner)
      model = cut.put(model, p, self.method.params(inner))
    return model


def _put(parts: tuple[Any, ...], place: int, part: Any) -> tuple[Any, ...]:
  return (*parts[:place], part, *parts[place + 1 :])
