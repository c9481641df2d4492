"""Many aggregators in one program, each with a regression of its own: one compilation for all."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
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


def recorded(inner: Aggregator) -> Aggregator:
  """Keeps in its state what the last round was about."""

  def init(params):
    zeros = jax.tree.map(jnp.zeros_like, params)
    return Recorded(zeros, zeros, zeros, inner.init(params))

  def aggregate(tree, state, key, presence=EVERYONE):
    value, sent, link = inner.aggregate(tree, state.inner, key, presence)
    return Aggregate(value, sent, Recorded(tree, value, sent, link))

  return Aggregator(init, aggregate, inner.traits)


class SideBySideLocal(NamedTuple):
  params: Params
  parts: dict[str, Any]


def side_by_side(methods: Mapping[str, Method]) -> Method:
  """Methods with rounds of one length, by name; so is everything they have."""

  def of_round(parts):
    return SideBySideLocal({name: part.params for name, part in parts.items()}, parts)

  def step(grads, local, state, *, key, grad_fn=None):
    at = lambda params, name: grad_fn and grad_fn({**local.params, name: params})[name]

    def one(name):
      elsewhere = grad_fn and functools.partial(at, name=name)
      return methods[name].step(
        grads[name], local.parts[name], state[name], key=key, grad_fn=elsewhere
      )

    return of_round({n: one(n) for n in methods})

  def sync(local, state, *, key, weight=1.0, active=True):
    told = {"key": key, "weight": weight, "active": active}
    one = lambda n: methods[n].sync(local.parts[n], state[n], **told)
    return {n: one(n) for n in methods}

  (period,) = {method.local_steps for method in methods.values()}
  return Method(
    lambda params: {n: m.init(params[n]) for n, m in methods.items()},
    lambda state: of_round({n: m.begin(state[n]) for n, m in methods.items()}),
    step,
    sync,
    lambda state: {n: m.params(state[n]) for n, m in methods.items()},
    period,
    over=lambda wrap: side_by_side({n: m.over(wrap) if m.over else m for n, m in methods.items()}),
  )


def trained(aggregators: Mapping[str, Aggregator], record: bool = False) -> Method:
  """Gradient descent with each of them."""
  wrap = recorded if record else lambda inner: inner
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
