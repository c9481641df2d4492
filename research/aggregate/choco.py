"""Implements CHOCO: neighbours average their values by exchanging only compressed differences."""

from dataclasses import KW_ONLY
from typing import NamedTuple

import jax
import optax

from research.aggregate.coded_gossip import CodedGossip
from research.aggregate.presence import need_everyone
from research.core import checks
from research.core.base import EVERYONE, Aggregate, Array, Key, Trait, Tree


class ChocoState(NamedTuple):
  known: Tree  # x_hat_i, the estimate of this worker's value that its neighbours have
  pull: Tree  # s_i - x_hat_i = sum_j w_ij (x_hat_j - x_hat_i)


class Choco(CodedGossip, name="choco"):
  """Averages by compressed gossip, which converges linearly to the exact mean.

      q_i = C(x_i - x_hat_i)
      x_hat_i <- x_hat_i + q_i,   s_i <- s_i + sum_j w_ij q_j
      value_i = x_i + gamma (s_i - x_hat_i)

  A worker sends the payload of q_i over each of its links. For any number of links, it stores two
  trees: x_hat_i and s_i - x_hat_i. The second tree accumulates the rounding errors of the early,
  large terms. In float32, the squared disagreement therefore stops decreasing at about 1e-7 of its
  initial value; with --x64, it decreases further. `d_psgd(sgd(...), choco(...))` is CHOCO-SGD,
  algorithm 2 of the paper.

  Args:
    compressor: a contractive compressor, or an unbiased compressor with small variance.
    topology: an undirected graph that is the same in each round.
    gamma: the consensus step size, in (0, 1]; aggressive compression needs a small gamma.
    axis: the worker axes of the exchange.

  Raises:
    ValueError: if gamma is not in (0, 1], the compressor is not contractive, or the topology is
      directed or varies from round to round.

  Reference: Koloskova, Stich, Jaggi 2019, arXiv 1902.00340, algorithm 1, in its memory-efficient
    form.
  """

  _: KW_ONLY
  gamma: float
  adds = Trait.LOCAL | Trait.MEMORY

  def check(self):
    checks.in_range("gamma", self.gamma, "(0, 1]")
    if not self.compressor.contractive:
      raise ValueError("choco needs a contractive compressor")
    if not self.topology.symmetric or self.topology.varying:
      raise ValueError(
        f"choco stores a sum over its neighbours, but '{self.topology.title}' is directed or "
        "varies; use ring, torus, complete, star, or symmetric weights"
      )

  def init(self, params):
    zeros = optax.tree.zeros_like(params)
    return ChocoState(zeros, zeros)

  def aggregate(self, tree, state, key, presence=EVERYONE):
    need_everyone("choco", presence)
    leaves, treedef = jax.tree.flatten(tree)
    keys = [jax.random.fold_in(key, leaf) for leaf in range(len(leaves))]
    memory = treedef.flatten_up_to(state.known), treedef.flatten_up_to(state.pull)
    results = [self._one(*args) for args in zip(leaves, *memory, keys, strict=True)]
    value, known, pull = (treedef.unflatten([r[i] for r in results]) for i in range(3))
    return Aggregate(value, known, ChocoState(known, pull))

  def _one(self, x: Array, known: Array, pull: Array, key: Key) -> tuple[Array, Array, Array]:
    """Returns the value of a leaf, and its new x_hat_i and s_i - x_hat_i."""
    change, far = self.drawn(x - known, pull, key)
    return (x + self.gamma * far).astype(x.dtype), known + change, far.astype(x.dtype)


choco = Choco
