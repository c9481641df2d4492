"""Computes PageRank as a fixed point: residuals replace gradients, and links are the examples."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.core import checks
from research.core.base import Array, Key, Params
from research.core.task import Batch, Task
from research.tasks import sampling
from research.tasks.search import graphs
from research.tasks.search.graphs import Graph

TOGETHER = 8  # links per example, all to the same node


def pagerank(
  graph: str = "wiki-Vote",
  alpha: float = 0.85,
  edges: int = 10_000_000,
  nodes: int = 1_000_000,
  *,
  data_dir: str = "",
) -> Task:
  """Computes the stationary distribution of a random walk that follows links or jumps anywhere.

      T(x) = alpha (P x + v sum of x over nodes without links) + (1 - alpha) v,     v = 1/N

  `grads` returns x - T(x), so `data_parallel(sgd(1.0), mean())` on all edges is power iteration,
  which contracts the L1 error by alpha. An example consists of up to eight links to one node,
  {"source": [8], "y"}, because CPUs gather fastest in sums of eight terms; only these sums are
  added per node. Each worker computes P from its own n of all E examples and scales the result by
  E/n. The mean over workers is then the exact P, so that compression, local steps, mini-batches of
  links and delays work as they do with gradients. The metric "residual" is ||x - T(x)||_1, the
  change in the next iteration; "loss" is the same norm for a worker's own links, averaged over
  workers. The residual levels off at about 1e-7 in float32, and at 1e-15 with --x64. Summation is
  fastest if each worker has the links to contiguous nodes, as with `--partition=sorted()`.

  Args:
    graph: "wiki-Vote" or the path of an edge list (see `graphs.load`), or "power_law" for a random
      graph.
    alpha: the probability of following a link, in [0, 1).
    edges: the number of edges of the random graph.
    nodes: the number of nodes of the random graph.
    data_dir: the folder to search first; see `files.find`.

  Raises:
    FileNotFoundError: if the file is not found and cannot be downloaded.
    ValueError: if the graph has no edges, a line of the file is not an edge, or a number is out of
      range.

  Reference: Page, Brin, Motwani, Winograd, 1999, The PageRank citation ranking, Stanford InfoLab;
    Langville, Meyer, 2004, Deeper inside PageRank, sections 5 and 8 (dangling nodes).
  """
  if graph == "power_law":
    return of_graph(graphs.power_law(edges, nodes), alpha)
  return of_graph(graphs.load(graph, data_dir), alpha)


def of_graph(graph: Graph, alpha: float) -> Task:
  """Returns the task of computing the PageRank of a graph, with parameters {"rank": [N]}.

  Args:
    graph: the graph.
    alpha: the probability of following a link, in [0, 1).

  Raises:
    ValueError: if alpha is not in [0, 1).
  """
  checks.in_range("alpha", alpha, "[0, 1)")
  nodes, train = graph.nodes, together(graph)
  total = len(train["y"])
  links = np.bincount(graph.source, minlength=nodes)
  share = np.divide(1.0, links, out=np.zeros(nodes), where=links > 0)
  dangling = np.flatnonzero(links == 0)

  def init(key: Key) -> Params:
    del key
    return {"rank": jnp.full(nodes, 1 / nodes)}

  def grads(params: Params, batch: Batch, key: Key) -> tuple[Array, Params]:
    del key
    x = params["rank"]
    carried = jnp.append(x * share.astype(x.dtype), jnp.zeros((), x.dtype))  # last entry: no link
    # eight explicit terms: a reduction over the axis would process elements one at a time
    of = lambda i: carried.at[i].get(mode="promise_in_bounds", wrap_negative_indices=False)
    moved = sum(of(batch["source"][:, k]) for k in range(TOGETHER))
    count: Any = len(batch["y"])
    if "mask" in batch:
      moved = moved * batch["mask"].astype(x.dtype)
      count = jnp.maximum(jnp.sum(batch["mask"].astype(x.dtype)), 1)
    along = jax.ops.segment_sum(moved, batch["y"], nodes, mode="promise_in_bounds")
    along = along * (total / count)
    jumps = (alpha * jnp.sum(x[dangling]) + (1 - alpha)) / nodes
    residual = x - (alpha * along + jumps)
    return jnp.sum(jnp.abs(residual)), {"rank": residual}

  def loss(params: Params, batch: Batch, key: Key) -> Array:
    return grads(params, batch, key)[0]

  def evaluate(params: Params, batch: Batch) -> dict[str, Array]:
    return {"loss": loss(params, batch, jax.random.key(0))}

  task = Task(init, loss, evaluate, sampling.epoch_sample, sampling.take, train)
  return task._replace(grads=grads, chunk=2**31 - 1)


def together(graph: Graph) -> dict[str, np.ndarray]:
  """Groups links by target into examples: sources [E, 8], padded with N, and targets "y" [E].

  Args:
    graph: the graph.
  """
  degree = np.bincount(graph.target, minlength=graph.nodes)
  rows = -(-degree // TOGETHER)
  y = np.repeat(np.arange(graph.nodes, dtype=np.int32), rows)
  before = lambda count: (np.cumsum(count) - count)[graph.target]
  place = np.arange(len(graph.target)) - before(degree)
  source = np.full((len(y), TOGETHER), graph.nodes, np.int32)
  source[before(rows) + place // TOGETHER, place % TOGETHER] = graph.source
  return {"source": source, "y": y}


def top(graph: Graph, rank: np.ndarray, count: int = 5) -> list[int]:
  """Returns the names of the nodes with the highest ranks, in descending order.

  Args:
    graph: the graph.
    rank: the ranks of the nodes, [N].
    count: the number of nodes to return.
  """
  return graph.names[np.argsort(-np.asarray(rank), kind="stable")[:count]].tolist()
