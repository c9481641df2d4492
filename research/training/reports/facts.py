"""What a run's specs say beyond the loss: how its workers are connected, what privacy it spends."""

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from research.comm import topology
from research.comm.collectives import Axes
from research.core import registry
from research.core.base import WORKER_AXES
from research.core.registry import Call
from research.parallel.job import Job
from research.parallel.layout import Layout
from research.training.config import Config, called
from research.training.privacy import columns, over, spending

MOST = 256  # workers whose matrix of weights is looked at


class Facts(NamedTuple):
  """Of a run: `found` is for its summary, `epsilon` for each row of its metrics."""

  found: dict[str, Any]
  epsilon: Callable[[int], float] | None  # rounds -> what they have spent, where that is known
  note: str  # one line that says why it is not


def facts(config: Config, job: Job, layout: Layout) -> Facts:
  """Reads them off the method's spec, the method itself and one traced round.

  Of every topology `topology` (its spec), `spectral_gap` and `described`; of every noisy aggregator
  its `noise` and `clip`; where there are several, lists of these. With noise also `delta`, and
  `accounted`, what epsilon is counted of: the sum over the workers where nothing else can be made
  of their messages, else each message with its own share of the noise. Where there is no epsilon,
  `privacy` says why.

  Clients drawn at a rate are counted as Poisson sampling, those of strata as such where a round's
  draw is what alone hides them (`private.spending`), and else as if they were in every round.
  """
  calls = list(_walk(registry.parse(config.method))) if called(config.method) else []
  graphs = [_topology(call, around, job) for call, around in calls if _kind(call) == "topology"]
  spent = spending(config, job, layout)
  found = columns(graphs) | spent.found | _pipeline(config, job)
  return Facts(found, spent.epsilon, spent.note)


def _pipeline(config: Config, job: Job) -> dict[str, Any]:
  """How the stages of a mesh take a worker's batch through the layers, and how long each idles."""
  stages, examples = job.axes.get("stage", 1), job.batch_size or int(job.sizes.max())
  if stages == 1 or config.executor != "spmd" or job.task.schedule is None:
    return {}
  plan = job.task.schedule(stages, examples, job.axes.get("fsdp", 1))
  return {"pipeline": plan._asdict() | {"bubble": plan.bubble}}


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


def _count(axis: Axes, job: Job) -> int:
  """The workers that an aggregator is over."""
  return math.prod(over(axis, job.axes).values())


def _topology(call: Call, around: Call | None, job: Job) -> dict[str, Any]:
  axis = _arguments(around).get("axis", WORKER_AXES) if around else WORKER_AXES
  count, found = _count(axis, job), {"topology": call.text}
  if count > MOST:
    line = f"{call.name} of {count} workers: spectral gap not computed for more than {MOST}"
    return found | {"spectral_gap": None, "described": line}
  graph = registry.build("topology", call)
  gap = topology.spectral_gap(topology.mixing(graph, count))
  return found | {"spectral_gap": gap, "described": topology.describe(graph, count)}
