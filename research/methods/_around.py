"""Base class of methods that wrap another method, or that another method defines."""

from collections.abc import Mapping
from typing import Any, ClassVar

from research.core.base import EVERYONE, Trait
from research.core.method import Method


class Around(Method):
  """Wraps another method: the field `inner`, or a method that a subclass builds from its fields.

  The state's field `inner` is the state of `method`. A subclass overrides `begin` and `finished` to
  add behaviour at the start and at the end of a round.
  """

  refuses: ClassVar[Mapping[Trait, str]] = {}

  @property
  def method(self) -> Method:
    """The inner method."""
    return self.fields()["inner"]

  def begin(self, state):
    return self.method.begin(state.inner)

  def step(self, grads, local, state, *, key, grad_fn=None):
    return self.method.step(grads, local, state.inner, key=key, grad_fn=grad_fn)

  def finished(self, after, local, state, *, key, presence) -> Any:
    """Returns the state after a round.

    Args:
      after: the inner method's state after the round.
      local: the Local after the round's last step; None if `receive` calls this method.
      state: the state at the round's start.
      key: a typed key of the round, equal on all workers.
      presence: this worker's participation and weight.
    """
    del local, key, presence
    return state._replace(inner=after)

  def inner_local(self, local: Any, state: Any) -> Any:
    """Returns the inner method's Local at the end of a round."""
    del state
    return local

  def sync(self, local, state, *, key, presence=EVERYONE):
    own = self.inner_local(local, state)
    after = self.method.sync(own, state.inner, key=key, presence=presence)
    return self.finished(after, local, state, key=key, presence=presence)

  def message(self, local, state, *, key, presence=EVERYONE):
    own = self.inner_local(local, state)
    tree, inner = self.method.message(own, state.inner, key=key, presence=presence)
    return tree, state._replace(inner=inner)

  def receive(self, value, sent, state, *, key, presence=EVERYONE):
    after = self.method.receive(value, sent, state.inner, key=key, presence=presence)
    return self.finished(after, None, state, key=key, presence=presence)

  def params(self, state):
    return self.method.params(state.inner)

  @property
  def exchange(self):
    return self.method.exchange

  def counted(self, presence):
    return self.method.counted(presence)

  def link(self, state):
    return self.method.link(state.inner)

  def with_link(self, state, link):
    return state._replace(inner=self.method.with_link(state.inner, link))

  @property
  def splits(self):
    return super().splits and self.method.splits

  @property
  def local_steps(self):
    return self.method.local_steps

  @property
  def later(self):
    return self.method.later

  @property
  def passes(self):
    return self.method.passes

  @property
  def one_by_one(self):
    return self.method.one_by_one

  def in_rounds(self, steps, participation):
    inner = self.fields().get("inner")
    if not isinstance(inner, Method):
      return self
    return self.replace(inner=inner.in_rounds(steps, participation))

  def onto(self, project):
    inner = self.fields().get("inner")
    kept = inner.onto(project) if isinstance(inner, Method) else None
    return kept and self.replace(inner=kept)

  def on_server(self):
    raise ValueError(f"{self.spec_name} has no server's half")
