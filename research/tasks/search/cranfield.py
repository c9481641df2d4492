"""Tunes BM25 and learns to rank on the Cranfield collection (1400 abstracts, 225 queries).

Odd-numbered queries are for training; even-numbered queries are held out.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from scipy import sparse

from research.core.base import Array, Key, Params
from research.core.registry import Default
from research.core.task import Batch, Task
from research.tasks import files, sampling
from research.tasks.search import bm25 as bm25s
from research.tasks.search import ranking

URL = "http://ir.dcs.gla.ac.uk/resources/test_collections/cran/cran.tar.gz"
SHA256 = {
  "cran.all.1400": "7ebff56cdaf2fb1a5f9e612f3d1fa9724e5890354a65112420d7815f1fff054a",
  "cran.qry": "99578ceb88941ef89c14faf7c63c23776a376d8fba319b990f01d0c601d8b03f",
  "cranqrel": "a90f56082cd44db70bf2c21ebca39a1a34e37c82ccb5ddf1bcc64f18795234c7",
}
FEATURES = ("bm25", "title", "prior", "length")


class Collection(NamedTuple):
  """Contains documents, queries and relevance judgements."""

  titles: list[str]  # D
  texts: list[str]  # D, including the titles
  queries: list[str]  # Q
  relevance: np.ndarray  # int32 [Q, D], from 0 to 4; 4 means a complete answer


def load(data_dir: str = "") -> Collection:
  """Reads the collection.

  In the judgements, a query's number is its position in the file, not the number in its .I line.
  The grades of the file range from 1 (a complete answer) to 4 (of minimum interest); the grade 5
  (of no interest) is written as -1. Grades 1 to 4 become relevances 4 to 1, and grade 5 becomes
  relevance 0.

  Args:
    data_dir: the folder of the files; "" means the default folders.

  Raises:
    FileNotFoundError: if a file is not found; the archive must be unpacked by hand.
    ValueError: if a file is not the published one.

  Reference: Cleverdon, 1967, The Cranfield tests on index language devices, Aslib Proceedings 19.
  """
  paths = {n: files.find(f"cranfield/{n}", data_dir, URL, sha) for n, sha in SHA256.items()}
  read = {name: path.read_bytes().decode("latin-1") for name, path in paths.items()}
  documents = [_fields(part) for part in _records(read["cran.all.1400"])]
  queries = [_fields(part).get("W", "") for part in _records(read["cran.qry"])]
  relevance = np.zeros((len(queries), len(documents)), np.int32)
  for line in read["cranqrel"].split("\n"):
    if line.strip():
      query, document, grade = map(int, line.split())
      relevance[query - 1, document - 1] = 5 - grade if 1 <= grade <= 4 else 0
  titles = [fields.get("T", "") for fields in documents]
  return Collection(titles, [fields.get("W", "") for fields in documents], queries, relevance)


def bm25(
  k1: float = bm25s.K1, b: float = bm25s.B, ask: str | None = None, *, data_dir: str = ""
) -> Task:
  """Tunes k1 and b of BM25 on the training queries of Cranfield.

  The parameters are {"k1", "b", "sharpness"}: BM25 uses the exponential of "k1" and the sigmoid of
  "b". The objective is that of ListNet: the cross-entropy between the softmax of the relevances and
  the softmax of exp(sharpness) times the scores. It is differentiated through the scores, which are
  those of `bm25.scores`. `evaluate` returns the metrics of `ranking.ranked`, "k1" and "b". If there
  is a query to `ask`, it also returns "found", the number of the top document.

  Args:
    k1: the initial k1, > 0.
    b: the initial b, in (0, 1).
    ask: a query of your own; None for none.
    data_dir: the folder to search first; see `files.find`.

  Raises:
    FileNotFoundError: if a file is not found and cannot be downloaded.
    ValueError: if k1 or b is out of range, or the query `ask` is empty.
  """
  if ask is not None and not bm25s.terms(ask):
    raise ValueError(f"ask={ask!r} is empty: it has no terms to search for")
  bm25s.check(k1, b)
  if not (k1 > 0 and 0 < b < 1):
    raise ValueError(f"k1={k1}, b={b}: tuning starts inside of (0, inf) and (0, 1)")
  found = load(data_dir)
  index = bm25s.index([bm25s.terms(text) for text in found.texts])
  if ask is not None and not set(bm25s.terms(ask)) & set(index.vocabulary):
    raise ValueError(f"ask={ask!r}: no document has any of its terms")
  lengths = (index.lengths / index.lengths.mean()).astype(np.float32)
  first = {"k1": math.log(k1), "b": math.log(b / (1 - b)), "sharpness": 0.0}

  def init(key: Key) -> Params:
    del key
    return {name: jnp.float32(value) for name, value in first.items()}

  def score(params: Params, batch: Batch) -> Array:
    k, slope = jnp.exp(params["k1"]), jax.nn.sigmoid(params["b"])
    norm = k * (1 - slope + slope * jnp.asarray(lengths))
    counts = batch["counts"].astype(jnp.float32)
    return jnp.einsum("qt,qtd->qd", batch["idf"], counts / (counts + norm[None, None]))

  present = np.ones(len(found.texts), bool)

  def objective(params: Params, scores: Array, batch: Batch) -> Array:
    sharp = jnp.exp(params["sharpness"]) * scores
    each = jax.vmap(lambda s, y: ranking.LOSSES["listnet"](s, y, jnp.asarray(present), 0))
    return sampling.mean(each(sharp, batch["relevance"]), batch)

  def loss(params: Params, batch: Batch, key: Key) -> Array:
    del key
    return objective(params, score(params, batch), batch)

  def evaluate(params: Params, batch: Batch) -> dict[str, Array]:
    scores = score(params, batch)
    of_query = jax.vmap(lambda s, y: ranking.metrics(s, y, jnp.asarray(present)))
    metrics = of_query(scores, batch["relevance"])
    found = {name: sampling.mean(values, batch) for name, values in metrics.items()}
    tuned = {"k1": jnp.exp(params["k1"]), "b": jax.nn.sigmoid(params["b"])}
    return {"loss": objective(params, scores, batch)} | found | tuned

  def measure(params: Params) -> dict[str, Array]:
    of_own = {name: jnp.asarray(leaf) for name, leaf in asked.items() if name in ("idf", "counts")}
    return {"found": 1 + jnp.argmax(score(params, of_own)[0])}

  examples = _postings(index, found)
  asked = _postings(index, found._replace(queries=[ask])) if ask else {}
  train, test = ({k: v[half::2] for k, v in examples.items()} for half in (0, 1))
  task = Task(init, loss, evaluate, sampling.epoch_sample, sampling.take, train, test)
  return task._replace(chunk=16, measure=measure) if ask else task._replace(chunk=16)


def cranfield(
  loss: str = "lambdarank",
  features: Sequence[str] = FEATURES,
  k1: float = bm25s.K1,
  b: float = bm25s.B,
  l2: float = 0.0,
  *,
  model: Callable[[int], nn.Module] = Default("model", "linear()"),
  data_dir: str = "",
) -> Task:
  """Learns to rank all 1400 Cranfield documents for each query; see `ranking.ranked`.

  Args:
    loss: the name of the loss, "pairwise", "listnet" or "lambdarank".
    features: any of "bm25", the BM25 score of the full text; "title", the BM25 score of the title;
      "prior", the logarithm of the PageRank on links from each document to the eight most similar
      ones (see `prior`); and "length", the logarithm of the number of terms. Each feature is
      standardized over all pairs of a training query and a document.
    k1: the parameter k1 of the BM25 scores; see `bm25.scores`.
    b: the parameter b of the BM25 scores.
    l2: the weight of the penalty l2/2 ||params||^2.
    model: a function that makes the module for one output.
    data_dir: the folder to search first; see `files.find`.

  Raises:
    FileNotFoundError: if a file is not found and cannot be downloaded.
    ValueError: if a feature or loss is unknown, or a number is out of range.
  """
  if not features or set(features) - set(FEATURES):
    raise ValueError(f"features={list(features)} are not some of {', '.join(FEATURES)}")
  found = load(data_dir)
  queries = [bm25s.terms(query) for query in found.queries]
  whole, titles = ([bm25s.terms(t) for t in kind] for kind in (found.texts, found.titles))
  index = bm25s.index(whole)
  shape = found.relevance.shape
  columns = {
    "bm25": lambda: bm25s.scores(index, queries, k1, b),
    "title": lambda: bm25s.scores(bm25s.index(titles), queries, k1, b),
    "prior": lambda: np.broadcast_to(np.log(prior(index)), shape),
    "length": lambda: np.broadcast_to(np.log1p(index.lengths), shape),
  }
  x = np.stack([columns[name]() for name in features], -1)
  x = (x - x[::2].mean((0, 1))) / x[::2].std((0, 1))
  examples = {
    "x": x.astype(np.float32),
    "relevance": found.relevance,
    "present": np.ones(shape, bool),
    "y": found.relevance.max(1),
  }
  train, test = ({name: leaf[half::2] for name, leaf in examples.items()} for half in (0, 1))
  task = ranking.ranked(model(1), train, test, loss=loss, l2=l2)
  return task._replace(chunk=8)


def prior(index: bm25s.Index, neighbours: int = 8, alpha: float = 0.85) -> np.ndarray:
  """Computes the documents' centrality [D]: the PageRank on links to the most similar documents.

  The similarity of two documents is the cosine of their TF-IDF vectors.

  Args:
    index: the index of the documents.
    neighbours: the number of links per document.
    alpha: the probability of following a link.

  Reference: Erkan, Radev, 2004, LexRank, JAIR 22; here with links to the nearest documents, not to
  all above a threshold.
  """
  weights = index.counts.copy()
  weights.data = weights.data * index.idf[weights.indices]
  norms = np.sqrt(np.asarray(weights.multiply(weights).sum(1)).ravel())
  unit = sparse.diags_array(1 / np.maximum(norms, 1e-12)) @ weights
  cosine = (unit @ unit.T).toarray()
  np.fill_diagonal(cosine, -1)
  nearest = np.argsort(-cosine, 1, kind="stable")[:, :neighbours]
  count = len(cosine)
  ends = nearest.ravel(), np.repeat(np.arange(count), nearest.shape[1])
  walk = sparse.csr_array((np.full(len(ends[0]), 1 / nearest.shape[1]), ends), (count, count))
  x = np.full(count, 1 / count)
  for _ in range(200):  # 0.85^200 = 1e-14
    x = alpha * (walk @ x) + (1 - alpha) / count
  return np.asarray(x)


def _postings(index: bm25s.Index, found: Collection) -> Batch:
  """Returns "idf" [Q, T], multiplied by the query's term counts, and "counts" [Q, T, D]."""
  queries = [bm25s.terms(query) for query in found.queries]
  known = [[index.vocabulary[t] for t in query if t in index.vocabulary] for query in queries]
  unique = [np.unique(np.array(c, np.int64), return_counts=True) for c in known]
  most, documents = max(len(columns) for columns, _ in unique), len(index.lengths)
  by_term = index.counts.tocsc()
  counts, idf = np.zeros((len(known), most, documents), np.uint8), np.zeros((len(known), most))
  for row, (columns, times) in enumerate(unique):
    counts[row, : len(columns)] = by_term[:, columns].toarray().T
    idf[row, : len(columns)] = times * index.idf[columns]
  relevance = found.relevance
  return {
    "counts": counts,
    "idf": idf.astype(np.float32),
    "relevance": relevance,
    "y": relevance.max(1),
  }


def _records(text: str) -> list[str]:
  """Splits a file into records at its .I lines."""
  return re.split(r"(?m)^\.I +\d+ *\n", text.replace("\r\n", "\n"))[1:]


def _fields(record: str) -> dict[str, str]:
  """Returns the fields of a record by letter; only the first if a field is repeated."""
  parts = re.split(r"(?m)^\.([A-Z]) *\n", record)
  found: dict[str, str] = {}
  for name, content in zip(parts[1::2], parts[2::2], strict=True):
    found.setdefault(name, content.strip())
  return found
