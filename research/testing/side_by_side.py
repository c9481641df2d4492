"""Runs several methods in one program, each on its own problem, so that they compile together."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

from research.core.base import EVERYONE, Params
from research.core.method import Method
from research.core.task import Task
from research.testing.problem import regression


class SideBySideLocal(NamedTuple):
  params: Params
  parts: dict[str, Any]


class SideBySide(Method):
  """Several methods by name, with rounds of equal length; states and models are also by name."""

  names: tuple[str, ...]
  methods: tuple[Method, ...]

  @property
  def period(self):
    (steps,) = {method.local_steps for method in self.methods}
    return steps

  @property
  def named(self) -> dict[str, Method]:
    return dict(zip(self.names, self.methods, strict=True))

  def init(self, params):
    return {n: m.init(params[n]) for n, m in self.named.items()}

  def begin(self, state):
    return _of_round({n: m.begin(state[n]) for n, m in self.named.items()})

  def step(self, grads, local, state, *, key, grad_fn=None):
    at = lambda params, name: grad_fn and grad_fn({**local.params, name: params})[name]

    def one(name: str, method: Method):
      elsewhere = grad_fn and functools.partial(at, name=name)
      return method.step(grads[name], local.parts[name], state[name], key=key, grad_fn=elsewhere)

    return _of_round({n: one(n, m) for n, m in self.named.items()})

  def sync(self, local, state, *, key, presence=EVERYONE):
    one = lambda n, m: m.sync(local.parts[n], state[n], key=key, presence=presence)
    return {n: one(n, m) for n, m in self.named.items()}

  def params(self, state):
    return {n: m.params(state[n]) for n, m in self.named.items()}


def _of_round(parts: dict[str, Any]) -> SideBySideLocal:
  return SideBySideLocal({name: part.params for name, part in parts.items()}, parts)


def side_by_side(methods: Mapping[str, Method]) -> Method:
  return SideBySide(tuple(methods), tuple(methods.values()))


def regressions(names: tuple[str, ...], task: Task | None = None) -> Task:
  """Creates a task that contains one copy of a regression per name.

  Args:
    names: the names of the copies.
    task: the regression; None means `regression()`.
  """
  one = task or regression()

  def loss(params, batch, key):
    return sum(one.loss(params[name], batch, key) for name in names)

  return one._replace(init=lambda key: dict.fromkeys(names, one.init(key)), loss=loss)
