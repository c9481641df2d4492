"""What a run's specs say beyond the loss: how its workers are connected, what privacy it spends."""

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from research import registry
from research.aggregate import private
from research.aggregate.secure import quorum_of
from research.base import WORKER_AXES, Aggregate, Aggregator
from research.comm import mesh as meshes
from research.comm import topology, wire
from research.comm.rounds import programs
from research.parallel import workers
from research.parallel.job import Job, resolved
from research.parallel.layout import Layout
from research.registry import Call
from research.train.config import Config

MOST = 256  # workers whose matrix of weights is looked at
# Aggregators that make of the messages nothing but a function of their sum.
_OF_THE_SUM = ("mean", "hierarchical_mean", "sum_mean", "power_sgd", "secure_sum", "bucketed")


class Facts(NamedTuple):
  """Of a run: `found` is for its summary, `epsilon` for each row of its metrics."""

  found: dict[str, Any]
  epsilon: Callable[[int], float] | None  # rounds -> what they have spent, where that is known
  note: str  # one line that says why it is not


def facts(config: Config, job: Job, layout: Layout) -> Facts:
  """Reads them off the method's spec and one traced round.

  Of every topology `topology` (its spec), `spectral_gap` and `described`; of every `noisy` its
  `noise` and `clip`; where there are several, lists of these. With noise also `delta`, and
  `accounted`, what epsilon is counted of: the sum over the workers where nothing else can be made
  of their messages, else each message with its own share of the noise.

  Clients drawn at a rate are counted as Poisson sampling, those of strata as such where a round's
  draw is what alone hides them (`private.spending`), and else as if they were in every round.
  """
  calls = list(_walk(registry.parse(config.method)))
  graphs = [_topology(call, around, job) for call, around in calls if _kind(call) == "topology"]
  noises = [call for call, _ in calls if call.name == "noisy"]
  named = [{name: _arguments(call)[name] for name in ("noise", "clip")} for call in noises]
  found = _columns(graphs) | _columns(named) | _pipeline(config, job)
  if not noises:
    return Facts(found, None, "")
  found["delta"] = config.delta
  if any(values["noise"] == 0 for values in named):
    return Facts(found, None, "epsilon is infinite: noise=0 hides nothing")
  try:
    epsilon, found["accounted"] = _spending(noises, config, job, layout)
  except (_Uncounted, ImportError) as error:
    return Facts(found, None, f"no epsilon in the metrics: {error}")
  return Facts(found, epsilon, "")


def _pipeline(config: Config, job: Job) -> dict[str, Any]:
  """How the stages of a mesh take a worker's batch through the layers, and how long each idles."""
  stages, examples = job.axes.get("stage", 1), job.batch_size or int(job.sizes.max())
  if stages == 1 or config.executor != "spmd" or job.task.schedule is None:
    return {}
  plan = job.task.schedule(stages, examples, job.axes.get("fsdp", 1))
  return {"pipeline": plan._asdict() | {"bubble": plan.bubble}}


class _Uncounted(Exception):
  """What a run spends is not known."""


def _walk(call: Call, around: Call | None = None) -> Iterator[tuple[Call, Call | None]]:
  """Every call of a spec, and the one that it is an argument of."""
  yield call, around
  for value in (*call.args, *call.kwargs.values()):
    for part in value if isinstance(value, list) else (value,):
      if isinstance(part, Call):
        yield from _walk(part, call)


def _kind(call: Call) -> str:
  return next((kind for kind, names in registry.TABLE.items() if call.name in names), "")


def _arguments(call: Call) -> dict[str, Any]:
  """What a call gives or leaves at its default, by name."""
  factory = registry.lookup((_kind(call),), call.name)
  bound = inspect.signature(factory).bind_partial(*call.args, **call.kwargs)
  bound.apply_defaults()
  return bound.arguments


def _columns(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """The values by name: a single row's as they are, those of several in lists."""
  if len(rows) == 1:
    return dict(rows[0])
  return {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}


def _count(call: Call | None, job: Job) -> int:
  """The workers that an aggregator is over."""
  axis = _arguments(call).get("axis", WORKER_AXES) if call else WORKER_AXES
  names = (axis,) if isinstance(axis, str) else axis
  return math.prod(size for name, size in meshes.worker_axes(job.axes).items() if name in names)


def _topology(call: Call, around: Call | None, job: Job) -> dict[str, Any]:
  count, found = _count(around, job), {"topology": call.text}
  if count > MOST:
    line = f"{call.name} of {count} workers: spectral gap not computed for more than {MOST}"
    return found | {"spectral_gap": None, "described": line}
  graph = registry.build("topology", call)
  gap = topology.spectral_gap(topology.mixing(graph, count))
  return found | {"spectral_gap": gap, "described": topology.describe(graph, count)}


def _spending(
  noises: Sequence[Call], config: Config, job: Job, layout: Layout
) -> tuple[Callable[[int], float], str]:
  """What rounds spend, and a line of what that is counted.

  Raises:
    _Uncounted: if not all that the workers send has one and the same noise.
    ImportError: without the accountant.
  """
  if len(noises) > 1:
    raise _Uncounted("the method has several noises, and one accountant counts one")
  noise = _arguments(noises[0])["noise"] / math.sqrt(_noisy_exchanges(job, layout))
  inside = [call for call, _ in _walk(noises[0]) if _kind(call) == "aggregator"][1:]
  is_sum = all(call.name in _OF_THE_SUM for call in inside)
  if not is_sum:
    noise /= math.sqrt(_count(noises[0], job))
  for call in inside:
    if call.name == "secure_sum" and _arguments(call)["dropout"] > 0:
      # those who vanish take their noise with them
      count = _count(call, job)
      noise *= math.sqrt(quorum_of(_arguments(call)["threshold"], count) / count)
  of = f"{'the sum' if is_sum else 'each message'} with noise {noise:.4g}"
  spend = functools.partial(private.spending, noise, config.delta)
  if job.sampling_rate and is_sum:
    return spend(rate=job.sampling_rate), f"{of}, Poisson sampling at {job.sampling_rate:g}"
  drawn = not job.sampling_rate and job.order is None and job.even
  if drawn and job.clients > 1 and not any(jax.tree.leaves(layout.state)):
    return spend(clients=job.clients), f"{of}, one of {job.clients} clients in each round"
  return spend(), f"{of}, everybody in every round"


def _noisy_exchanges(job: Job, layout: Layout) -> int:
  """How often a round aggregates with noise, at most.

  Raises:
    _Uncounted: if workers exchange anything else, or the method does not show what.
  """
  if job.method.over is None:
    raise _Uncounted("the method does not say how its aggregator is wrapped")
  key = jax.eval_shape(lambda: jax.random.key(0))
  weight = jax.ShapeDtypeStruct((), jnp.float32)
  marked = resolved(job._replace(method=job.method.over(_silent)))
  program = lambda state, local, weight, key: workers.sync(marked, local, state, weight, key)
  args = (layout.state_shapes, layout.local_shapes, weight, key)
  axes = meshes.worker_axes(job.axes)
  if wire.axes_of(program, *args, axes=axes):
    raise _Uncounted("workers exchange more than what has noise")
  return _marks(jax.make_jaxpr(program, axis_env=list(axes.items()))(*args).jaxpr)


def _silent(inner: Aggregator) -> Aggregator:
  """A noisy aggregator without its communication, which a traced program shows by name."""

  def noisy_exchange(tree, state, key):
    del key
    return Aggregate(tree, tree, state)

  if "noise" not in inner.traits:
    return inner
  return inner._replace(aggregate=jax.jit(noisy_exchange))


def _marks(jaxpr: Any) -> int:
  """How often a program comes past one, whichever branches it takes."""
  found = 0
  for eqn in jaxpr.eqns:
    inside = [_marks(program.jaxpr) for program in programs(eqn)]
    times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
    branches = max(inside, default=0) if eqn.primitive.name == "cond" else sum(inside)
    found += 1 if eqn.params.get("name") == "noisy_exchange" else times * branches
  return found
