"""Graphs of workers: their weights, their gaps, and what is exchanged along their links."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from research.analysis import wire
from research.comm import mesh as meshes
from research.comm import neighbours, topology
from research.comm.mixing import describe, mixing, spectral_gap
from research.comm.topology import Topology

# column-stochastic, nobody's rows sum to one, and its links go one way round
ONE_WAY = [[0.5, 0.3, 0.0], [0.0, 0.7, 0.2], [0.5, 0.0, 0.8]]
TOPOLOGIES = {
  "ring": topology.ring(),
  "torus": topology.torus(),
  "complete": topology.complete(),
  "star": topology.star(),
  "exponential": topology.exponential(),
  "one_peer_exponential": topology.one_peer_exponential(),
  "random_pairs": topology.random_pairs(),
}
LINKS = {
  "ring": 2,
  "torus": 3,
  "complete": 7,
  "star": 14 / 8,
  "exponential": 3,
  "random_pairs": 1,
}  # W = 8


@pytest.mark.parametrize("count", [1, 2, 3, 6, 8, 25])
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_weights_are_what_the_topology_says(name, count):
  graph = TOPOLOGIES[name]
  every = mixing(graph, count)
  assert every.min() >= 0
  np.testing.assert_allclose(every.sum(1), 1, atol=1e-12)
  np.testing.assert_allclose(every.sum(2), 1, atol=1e-12)
  assert not graph.symmetric or (every == every.swapaxes(1, 2)).all()
  assert graph.varying or len(every) == 1
  assert spectral_gap(every) > 0
  assert f"{name} of {count} workers" in describe(graph, count)


def test_gaps_are_the_known_ones():
  gap = lambda name, count: spectral_gap(mixing(TOPOLOGIES[name], count))
  for count in (8, 25, 64):
    assert gap("ring", count) == pytest.approx(2 / 3 * (1 - np.cos(2 * np.pi / count)))
    assert gap("complete", count) == pytest.approx(1)
    assert gap("star", count) == pytest.approx(1 / count)
  assert gap("exponential", 64) == pytest.approx(2 / 7)
  assert gap("one_peer_exponential", 64) == pytest.approx(1)
  per_axis = 2 / 5 * (1 - np.cos(2 * np.pi / 5))  # of a 5 x 5 torus
  assert gap("torus", 25) == pytest.approx(per_axis)


OWN = np.roll(np.eye(8), 3, 0) * 0.25 + 0.75 / 8
EIGHT = {**TOPOLOGIES, "weights": topology.weights(OWN.tolist())}


def mixed(shape: jax.Array, graphs: dict[str, Topology] = EIGHT) -> dict[str, jax.Array]:
  """sum_j w_ij x_j by every graph, in its last round."""

  def one(graph):
    shifts = graph.rounds(8)[-1]
    heard = neighbours.heard(shifts, shape)
    return neighbours.own_weight(shifts) * shape + sum(w * y for w, y in heard)

  return {name: one(graph) for name, graph in graphs.items()}


def spread(axes: dict[str, int]):
  mesh, rows = meshes.device_mesh(axes), P(tuple(axes))
  lead = lambda x: jax.tree.map(lambda y: y[None], mixed(x[0]))
  return jax.shard_map(lead, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)


def nested(inner: str, outer: str, axis: int):
  one = jax.vmap(jax.vmap(mixed, axis_name=inner), axis, axis, axis_name=outer)
  flat = lambda y: y.reshape(8, *y.shape[2:])
  return lambda x: jax.tree.map(flat, one(x.reshape(2, 4, *x.shape[1:])))


EXECUTIONS = {
  "vmap": jax.vmap(mixed, axis_name="data"),
  "over blocks too": jax.vmap(jax.vmap(mixed), axis_name="data"),
  "slices": nested("data", "slice", 0),
  "slices inside": nested("slice", "data", 1),
  "shard_map": spread({"data": 8}),
  "shard_map of slices": spread({"slice": 2, "data": 4}),
  "pmap": jax.pmap(mixed, "data"),
}


@pytest.mark.parametrize("name", EXECUTIONS)
def test_exchange_is_multiplication_by_the_matrix(name):
  x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
  got = (EXECUTIONS[name] if name == "pmap" else jax.jit(EXECUTIONS[name]))(x)
  for graph, value in got.items():
    want = mixing(EIGHT[graph], 8)[-1] @ x
    np.testing.assert_allclose(value, want, atol=1e-6, err_msg=graph)


def test_bytes_follow_the_links():
  x = jax.ShapeDtypeStruct((1000,), jnp.float32)
  for axes in ({"data": 8}, {"slice": 2, "data": 4}):
    for name, links in LINKS.items():
      found = wire.traffic(lambda x, n=name: mixed(x, {n: EIGHT[n]}), x, axes=axes)
      assert {t.operation for t in found} == {"permute"}
      assert wire.by_axis(found) == pytest.approx({"+".join(axes): links * 4000}), name


@pytest.mark.parametrize(
  ("matrix", "directed", "words"),
  [
    ([[0.5, 0.5]], False, "lengths"),
    ([[0.5, 0.5], [0.6, 0.5]], False, "column 0 of weights sums to 1.1, not 1"),
    (ONE_WAY, False, "row 0 of weights sums to 0.8, not 1; if only its columns .* directed=True"),
    ([[1.5, -0.5], [-0.5, 1.5]], False, "row 0, column 1 hold -0.5"),
    ([[float("nan"), 1], [1, 0]], False, "row 0, column 0 hold nan"),
    (
      np.kron(np.eye(2), np.full((2, 2), 0.5)).tolist(),
      False,
      "not connected: .* worker 2 to worker 0",
    ),
    ([[0.5, 0.0], [0.5, 1.0]], True, "not connected: .* worker 1 to worker 0"),
    ([[0, 1], [1, 0]], False, "spectral gap 0"),
  ],
)
def test_wrong_weights_are_refused(matrix, directed, words):
  with pytest.raises(ValueError, match=words):
    topology.weights(matrix, directed=directed)


def test_weights_know_what_they_are():
  one_way = topology.weights(ONE_WAY, directed=True)
  assert (one_way.symmetric, one_way.balanced) == (False, False)
  even = topology.weights(np.full((3, 3), 1 / 3).tolist())
  assert (even.symmetric, even.balanced) == (True, True)
  np.testing.assert_array_equal(mixing(one_way, 3)[0], ONE_WAY)
  with pytest.raises(ValueError, match="of 3 workers, and there are 8"):
    even.rounds(8)
