"""The graph network: no numbering of nodes, no padding and no list of rows changes its outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core import registry
from research.models import graph_network

WIDTH, OUTPUTS = 8, 3
MODULE = graph_network.graph_network(WIDTH, layers=2)(OUTPUTS)
APPLY = jax.jit(MODULE.apply)


@pytest.fixture(autouse=True)
def strict():
  with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
    yield


def graphs(sizes=(5, 1, 4, 7), atoms=9, slots=5, seed=0):
  """Random trees with random bits of features, which for atoms and bonds are never all zero."""
  rng = np.random.default_rng(seed)
  x = {
    "atoms": np.zeros((len(sizes), atoms, 2), np.uint8),
    "bonds": np.zeros((len(sizes), atoms, slots, 1), np.uint8),
    "neighbours": np.zeros((len(sizes), atoms, slots), np.uint8),
  }
  for row, size in enumerate(sizes):
    x["atoms"][row, :size] = rng.integers(1, 256, (size, 2))
    used = [0] * size
    for node in range(1, size):
      parent = min(range(node), key=lambda n: used[n])
      code = rng.integers(1, 256)
      for here, there in ((node, parent), (parent, node)):
        x["bonds"][row, here, used[here]] = code
        x["neighbours"][row, here, used[here]] = there
        used[here] += 1
  return x


@pytest.fixture(scope="module")
def params():
  shapes = jax.eval_shape(MODULE.init, jax.random.key(0), graphs())
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda s: rng.normal(0, 0.3, s.shape).astype(np.float32), shapes)


def outputs(params, x):
  return np.asarray(APPLY(params, x))


def close(got, wanted):
  np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_permuting_atoms_and_bonds_changes_nothing(params):
  x, rng = graphs(), np.random.default_rng(1)
  other = {name: np.zeros_like(leaf) for name, leaf in x.items()}
  for row in range(4):
    order = rng.permutation(9)  # also moves padding between atoms
    place = np.argsort(order)
    slots = rng.permutation(5)
    other["atoms"][row] = x["atoms"][row][order]
    other["bonds"][row] = x["bonds"][row][order][:, slots]
    other["neighbours"][row] = place[x["neighbours"][row][order][:, slots]]
  assert not np.array_equal(other["atoms"], x["atoms"])
  close(outputs(params, other), outputs(params, x))


def test_padding_changes_nothing(params):
  x, wide = graphs(), graphs(atoms=20, slots=8)
  rng = np.random.default_rng(2)
  loose = wide["bonds"][..., 0] == 0
  wide["neighbours"][loose] = rng.integers(0, 20, loose.sum())  # of bonds that are not there
  close(outputs(params, wide), outputs(params, x))
  one = {name: leaf[1:2] for name, leaf in x.items()}
  close(outputs(params, one), outputs(params, x)[1:2])


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.1, 0.3, 0.9])
def test_rows_without_padding_give_the_same(params, share, monkeypatch):
  """For batches that fill little, some, and most of their padding; the gradients too."""
  sizes = np.random.default_rng(3).permutation(
    [round(2 * share * 9 * k / 32) + 1 for k in range(32)]
  )
  x = graphs([min(int(size), 9) for size in sizes])
  loss = lambda params, x: jnp.sum(jnp.asarray(MODULE.apply(params, x)) ** 2)
  wanted = jax.value_and_grad(loss)(params, x)
  monkeypatch.setattr(graph_network, "FEW", 1)
  got = jax.value_and_grad(loss)(params, x)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
    close(a, np.asarray(b))


def test_messages_against_a_loop(params):
  x, p = graphs((5,)), params["params"]
  bits = lambda packed: np.unpackbits(packed, axis=-1).astype(np.float32)
  normed = lambda h: h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-6)
  relu = lambda v: np.maximum(v, 0)
  h = bits(x["atoms"][0, :5]) @ p["atom"] + p["atom_bias"]
  for i in range(2):
    message = np.zeros_like(h)
    for v in range(5):
      for k in range(5):
        if x["bonds"][0, v, k].any():
          bond = bits(x["bonds"][0, v, k]) @ p["bond"]
          message[v] += h[x["neighbours"][0, v, k]] + bond
    inner = relu(normed(h + message) @ p[f"in_{i}"] + p[f"in_bias_{i}"])
    h = h + inner @ p[f"out_{i}"]
  nodes = relu(normed(h) @ p["readout"] + p["readout_bias"])
  pooled = np.concatenate([nodes.sum(0) / graph_network.SIZE, nodes.mean(0)])
  hidden = relu(pooled @ p["hidden"]["kernel"] + p["hidden"]["bias"])
  close(outputs(params, x)[0], hidden @ p["output"]["kernel"] + p["output"]["bias"])


@pytest.mark.slow
def test_dropout_needs_a_key_only_in_training():
  module = registry.build("model", "graph_network(8, layers=1, dropout=0.5)")(2)
  params = module.init(jax.random.key(0), graphs())
  still = [module.apply(params, graphs()) for _ in range(2)]
  assert np.array_equal(*still)
  rngs = {"dropout": jax.random.key(1)}
  assert not np.array_equal(module.apply(params, graphs(), train=True, rngs=rngs), still[0])


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: graph_network.graph_network(0), "width=0 is not a positive integer"),
    (lambda: graph_network.graph_network(8, layers=0), "layers=0 is not a positive integer"),
    (lambda: graph_network.graph_network(8, dropout=1.0), r"dropout=1.0 is not in \[0, 1\)"),
    (
      lambda: MODULE.init(jax.random.key(0), np.zeros((2, 4), np.float32)),
      "graph_network reads graphs",
    ),
  ],
)
def test_refusals(call, message):
  with pytest.raises(ValueError, match=message):
    call()
