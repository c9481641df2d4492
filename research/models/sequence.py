"""Computes attention over sequences that are sharded along the mesh axis `seq`.

`by_heads` temporarily gives each device all tokens of some heads. `ring` leaves the tokens in place
and passes keys and values from device to device.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from research.core.base import Array
from research.models import activations
from research.models.attention import Attend


def devices() -> int:
  """Returns the size of the axis `seq` of the mesh in scope; 1 if the mesh has no such axis."""
  return activations.inner_axes().get("seq", 1)


def check(length: int) -> None:
  """Checks that an example's tokens can be divided evenly among the devices along `seq`.

  Args:
    length: the number of tokens of an example.

  Raises:
    ValueError: if the number of devices along `seq` does not divide the length.
  """
  if length % devices():
    raise ValueError(f"'seq:{devices()}' does not divide the {length} tokens of an example")


def across(query: Array, key: Array, value: Array, attend: Attend) -> Array:
  """Calls `by_heads` if the key heads can be divided evenly among the devices, else `ring`.

  Args:
    query: the query [batch, length, heads, head_dim].
    key: the key [batch, length, kv_heads, head_dim].
    value: the value, of the shape of `key`.
    attend: an attention function for full sequences.
  """
  axes = activations.inner_axes()
  heads = key.shape[2] // (axes.get("model", 1) if key.shape[2] % axes.get("model", 1) == 0 else 1)
  return (by_heads if heads % axes["seq"] == 0 else ring)(query, key, value, attend)


def by_heads(query: Array, key: Array, value: Array, attend: Attend) -> Array:
  """Computes attention between two all-to-all exchanges: tokens to heads, and back.

  The first exchange turns token shards into head shards; the second exchange reverses this.

  Args:
    query, key, value: the arguments of an attention function, with the length sharded along `seq`.
    attend: an attention function for full sequences.

  Raises:
    ValueError: if the number of devices along `seq` does not divide the number of heads per device.

  Reference: Jacobs et al. 2023, arXiv 2309.14509, section 3.
  """

  def body(query: Array, key: Array, value: Array) -> Array:
    size = lax.axis_size("seq")
    if key.shape[2] % size:
      raise ValueError(f"'seq:{size}' does not divide the {key.shape[2]} heads of keys on a device")
    heads = partial(lax.all_to_all, axis_name="seq", split_axis=2, concat_axis=1, tiled=True)
    tokens = partial(lax.all_to_all, axis_name="seq", split_axis=1, concat_axis=2, tiled=True)
    return tokens(attend(heads(query), heads(key), heads(value)))

  return _on_devices(body, query, key, value)


def ring(query: Array, key: Array, value: Array, attend: Attend | None = None) -> Array:
  """Computes attention in S steps: in each step, a device attends to a part and passes it on.

  A part consists of the keys and values of one device. For a part with scores x, a device updates
  its sums l and o, which are relative to the maximum score m so far:

      m' = max(m, max x);  l' = l e^(m - m') + sum e^(x - m');  o' = o e^(m - m') + e^(x - m') value

  The output is o / l. A device skips parts that come later than all of its queries. The backward
  pass recomputes the scores. Since parts are in the order of the tokens, the last device computes S
  parts while the first device computes one.

  Args:
    query, key, value: the arguments of an attention function, with the length sharded along `seq`.
    attend: unused.

  Reference: Liu et al. 2023, arXiv 2310.01889, algorithm 1.
  """
  del attend
  return _on_devices(_ring, query, key, value)


def _ring(query: Array, key: Array, value: Array) -> Array:
  size, here = lax.axis_size("seq"), lax.axis_index("seq")
  batch, length, heads, head_dim = query.shape
  onward = [(i, (i + 1) % size) for i in range(size)]
  earlier = jnp.tril(jnp.ones((length, length), bool))

  @jax.checkpoint
  def meet(sums, key, value, source):
    most, total, out = sums
    shared = heads // key.shape[2]
    key, value = (jnp.repeat(x, shared, axis=2) for x in (key, value))
    scores = jnp.einsum("bthd,bshd->bhts", query, key, preferred_element_type=jnp.float32)
    seen = earlier[None, None] | (source < here)
    scores = jnp.where(seen, scores * head_dim**-0.5, -jnp.inf)
    top = jnp.maximum(most, jnp.max(scores, -1))
    shares, before = jnp.exp(scores - top[..., None]), jnp.exp(most - top)
    met = jnp.einsum("bhts,bshd->bhtd", shares.astype(value.dtype), value)
    return top, total * before + jnp.sum(shares, -1), out * before[..., None] + met

  def step(held, number):
    sums, (key, value) = held
    source = (here - number) % size
    sums = lax.cond(source <= here, meet, lambda sums, *_: sums, sums, key, value, source)
    return (sums, lax.ppermute((key, value), "seq", onward)), None

  zeros = lambda *shape: jnp.zeros((batch, heads, length, *shape), jnp.float32)
  # a device starts with its own part, in which every query sees a key; the finite minimum can
  # therefore stand for -inf
  sums = zeros() + jnp.finfo(jnp.float32).min, zeros(), zeros(head_dim)
  ((_, total, out), _), _ = lax.scan(step, (sums, (key, value)), jnp.arange(size))
  return jnp.swapaxes(out / total[..., None], 1, 2).astype(query.dtype)


def _on_devices(body, query: Array, key: Array, value: Array) -> Array:
  """Runs a function on the examples, tokens and heads of each device."""
  axes = activations.inner_axes()
  lies: P = activations.spec(key.shape, "fsdp", "seq", "model", None)  # divides query heads too
  return jax.shard_map(
    body, in_specs=(lies,) * 3, out_specs=lies, axis_names=set(axes), check_vma=False
  )(query, key, value)
