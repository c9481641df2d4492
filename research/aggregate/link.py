"""Encodes a worker's messages to a server: exactly, compressed, or with error feedback."""

import jax
import jax.numpy as jnp

from research.core.base import Array, Compressor, Key, Uplink

_OWN = 0x6F776E


def leaf_keys(key: Key, count: int) -> list[Key]:
  """Returns one key per leaf, equal on all workers.

  Args:
    key: the key of a round.
    count: the number of leaves.
  """
  return [jax.random.fold_in(key, leaf) for leaf in range(count)]


def struct_of(x: Array) -> jax.ShapeDtypeStruct:
  """Returns the shape and the dtype of an array.

  Args:
    x: the array.
  """
  return jax.ShapeDtypeStruct(x.shape, x.dtype)


def plain() -> Uplink:
  """Returns an uplink that sends leaves uncompressed."""
  return Uplink(
    lambda params: (),
    lambda tree, state, key: (jax.tree.leaves(tree), state),
    lambda payload, like, key, leaf: payload,
  )


def compressed(compressor: Compressor) -> Uplink:
  """Returns an uplink that compresses each leaf separately, with its own key.

  Args:
    compressor: the compressor.
  """

  def encode(tree, state, key):
    leaves = jax.tree.leaves(tree)
    pairs = zip(leaves, leaf_keys(key, len(leaves)), strict=True)
    return [compressor.encode(x, k, jax.random.fold_in(k, _OWN)) for x, k in pairs], state

  def decode(payload, like, key, leaf):
    return compressor.decode(payload, like, jax.random.fold_in(key, leaf))

  return Uplink(lambda params: (), encode, decode)


def remembering(link: Uplink, decay: float) -> Uplink:
  """Returns an uplink with error feedback: it sends p = x + decay e and stores e <- p - D(C(p)).

  Args:
    link: the uplink to wrap, which must have no state.
    decay: the decay factor of the memory, in [0, 1].
  """

  def encode(tree, memory, key):
    corrected = jax.tree.map(lambda x, e: x + decay * e, tree, memory)
    payloads, _ = link.encode(corrected, (), key)
    leaves, treedef = jax.tree.flatten(corrected)
    like = list(map(struct_of, leaves))
    sent = [link.decode(p, x, key, i) for i, (p, x) in enumerate(zip(payloads, like, strict=True))]
    left = [x - y for x, y in zip(leaves, sent, strict=True)]
    return payloads, treedef.unflatten(left)

  return Uplink(lambda params: jax.tree.map(jnp.zeros_like, params), encode, link.decode)
