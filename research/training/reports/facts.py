"""Derives facts about a run from its method: the workers' topology, and the privacy spent."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from research.comm import mixing
from research.comm.collectives import Axes
from research.comm.topology import Topology
from research.core.base import WORKER_AXES
from research.core.part import Part
from research.parallel.job import Job
from research.parallel.layout import Layout
from research.training.config import Config
from research.training.privacy import columns, over, spending

MOST = 256  # maximum number of workers for which the spectral gap is computed


class Facts(NamedTuple):
  """Facts for the summary, and epsilon for each row of the metrics."""

  found: dict[str, Any]
  epsilon: Callable[[int], float] | None  # maps rounds to the spent epsilon; None if unknown
  note: str  # a line that explains why epsilon is unknown, or ''


def facts(config: Config, job: Job, layout: Layout) -> Facts:
  """Derives the facts from the method and one traced round.

  The facts include `topology` (its spec), `spectral_gap` and `described` of every topology, and
  `noise` and `clip` of every noisy aggregator, as lists if there are several. With noise, the facts
  also include `delta` and `accounted`. The entry `accounted` says whether epsilon is computed for
  the sum over the workers, if only the sum is visible, or for each message with the message's share
  of the noise. If epsilon is unknown, `privacy` gives the reason.

  Sampling of clients at a rate is accounted as Poisson sampling. If each worker samples one
  client of its stratum, and only the sampling hides this client, `accounting.spending` accounts for
  this sampling. All other clients are accounted as if they took part in every round.

  Args:
    config: the run.
    job: the resolved job.
    layout: which leaves of the method's state are private.
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
  """Returns the pipeline schedule of a worker's batch, with the idle fraction of the stages."""
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
  gap = mixing.gap_of(graph, count)
  return found | {"spectral_gap": gap, "described": mixing.describe(graph, count)}
