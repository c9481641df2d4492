"""Defines gossip of compressed messages, the base class of CHOCO and its baselines."""

from dataclasses import KW_ONLY

import jax
import jax.numpy as jnp

from research.comm import collectives
from research.comm.neighbours import heard
from research.comm.topology import Topology
from research.core.base import WORKER_AXES, Aggregator, Array, Compressor, Key, Trait


class CodedGossip(Aggregator):
  """An exchange in which each worker sends the same payload to all of its neighbours.

  Args:
    compressor: the compressor that encodes a worker's message.
    topology: a graph that is the same in each round.
    axis: the worker axes of the exchange.
  """

  compressor: Compressor
  topology: Topology
  _: KW_ONLY
  axis: collectives.Axes = WORKER_AXES
  adds = Trait.LOCAL

  def drawn(
    self, message: Array, start: Array, key: Key, origin: Array | None = None
  ) -> tuple[Array, Array]:
    """Sends a compressed leaf to the neighbours, and moves `start` towards their messages.

        start_i + sum_j w_ij (C(message_j) - origin_i)

    Args:
      message: the value that this worker compresses and sends.
      start: the value to move, of the shape of the message.
      key: a typed key, equal on all workers.
      origin: the value that is subtracted from each message; None means this worker's own message
        as the others receive it.

    Returns:
      This worker's message as the others receive it, and the moved value, both in float32 or wider.
    """
    (shifts,) = self.topology.rounds(collectives.worker_count(self.axis))
    like = jax.ShapeDtypeStruct(message.shape, message.dtype)
    payload = self.compressor.encode(message, key, collectives.worker_key(key, self.axis))
    sent = self.compressor.decode(payload, like, key)
    wide = jnp.promote_types(message.dtype, jnp.float32)
    value, own = start.astype(wide), (sent if origin is None else origin).astype(wide)
    for weight, other in heard(shifts, payload, self.axis):
      nearer = self.compressor.decode(other, like, key).astype(wide) - own
      value += (weight * nearer).astype(wide)
    return sent, value
