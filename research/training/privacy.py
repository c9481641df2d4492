"""Computes the privacy that a run spends, from its noisy aggregators and visible messages."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from research.aggregate.privacy import accounting, private
from research.aggregate.privacy.hiding import Noise, Sum, is_wide
from research.aggregate.privacy.private import Noisy
from research.analysis import wire
from research.analysis.rounds import programs
from research.comm import mesh as meshes
from research.comm.collectives import Axes
from research.core.base import EVERYONE, Aggregate, Aggregator, Trait
from research.core.method import Method
from research.core.part import Part
from research.parallel import workers
from research.parallel.job import Job, resolved
from research.parallel.layout import Layout
from research.training.config import Config

# A message is rounded finely enough if the noise spans _UNITS rounding units, and is not clipped
# by rounding if the range leaves _ROOM standard deviations.
_UNITS, _ROOM = 2.0, 8.0


class Spent(NamedTuple):
  """The privacy spent by a run."""

  found: dict[str, Any]  # entries of the summary
  epsilon: Callable[[int], float] | None  # rounds -> epsilon spent, if known
  note: str  # a line that explains why epsilon is unknown, or ''


class _Uncounted(Exception):
  """Reports that the privacy spent by the run is unknown."""


def spending(config: Config, job: Job, layout: Layout) -> Spent:
  """Computes the privacy that a run spends.

  The noise is known from the types of the method's parts. If some parts are defined outside this
  library, one traced round is also searched for noise.

  Args:
    config: provides delta and the flags.
    job: the resolved job.
    layout: which leaves of the method's state are private.
  """
  noisy = [a for a in _outermost(job.method) if any(a.parts(Noisy)) or Trait.NOISE in a.traits]
  noises = [a.privacy for a in noisy if isinstance(a.privacy, Noise)]
  found = columns([{"noise": noise.noise, "clip": noise.clip} for noise in noises])
  if not noisy and not (_has_foreign(job.method) and _adds_noise(job, layout)):
    return Spent(found, None, "")
  found["delta"] = config.delta
  try:
    if not noisy:
      raise _Uncounted("the method adds noise that its fields do not declare")
    if len(noises) < len(noisy):
      raise _Uncounted("a noisy aggregator is inside one that does not declare what is visible")
    if any(noise.noise == 0 for noise in noises):
      raise _Uncounted("epsilon is infinite: noise=0 hides nothing")
    if len(noises) > 1:
      raise _Uncounted("the method has several noises, and one accountant counts one")
    epsilon, accounted = _counted(noises[0], config, job, layout)
  except _Uncounted as error:
    found["privacy"] = f"no guarantee: {error}"
    return Spent(found, None, f"no epsilon in the metrics: {error}")
  except ImportError as error:
    found["privacy"] = f"not computed: {error}"
    return Spent(found, None, f"no epsilon in the metrics: {error}")
  return Spent(found | {"accounted": accounted}, epsilon, "")


def _outermost(method: Method) -> list[Aggregator]:
  """Returns the aggregators that are fields of a method or of a method within it."""
  return [a for part in method.parts(Method) for a in part.aggregators()]


def _has_foreign(method: Method) -> bool:
  """Returns whether a part is defined outside this library and may thus hide its noise."""
  return any(not type(part).__module__.startswith("research.") for part in method.parts(Part))


def columns(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """Merges rows by column; a column of several rows becomes a list of values.

  Args:
    rows: rows with the same columns.
  """
  if len(rows) == 1:
    return dict(rows[0])
  return {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}


def over(axis: Axes, axes: Mapping[str, int]) -> dict[str, int]:
  """Returns the sizes of the worker axes over which an aggregator exchanges, by axis.

  Args:
    axis: the aggregator's axes.
    axes: the sizes of the mesh axes by name.
  """
  names = (axis,) if isinstance(axis, str) else axis
  return {name: size for name, size in meshes.worker_axes(axes).items() if name in names}


def _counted(
  noise: Noise, config: Config, job: Job, layout: Layout
) -> tuple[Callable[[int], float], str]:
  """Returns epsilon as a function of the rounds, and a description of the accounted mechanism.

  Raises:
    _Uncounted: if workers send messages without noise, or share the noise of another worker.
    ImportError: if the accountant is not installed.
  """
  spread = noise.noise / math.sqrt(_noisy_exchanges(job, layout))
  sharing = over(noise.axis, job.axes)
  alike = [a for a, n in meshes.worker_axes(job.axes).items() if n > 1 and a not in sharing]
  if alike:
    raise _Uncounted(f"workers along '{alike[0]}' draw the same noise; leave out axis=")
  count = math.prod(sharing.values())
  own = noise.noise / math.sqrt(count)  # deviation of one message's noise, relative to the clip
  is_sum = noise.seen is not None and _is_of_the_sum(noise, noise.seen, own, job)
  if is_sum and noise.seen is not None:
    # a worker that is missing from the sum does not contribute its noise
    among = math.prod(over(noise.seen.axis, job.axes).values())
    spread *= math.sqrt(among * noise.seen.present(among) / count)
  else:
    spread /= math.sqrt(count)
  of = f"{'the sum' if is_sum else 'each message'} with noise {spread:.4g}"
  spend = functools.partial(accounting.spending, spread, config.delta)
  if job.sampling_rate and is_sum:
    return spend(rate=job.sampling_rate), f"{of}, Poisson sampling at {job.sampling_rate:g}"
  drawn = not job.sampling_rate and job.order is None and job.even
  if drawn and job.clients > 1 and not any(jax.tree.leaves(layout.state)):
    return spend(clients=job.clients), f"{of}, one of {job.clients} clients in each round"
  return spend(), f"{of}, everybody in every round"


def _is_of_the_sum(noise: Noise, seen: Sum, own: float, job: Job) -> bool:
  """Returns whether only the sum is visible, rounded finely enough for the noise; see `noisy`."""
  params = jax.tree.leaves(jax.eval_shape(job.task.init, jax.random.key(0)))
  if not all(is_wide(leaf.dtype) for leaf in params):
    return False
  deviation = own * noise.clip
  return seen.unit == 0 or (
    deviation >= _UNITS * seen.unit and seen.limit >= noise.clip + _ROOM * deviation
  )


def _noisy_exchanges(job: Job, layout: Layout) -> int:
  """Returns the maximum number of noisy exchanges in a round.

  Raises:
    _Uncounted: if workers also exchange a value without noise.
  """
  marked = resolved(job._replace(method=job.method.over(_silent)))
  program, args = _sync(marked, layout)
  axes = meshes.worker_axes(job.axes)
  if wire.axes_of(program, *args, axes=axes):
    raise _Uncounted("workers exchange more than what has noise")
  return _marks(jax.make_jaxpr(program, axis_env=list(axes.items()))(*args).jaxpr)


def _sync(job: Job, layout: Layout) -> tuple[Callable[..., Any], tuple[Any, ...]]:
  """Returns the communicating part of a round, and the shapes of its arguments."""
  key = jax.eval_shape(lambda: jax.random.key(0))
  weight = jax.ShapeDtypeStruct((), jnp.float32)
  program = lambda state, local, weight, key: workers.sync(job, local, state, weight, key)
  return program, (layout.state_shapes, layout.local_shapes, weight, key)


def _adds_noise(job: Job, layout: Layout) -> bool:
  """Returns whether a traced round adds noise that is not known from the method's parts."""

  def is_in(jaxpr: Any) -> bool:
    return any(
      private.SCOPE in str(eqn.source_info.name_stack).split("/")
      or any(is_in(program.jaxpr) for program in programs(eqn))
      for eqn in jaxpr.eqns
    )

  program, args = _sync(job, layout)
  axes = meshes.worker_axes(job.axes)
  return is_in(jax.make_jaxpr(program, axis_env=list(axes.items()))(*args).jaxpr)


class _Silent(Aggregator):
  """Replaces a noisy aggregator by a named call that appears in a trace and sends nothing."""

  inner: Aggregator

  def init(self, params):
    return self.inner.init(params)

  def aggregate(self, tree, state, key, presence=EVERYONE):
    del key, presence

    def noisy_exchange(tree, state):
      return Aggregate(tree, tree, state)

    return jax.jit(noisy_exchange)(tree, state)


def _silent(inner: Aggregator) -> Aggregator:
  return _Silent(inner) if Trait.NOISE in inner.traits else inner


def _marks(jaxpr: Any) -> int:
  """Returns the maximum number of `_Silent` calls that a program executes, over all branches."""
  found = 0
  for eqn in jaxpr.eqns:
    inside = [_marks(program.jaxpr) for program in programs(eqn)]
    times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
    branches = max(inside, default=0) if eqn.primitive.name == "cond" else sum(inside)
    found += 1 if eqn.params.get("name") == "noisy_exchange" else times * branches
  return found
