"""Many aggregators in one program, each with a regression of its own: one compilation for all."""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import optax
import pytest
from aggregators import AGGREGATORS
from problems import Running

from research.comm import mesh as meshes
from research.core.base import EVERYONE, Aggregate, Aggregator, State, Tree
from research.core.method import Method
from research.methods.data_parallel import data_parallel
from research.parallel import inference
from research.parallel import layout as layouts
from research.parallel.job import Job
from research.testing.side_by_side import regressions, side_by_side


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


def trained(aggregators: Mapping[str, Aggregator], record: bool = False) -> Method:
  """Gradient descent with each of them."""
  wrap = Recording if record else lambda inner: inner
  return side_by_side({n: data_parallel(optax.sgd(0.1), wrap(a)) for n, a in aggregators.items()})


def running(
  names: tuple[str, ...], executor: str, axes: Mapping[str, int], record: bool = False
) -> Running:
  """Entries of the table on all examples, which the workers hold in equal numbers."""
  count = meshes.count(meshes.worker_axes(axes))
  arguments = (axes, (240 // count,) * count, None)
  found = layout_of(names, tuple(axes.items()), record)
  with pytest.MonkeyPatch.context() as patch:  # it is the same for every executor, and takes time
    patch.setattr(inference, "layout_of", lambda job: found)
    return Running(_method(names, record), executor, *arguments, task=regressions(names))


def _method(names: tuple[str, ...], record: bool) -> Method:
  return trained({name: AGGREGATORS[name] for name in names}, record)


def job_of(names: tuple[str, ...], axes: Mapping[str, int], record: bool = False) -> Job:
  count = meshes.count(meshes.worker_axes(axes))
  sizes = np.full(count, 240 // count)
  return Job(_method(names, record), regressions(names), dict(axes), sizes, None)


@functools.cache
def layout_of(names, axes, record=False) -> layouts.Layout:
  """What `inference.layout_of` says; `axes` are pairs, which can be remembered."""
  return inference.layout_of(job_of(names, dict(axes), record))
