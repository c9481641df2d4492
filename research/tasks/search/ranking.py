"""Learns to rank; an example is a query with its documents and their relevance."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from research.core import checks
from research.core.base import Array, Key, Params
from research.core.registry import Default
from research.core.task import Batch, Task
from research.tasks import files, sampling

URL = "https://raw.githubusercontent.com/microsoft/LightGBM/master/examples/lambdarank/"
SHA256 = {
  "rank.train": "a0c7201c89120879c14a5059e091f441cbf2a29b8aaef363885ccb1a530448df",
  "rank.train.query": "40cb5fef637229311cd30fab13cb7fb633b023e86a87ff04ec55db420143d6af",
  "rank.test": "3b1219ce117a0a36d2f76c02de7e7831c1d79af0d40f5195c03178bbe26c824b",
  "rank.test.query": "36dca82ba3bf99201bac3987b00a8fbf6fe5f563e9fa6d0da90e783710a32df4",
}

CUTS = (1, 3, 5, 10)  # k of the NDCG@k metrics
ABSENT = -1e9  # score of padding


def rank(
  loss: str = "lambdarank",
  l2: float = 0.0,
  *,
  model: Callable[[int], nn.Module] = Default("model", "linear()"),
  data_dir: str = "",
) -> Task:
  """Learns to rank on LightGBM's example data: 201 training and 50 test queries, relevance 0 to 4.

  There are 300 features, each standardized by its mean and deviation over the training documents.
  For the losses and the metrics, see `ranked`.

  Args:
    loss: the name of the loss, "pairwise", "listnet" or "lambdarank".
    l2: the weight of the penalty l2/2 ||params||^2.
    model: a function that makes the module for one output; the module computes a document's score
      from its features.
    data_dir: the folder to search first; see `files.find`.

  Raises:
    FileNotFoundError: if a file is not found and cannot be downloaded.
    ValueError: if a file is not the published one, or loss or l2 is invalid.

  Reference: Ke et al., 2017, LightGBM, NeurIPS 30; the files are in its folder examples/lambdarank.
  """
  train, test = (load(part, data_dir) for part in ("rank.train", "rank.test"))
  present = train["x"][train["present"]]
  center, spread = present.mean(0), present.std(0)
  scale = np.where(spread > 0, spread, 1)
  for part in (train, test):
    part["x"] = np.where(part["present"][..., None], (part["x"] - center) / scale, 0)
    part["x"] = part["x"].astype(np.float32)
  return ranked(model(1), train, test, loss=loss, l2=l2)


def ranked(
  module: nn.Module, train: Batch, test: Batch | None, *, loss: str, l2: float = 0.0
) -> Task:
  """Returns the task of scoring documents so that a query's relevant documents come first.

  With scores s and relevances y, the objective is the mean over queries of one of

      pairwise    mean over pairs y_i > y_j of log(1 + exp(s_j - s_i))
      listnet     - sum_i softmax(y)_i log softmax(s)_i
      lambdarank  sum over pairs y_i > y_j of |Delta NDCG_ij| log(1 + exp(s_j - s_i)),
                  Delta NDCG_ij the change from swapping i and j in the current order, a constant

  plus l2/2 ||params||^2. `evaluate` returns "loss", "ndcg@k", "map" and "mrr", all averaged over
  queries. Ties are broken by the order of the documents. The metrics of a query without relevant
  documents are 1, as in LightGBM.

  Args:
    module: a module that maps features [n, F] to scores [n, 1].
    train: the training queries: features "x" [Q, D, F]; "relevance" [Q, D], integers from 0;
      "present" [Q, D], False for padding; and "y" [Q], by which partitions sort.
    test: the same arrays for the test queries.
    loss: the name of the loss.
    l2: the weight of the penalty, >= 0.

  Raises:
    ValueError: if the loss is unknown, l2 is negative, or a query has no documents.

  Reference: Burges et al., 2005, Learning to rank using gradient descent (RankNet); Cao et al.,
    2007, Learning to rank: from pairwise approach to listwise approach (ListNet, top one); Burges,
    2010, From RankNet to LambdaRank to LambdaMART, here with the loss of Wang et al., 2018, The
    LambdaLoss framework, section 4.2.
  """
  checks.one_of("loss", loss, LOSSES, cutoff=0.0)
  checks.at_least("l2", l2, 0)
  for examples in (train, test):
    if examples is not None and not examples["present"].any(1).all():
      number = int(np.flatnonzero(~examples["present"].any(1))[0])
      raise ValueError(f"query {number} of {len(examples['y'])} is empty: it has no documents")
  features = train["x"].shape[-1]
  counts = [(part["relevance"] > 0).sum(1).max() for part in (train, test) if part is not None]
  most = max(1, int(max(counts)))

  def init(key: Key) -> Params:
    return module.init(key, jnp.zeros((1, features)))["params"]

  def score(params: Params, batch: Batch) -> Array:
    flat = batch["x"].reshape(-1, features)
    found: Array = module.apply({"params": params}, flat)  # pyright: ignore[reportAssignmentType]
    return jnp.where(batch["present"], found.reshape(batch["present"].shape), ABSENT)

  def objective(params: Params, scores: Array, batch: Batch) -> Array:
    of_query = lambda s, y, there: LOSSES[loss](s, y, there, most)
    value = sampling.mean(jax.vmap(of_query)(scores, batch["relevance"], batch["present"]), batch)
    return value + l2 / 2 * sum(jnp.vdot(p, p) for p in jax.tree.leaves(params)) if l2 else value

  def batch_loss(params: Params, batch: Batch, key: Key) -> Array:
    del key
    return objective(params, score(params, batch), batch)

  def evaluate(params: Params, batch: Batch) -> dict[str, Array]:
    scores = score(params, batch)
    of_query = jax.vmap(metrics)(scores, batch["relevance"], batch["present"])
    found = {name: sampling.mean(values, batch) for name, values in of_query.items()}
    return {"loss": objective(params, scores, batch)} | found

  return Task(init, batch_loss, evaluate, sampling.epoch_sample, sampling.take, train, test)


def metrics(scores: Array, relevance: Array, present: Array) -> dict[str, Array]:
  """Computes the NDCG@k, the average precision and the reciprocal rank of one query's ranking.

  NDCG has gains 2^y - 1 and discounts 1/log2(rank + 1). For the other metrics, a document is
  relevant if its relevance is above 0.

  Args:
    scores: the documents' scores, [D].
    relevance: the documents' relevances, [D], integers from 0.
    present: a mask [D], False for padding.

  Reference: Järvelin, Kekäläinen, 2002, Cumulated gain-based evaluation of IR techniques.
  """
  ordered = _in_order(scores, relevance, present).astype(scores.dtype)
  best = jnp.sort(jnp.where(present, relevance, 0), descending=True).astype(scores.dtype)
  place = jnp.arange(1, len(scores) + 1).astype(scores.dtype)
  gain = lambda y, k: jnp.sum(jnp.where(place <= k, (2**y - 1) / jnp.log2(place + 1), 0))
  hit = (ordered > 0).astype(scores.dtype)
  any_, hits = jnp.max(hit) > 0, jnp.sum(hit)
  precision = jnp.sum(hit * jnp.cumsum(hit) / place) / jnp.maximum(hits, 1)
  found = {f"ndcg@{k}": gain(ordered, k) / jnp.maximum(gain(best, k), 1e-9) for k in CUTS}
  found |= {"map": precision, "mrr": jnp.max(hit / place)}
  return {name: jnp.where(any_, value, 1.0) for name, value in found.items()}


def _in_order(scores: Array, relevance: Array, present: Array) -> Array:
  """Sorts the relevances by descending score; padding comes last, with relevance 0."""
  scores = jnp.where(present, scores, ABSENT)
  return jnp.where(present, relevance, 0)[jnp.argsort(-scores, stable=True)]


def _pairs(scores: Array, relevance: Array, present: Array, most: int) -> tuple[Array, ...]:
  """Returns relevant documents i [R], whether y_i > y_j [R, D], and log(1 + exp(s_j - s_i)).

  Only relevant documents can have y_i > y_j, and a query has at most R = `most` of them.
  """
  ahead = jax.lax.top_k(jnp.where(present, relevance, 0), min(most, len(relevance)))[1]
  pairs = (relevance[ahead][:, None] > relevance[None]) & present[ahead][:, None] & present[None]
  return ahead, pairs, jax.nn.softplus(scores[None] - scores[ahead][:, None])


def _pairwise(scores: Array, relevance: Array, present: Array, most: int) -> Array:
  _, pairs, behind = _pairs(scores, relevance, present, most)
  return jnp.sum(jnp.where(pairs, behind, 0)) / jnp.maximum(jnp.sum(pairs), 1).astype(scores.dtype)


def _listnet(scores: Array, relevance: Array, present: Array, most: int) -> Array:
  del most
  wanted = jax.nn.softmax(jnp.where(present, relevance.astype(scores.dtype), ABSENT))
  return -jnp.sum(jnp.where(present, wanted * jax.nn.log_softmax(scores), 0))


def _lambdarank(scores: Array, relevance: Array, present: Array, most: int) -> Array:
  ahead, pairs, behind = _pairs(scores, relevance, present, most)
  fixed = jax.lax.stop_gradient(jnp.where(present, scores, ABSENT))
  place = jnp.argsort(jnp.argsort(-fixed, stable=True)).astype(scores.dtype) + 1
  discount, gain = 1 / jnp.log2(place + 1), 2 ** relevance.astype(scores.dtype) - 1
  best = jnp.sort(jnp.where(present, gain, 0), descending=True)
  ideal = jnp.sum(best / jnp.log2(jnp.arange(2, len(best) + 2).astype(scores.dtype)))
  apart = lambda x: x[ahead][:, None] - x[None]
  each = jnp.where(pairs, jnp.abs(apart(gain) * apart(discount)) * behind, 0)
  return jnp.sum(each) / jnp.maximum(ideal, 1e-9)


# (scores, relevance, present), each [D], and the maximum number of relevant documents -> loss
LOSSES: dict[str, Callable[[Array, Array, Array, int], Array]] = {
  "pairwise": _pairwise,
  "listnet": _listnet,
  "lambdarank": _lambdarank,
}


def padded(x: np.ndarray, relevance: np.ndarray, counts: np.ndarray) -> Batch:
  """Pads concatenated documents [N, F] to [Q, D, F], the format of `ranked`.

  A query's "y" is its highest relevance.

  Args:
    x: the features [N, F] of all queries' documents, query by query.
    relevance: the relevances of the documents, [N].
    counts: the number of documents per query, [Q].

  Raises:
    ValueError: if a query has no documents, or the counts do not add up to N.
  """
  if not (counts > 0).all() or counts.sum() != len(x):
    raise ValueError(f"counts from {counts.min()}, {counts.sum()} in all, of {len(x)} documents")
  present = np.arange(counts.max()) < counts[:, None]
  found = {
    "x": np.zeros((*present.shape, x.shape[1]), np.float32),
    "relevance": np.zeros(present.shape, np.int32),
  }
  found["x"][present], found["relevance"][present] = x, relevance
  return found | {"present": present, "y": found["relevance"].max(1)}


def load(part: str, data_dir: str) -> Batch:
  """Loads a file of LightGBM's ranking example, without scaling its features; see `rank`.

  Args:
    part: the name of the file, "rank.train" or "rank.test".
    data_dir: the folder of the files; "" means the default folders.
  """
  from sklearn.datasets import load_svmlight_file

  rows, counts = (
    files.find(f"lightgbm-lambdarank/{name}", data_dir, URL + name, SHA256[name])
    for name in (part, f"{part}.query")
  )
  x, y = load_svmlight_file(
    str(rows),
    n_features=301,
    zero_based=True,  # pyright: ignore[reportArgumentType]
  )[:2]
  with files.opened(counts) as file:
    of_query = np.array(file.read().split()).astype(int)
  return padded(x.toarray()[:, 1:], np.asarray(y).astype(int), of_query)
