"""The programs of a round whose exchange runs on communication devices."""

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from research.comm import collectives
from research.comm import mesh as meshes
from research.core.base import EVERYONE, Array, Presence, State, Tree
from research.core.method import Method
from research.methods.overlapping import Overlapping
from research.optim import fitting
from research.parallel import inference, sharded, workers
from research.parallel import layout as layouts
from research.parallel.cohorts import draw
from research.parallel.halves import Halves, LateHalves, Tools
from research.parallel.job import Job, largest_sum, resolved
from research.parallel.local_phase import local_phase


class Parts(NamedTuple):
  """Which leaves of the workers' trees are private, and the leaves' shapes and shardings."""

  private: Tree  # tree of bool, whether a leaf is private
  shapes: Tree  # the shapes of one worker's leaves
  computing: Tree  # shardings on the computing devices
  communicating: Tree


class Programs:
  """Builds the programs of one job; see `overlapped.overlapped`."""

  def __init__(self, job: Job, layout: layouts.Layout, mesh: Mesh, other: Mesh):
    self.mesh, self.other, self.layout = mesh, other, layout
    self.axes = meshes.worker_axes(job.axes)
    self.cut = cut = sharded.cut_of(job.axes, job.task)
    traced = workers.blocked(job)  # needs no mesh
    self.traced = _halves(traced.method)
    self.initial = partial(workers.initial, job, layout)
    if cut:
      job = resolved(job._replace(method=job.method.over(lambda one: sharded.PerShard(one, cut))))
      model = fitting.Model(job.task.dimensions, cut)
      job = job._replace(method=fitting.method_for(job.method, model))
    self.job = job
    self.halves = _halves(job.method)
    self.stepping_job = job._replace(method=self.halves.waiting)
    self.inside = sharded.inside(job.axes, cut, 3)
    self.options = meshes.options_for_sums(mesh, largest_sum(job))
    halves, every = self.halves, range(self.halves.fragments)
    self.held = self._parts(halves.held(layout.state), halves.held(layout.state_shapes))
    self.local = self._traced(*self._of_local(traced))
    of_links = halves.links(layout.state), halves.links(layout.state_shapes)
    self.links = [self._parts(*one) for one in zip(*of_links, strict=True)]
    self.messages = [self._traced(*self._of_message(p)) for p in every]
    self.results = [self._traced(*self._of_exchange(p)) for p in every]
    self.traced.check(layout.state_shapes, self.results[0].shapes, self.axes)
    self.stepping, self.arriving = functools.cache(self._stepping), functools.cache(self._arriving)
    self.departing = functools.cache(self._departing)
    self.exchanging = functools.cache(self._exchanging)
    self.tools = Tools(self._receive, functools.cache(self._nothing))

  # ---- placement of the state

  def _parts(self, private: Tree, shapes: Tree) -> Parts:
    names = tuple(self.axes)
    on = lambda mesh: sharded.of_state(private, mesh, names, shapes, self.cut).method
    return Parts(private, shapes, on(self.mesh), on(self.other))

  def _traced(self, fn: Callable[..., Tree], privates: Sequence[Tree], shapes: Sequence[Tree]):
    """Traces one worker's function of private and shared arguments; returns its result's Parts."""
    spread = lambda private, shape: jax.tree.map(
      lambda p, x: jax.ShapeDtypeStruct((*self.axes.values(), *x.shape), x.dtype) if p else x,
      private,
      shape,
    )
    args = list(map(spread, privates, shapes))
    in_axes = tuple(map(layouts.lead, privates))
    found = layouts.private_outputs(fn, self.axes, in_axes, *args)
    return self._parts(found, layouts.shapes_of_one(fn, self.axes, in_axes, *args))

  def _of_local(self, job: Job) -> tuple[Any, ...]:
    job = job._replace(method=self.traced.waiting)
    phase = lambda held, *args: local_phase(job, held, *args)[0]
    args = inference.phase_arguments(job)
    private = tuple(jax.tree.map(lambda _: True, arg) for arg in args)
    return phase, (self.held.private, *private), (self.held.shapes, *args)

  def _of_message(self, fragment: int) -> tuple[Any, ...]:
    layout, halves = self.layout, self.traced
    message = lambda local, held, key: halves.depart(
      fragment, local, held, key=key, presence=EVERYONE
    )[0]
    held = halves.held(layout.state_shapes)
    shapes = self.local.shapes, held, jax.eval_shape(lambda: jax.random.key(0))
    return message, (self.local.private, self.held.private, False), shapes

  def _of_exchange(self, fragment: int) -> tuple[Any, ...]:
    layout, halves = self.layout, self.traced

    def exchange(local, held, link, key):
      tree = self._of_message(fragment)[0](local, held, key)
      return halves.result(halves.exchange.aggregate(tree, link, key, EVERYONE))

    _, privates, shapes = self._of_message(fragment)
    link = halves.links(layout.state_shapes)[fragment]
    return (
      exchange,
      (*privates[:2], self.links[fragment].private, privates[2]),
      (*shapes[:2], link, shapes[2]),
    )

  def _specs(self, parts: Parts) -> Tree:
    """Returns the specs of a tree for `shard_map` over the workers."""
    return sharded.of_state(parts.private, None, tuple(self.axes)).method

  def _program(
    self, fn: Callable[..., Any], mesh: Mesh, ins: Sequence[Any], outs: Sequence[Any], donate: Any
  ) -> Any:
    """Compiles one worker's function; the program's private leaves have a leading dimension."""
    spec = lambda one: self._specs(one) if isinstance(one, Parts) else one
    on = lambda parts: parts.computing if mesh is self.mesh else parts.communicating
    place = lambda one: on(one) if isinstance(one, Parts) else NamedSharding(mesh, one)

    def inner(*args):
      own = lambda one, x: _own(one.private, x) if isinstance(one, Parts) else x
      found = fn(*map(own, ins, args))
      return tuple(
        _rows(one.private, x) if isinstance(one, Parts) else x
        for one, x in zip(outs, found, strict=True)
      )

    mapped = jax.shard_map(
      inner,
      mesh=mesh,
      in_specs=tuple(map(spec, ins)),
      out_specs=tuple(map(spec, outs)),
      axis_names=set(self.axes),
      check_vma=False,
    )
    return sharded.jit(
      mapped,
      out_shardings=tuple(map(place, outs)),
      donate_argnums=donate,
      compiler_options=self.options,
    )

  # ---- the programs of a round

  def _stepping(self, first: int, last: int, begun: bool) -> Any:
    """Compiles steps [first, last): (round, key, held, data[, local]) -> (local, measurements)."""
    names = P(tuple(self.axes))

    def one(number, key, held, data, *local):
      worker = collectives.worker_index()
      lots = draw(self.stepping_job, data, key, number[None], worker)
      local, measured = local_phase(
        self.stepping_job,
        held,
        jax.tree.map(lambda x: x[0], data.examples),
        data.sizes[worker],
        jax.tree.map(lambda x: x[0], lots.index),
        collectives.worker_key(collectives.round_keys(key, number)[1]),
        self.inside,
        begun=(first, local[0]) if begun else None,
        last=last,
      )
      return local, jax.tree.map(lambda x: (x * lots.share[0])[None], measured)

    ins = (P(), P(), self.held, sharded.of_data(names), *([self.local] if begun else []))
    return self._program(one, self.mesh, ins, (self.local, names), (4,) if begun else ())

  def _arriving(self, fragment: int, begun: bool) -> Any:
    """Compiles the receipt of a due result: (held, result[, local]) -> (held, local)."""

    def one(held, result, *local):
      own = local[0] if begun else self.halves.waiting.begin(held)
      return self.halves.arrive(fragment, held, own, result)

    ins = (self.held, self.results[fragment], *([self.local] if begun else []))
    donate = (0, 2) if begun else (0,)
    return self._program(one, self.mesh, ins, (self.held, self.local), donate)

  def _departing(self, fragment: int) -> Any:
    """Compiles (round, key, held, local, data) -> (message, key data, weight, held, round + 1)."""
    names = P(tuple(self.axes))

    def one(number, key, held, local, data):
      weight = draw(self.job, data, key, number[None], collectives.worker_index()).weight[0]
      sync_key, presence = collectives.round_keys(key, number)[0], self._presence(weight)
      tree, held = self.halves.depart(fragment, local, held, key=sync_key, presence=presence)
      return tree, jax.random.key_data(sync_key), weight[None], self.halves.held(held), number + 1

    ins = (P(), P(), self.held, self.local, sharded.of_data(names))
    outs = (self.messages[fragment], P(), names, self.held, P())
    return self._program(one, self.mesh, ins, outs, (2, 3))

  def _exchanging(self, fragment: int) -> Any:
    """Compiles the exchange: (message, key data, weight, link) -> (result, link)."""
    names = P(tuple(self.axes))

    def one(tree, key, weight, link):
      presence = self.job.method.counted(self._presence(weight[0]))
      key = jax.random.wrap_key_data(key)
      found = self.halves.exchange.aggregate(tree, link, key, presence)
      return self.halves.result(found), found.state

    ins = (self.messages[fragment], P(), names, self.links[fragment])
    outs = (self.results[fragment], self.links[fragment])
    return self._program(one, self.other, ins, outs, (0, 3))

  def _presence(self, weight: Array) -> Presence:
    return EVERYONE if self.job.even else Presence(weight)

  @functools.cached_property
  def measuring(self) -> Any:
    """Compiles (measurements of the parts of rounds, held) -> metrics of a dispatch."""

    def one(parts, held):
      parts = [jax.tree.map(lambda x: x[0], part) for part in parts]
      measured = jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)
      return (workers.reduce_metrics(measured, workers.all_finite(held)),)

    return self._program(one, self.mesh, (P(tuple(self.axes)), self.held), (P(),), ())

  @functools.cached_property
  def _receiving(self) -> Any:
    """Compiles the end of an eager method's exchange: (held, result) -> held."""
    one = lambda held, result: (self.halves.receive(held, result),)
    return self._program(one, self.mesh, (self.held, self.results[0]), (self.held,), ())

  def _receive(self, held: State, result: Tree) -> State:
    return self._receiving(held, result)[0]

  def _nothing(self, fragment: int) -> Tree:
    """Returns a fragment's result with all elements zero."""
    return self._zeros(self.results[fragment], here=True)

  def _zeros(self, parts: Parts, *, here: bool) -> Tree:
    """Returns zeros for all workers, on the computing devices or on the communication devices."""
    count = (meshes.count(self.axes),)
    rows = lambda p, x: jnp.zeros(count * p + x.shape, x.dtype)
    zeros = lambda: jax.tree.map(rows, parts.private, parts.shapes)
    return sharded.jit(zeros, out_shardings=parts.computing if here else parts.communicating)()


def _halves(method: Method) -> Halves:
  return LateHalves(method) if isinstance(method, Overlapping) else Halves(method)


def _own(private: Tree, tree: Tree) -> Tree:
  """Returns one worker's leaves: removes the leading dimension of private leaves."""
  return jax.tree.map(lambda p, x: x[0] if p else x, private, tree)


def _rows(private: Tree, tree: Tree) -> Tree:
  return jax.tree.map(lambda p, x: x[None] if p else x, private, tree)
