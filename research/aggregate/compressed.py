"""Averages of compressed values: what is exchanged are payloads, in their own dtypes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from research.aggregate.chunks import cut, joined
from research.aggregate.composition import traits_of
from research.aggregate.link import compressed
from research.base import WORKER_AXES, Aggregate, Aggregator, Array, Chunk, Compressor, Key, Tree
from research.comm import collectives


def gather_mean(compressor: Compressor, axis: collectives.Axes = WORKER_AXES) -> Aggregator:
  """Every worker sends its payload to all others; each decodes all and takes the mean.

      value = 1/W sum_i D(C(x_i))

  Sends (W-1) payloads per worker: it grows with W, and one byte per element already costs what a
  float32 ring all-reduce does at W = 8. `two_phase` does not grow.

  Args:
    compressor: any.
    axis: the worker axes to average over.

  Reference: Alistarh et al. 2017, arXiv 1610.02132, algorithm 1.
  """

  def one(x, key):
    payload = compressor.encode(x, key, collectives.worker_key(key, axis))
    everyone = collectives.gather(payload, axis)
    add = lambda sum_, p: (sum_ + compressor.decode(p, _like(x), key), None)
    value = lax.scan(add, jnp.zeros_like(x), everyone)[0] / collectives.worker_count(axis)
    return value.astype(x.dtype), compressor.decode(payload, _like(x), key)

  return _leafwise(one, traits_of(compressor))._replace(link=compressed(compressor))


def sum_mean(compressor: Compressor, axis: collectives.Axes = WORKER_AXES) -> Aggregator:
  """One all-reduce of the payloads of a linear compressor, decoded once.

      value = D(1/W sum_i C(x_i)) = 1/W sum_i D(C(x_i))

  Args:
    compressor: a linear one, such as random_k or count_sketch.
    axis: the worker axes to average over.

  Raises:
    ValueError: if payloads of the compressor may not be summed.
  """
  if not compressor.linear:
    raise ValueError(
      "sum_mean adds payloads, which only a linear compressor allows (identity, random_k, "
      "count_sketch, hadamard of these); take gather_mean or two_phase"
    )

  def one(x, key):
    payload = compressor.encode(x, key, collectives.worker_key(key, axis))
    decode = lambda p: compressor.decode(p, _like(x), key)
    return decode(collectives.mean(payload, axis)), decode(payload)

  return _leafwise(one, traits_of(compressor))._replace(link=compressed(compressor))


def two_phase(compressor: Compressor, axis: collectives.Axes = WORKER_AXES) -> Aggregator:
  """A compressed reduce-scatter, then a compressed all-gather: bytes do not grow with W.

  Each leaf is cut into W chunks. Worker j receives all encodings of chunk j, averages, adds what
  it still owes, encodes the sum again and sends it to all:

      c_j = 1/W sum_i D(C(x_i[j])) + m_j,   value[j] = D(C(c_j)),   m_j <- c_j - value[j]

  Sends 2 (W-1)/W payloads of the leaf per worker at any W.

  Args:
    compressor: a contractive one; applied to chunks of ceil(n / W) elements.
    axis: the worker axes to average over.

  Raises:
    ValueError: if the compressor may miss more than all of a value: the memory of what is owed
      would grow without bound.

  Reference: Tang et al. 2019, arXiv 1905.05957 (DoubleSqueeze), algorithm 1, with the server's part
  spread over the workers as in Tang et al. 2021, arXiv 2102.02888, section 5.
  """

  if not compressor.contractive:
    raise ValueError(
      "two_phase keeps what it owes, which grows without bound where a compressor may miss more "
      "than all of a value (terngrad, qsgd of few levels, unbiased random_k, count_sketch); take "
      "gather_mean or sum_mean"
    )

  def init(params):
    count = collectives.worker_count(axis)
    return jax.tree.map(lambda x: Chunk(jnp.zeros_like(cut(x, count)[0])), params)

  def one(x, memory, key):
    count = collectives.worker_count(axis)
    first, second = jax.random.split(key)
    chunks = cut(x, count)
    like = _like(chunks[0])
    shared = jax.random.split(first, count)
    own = jax.random.split(collectives.worker_key(first, axis), count)
    payload = jax.vmap(compressor.encode)(chunks, shared, own)
    sent = jax.vmap(lambda p, k: compressor.decode(p, like, k))(payload, shared)
    mine = shared[collectives.worker_index(axis)]
    received = collectives.exchange(payload, axis)
    mean = jnp.mean(jax.vmap(lambda p: compressor.decode(p, like, mine))(received), 0)
    owed = mean.astype(x.dtype) + memory.part
    answers = jax.random.split(second, count)
    answer = answers[collectives.worker_index(axis)]
    payload = compressor.encode(owed, answer, collectives.worker_key(second, axis))
    decoded = compressor.decode(payload, like, answer)
    everyone = collectives.gather(payload, axis)
    value = jax.vmap(lambda p, k: compressor.decode(p, like, k))(everyone, answers)
    return joined(value, x), joined(sent, x), Chunk(owed - decoded)

  def aggregate(tree, state, key):
    leaves, treedef = jax.tree.flatten(tree)
    memories, keys = treedef.flatten_up_to(state), _keys(key, len(leaves))
    results = [one(*args) for args in zip(leaves, memories, keys, strict=True)]
    value, sent, memory = (treedef.unflatten([r[i] for r in results]) for i in range(3))
    return Aggregate(value, sent, memory)

  apart = {"apart"} if compressor.sparse else set()  # the phases have a support each
  return Aggregator(init, aggregate, traits_of(compressor) | apart)


def majority_vote(axis: collectives.Axes = WORKER_AXES) -> Aggregator:
  """The sign that most workers have, element by element; ties and zeros count as +1.

      value = sign(sum_i sign(x_i))

  One bit per element each way: the signs go to the worker that counts them, the votes come back.

  Args:
    axis: the worker axes to vote over.

  Reference: Bernstein et al. 2018, arXiv 1810.05291, algorithm 1.
  """

  def one(x, key):
    del key
    count = collectives.worker_count(axis)
    chunks = cut(x, count).reshape(count, -1)
    bits = collectives.exchange(jnp.packbits(chunks >= 0, axis=1), axis)
    ayes = jnp.sum(jnp.unpackbits(bits, axis=1, count=chunks.shape[1]), 0, dtype=jnp.int32)
    votes = collectives.gather(jnp.packbits(2 * ayes >= count), axis)
    won = jnp.unpackbits(votes, axis=1, count=chunks.shape[1])
    plus_minus = lambda aye: jnp.where(aye, 1, -1).astype(x.dtype)
    return joined(plus_minus(won == 1), x), plus_minus(x >= 0)

  return _leafwise(one, frozenset({"vote", "dense"}))


def _like(x: Array) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _keys(key: Key, count: int) -> Any:
  """A key for each leaf, shared by all workers."""
  return [jax.random.fold_in(key, leaf) for leaf in range(count)]


def _leafwise(
  one: Callable[[Array, Key], tuple[Array, Array]], traits: frozenset[str]
) -> Aggregator:
  """An aggregator without state from (leaf, key) -> (value, sent)."""

  def aggregate(tree: Tree, state: Any, key: Key) -> Aggregate:
    leaves, treedef = jax.tree.flatten(tree)
    pairs = [one(x, k) for x, k in zip(leaves, _keys(key, len(leaves)), strict=True)]
    value, sent = (treedef.unflatten([pair[i] for pair in pairs]) for i in range(2))
    return Aggregate(value, sent, state)

  return Aggregator(lambda params: (), aggregate, traits)
