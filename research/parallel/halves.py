"""Splits a round into two halves, for an executor whose exchange runs on other devices.

A state is divided into three parts: the aggregator's state (`links`) on the devices of the
exchange, the results in flight, and all other state (`held`) on the workers' devices. The methods
`held` and `links` accept any tree with the structure of a state; its leaves may be arrays, shapes,
or bools that mark private leaves.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval

from research.core.base import Aggregate, Aggregator, Array, Presence, State, Tree
from research.core.method import Local, Method
from research.methods.overlapping import LateState, Overlapping

InAir = tuple[int, Tree]  # fragment and result of an exchange in flight


class Tools(NamedTuple):
  """The programs with which `settled` assembles a state."""

  receive: Callable[[State, Tree], State]  # `Halves.receive`, for all workers
  nothing: Callable[[int], Tree]  # maps a fragment to a result of zeros


class Halves:
  """Splits a method with one exchange per round, whose result is due in a later round.

  The base class handles eager methods, whose result is due before the next message.
  """

  def __init__(self, method: Method):
    self.method = method
    self.waiting = method  # begins and steps without receiving anything
    self.fragments, self.local_steps = 1, method.local_steps
    self.rounds_late, self.steps_late = 0, method.local_steps

  @property
  def exchange(self) -> Aggregator:
    """The aggregator."""
    return self.method.exchange

  def check(self, state: State, result: Tree, axes: Mapping[str, int]) -> None:
    """Traces both, and rejects a method whose local steps use state that its exchange changes.

    Args:
      state: the shapes of one worker's state.
      result: the shapes of the result of an exchange.
      axes: sizes of the worker axes by name.

    Raises:
      ValueError: if the result of a round's exchange is needed before the next message; the error
        names the leaves.
    """
    trace = lambda fn, *args: jax.make_jaxpr(fn, axis_env=[*axes.items()])(*args).jaxpr
    held, key, weight = self.held(state), jax.random.key(0), jnp.float32(1)

    def receive(held, result, key, weight):
      value, sent = result
      return self.method.receive(value, sent, held, key=key, presence=Presence(weight))

    def step(held):
      local = self.method.begin(held)
      return self.method.step(local.params, local, held, key=key, grad_fn=lambda params: params)

    received, stepped = trace(receive, held, result, key, weight), trace(step, held)
    _, needed = partial_eval.dce_jaxpr(received, [True] * len(received.outvars))
    if any(needed[-2:]):
      raise ValueError(
        f"{self.method.title}: what it does with a result depends on the round's key or on the "
        "worker's weight; use --executor=spmd"
      )
    _, used = partial_eval.dce_jaxpr(stepped, [True] * len(stepped.outvars))
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(held)]
    pairs = zip(names, received.invars, received.outvars, used, strict=False)
    early = [name for name, before, after, needs in pairs if needs and before is not after]
    if early:
      raise ValueError(
        f"{self.method.title} is not eager: its local steps use what the exchange changes, "
        f"{', '.join(early)}"
      )

  def held(self, state: State) -> State:
    """Returns a state without the aggregator's state and without the results in flight."""
    return self.method.with_link(state, ())

  def links(self, state: State) -> tuple[State, ...]:
    """Returns the aggregator's state, by fragment."""
    return (self.method.link(state),)

  def result(self, found: Aggregate) -> Tree:
    """Returns the part of an aggregate that a worker needs."""
    return found.value, found.sent

  def depart(
    self, fragment: int, local: Local, held: State, *, key: Array, presence: Presence
  ) -> tuple[Tree, State]:
    """Ends a round: returns the message of a fragment, and the workers' new `held` state."""
    del fragment
    return self.method.message(local, held, key=key, presence=presence)

  def arrive(self, fragment: int, held: State, local: Local, result: Tree) -> tuple[State, Local]:
    """Receives the result that is due; returns the workers' `held` state and Local."""
    del fragment
    return self.receive(held, result), local

  def receive(self, held: State, result: Tree) -> State:
    """Returns an eager method's state after an exchange."""
    value, sent = result
    return self.method.receive(value, sent, held, key=jax.random.key(0))

  def pending(self, state: State, number: int) -> list[InAir]:
    """Returns the results in flight in a state after `number` rounds, the oldest first."""
    del state, number
    return []

  def settled(
    self, held: State, links: Sequence[State], air: Sequence[InAir], tools: Tools
  ) -> State:
    """Assembles a state from its three parts.

    Args:
      held: the state on the workers' devices.
      links: the aggregator's state, by fragment.
      air: fragment and result of each exchange in flight, the oldest first.
      tools: programs on the computing devices.
    """
    for _, result in air:
      held = tools.receive(held, result)
    return self.method.with_link(held, links[0])


class LateHalves(Halves):
  """Splits `late(...)` and `streaming_diloco`."""

  method: Overlapping

  def __init__(self, method: Overlapping):
    super().__init__(method)
    self.waiting = method.replace(receives=False)
    self.fragments = method.fragments
    self.rounds_late, self.steps_late = method.rounds_late, method.steps_late

  def check(self, state, result, axes):
    del state, result, axes  # `late` itself checks its inner method

  def held(self, state: LateState) -> LateState:
    return state._replace(inner=self.method.without_links(state.inner), air=((),) * self.fragments)

  def links(self, state: LateState) -> tuple[State, ...]:
    return tuple(map(self.method.method.link, state.inner))

  def result(self, found):
    return found.value

  def depart(self, fragment, local: Any, held, *, key, presence):
    return self.method.depart(fragment, local, held, key=key, presence=presence)

  def arrive(self, fragment, held, local: Any, result):
    return held, self.method.arrive(fragment, local, result)

  def pending(self, state: LateState, number: int) -> list[InAir]:
    found = []
    for round_ in range(max(0, number - 1 - self.rounds_late), number):
      fragment = round_ % self.fragments
      later = (number - 1 - round_) // self.fragments  # number of later exchanges of the fragment
      found.append((fragment, state.air[fragment][self.method.flights - 1 - later]))
    return found

  def settled(self, held, links, air, tools):
    inner = map(self.method.method.with_link, held.inner, links)
    slots: list[list[Tree]] = [[] for _ in range(self.fragments)]
    for fragment, value in air:
      slots[fragment].append(value)
    empty = lambda p: [tools.nothing(p)] * (self.method.flights - len(slots[p]))
    filled = tuple((*empty(p), *slots[p]) for p in range(self.fragments))
    return held._replace(inner=tuple(inner), air=filled)
