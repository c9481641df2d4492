"""Interface of algorithms: what a worker computes between two exchanges, sends, and receives."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, Self

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

GradFn = Callable[[Params], Tree]
Period = int | Sequence[Sequence[int]]  # local steps per round, or [[first round, steps], ...]


class Local(Protocol):
  """What a worker carries through one round."""

  @property
  def params(self) -> Params:
    """Where its next gradient is taken."""
    ...


# A method whose workers are to hold one model.
COMMON_MODEL = {Trait.LOCAL: "the workers' models would part for good; take d_psgd"}


class Method(Wrapper):
  """An algorithm as one worker sees it. Only `sync` communicates.

  A round is `begin`, then `local_steps` times `step`, then `sync`. A method with one exchange per
  round is written with `message` and `receive`, of which `sync` is made: its state then has a field
  `link`, what its `aggregator` keeps. Another one overrides `sync`.

  The presence of an absent worker is inactive: its round is lost, what it computed in it reaches
  nobody, and the state that it keeps for itself stays as it was. Which state is private and which
  is equal on all workers is inferred by tracing (`parallel/layout.py`).

  A `period` is a number of local steps per round, or [[first round, steps], ...] where it changes.
  By default a method refuses aggregators whose value differs between workers.
  """

  refuses: ClassVar[Mapping[Trait, str]] = COMMON_MODEL
  period: ClassVar[Any] = 1
  aggregator: ClassVar[Any]

  def __post_init__(self):
    super().__post_init__()
    checks.at_least("local_steps", self.local_steps)

  def init(self, params: Params) -> State:
    """The state that lives from round to round, of the first model."""
    raise NotImplementedError(f"{type(self).__name__} has no init")

  def begin(self, state: State) -> Any:
    """What a worker carries through one round: a Local, whose `params` are differentiated at."""
    raise NotImplementedError(f"{type(self).__name__} has no begin")

  def step(
    self, grads: Tree, local: Any, state: State, *, key: Key, grad_fn: GradFn | None = None
  ) -> Any:
    """One local step; nothing is communicated.

    Args:
      grads: the gradient of a mini-batch at `local.params`.
      local: what `begin` or the last step returned.
      state: of the round's start.
      key: a typed key of this worker and step.
      grad_fn: params -> the gradient of the same mini-batch at other parameters.

    Returns:
      The Local after it.
    """
    raise NotImplementedError(f"{type(self).__name__} has no step")

  def message(
    self, local: Any, state: State, *, key: Key, presence: Presence = EVERYONE
  ) -> tuple[Tree, State]:
    """The end of a local phase: what is sent, and the state without what has to be waited for.

    Args:
      local: of the round's last step.
      state: of its start.
      key: a typed key of the round, equal on all workers.
      presence: whether this worker takes part, and what it weighs.
    """
    raise NotImplementedError(f"{type(self).__name__} has no message")

  def receive(
    self, value: Tree, sent: Tree, state: State, *, key: Key, presence: Presence = EVERYONE
  ) -> State:
    """The state when the exchange is done.

    Args:
      value: what the aggregator made of all messages.
      sent: this worker's message as the others saw it.
      state: what `message` returned, or what local steps have since made of it.
      key: that of the message.
      presence: that of the message.
    """
    raise NotImplementedError(f"{type(self).__name__} has no receive")

  def sync(self, local: Any, state: State, *, key: Key, presence: Presence = EVERYONE) -> State:
    """The part of a round that communicates, under named worker axes."""
    tree, state = self.message(local, state, key=key, presence=presence)
    link, counted = self.link(state), self.counted(presence)
    value, sent, link = self.exchange.aggregate(tree, link, key, counted)
    return self.receive(value, sent, self.with_link(state, link), key=key, presence=presence)

  def params(self, state: State) -> Params:
    """The model one would deploy."""
    return state.params

  @property
  def exchange(self) -> Aggregator:
    """The aggregator of its one exchange per round."""
    return self.aggregator

  def counted(self, presence: Presence) -> Presence:
    """The presence that the aggregator is told: the worker's own by default."""
    return presence

  def link(self, state: State) -> State:
    """The aggregator's part of a state."""
    return state.link

  def with_link(self, state: State, link: State) -> State:
    """The state with another part of the aggregator."""
    return state._replace(link=link)

  @property
  def splits(self) -> bool:
    """Whether its round is message, one exchange, receive."""
    return type(self).message is not Method.message

  @property
  def local_steps(self) -> int:
    """Local steps per round: static, so that traffic per round is known."""
    return periods(self.period)[0]

  @property
  def later(self) -> tuple[tuple[int, int], ...]:
    """The changes of its local steps: (first round, steps), rising."""
    return periods(self.period)[1]

  @property
  def passes(self) -> int:
    """Passes of each owner over its own examples per round, in place of a number of steps; or 0.

    The executors find the steps: those of the owner that has most; the others stop where they are
    done.
    """
    return 0

  @property
  def one_by_one(self) -> bool:
    """Whether a round is that of a single worker, whose turn it is on a virtual clock."""
    return False

  def in_rounds(self, steps: int, participation: float) -> "Method":
    """The same method in rounds of so many steps, in which a share of all owners takes part."""
    del participation
    return self.replace(period=steps) if "period" in self.fields() else self

  def over(self, wrap: Callable[[Aggregator], Aggregator]) -> Self:
    """The same method with each of its aggregators wrapped."""

    def wrapped(value: Any) -> Any:
      if isinstance(value, Method):
        return value.over(wrap)
      if type(value) is tuple:
        return tuple(map(wrapped, value))
      return wrap(value) if isinstance(value, Aggregator) else value

    return self.replace(**{name: wrapped(value) for name, value in self.fields().items()})

  def onto(self, project: Callable[[Params], Params]) -> "Method | None":
    """The same method with its models kept in a convex set; None if it cannot."""
    del project
    return None

  def on_server(self) -> "tuple[Method, Any]":
    """The method that a server and its workers run, and a correction for the age of a message.

    Raises:
      ValueError: if it has none, with the reason.
    """
    return self, None


def periods(period: Period) -> tuple[int, tuple[tuple[int, int], ...]]:
  """The local steps that a method begins with, and the later ones with their first rounds.

  Args:
    period: a number of steps, or [[first round, steps], ...].

  Raises:
    ValueError: if a number of steps is < 1, or the schedule does not begin at round 0 and rise.
  """
  stages = [[0, period]] if isinstance(period, int) else [list(stage) for stage in period]
  rounds = [stage[0] for stage in stages]
  if any(len(stage) != 2 for stage in stages) or rounds[:1] != [0] or sorted(set(rounds)) != rounds:
    raise ValueError(f"period={period} is no list of [first round, steps] from round 0 on, rising")
  for _, steps in stages:
    checks.at_least("period", steps)
  first, *later = ((number, steps) for number, steps in stages)
  return first[1], tuple(later)
