"""Passes messages over the edges of padded graphs, such as the atoms and bonds of molecules."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from research.core import checks
from research.core.base import Array, Params
from research.core.task import Batch

# Numbers of rows for the nodes of a batch, as fractions of the padded size; the smallest sufficient
# number is used. The nodes of molecules fill an eighth to a quarter of their padding.
FILLED = (3 / 16, 5 / 16)
FEW = 512  # minimum number of padded nodes for which it is faster to leave out the padding
SIZE = 16.0  # typical number of nodes, by which sums over nodes are divided


def graph_network(
  width: int = 128, layers: int = 3, dropout: float = 0.0
) -> Callable[[int], nn.Module]:
  """Builds a message-passing network for graphs whose nodes and edges have binary features.

      m_v = sum over edges (v, u) of h_u + W e_vu
      h_v <- h_v + U relu(V norm(h_v + m_v))

  Here, norm divides a vector by its root mean square. A perceptron with one hidden layer computes
  the outputs from the sum and the mean of relu(R norm(h_v)) over the nodes. The outputs depend
  neither on the order of the nodes nor on the padding.

  The input is a dictionary as in the task `molecules`: "atoms" uint8 [batch, A, F] and "bonds"
  uint8 [batch, A, K, G] contain the packed bits of the features, and "neighbours" [batch, A, K]
  contains the index of the node at the other end of each edge. Nodes and edges of which no bit is
  set are padding.

  Args:
    width: the length of the vectors h and m.
    layers: the number of message-passing steps.
    dropout: the probability that an entry of the hidden layer is set to zero in training.

  Returns:
    A function that makes the module for a given number of outputs.

  Raises:
    ValueError: if width or layers is not a positive integer, or dropout is not in [0, 1).

  Reference: Gilmer, Schoenholz, Riley, Vinyals, Dahl, 2017, arXiv:1704.01212; messages as in Hu et
    al., 2019, arXiv:1905.12265.
  """
  checks.positive_integer("width", width)
  checks.positive_integer("layers", layers)
  checks.in_range("dropout", dropout, "[0, 1)")
  return lambda outputs: GraphNetwork(outputs, width, layers, dropout)


class GraphNetwork(nn.Module):
  """Passes messages, computes the sum and the mean over nodes, and applies a perceptron."""

  outputs: int
  width: int
  layers: int
  dropout: float

  reads = "graphs"

  @nn.compact
  def __call__(self, x: Batch, train: bool = False) -> Array:
    if not isinstance(x, dict) or {"atoms", "bonds", "neighbours"} - set(x):
      raise ValueError("graph_network reads graphs: atoms, bonds and neighbours, see `molecules`")
    x = {name: jnp.asarray(leaf) for name, leaf in x.items()}
    sums, counts = _sums_over_nodes(self._weights(x), x)
    pooled = jnp.concatenate([sums / SIZE, sums / jnp.maximum(counts, 1)], axis=1)
    he = nn.initializers.he_normal()
    hidden = nn.relu(nn.Dense(self.width, kernel_init=he, name="hidden")(pooled))
    hidden = nn.Dropout(self.dropout, deterministic=not train)(hidden)
    return nn.Dense(self.outputs, name="output")(hidden)

  def _weights(self, x: Batch) -> Params:
    """Returns the matrices of message passing."""
    he, zeros, width = nn.initializers.he_normal(), nn.initializers.zeros_init(), self.width
    bits = lambda name: 8 * x[name].shape[-1]
    matrix = lambda name, rows, init=he: self.param(name, init, (rows, width))
    vector = lambda name: self.param(name, zeros, (width,))
    found = {
      "atom": matrix("atom", bits("atoms")),
      "atom_bias": vector("atom_bias"),
      "bond": matrix("bond", bits("bonds")),
      "readout": matrix("readout", width),
      "readout_bias": vector("readout_bias"),
    }
    for i in range(self.layers):
      found[f"in_{i}"] = matrix(f"in_{i}", width)
      found[f"in_bias_{i}"] = vector(f"in_bias_{i}")
      found[f"out_{i}"] = matrix(f"out_{i}", width)
    return found


class _Nodes(NamedTuple):
  """Contains the nodes of a batch of graphs as one list of M rows, of which some may be padding."""

  atoms: Array  # uint8 [M, F], packed bits
  bonds: Array  # uint8 [M, K, G]
  neighbours: Array  # int32 [M, K], row numbers in this list
  sums: Callable[[Array], Array]  # values [M, width] -> their sums over each graph


def _sums_over_nodes(weights: Params, x: Batch) -> tuple[Array, Array]:
  """Returns each graph's sum over nodes, [batch, width], and number of nodes, [batch, 1]."""
  there = jnp.any(x["atoms"] != 0, axis=-1)
  counts = jnp.sum(there, axis=1, keepdims=True).astype(jnp.float32)
  padded = there.size
  of_all = lambda weights: _passed(weights, _all_rows(x))
  if padded < FEW:
    return of_all(weights), counts
  sizes = [round(share * padded) for share in FILLED]
  branches = [lambda w, rows=rows: _passed(w, _filled_rows(x, there, rows)) for rows in sizes]
  place = jnp.sum(jnp.sum(there) > jnp.array(sizes))
  # each branch recomputes its residuals: otherwise, those of all branches would be stored
  return lax.switch(place, [jax.checkpoint(b) for b in (*branches, of_all)], weights), counts


def _all_rows(x: Batch) -> _Nodes:
  """Returns all nodes, including padding."""
  batch, most = x["atoms"].shape[:2]
  first = most * jnp.arange(batch)[:, None, None]
  flat = lambda leaf: leaf.reshape(batch * most, *leaf.shape[2:])
  neighbours = flat(x["neighbours"].astype(jnp.int32) + first)
  sums = lambda values: values.reshape(batch, most, -1).sum(1)
  return _Nodes(flat(x["atoms"]), flat(x["bonds"]), neighbours, sums)


def _filled_rows(x: Batch, there: Array, rows: int) -> _Nodes:
  """Returns all nodes in `rows` rows; `rows` must be at least the number of nodes."""
  batch, most = there.shape
  every = _all_rows(x)
  row_of = jnp.cumsum(there.reshape(-1)) - 1  # row of each node
  source = jnp.argsort(~there.reshape(-1), stable=True)[:rows]  # node of each row
  neighbours = jnp.maximum(row_of[every.neighbours[source]], 0)
  graph = (source // most)[None]
  member = (graph == jnp.arange(batch)[:, None]).astype(jnp.float32)
  return _Nodes(every.atoms[source], every.bonds[source], neighbours, lambda v: member @ v)


def _passed(weights: Params, nodes: _Nodes) -> Array:
  """Passes messages and returns the sum over the nodes of each graph, [batch, width]."""
  bits = lambda packed: jnp.unpackbits(packed, axis=-1).astype(jnp.float32)
  exists = jnp.any(nodes.atoms != 0, axis=-1)[:, None]
  connected = jnp.any(nodes.bonds != 0, axis=-1)[..., None]
  edges = jnp.sum(bits(nodes.bonds), axis=1) @ weights["bond"]
  h = bits(nodes.atoms) @ weights["atom"] + weights["atom_bias"][None]
  layer = 0
  while f"in_{layer}" in weights:
    messages = jnp.sum(jnp.where(connected, h[nodes.neighbours], 0), axis=1) + edges
    inner = _normed(h + messages) @ weights[f"in_{layer}"]
    h = h + nn.relu(inner + weights[f"in_bias_{layer}"][None]) @ weights[f"out_{layer}"]
    layer += 1
  values = nn.relu(_normed(h) @ weights["readout"] + weights["readout_bias"][None])
  return nodes.sums(jnp.where(exists, values, 0))


def _normed(h: Array) -> Array:
  return h * lax.rsqrt(jnp.mean(h**2, axis=-1, keepdims=True) + 1e-6)
