"""Many aggregators in one program, each with a regression of its own: one compilation for all."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import optax
import pytest
from aggregators import AGGREGATORS
from problems import Running, regression

from research.comm import mesh as meshes
from research.core.base import EVERYONE, Aggregate, Aggregator, Params, State, Tree
from research.core.method import Method
from research.core.task import Task
from research.methods.data_parallel import data_parallel
from research.parallel import layout as layouts
from research.parallel import workers
from research.parallel.job import Job


class Recorded(NamedTuple):
  given: Tree  # what the worker had
  value: Tree
  sent: Tree
  inner: State


class Recording(Aggregator):
  """Keeps in its state what the last round was about."""

  inner: Aggregator

  def init(self, params):
    zeros = optax.tree.zeros_like(params)
    return Recorded(zeros, zeros, zeros, self.inner.init(params))

  def aggregate(self, tree, state, key, presence=EVERYONE):
    value, sent, link = self.inner.aggregate(tree, state.inner, key, presence)
    return Aggregate(value, sent, Recorded(tree, value, sent, link))


class SideBySideLocal(NamedTuple):
  params: Params
  parts: dict[str, Any]


class SideBySide(Method):
  """Methods with rounds of one length, by name; so is everything they have."""

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


def trained(aggregators: Mapping[str, Aggregator], record: bool = False) -> Method:
  """Gradient descent with each of them."""
  wrap = Recording if record else lambda inner: inner
  return side_by_side({n: data_parallel(optax.sgd(0.1), wrap(a)) for n, a in aggregators.items()})


def regressions(names: tuple[str, ...], task: Task | None = None) -> Task:
  """The same regression for each name."""
  one = task or regression()

  def loss(params, batch, key):
    return sum(one.loss(params[name], batch, key) for name in names)

  return one._replace(init=lambda key: dict.fromkeys(names, one.init(key)), loss=loss)


def running(
  names: tuple[str, ...], executor: str, axes: Mapping[str, int], record: bool = False
) -> Running:
  """Entries of the table on all examples, which the workers hold in equal numbers."""
  count = meshes.count(meshes.worker_axes(axes))
  arguments = (axes, (240 // count,) * count, None)
  found = layout_of(names, tuple(axes.items()), record)
  with pytest.MonkeyPatch.context() as patch:  # it is the same for every executor, and takes time
    patch.setattr(workers, "infer_layout", lambda job: found)
    return Running(_method(names, record), executor, *arguments, task=regressions(names))


def _method(names: tuple[str, ...], record: bool) -> Method:
  return trained({name: AGGREGATORS[name] for name in names}, record)


def job_of(names: tuple[str, ...], axes: Mapping[str, int], record: bool = False) -> Job:
  count = meshes.count(meshes.worker_axes(axes))
  sizes = np.full(count, 240 // count)
  return Job(_method(names, record), regressions(names), dict(axes), sizes, None)


@functools.cache
def layout_of(names, axes, record=False) -> layouts.Layout:
  """What `workers.infer_layout` says; `axes` are pairs, which can be remembered."""
  return workers.infer_layout(job_of(names, dict(axes), record))
