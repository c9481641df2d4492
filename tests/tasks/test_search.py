"""Search: PageRank as a fixed point, learning to rank, BM25."""

import itertools
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import Running
from sklearn.metrics import label_ranking_average_precision_score, ndcg_score
from subset import slow_except

from research.core import registry
from research.tasks.search import bm25, cranfield, graphs, pagerank, ranking

KEY = jax.random.key(0)


def real(name: str) -> str:
  """The user's directory of data files, if it has this one."""
  folder = os.environ.get("RESEARCH_DATA_DIR")
  if not folder or not list(Path(folder).rglob(name)):
    pytest.skip(f"$RESEARCH_DATA_DIR has no {name}")
  return folder


def iterates(graph: graphs.Graph, method: str, rounds: list[int], workers: int = 8) -> list:
  """The ranks after so many rounds more, on links in as equal parts as can be."""
  task = pagerank.of_graph(graph, 0.85)
  sizes = [len(part) for part in np.array_split(task.train["y"], workers)]
  built = registry.build("method", method)
  run = Running(built, "simulate", {"data": workers}, sizes, None, task=task)
  return [run.rounds(count).params()["rank"] for count in rounds]


POWER = "data_parallel(sgd(1.0), mean())"
SMALL = graphs.of_edges([(1, 2), (1, 3), (2, 3), (3, 1), (4, 3), (3, 5), (3, 5), (6, 7)])


def test_a_step_is_a_power_iteration_with_dangling_nodes():
  """Nodes 5 and 7 lead nowhere; an edge that is there twice counts once."""
  matrix = np.zeros((7, 7))
  for source, target in {(1, 2), (1, 3), (2, 3), (3, 1), (4, 3), (3, 5), (6, 7)}:
    matrix[target - 1, source - 1] = 1
  links = matrix.sum(0)
  matrix = np.where(links > 0, matrix / np.maximum(links, 1), 1 / 7)
  x = np.full(7, 1 / 7)
  with jax.enable_x64(True):
    for found in iterates(SMALL, POWER, [1] * 4, workers=3):
      x = 0.85 * matrix @ x + 0.15 / 7
      np.testing.assert_allclose(found, x, atol=1e-15)


@pytest.mark.slow
@pytest.mark.parametrize(
  "method",
  [
    "data_parallel(sgd(1.0), ef21(two_phase(int8())))",
    "local_sgd(sgd(0.1), mean(), period=2)",
    "delayed(data_parallel(sgd(0.5), mean()), constant(1))",
  ],
)
def test_methods_apply_as_they_stand(method):
  """Compression and delays reach the fixed point; local steps, a point near it."""
  exact = iterates(SMALL, POWER, [80], workers=2)[0]
  found = iterates(SMALL, method, [150], workers=2)[0]
  near = 0.3 if method.startswith("local") else 1e-4
  assert np.abs(found - exact).sum() < near


def test_pagerank_of_wiki_vote():
  """Iterations to a change of 1e-6, 1e-10 and 1e-14; contraction; networkx; who is first."""
  graph = graphs.load("wiki-Vote", real("wiki-Vote.txt"))
  with jax.enable_x64(True):
    ranks = iterates(graph, POWER, [1] * 44)
  ranks = [np.full(graph.nodes, 1 / graph.nodes), *ranks]
  changes = np.array([np.abs(b - a).sum() for a, b in itertools.pairwise(ranks)])
  assert [1 + int(np.argmax(changes < tol)) for tol in (1e-6, 1e-10, 1e-14)] == [16, 29, 43]
  assert (changes[1:30] <= 0.85 * changes[:29]).all()
  assert pagerank.top(graph, ranks[-1]) == [4037, 15, 6634, 2625, 2398]
  networkx = pytest.importorskip("networkx")
  pairs = np.stack([graph.source, graph.target], 1).tolist()
  peer = networkx.pagerank(networkx.DiGraph(pairs), 0.85, tol=1e-15, max_iter=200)
  np.testing.assert_allclose(ranks[-1], [peer[i] for i in range(graph.nodes)], atol=1e-10, rtol=0)


def test_metrics_of_a_ranking():
  """Against scikit-learn, which has gains without exponent and no cut of absent documents."""
  scores = np.array([0.1, 2.0, 0.7, -1.0, 9.0], np.float32)
  relevance = np.array([1, 0, 1, 0, 1])
  present = np.array([True, True, True, True, False])
  metrics = jax.jit(ranking.metrics)
  found = metrics(scores, relevance, present)
  some = [relevance[None, :4], scores[None, :4]]
  assert found["ndcg@3"] == pytest.approx(ndcg_score(*some, k=3), abs=1e-6)
  assert found["map"] == pytest.approx(label_ranking_average_precision_score(*some), abs=1e-6)
  assert found["mrr"] == pytest.approx(1 / 2)
  nothing = metrics(scores, 0 * relevance, present)
  assert all(value == 1 for value in nothing.values())


def queries(count: int = 16, seed: int = 0):
  """Queries whose relevance is a linear function of three features, cut into grades."""
  rng = np.random.default_rng(seed)
  counts = rng.integers(4, 9, count)
  x = rng.normal(size=(counts.sum(), 3))
  grade = np.clip(np.round(x @ np.array([1.0, -0.5, 0.2]) + 1), 0, 3).astype(int)
  return ranking.padded(x, grade, counts)


@pytest.mark.parametrize("loss", slow_except([*ranking.LOSSES][:1], ranking.LOSSES))
def test_losses_are_what_they_say_and_rank(loss):
  module = registry.build("model", "linear()")(1)
  task = ranking.ranked(module, queries(), queries(seed=1), loss=loss)
  s, y, there = np.array([0.3, -0.2, 1.0]), np.array([2, 0, 1]), np.ones(3, bool)
  behind = lambda i, j: np.log1p(np.exp(s[j] - s[i]))
  pairs = [(0, 1), (0, 2), (2, 1)]
  discount, gain = 1 / np.log2(np.array([3, 4, 2])), 2.0**y - 1  # places 2, 3, 1
  ideal = 3 / np.log2(2) + 1 / np.log2(3)
  swaps = [abs((gain[i] - gain[j]) * (discount[i] - discount[j])) / ideal for i, j in pairs]
  soft = lambda v: np.exp(v) / np.exp(v).sum()
  want = {
    "pairwise": np.mean([behind(*p) for p in pairs]),
    "listnet": -np.sum(soft(y) * np.log(soft(s))),
    "lambdarank": np.sum([w * behind(*p) for w, p in zip(swaps, pairs, strict=True)]),
  }
  found = jax.jit(ranking.LOSSES[loss], static_argnums=3)(s.astype(np.float32), y, there, 2)
  assert found == pytest.approx(want[loss], abs=1e-6)
  assert task.test is not None
  test = task.test
  evaluate = jax.jit(lambda params: task.evaluate(params, test))

  def step(_, params):
    grads = jax.grad(task.loss)(params, task.train, KEY)
    return jax.tree.map(lambda p, g: p - 0.3 * g, params, grads)

  params = jax.jit(task.init)(KEY)
  before = evaluate(params)
  after = evaluate(jax.jit(lambda params: jax.lax.fori_loop(0, 60, step, params))(params))
  assert after["ndcg@10"] > max(0.93, before["ndcg@10"])
  assert after["loss"] < before["loss"]


DOCUMENTS = [
  "shear flow past a flat plate",
  "heat conduction in composite slabs and plates",
  "the boundary layer of a flat plate in hypersonic flow",
  "flat flat flat",
]


def test_bm25_is_that_of_a_peer():
  peer = pytest.importorskip("bm25s")
  documents = [bm25.terms(text) for text in DOCUMENTS]
  asked = [bm25.terms("flow past a flat flat plate"), bm25.terms("heat of zeppelins")]
  for k1, b in ((1.2, 0.75), (2.0, 0.3)):
    retriever = peer.BM25(k1=k1, b=b, method="lucene")
    retriever.index(documents, show_progress=False)
    found = bm25.scores(bm25.index(documents), asked, k1, b)
    for row, query in zip(found, asked, strict=True):
      known = [term for term in query if any(term in document for document in documents)]
      want = sum(retriever.get_scores([term]) for term in known)
      np.testing.assert_allclose(row, want, atol=1e-5)


@pytest.mark.slow
def test_cranfield_and_its_bm25():
  """225 queries numbered by their order; scores in JAX are those of the index; MAP as stated."""
  folder = real("cranqrel")
  found = cranfield.load(folder)
  assert (len(found.titles), len(found.queries)) == (1400, 225)
  assert found.queries[2].startswith("what problems of heat conduction in composite slabs")
  assert (found.relevance > 0).sum() == 1612
  task = cranfield.bm25(data_dir=folder)
  assert task.test is not None
  some = {name: leaf[:4] for name, leaf in task.test.items()}
  scores = bm25.scores(
    bm25.index([bm25.terms(text) for text in found.texts]),
    [bm25.terms(query) for query in found.queries[1:8:2]],
  )
  want = [
    ranking.metrics(jnp.asarray(s), jnp.asarray(y), jnp.ones(1400, bool))["map"]
    for s, y in zip(scores, some["relevance"], strict=True)
  ]
  metrics = jax.jit(task.evaluate)(task.init(KEY), some)
  assert metrics["map"] == pytest.approx(np.mean(want), abs=1e-4)


def test_a_prior_is_a_distribution_that_prefers_the_middle():
  texts = ["flat plate", "flat plate flow", "flat flow", "heat", "heat flow flat plate"]
  found = cranfield.prior(bm25.index([text.split() for text in texts]), neighbours=2)
  assert found.sum() == pytest.approx(1)
  assert found.argmin() == 3
