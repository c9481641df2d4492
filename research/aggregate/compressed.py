"""Averages of compressed values: workers exchange payloads in the payloads' own dtypes."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from research.aggregate.chunks import cut, joined
from research.aggregate.link import compressed, leaf_keys, struct_of
from research.aggregate.presence import Roll, call_roll, unweighted, weighted
from research.aggregate.privacy.hiding import Sum, keeps_floats
from research.comm import collectives
from research.core.base import (
  EVERYONE,
  WORKER_AXES,
  Aggregate,
  Aggregator,
  Array,
  Chunk,
  Compressor,
  Key,
  Trait,
  Tree,
)


class SumMean(Aggregator, name="sum_mean"):
  """Averages the payloads of a linear compressor by one all-reduce, then decodes once.

      value = D(1/W sum_i C(x_i)) = 1/W sum_i D(C(x_i))

  Args:
    compressor: a linear compressor, such as random_k or count_sketch.
    axis: the worker axes to average over.

  Raises:
    ValueError: if the compressor is not linear.
  """

  compressor: Compressor
  axis: collectives.Axes = WORKER_AXES

  def check(self):
    if not self.compressor.linear:
      raise ValueError(
        "sum_mean adds payloads, which only a linear compressor allows (identity, random_k, "
        "count_sketch, hadamard of these); use gather_mean or two_phase"
      )

  @property
  def uplink(self):
    return compressed(self.compressor)

  @property
  def privacy(self):
    return Sum(self.axis) if keeps_floats(self.compressor) else None

  def aggregate(self, tree, state, key, presence=EVERYONE):
    value, sent = _leafwise(self._one, weighted(tree, presence), key)
    return Aggregate(value, sent, state)

  def _one(self, x: Array, key: Key) -> tuple[Array, Array]:
    payload = self.compressor.encode(x, key, collectives.worker_key(key, self.axis))
    decode = lambda p: self.compressor.decode(p, struct_of(x), key)
    return decode(collectives.mean(payload, self.axis)), decode(payload)


sum_mean = SumMean


class TwoPhase(Aggregator, name="two_phase"):
  """Runs a compressed reduce-scatter and a compressed all-gather; traffic does not grow with W.

  Each leaf is cut into W chunks. Worker j receives all encodings of chunk j, averages them, adds
  its memory m_j, encodes the sum and sends the result to all workers:

      c_j = 1/W sum_i D(C(x_i[j])) + m_j,   value[j] = D(C(c_j)),   m_j <- c_j - value[j]

  For any W, each worker sends 2 (W-1)/W times the size of the leaf's payload.

  Args:
    compressor: a contractive compressor, applied to chunks of ceil(n / W) elements.
    axis: the worker axes to average over.

  Raises:
    ValueError: if the compressor is not contractive, since the memory would grow without bound.

  Reference: Tang et al. 2019, arXiv 1905.05957 (DoubleSqueeze), algorithm 1, with the server's work
  distributed over the workers as in Tang et al. 2021, arXiv 2102.02888, section 5.
  """

  compressor: Compressor
  axis: collectives.Axes = WORKER_AXES

  def check(self):
    if not self.compressor.contractive:
      raise ValueError(
        "two_phase stores compression errors, which grow without bound if the compressor is not "
        "contractive (terngrad, qsgd of few levels, unbiased random_k, count_sketch); take "
        "gather_mean or sum_mean"
      )

  @property
  def traits(self):
    # even with a linear compressor, each phase has its own support
    return super().traits | (Trait.APART if self.compressor.sparse else Trait(0))

  def init(self, params):
    count = collectives.worker_count(self.axis)
    return jax.tree.map(lambda x: Chunk(jnp.zeros_like(cut(x, count)[0])), params)

  def aggregate(self, tree, state, key, presence=EVERYONE):
    leaves, treedef = jax.tree.flatten(weighted(tree, presence))
    memories = treedef.flatten_up_to(state)
    pairs = [jax.random.split(k) for k in leaf_keys(key, len(leaves))]
    first, second = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    payloads, sent = _unzip(map(self._encode_chunks, leaves, first))
    received = collectives.exchange(payloads, self.axis)
    answers, owed = _unzip(map(self._serve, leaves, received, memories, first, second))
    everyone = collectives.gather(answers, self.axis)
    values = map(self._put_together, leaves, everyone, memories, second)
    return Aggregate(*map(treedef.unflatten, (values, sent, owed)))

  def _encode_chunks(self, x: Array, key: Key) -> tuple[Tree, Array]:
    """Returns the payloads of a leaf's chunks, and the leaf that they decode to."""
    count = collectives.worker_count(self.axis)
    chunks = cut(x, count)
    shared = jax.random.split(key, count)
    own = jax.random.split(collectives.worker_key(key, self.axis), count)
    payload = jax.vmap(self.compressor.encode)(chunks, shared, own)
    sent = jax.vmap(lambda p, k: self.compressor.decode(p, struct_of(chunks[0]), k))(
      payload, shared
    )
    return payload, joined(sent, x)

  def _serve(self, x: Array, received: Tree, memory: Chunk, first: Key, second: Key):
    """Returns the encoded mean of this worker's chunk, and the chunk's updated memory."""
    count, mine = collectives.worker_count(self.axis), collectives.worker_index(self.axis)
    like, key = _chunk_like(x, memory), jax.random.split(first, count)[mine]
    mean = jnp.mean(jax.vmap(lambda p: self.compressor.decode(p, like, key))(received), 0)
    owed = mean.astype(x.dtype) + memory.part
    key = jax.random.split(second, count)[mine]
    payload = self.compressor.encode(owed, key, collectives.worker_key(second, self.axis))
    return payload, Chunk(owed - self.compressor.decode(payload, like, key))

  def _put_together(self, x: Array, everyone: Tree, memory: Chunk, key: Key) -> Array:
    keys = jax.random.split(key, collectives.worker_count(self.axis))
    decode = lambda p, k: self.compressor.decode(p, _chunk_like(x, memory), k)
    return joined(jax.vmap(decode)(everyone, keys), x)


two_phase = TwoPhase


class MajorityVote(Aggregator, name="majority_vote"):
  """Computes the elementwise majority of the workers' signs; ties and zeros give +1.

      value = sign(sum_i sign(x_i))

  One bit per element is sent in each direction: the sign goes to the worker that counts the votes,
  and the result goes back to every worker. Every worker present has one vote, regardless of its
  weight.

  Args:
    axis: the worker axes to vote over.

  Reference: Bernstein et al. 2018, arXiv 1810.05291, algorithm 1.
  """

  axis: collectives.Axes = WORKER_AXES
  adds = Trait.VOTE | Trait.DENSE

  def aggregate(self, tree, state, key, presence=EVERYONE):
    roll = call_roll(presence, self.axis)
    value, sent = _leafwise(lambda x, key: self._one(x, roll), tree, key)
    return Aggregate(value, weighted(sent, unweighted(presence)), state)

  def _one(self, x: Array, roll: Roll | None) -> tuple[Array, Array]:
    count = collectives.worker_count(self.axis)
    chunks = cut(x, count).reshape(count, -1)
    bits = collectives.exchange(jnp.packbits(chunks >= 0, axis=1), self.axis)
    cast = jnp.unpackbits(bits, axis=1, count=chunks.shape[1]).astype(jnp.int32)
    ayes = jnp.sum(cast if roll is None else jnp.where(roll.present[:, None], cast, 0), 0)
    majority = jnp.packbits(2 * ayes >= (roll.count if roll else count))
    votes = collectives.gather(majority, self.axis)
    won = jnp.unpackbits(votes, axis=1, count=chunks.shape[1])
    plus_minus = lambda aye: jnp.where(aye, 1, -1).astype(x.dtype)
    return joined(plus_minus(won == 1), x), plus_minus(x >= 0)


majority_vote = MajorityVote


def _chunk_like(x: Array, memory: Chunk) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(memory.part.shape, x.dtype)


def _unzip(pairs: Iterable[tuple[Any, Any]]) -> tuple[list[Any], list[Any]]:
  found = list(pairs)
  return [first for first, _ in found], [second for _, second in found]


def _leafwise(
  one: Callable[[Array, Key], tuple[Array, Array]], tree: Tree, key: Key
) -> tuple[Tree, Tree]:
  """Applies (leaf, key) -> (value, sent) to every leaf."""
  leaves, treedef = jax.tree.flatten(tree)
  pairs = [one(x, k) for x, k in zip(leaves, leaf_keys(key, len(leaves)), strict=True)]
  value, sent = (treedef.unflatten([pair[i] for pair in pairs]) for i in range(2))
  return value, sent
