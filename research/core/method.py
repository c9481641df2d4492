"""Defines the interface of algorithms: local steps, messages, and updates after an exchange."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, Self

import optax

from research.core import checks
from research.core.base import (
  EVERYONE,
  Aggregator,
  Key,
  Params,
  Presence,
  State,
  Trait,
  Tree,
  Wrapper,
)
from research.core.dimensions import Declared, Dimensions
from research.core.part import defined_at, required

GradFn = Callable[[Params], Tree]
Period = int | Sequence[Sequence[int]]  # local steps per round, or [[first round, steps], ...]


class Local(Protocol):
  """The state of a worker within one round."""

  @property
  def params(self) -> Params:
    """The parameters at which the next gradient is computed."""
    ...


# Methods whose workers share one model reject aggregators with this trait.
COMMON_MODEL = {Trait.LOCAL: "the workers' models would diverge permanently; use d_psgd"}


class Method(Wrapper):
  """An algorithm from the point of view of one worker; only `sync` communicates.

  In a round, `begin` runs once, `step` runs `local_steps` times, and `sync` runs once. A method
  with one exchange per round defines `message` and `receive`, from which `sync` is derived; its
  state then has a field `link` with the state of its `aggregator`. Other methods override `sync`.

  A worker whose presence is inactive is absent: its round is lost, its results reach no other
  worker, and its private state does not change. Tracing determines which leaves of the state are
  private and which are equal on all workers (`parallel/layout.py`).

  A `period` is a number of local steps per round, or a schedule [[first round, steps], ...]. By
  default, a method rejects aggregators whose value differs between workers.
  """

  refuses: ClassVar[Mapping[Trait, str]] = COMMON_MODEL
  # Whether only the next `message` uses what `receive` changes. If so, the exchange of a round may
  # end as late as the next round.
  eager: ClassVar[bool] = False
  period: ClassVar[Any] = 1
  aggregator: ClassVar[Any]

  def __post_init__(self):
    super().__post_init__()
    checks.at_least("local_steps", self.local_steps)

  @required
  def init(self, params: Params) -> State:
    """Returns the initial state, which persists from round to round.

    Args:
      params: the initial model, equal on all workers.
    """
    ...

  @required
  def begin(self, state: State) -> Any:
    """Starts a round: returns its first Local, at whose `params` gradients are computed.

    Args:
      state: the state at the start of the round.
    """
    ...

  @required
  def step(
    self, grads: Tree, local: Any, state: State, *, key: Key, grad_fn: GradFn | None = None
  ) -> Any:
    """Takes one local step, without communication.

    Args:
      grads: the gradient of a mini-batch at `local.params`.
      local: the result of `begin` or of the previous step.
      state: the state at the start of the round.
      key: a typed key of this worker and step.
      grad_fn: a function that computes the gradient of the same mini-batch at other parameters.

    Returns:
      The Local after the step.
    """
    ...

  @required
  def message(
    self, local: Any, state: State, *, key: Key, presence: Presence = EVERYONE
  ) -> tuple[Tree, State]:
    """Ends the local phase; returns the message, and the state until the exchange is complete.

    Args:
      local: the Local after the last step of the round.
      state: the state at the start of the round.
      key: a typed key of the round, equal on all workers.
      presence: this worker's participation and weight.
    """
    ...

  @required
  def receive(
    self, value: Tree, sent: Tree, state: State, *, key: Key, presence: Presence = EVERYONE
  ) -> State:
    """Updates the state with the result of the exchange.

    Args:
      value: the aggregate of all messages.
      sent: this worker's message as the other workers received it.
      state: the state returned by `message`, to which later local steps may have been applied.
      key: the key that was passed to `message`.
      presence: the presence that was passed to `message`.
    """
    ...

  def sync(self, local: Any, state: State, *, key: Key, presence: Presence = EVERYONE) -> State:
    """Runs the exchange of a round, under named worker axes.

    Args:
      local: the Local after the last step of the round.
      state: the state at the start of the round.
      key: a typed key of the round, equal on all workers.
      presence: this worker's participation and weight.

    Returns:
      The state after the round.
    """
    tree, state = self.message(local, state, key=key, presence=presence)
    link, counted = self.link(state), self.counted(presence)
    value, sent, link = self.exchange.aggregate(tree, link, key, counted)
    return self.receive(value, sent, self.with_link(state, link), key=key, presence=presence)

  def params(self, state: State) -> Params:
    """Returns the model to deploy."""
    return state.params

  @property
  def exchange(self) -> Aggregator:
    """The aggregator of the single exchange per round."""
    return self.aggregator

  def counted(self, presence: Presence) -> Presence:
    """Returns the presence to pass to the aggregator; by default, the same presence."""
    return presence

  def link(self, state: State) -> State:
    """Returns the aggregator's part of a state."""
    return state.link

  def with_link(self, state: State, link: State) -> State:
    """Returns the state with the aggregator's part replaced."""
    return state._replace(link=link)

  @property
  def splits(self) -> bool:
    """Whether a round consists of `message`, one exchange and `receive`."""
    at = lambda name: defined_at(type(self), name)
    return type(self).message is not Method.message and at("message") <= at("sync")

  @property
  def local_steps(self) -> int:
    """The number of local steps per round, which is static, so that traffic is known in advance."""
    return periods(self.period)[0]

  @property
  def later(self) -> tuple[tuple[int, int], ...]:
    """The later stages of the period's schedule, as (first round, steps) in increasing order."""
    return periods(self.period)[1]

  @property
  def hidden_steps(self) -> int:
    """The number of local steps during which an exchange may run; 0 if the workers wait for it."""
    return self.local_steps if self.eager else 0

  @property
  def passes(self) -> int:
    """The number of passes over an owner's examples per round; 0 if rounds have a fixed length.

    The owner with the most examples determines the number of steps; the other owners stop earlier.
    """
    return 0

  @property
  def one_by_one(self) -> bool:
    """Whether each round is the turn of a single worker on a virtual clock."""
    return False

  def in_rounds(self, steps: int, participation: float) -> "Method":
    """Returns the same method with another round length or participation.

    Args:
      steps: the number of local steps per round.
      participation: the fraction of all owners that take part in a round.
    """
    del participation
    return self.replace(period=steps) if "period" in self.fields() else self

  def over(self, wrap: Callable[[Aggregator], Aggregator]) -> Self:
    """Returns the same method with each of its aggregators wrapped.

    Args:
      wrap: a function from an aggregator to the wrapped aggregator.

    Raises:
      ValueError: if a wrapper rejects an aggregator, or the method rejects the wrapped one.
    """

    return self._changed(Aggregator, wrap)

  def with_optimizers(self, change: Callable[[Any], Any]) -> Self:
    """Returns the same method with each of its optimizers changed.

    Args:
      change: a function from an optax transformation to the changed transformation.
    """
    return self._changed(optax.GradientTransformation, change)

  def with_dimensions(self, dimensions: Dimensions) -> Self:
    """Returns the same method with a model's declaration, if the method uses such a declaration.

    Args:
      dimensions: the declaration of the model; see `core/dimensions.py`.
    """
    return self._changed(Declared, lambda _: Declared(dimensions))

  def _changed(self, kind: type, change: Callable[[Any], Any]) -> Self:
    """Returns the method with each field of a type changed, also in methods within it."""

    def changed(value: Any) -> Any:
      if isinstance(value, Method):
        return value._changed(kind, change)
      if type(value) is tuple:
        return tuple(map(changed, value))
      if isinstance(value, dict):
        return {name: changed(one) for name, one in value.items()}
      return change(value) if isinstance(value, kind) else value

    return self.replace(**{name: changed(value) for name, value in self.fields().items()})

  def onto(self, project: Callable[[Params], Params]) -> "Method | None":
    """Returns a method that projects its models onto a convex set; None if this is not supported.

    Args:
      project: a function that maps parameters to the nearest point of the set.
    """
    del project
    return None

  def on_server(self) -> "tuple[Method, Any]":
    """Returns the method that a server and its workers run, and its correction for stale messages.

    Raises:
      ValueError: if the method cannot run on a server; the message contains the reason.
    """
    return self, None


def periods(period: Period) -> tuple[int, tuple[tuple[int, int], ...]]:
  """Parses a period into the local steps of its stages.

  Args:
    period: the number of local steps per round, or a schedule [[first round, steps], ...].

  Returns:
    The number of local steps in the first stage, and the later stages as (first round, steps).

  Raises:
    ValueError: if a number of steps is below 1, or the first rounds of the stages do not increase
      from 0.
  """
  stages = [[0, period]] if isinstance(period, int) else [list(stage) for stage in period]
  rounds = [stage[0] for stage in stages]
  if any(len(stage) != 2 for stage in stages) or rounds[:1] != [0] or sorted(set(rounds)) != rounds:
    raise ValueError(
      f"period={stages} is not a list of [first round, steps] that increases from round 0"
    )
  for _, steps in stages:
    checks.at_least("period", steps)
  first, *later = ((number, steps) for number, steps in stages)
  return first[1], tuple(later)
