"""Averages among neighbours: what the papers prove of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.aggregate.choco import choco
from research.aggregate.gossip import gossip, push_sum
from research.aggregate.quantized_gossip import q1_gossip, q2_gossip
from research.comm import topology
from research.comm.mixing import gap_of, mixing, spectral_gap
from research.comm.topology import Topology
from research.compress.quantize import int8, qsgd
from research.compress.sparsify import top_k
from research.core.base import Aggregator


def one_way(count: int) -> Topology:
  """Links that go one way round, with weights that favour some workers."""
  i = np.arange(count)
  matrix = np.zeros((count, count))
  matrix[i, i] = 0.4 + 0.4 * i / count
  matrix[(i + 1) % count, i] = 0.5 * (1 - matrix[i, i])
  matrix[(i + 3) % count, i] += 0.5 * (1 - matrix[i, i])
  return topology.weights(matrix.tolist(), directed=True)


def iterated(aggregator: Aggregator, x: np.ndarray, rounds: int) -> np.ndarray:
  """The values [rounds, W, n] of averaging again and again."""

  def one(x):
    def again(carry, key):
      value, _, state = aggregator.aggregate(carry[0], carry[1], key)
      return (value, state), value

    keys = jax.random.split(jax.random.key(0), rounds)
    return jax.lax.scan(again, (x, aggregator.init(x)), keys)[1]

  return np.asarray(jax.jit(jax.vmap(one, axis_name="data", out_axes=1))(x), np.float64)


def spread_of(values: np.ndarray, x: np.ndarray) -> np.ndarray:
  """How far values [..., W, n] lie from the mean of x [W, n], relative to x."""
  mean = x.mean(0, dtype=np.float64)
  return np.linalg.norm(values - mean, axis=(-2, -1)) / np.linalg.norm(x - mean)


@pytest.mark.parametrize("count", [8, 25])
def test_gossip_contracts_by_the_spectral_gap(count):
  """At that rate exactly along the slowest direction, at least so fast along any other."""
  graph = topology.ring()
  rate = 1 - spectral_gap(mixing(graph, count))
  slowest = np.cos(2 * np.pi * np.arange(count) / count)[:, None]
  x = np.random.default_rng(0).normal(1, 1, size=(count, 5))
  x = np.hstack([slowest, x]).astype(np.float32)
  values = iterated(gossip(graph), x, 10)
  k = np.arange(1, 11)
  np.testing.assert_allclose(spread_of(values[..., :1], x[:, :1]), rate**k, rtol=1e-4)
  assert (spread_of(values[..., 1:], x[:, 1:]) <= rate**k + 1e-6).all()
  np.testing.assert_allclose(values.mean(1), np.tile(x.mean(0), (10, 1)), atol=1e-6)


def test_doubles_keep_their_digits():
  x = np.random.default_rng(0).standard_normal((8, 5))
  with jax.enable_x64(True):
    found = iterated(gossip(topology.ring()), x, 300)[-1]
  assert np.abs(found - x.mean(0)).max() < 1e-13


def test_a_period_of_one_peer_graphs_is_the_mean():
  x = np.random.default_rng(1).normal(size=(8, 5)).astype(np.float32)
  values = iterated(gossip(topology.one_peer_exponential()), x, 3)
  assert spread_of(values[1], x) > 0.1
  assert spread_of(values[2], x) <= 1e-6


def test_push_sum_is_exact_on_a_directed_graph():
  """Where plain averaging with the same weights, rows scaled to one, finds another consensus."""
  x = np.random.default_rng(2).normal(size=(8, 5)).astype(np.float32)
  graph = one_way(8)
  assert spread_of(iterated(push_sum(graph), x, 100)[-1], x) <= 1e-6
  matrix = mixing(graph, 8)[0]
  rows = np.linalg.matrix_power(matrix / matrix.sum(1, keepdims=True), 100)
  assert spread_of(rows @ x, x) > 0.01


@pytest.mark.parametrize(
  ("compressor", "gamma", "rounds"),
  [(int8(), 1.0, 60), (qsgd(7, bucket=16), 0.6, 100), (top_k(0.25), 0.3, 200)],
  ids=["int8", "qsgd", "top_k"],
)
def test_choco_converges_where_compressed_gossip_stalls(compressor, gamma, rounds):
  """Linearly to the exact mean; gossip of compressed values stays at their error."""
  graph, like = topology.ring(), jax.ShapeDtypeStruct((32,), jnp.float32)
  x = np.random.default_rng(3).normal(size=(8, 32)).astype(np.float32)
  matrix = jnp.asarray(mixing(graph, 8)[0], jnp.float32)

  def naive(x, key):
    coded = lambda x, own: compressor.decode(compressor.encode(x, key, own), like, key)
    heard = jax.vmap(coded)(x, jax.random.split(key, 8))
    return x + gamma * (matrix @ heard - heard), None

  keys = jax.random.split(jax.random.key(1), rounds)
  stalled = jax.jit(lambda x: jax.lax.scan(naive, x, keys)[0])
  spread = spread_of(iterated(choco(compressor, graph, gamma=gamma), x, rounds), x)
  assert spread[rounds // 2 - 1] <= 5e-3
  assert spread[-1] <= 1e-5
  assert spread_of(np.asarray(stalled(x)), x) >= 1e-3


@pytest.mark.parametrize("make", [q1_gossip, q2_gossip])
def test_gossip_of_values_stays_at_their_error(make):
  """Also when it starts from the mean; the second scheme at least keeps the mean of all."""
  x = np.random.default_rng(3).normal(size=(8, 32)).astype(np.float32)
  values = iterated(make(int8(), topology.ring()), x, 100)
  settled = spread_of(values[50:], x)
  assert (settled >= 1e-3).all()
  assert settled.max() <= 0.1
  moved = np.abs(values.mean(1) - x.mean(0, dtype=np.float64)).max()
  assert moved >= 1e-3 if make is q1_gossip else moved <= 1e-5


@pytest.mark.parametrize("make", [q1_gossip, q2_gossip])
def test_gossip_of_values_equals_numpy(make):
  x = np.random.default_rng(4).normal(size=(6, 8)).astype(np.float32)
  w = mixing(topology.star(), 6)[0]
  values = iterated(make(top_k(0.25), topology.star()), x, 2)
  for t in range(2):
    sent = np.zeros((6, 8))
    for i, held in enumerate(x):
      largest = np.argsort(-np.abs(held))[:2]
      sent[i, largest] = held[largest]
    origin = x if make is q1_gossip else sent
    neighbours = w - np.diag(np.diag(w))
    x = x + neighbours @ sent - neighbours.sum(1, keepdims=True) * origin
    np.testing.assert_allclose(values[t], x, atol=1e-6)


def test_choco_equals_numpy():
  """Algorithm 1, where every worker keeps x_hat of each neighbour; for three rounds."""
  x = np.random.default_rng(4).normal(size=(6, 8)).astype(np.float32)
  w = mixing(topology.star(), 6)[0]
  values = iterated(choco(top_k(0.25), topology.star(), gamma=0.4), x, 3)
  x_hat = np.zeros((6, 8))
  for t in range(3):
    q = np.zeros((6, 8))
    for i, missing in enumerate(x - x_hat):
      largest = np.argsort(-np.abs(missing))[:2]
      q[i, largest] = missing[largest]
    x_hat = x_hat + q
    x = x + 0.4 * np.stack(
      [sum(w[i, j] * (x_hat[j] - x_hat[i]) for j in range(6)) for i in range(6)]
    )
    np.testing.assert_allclose(values[t], x, atol=1e-6)


@pytest.mark.parametrize(
  ("make", "words"),
  [
    (lambda: gossip(one_way(4)), "use push_sum"),
    (
      lambda: choco(int8(), topology.one_peer_exponential(), gamma=0.5),
      "'one_peer_exponential' is directed",
    ),
    (lambda: choco(int8(), topology.ring(), gamma=0.0), "gamma=0.0"),
    (lambda: choco(qsgd(1), topology.ring(), gamma=0.5), "contractive"),
    (lambda: q1_gossip(int8(), topology.one_peer_exponential()), "q1_gossip takes a graph"),
    (lambda: q2_gossip(int8(), one_way(4)), "q2_gossip takes a graph"),
  ],
)
def test_what_makes_no_sense_is_refused(make, words):
  with pytest.raises(ValueError, match=words):
    make()


def test_random_pairs_contract_in_the_mean_square_by_their_gap():
  """Each round is one of the matchings; their mean contraction is that of any random pairs."""
  graph, x = topology.random_pairs(), np.random.default_rng(5).normal(size=(8, 5))
  values = iterated(gossip(graph), x.astype(np.float32), 60)
  after = np.stack([w @ x for w in mixing(graph, 8)])
  distances = np.sort(np.abs(after - values[0]).max((1, 2)))
  assert distances[0] < 1e-6 < 1e-2 < distances[1]
  assert spread_of(values[-1], x) < 1e-4
  assert gap_of(graph, 8) == pytest.approx(8 / 14)
  assert gap_of(graph, 9) == pytest.approx(1 / 2)
  np.testing.assert_allclose(np.square(spread_of(after, x)).mean(), 6 / 14)
