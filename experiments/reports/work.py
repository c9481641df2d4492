"""Predicts the parts of a method's local step: what it sends and encodes, from its traced round."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from research.analysis import cost, encodings, wire
from research.analysis.encodings import Count
from research.analysis.network import Network
from research.comm import mesh as meshes
from research.core import registry
from research.core.method import Method
from research.core.task import Task
from research.parallel import inference, traffic
from research.parallel import layout as layouts
from research.parallel import workers as of_workers
from research.parallel.job import Job, resolved
from research.training import assemble, exchanges
from research.training.config import Config

PLAIN = "data_parallel(sgd(0.1), mean())"  # the method of a measured computation


class Work(NamedTuple):
  """What one worker sends and encodes per local step."""

  rows: list[dict[str, Any]]  # transfers, as in summary.json
  axes: dict[str, int]  # sizes of the worker axes
  counts: dict[str, Count]  # elements by the spec of a compressor or an aggregator
  period: int  # local steps from one exchange to the next
  delay: int  # local steps that an exchange may take

  @property
  def load(self) -> cost.Load:
    """The worker's messages."""
    return cost.load(self.rows, self.axes)

  def encoding(self, network: Network) -> float:
    """Returns the seconds of encoding and decoding; kernels that were not measured cost nothing."""
    return encoding(self.counts, network)

  def step(self, network: Network, computing: float = 0.0) -> cost.Step:
    """Predicts a local step.

    Args:
      network: the network and the machines.
      computing: seconds of computation per local step; 0 means the network's.
    """
    return cost.step(
      self.load,
      network,
      workers=meshes.count(self.axes),
      computing=computing or network.computing,
      encoding=self.encoding(network),
      period=self.period,
      delay=self.delay,
    )


def encoding(counts: Mapping[str, Count], network: Network) -> float:
  """Returns the seconds that the counted elements take with the kernels of a network."""
  known = network.kernels
  return sum(one.seconds(known[spec]) for spec, one in counts.items() if spec in known)


def of_config(config: Config) -> Work:
  """Returns the work of a run's method; the workers are simulated, whatever the executor is.

  Raises:
    UsageError: if a flag is invalid.
  """
  config = config.replace(executor="simulate")
  problem = assemble.assemble(config, assemble.check(config))
  return of_job(problem.job, problem.executor.layout)


def of_job(job: Job, layout: layouts.Layout) -> Work:
  """Returns the work of one worker, averaged over the rounds of 64 local steps.

  Args:
    job: the resolved job.
    layout: which state of the job is private.
  """
  period = job.method.local_steps
  rounds = max(1, 64 // period)
  sent = traffic.of_method(job, layout, rounds).transfers
  per_step = {
    spec: Count(one.encoded / period, one.decoded / period)
    for spec, one in _counts(job, layout).items()
  }
  axes = meshes.worker_axes(job.axes)
  rows = wire.table(sent, rounds * period)
  return Work(rows, axes, per_step, period, job.method.hidden_steps)


def _counts(job: Job, layout: layouts.Layout) -> dict[str, Count]:
  """Counts the elements that one worker encodes and combines in a round.

  The computation of a step is measured with PLAIN, so the arithmetic of PLAIN's exchange is not
  counted again.
  """
  found = _all_counts(job, layout)
  if job.method.local_steps == 1 and encodings.ARITHMETIC in found:
    plain = resolved(job._replace(method=registry.build("method", PLAIN)))
    known = _all_counts(plain, inference.layout_of(plain)).get(encodings.ARITHMETIC, Count(0, 0))
    more = max(0.0, found[encodings.ARITHMETIC].encoded - known.encoded)
    found[encodings.ARITHMETIC] = Count(more, 0)
  return found


def _all_counts(job: Job, layout: layouts.Layout) -> dict[str, Count]:
  job = job._replace(method=encodings.marked(job.method))
  cut = of_workers.blocked(job)
  key = jax.eval_shape(lambda: jax.random.key(0))
  weight = jax.ShapeDtypeStruct((), jnp.float32)
  program = jax.make_jaxpr(
    lambda state, local, weight, key: of_workers.sync(cut, local, state, weight, key),
    axis_env=list(meshes.worker_axes(job.axes).items()),
  )(layout.state_shapes, layout.local_shapes, weight, key)
  return encodings.counts(program)


def of_shapes(method: Method, shapes: Any, workers: int) -> tuple[Work, int]:
  """Returns the work of a method on a model of which only the shapes are known.

  Args:
    method: the method.
    shapes: the tree of the parameters' shapes and dtypes.
    workers: the number of workers.

  Returns:
    The work, and the bytes of one worker's state with its parameters.

  Raises:
    ValueError: if the method does not fit the number of workers.
  """
  job = _job(method, shapes, workers)
  layout = inference.layout_of(job)
  return of_job(job, layout), memory(layout)


def of_server(method: Method, shapes: Any) -> tuple[float, float, int]:
  """Returns what a worker of a server exchanges, for a method that serves one worker at a time.

  Args:
    method: the method.
    shapes: the tree of the parameters' shapes and dtypes.

  Returns:
    The bytes of a message to the server and of its reply, and the bytes of the state with its
    parameters.
  """
  job = _job(method, shapes, 1)
  held = memory(inference.layout_of(job))
  return exchanges.push_bytes(job, 1.0), exchanges.pull_bytes(job, 1.0), held


def _job(method: Method, shapes: Any, workers: int) -> Job:
  """Returns a job without data on a model of which only the shapes are known."""
  zeros = lambda key: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  loss = lambda params, batch, key: sum(jnp.sum(x) for x in jax.tree.leaves(params))
  sample = lambda size, step, key, *, batch_size: jnp.zeros(batch_size, jnp.int32)
  batch = lambda examples, index: jax.tree.map(lambda x: x[index], examples)
  examples = {"x": np.zeros((workers, 1), np.float32)}
  task = Task(zeros, loss, lambda params, batch: {}, sample, batch, examples)
  return resolved(Job(method, task, {"data": workers}, np.ones(workers, np.int64), 1))


def memory(layout: layouts.Layout) -> int:
  """Returns the bytes of one worker's state with its parameters."""
  return sum(_bytes(leaf) for leaf in jax.tree.leaves(layout.state_shapes))


def _bytes(leaf: Any) -> int:
  if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    return 0
  return leaf.size * leaf.dtype.itemsize
