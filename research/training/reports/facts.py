"""What a run's specs say beyond the loss: how its workers are connected, what privacy it spends."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from research.comm import topology
from research.comm.collectives import Axes
from research.comm.topology import Topology
from research.core.base import WORKER_AXES
from research.core.part import Part
from research.parallel.job import Job
from research.parallel.layout import Layout
from research.training.config import Config
from research.training.privacy import columns, over, spending

MOST = 256  # workers whose matrix of weights is looked at


class Facts(NamedTuple):
  """Of a run: `found` is for its summary, `epsilon` for each row of its metrics."""

  found: dict[str, Any]
  epsilon: Callable[[int], float] | None  # rounds -> what they have spent, where that is known
  note: str  # one line that says why it is not


def facts(config: Config, job: Job, layout: Layout) -> Facts:
  """Reads them off the method and one traced round.

  Of every topology `topology` (its spec), `spectral_gap` and `described`; of every noisy aggregator
  its `noise` and `clip`; where there are several, lists of these. With noise also `delta`, and
  `accounted`, what epsilon is counted of: the sum over the workers where nothing else can be made
  of their messages, else each message with its own share of the noise. Where there is no epsilon,
  `privacy` says why.

  Clients drawn at a rate are counted as Poisson sampling, those of strata as such where a round's
  draw is what alone hides them (`private.spending`), and else as if they were in every round.
  """
  graphs = [
    _topology(value, getattr(part, "axis", WORKER_AXES), job)
    for part in job.method.parts(Part)
    for value in part.values()
    if isinstance(value, Topology)
  ]
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


def _topology(graph: Topology, axis: Axes, job: Job) -> dict[str, Any]:
  count, found = math.prod(over(axis, job.axes).values()), {"topology": repr(graph)}
  if count > MOST:
    name = graph.spec_name or type(graph).__name__
    line = f"{name} of {count} workers: spectral gap not computed for more than {MOST}"
    return found | {"spectral_gap": None, "described": line}
  gap = topology.spectral_gap(topology.mixing(graph, count))
  return found | {"spectral_gap": gap, "described": topology.describe(graph, count)}
