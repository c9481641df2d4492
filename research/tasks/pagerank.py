"""PageRank as a fixed point: its residual stands for the gradient, edges are the examples."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.base import Array, Batch, Key, Params, Task
from research.tasks import graphs, sampling
from research.tasks.graphs import Graph

DEFAULT_MODEL: dict[str, str] = {}


def pagerank(
  graph: str = "wiki-Vote",
  alpha: float = 0.85,
  edges: int = 10_000_000,
  nodes: int = 1_000_000,
  *,
  data_dir: str = "",
) -> Task:
  """The stationary distribution of a walk that follows links, and now and then jumps anywhere.

      T(x) = alpha (P x + v sum of x over nodes without links) + (1 - alpha) v,     v = 1/N

  `grads` is x - T(x): `data_parallel(sgd(1.0), mean())` on all edges is power iteration, and it
  contracts by alpha in L1. A worker has P of its own edges, E/n times those of its n; the workers'
  mean is the whole, so that compression, local steps, mini-batches of edges and delays apply as to
  a gradient. The metric "residual" is ||x - T(x)||_1, the change that the next iteration makes;
  "loss" is the same of a worker's own edges, the mean over workers. float32 leaves the residual at
  about 1e-7, --x64 takes it to 1e-15.

  Workers with edges of a stretch of nodes, `--partition=sorted()`, add up fastest.

  Args:
    graph: "wiki-Vote", the path of a list of edges, see `graphs.load`; or "power_law", made up.
    alpha: the probability of following a link, in [0, 1).
    edges: of "power_law".
    nodes: of "power_law".
    data_dir: where to look first, see `files.find`.

  Raises:
    FileNotFoundError: the file is nowhere and cannot be fetched.
    ValueError: a graph without edges, a file that holds none, or a number out of its range.

  Reference: Page, Brin, Motwani, Winograd, 1999, The PageRank citation ranking, Stanford InfoLab;
    Langville, Meyer, 2004, Deeper inside PageRank, sections 5 and 8 (dangling nodes).
  """
  if graph == "power_law":
    return of_graph(graphs.power_law(edges, nodes), alpha)
  return of_graph(graphs.load(graph, data_dir), alpha)


def of_graph(graph: Graph, alpha: float) -> Task:
  """The task of ranking the nodes of a graph; its parameters are {"rank": [N]}.

  Raises:
    ValueError: alpha is not in [0, 1).
  """
  if not 0 <= alpha < 1:
    raise ValueError(f"alpha={alpha} is not in [0, 1)")
  nodes, total = graph.nodes, len(graph.source)
  links = np.bincount(graph.source, minlength=nodes)
  share = np.divide(1.0, links, out=np.zeros(nodes), where=links > 0)
  dangling = np.flatnonzero(links == 0)

  def init(key: Key) -> Params:
    del key
    return {"rank": jnp.full(nodes, 1 / nodes)}

  def grads(params: Params, batch: Batch, key: Key) -> tuple[Array, Params]:
    del key
    x = params["rank"]
    moved = (x * share.astype(x.dtype))[batch["source"]]
    count: Any = len(moved)
    if "mask" in batch:
      moved = moved * batch["mask"].astype(x.dtype)
      count = jnp.maximum(jnp.sum(batch["mask"].astype(x.dtype)), 1)
    along = jax.ops.segment_sum(moved, batch["y"], nodes) * (total / count)
    jumps = (alpha * jnp.sum(x[dangling]) + (1 - alpha)) / nodes
    residual = x - (alpha * along + jumps)
    return jnp.sum(jnp.abs(residual)), {"rank": residual}

  def loss(params: Params, batch: Batch, key: Key) -> Array:
    return grads(params, batch, key)[0]

  def evaluate(params: Params, batch: Batch) -> dict[str, Array]:
    return {"loss": loss(params, batch, jax.random.key(0))}

  train = {"source": graph.source, "y": graph.target}
  task = Task(init, loss, evaluate, sampling.epoch_sample, sampling.take, train)
  return task._replace(grads=grads, chunk=2**31 - 1)


def top(graph: Graph, rank: np.ndarray, count: int = 5) -> list[int]:
  """The names of the nodes of the highest ranks, the highest first."""
  return graph.names[np.argsort(-np.asarray(rank), kind="stable")[:count]].tolist()
