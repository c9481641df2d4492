"""Averages of compressed values: what is exchanged are payloads, in their own dtypes."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from research.aggregate.chunks import cut, joined
from research.aggregate.composition import traits_of
from research.aggregate.link import compressed
from research.aggregate.presence import call_roll, unweighted, weighted
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
  Tree,
)


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

  def aggregate(tree, state, key, presence=EVERYONE):
    leaves, treedef = jax.tree.flatten(weighted(tree, presence))
    keys = _keys(key, len(leaves))
    own = [collectives.worker_key(k, axis) for k in keys]
    payloads = list(map(compressor.encode, leaves, keys, own))
    everyone = collectives.gather(payloads, axis)
    values = map(mean_of, leaves, keys, everyone)
    sent = map(decode, leaves, keys, payloads)
    return Aggregate(treedef.unflatten(values), treedef.unflatten(sent), state)

  def mean_of(x, key, everyone):
    count, wide = collectives.worker_count(axis), jnp.promote_types(x.dtype, jnp.float32)
    part = lambda payload: decode(x, key, payload).astype(wide) / count
    add = lambda sum_, payload: (sum_ + part(payload), None)
    return lax.scan(add, jnp.zeros(x.shape, wide), everyone)[0].astype(x.dtype)

  def decode(x, key, payload):
    return compressor.decode(payload, _like(x), key)

  traits, link = traits_of(compressor), compressed(compressor)
  return Aggregator(lambda params: (), aggregate, traits, link=link)


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

  def aggregate(tree, state, key, presence=EVERYONE):
    value, sent = _leafwise(one, weighted(tree, presence), key)
    return Aggregate(value, sent, state)

  seen, link = Sum(axis) if keeps_floats(compressor) else None, compressed(compressor)
  return Aggregator(lambda params: (), aggregate, traits_of(compressor), link=link, privacy=seen)


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

  def encode_chunks(x, key):
    count = collectives.worker_count(axis)
    chunks = cut(x, count)
    shared = jax.random.split(key, count)
    own = jax.random.split(collectives.worker_key(key, axis), count)
    payload = jax.vmap(compressor.encode)(chunks, shared, own)
    sent = jax.vmap(lambda p, k: compressor.decode(p, _like(chunks[0]), k))(payload, shared)
    return payload, joined(sent, x)

  def serve(x, received, memory, first, second):
    """The answer to the encodings of this worker's chunk, and what it still owes."""
    count, mine = collectives.worker_count(axis), collectives.worker_index(axis)
    like, key = _chunk_like(x, memory), jax.random.split(first, count)[mine]
    mean = jnp.mean(jax.vmap(lambda p: compressor.decode(p, like, key))(received), 0)
    owed = mean.astype(x.dtype) + memory.part
    key = jax.random.split(second, count)[mine]
    payload = compressor.encode(owed, key, collectives.worker_key(second, axis))
    return payload, Chunk(owed - compressor.decode(payload, like, key))

  def put_together(x, everyone, memory, key):
    keys = jax.random.split(key, collectives.worker_count(axis))
    decode = lambda p, k: compressor.decode(p, _chunk_like(x, memory), k)
    return joined(jax.vmap(decode)(everyone, keys), x)

  def aggregate(tree, state, key, presence=EVERYONE):
    leaves, treedef = jax.tree.flatten(weighted(tree, presence))
    memories = treedef.flatten_up_to(state)
    pairs = [jax.random.split(k) for k in _keys(key, len(leaves))]
    first, second = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    payloads, sent = _unzip(map(encode_chunks, leaves, first))
    received = collectives.exchange(payloads, axis)
    answers, owed = _unzip(map(serve, leaves, received, memories, first, second))
    everyone = collectives.gather(answers, axis)
    values = map(put_together, leaves, everyone, memories, second)
    return Aggregate(*map(treedef.unflatten, (values, sent, owed)))

  apart = {"apart"} if compressor.sparse else set()  # the phases have a support each
  return Aggregator(init, aggregate, traits_of(compressor) | apart)


def majority_vote(axis: collectives.Axes = WORKER_AXES) -> Aggregator:
  """The sign that most workers have, element by element; ties and zeros count as +1.

      value = sign(sum_i sign(x_i))

  One bit per element each way: the signs go to the worker that counts them, the votes come back.
  Those present have a vote each, whatever they weigh.

  Args:
    axis: the worker axes to vote over.

  Reference: Bernstein et al. 2018, arXiv 1810.05291, algorithm 1.
  """

  def one(x, roll):
    count = collectives.worker_count(axis)
    chunks = cut(x, count).reshape(count, -1)
    bits = collectives.exchange(jnp.packbits(chunks >= 0, axis=1), axis)
    cast = jnp.unpackbits(bits, axis=1, count=chunks.shape[1]).astype(jnp.int32)
    ayes = jnp.sum(cast if roll is None else jnp.where(roll.present[:, None], cast, 0), 0)
    votes = collectives.gather(jnp.packbits(2 * ayes >= (roll.count if roll else count)), axis)
    won = jnp.unpackbits(votes, axis=1, count=chunks.shape[1])
    plus_minus = lambda aye: jnp.where(aye, 1, -1).astype(x.dtype)
    return joined(plus_minus(won == 1), x), plus_minus(x >= 0)

  def aggregate(tree, state, key, presence=EVERYONE):
    roll = call_roll(presence, axis)
    value, sent = _leafwise(lambda x, key: one(x, roll), tree, key)
    return Aggregate(value, weighted(sent, unweighted(presence)), state)

  return Aggregator(lambda params: (), aggregate, frozenset({"vote", "dense"}))


def _like(x: Array) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _chunk_like(x: Array, memory: Chunk) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(memory.part.shape, x.dtype)


def _unzip(pairs: Iterable[tuple[Any, Any]]) -> tuple[list[Any], list[Any]]:
  found = list(pairs)
  return [first for first, _ in found], [second for _, second in found]


def _keys(key: Key, count: int) -> Any:
  """A key for each leaf, shared by all workers."""
  return [jax.random.fold_in(key, leaf) for leaf in range(count)]


def _leafwise(
  one: Callable[[Array, Key], tuple[Array, Array]], tree: Tree, key: Key
) -> tuple[Tree, Tree]:
  """Values and what was sent, from (leaf, key) -> (value, sent)."""
  leaves, treedef = jax.tree.flatten(tree)
  pairs = [one(x, k) for x, k in zip(leaves, _keys(key, len(leaves)), strict=True)]
  value, sent = (treedef.unflatten([pair[i] for pair in pairs]) for i in range(2))
  return value, sent
