"""Defines collectives between workers, over the worker axes that are in scope.

Every function runs on each worker, under `vmap(axis_name=...)`, `shard_map` or `pmap`. The argument
`axes` names the worker axes of the exchange. Default axes that are not in scope are ignored, so the
same code runs on meshes with and without slices.
"""

import contextlib
import contextvars
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from research.comm import sending
from research.core.base import EVERYONE, WORKER_AXES, Array, Key, Presence, Tree

Axes = str | Sequence[str]
_OWN = 0x776F726B
_LANES = 128
_SHORT = 2**16  # bytes: roughly what a fast link transfers during the latency of one message


class NoAxis(ValueError):
  """Raised if an exchange uses a mesh axis that is not in scope."""


_NAMES: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar(
  "axes", default=WORKER_AXES
)


@contextlib.contextmanager
def named(axes: Axes) -> Iterator[None]:
  """Replaces the default worker axes with those of a user's own mesh while the context is active.

  Exchanges over the default axes then use the user's axes; exchanges over explicitly named axes do
  not change.

  Args:
    axes: the name or names of the axes, slow links first; all of them must be in scope.
  """
  token = _NAMES.set((axes,) if isinstance(axes, str) else tuple(axes))
  try:
    yield
  finally:
    _NAMES.reset(token)


def in_scope(axes: Axes = WORKER_AXES) -> tuple[str, ...]:
  """Returns the names in `axes` that are in scope, in order.

  Args:
    axes: one or more axis names. Some of the default axes may be missing from the scope.

  Raises:
    NoAxis: if no axis is in scope, or an explicitly named axis is not in scope. NoAxis is a
      subclass of ValueError.
    ValueError: if a name is repeated.
  """
  names = (axes,) if isinstance(axes, str) else tuple(axes)
  own = names == WORKER_AXES != _NAMES.get()  # axis names of a user's own mesh
  names = _NAMES.get() if own else names
  found = tuple(name for name in names if _is_bound(name))
  missing = [name for name in names if name not in found]
  if not names or len(set(names)) < len(names):
    raise ValueError(f"axis={list(names)} is empty or repeats an axis")
  if own and missing:
    raise NoAxis(
      f"workers communicate over mesh axis {' and '.join(map(repr, missing))}, which is not in "
      "scope; call it inside shard_map, pmap or vmap(axis_name=...) over that axis"
    )
  if not found or (missing and names != WORKER_AXES):
    raise NoAxis(
      f"workers communicate over mesh axis {' and '.join(map(repr, missing))}, which this "
      "execution does not have; a mesh such as 'slice:2,data:4' has both, 'data:8' has 'data' alone"
    )
  return found


def _is_bound(name: str) -> bool:
  try:
    lax.axis_size(name)
  except NameError:
    return False
  return True


def worker_count(axes: Axes = WORKER_AXES) -> int:
  """Returns the number of workers W, which is static.

  Args:
    axes: the worker axes.
  """
  return lax.axis_size(in_scope(axes))


def worker_index(axes: Axes = WORKER_AXES) -> Array:
  """Returns this worker's index, int32 in [0, W); workers of a slice have consecutive indices.

  Args:
    axes: the worker axes.
  """
  return lax.axis_index(in_scope(axes))


def are_summed(tree: Tree, axes: Axes = WORKER_AXES) -> bool:
  """Returns whether JAX has already summed any leaf over the workers.

  With `check_vma=True`, the default, `shard_map` sums the gradients of replicated parameters.

  Args:
    tree: this worker's arrays, such as gradients.
    axes: the worker axes.
  """
  names = in_scope(axes)
  varying = lambda x: jax.typeof(x).manual_axis_type.varying
  tracked = [name for name in names if name in varying(lax.axis_index(name))]
  return any(name not in varying(x) for x in jax.tree.leaves(tree) for name in tracked)


def worker_key(key: Key, axes: Axes = WORKER_AXES) -> Key:
  """Derives this worker's private key from a typed key that is equal on all workers.

  Args:
    key: a typed key, equal on all workers.
    axes: the worker axes.
  """
  return key_of(key, worker_index(axes))


def key_of(key: Key, worker: Array) -> Key:
  """Derives the private key of a worker from a shared key.

  The key is tagged first, because `fold_in(key, i)` equals `split(key)[i]`.

  Args:
    key: a typed key, equal on all workers.
    worker: the index of the worker, int32.
  """
  return jax.random.fold_in(jax.random.fold_in(key, _OWN), worker)


def round_keys(key: Key, number: Array) -> Key:
  """Derives the keys of a round for sync, local steps and client sampling, equal on all workers.

  Args:
    key: the typed key of the run.
    number: the index of the round, int32.
  """
  return jax.random.split(jax.random.fold_in(key, number), 3)


def mean(tree: Tree, axes: Axes = WORKER_AXES, presence: Presence = EVERYONE) -> Tree:
  """Averages over workers with one all-reduce per leaf; the result is equal on all workers.

      1/W sum_i weight_i x_i, where absent workers contribute zero

  Floats of 16 bits or fewer are sent in their own dtype. They are weighted and divided before the
  summation, since a product or a sum may overflow even if the mean does not. Values of simulated
  workers are summed in float32. On devices, float16 values below 6e-8 W lose digits.

  Args:
    tree: this worker's arrays.
    axes: the worker axes of the exchange.
    presence: this worker's participation and weight.
  """
  names, (weight, active) = in_scope(axes), presence

  def one(x):
    if presence is EVERYONE:
      return _mean_as(x.dtype, x, names)
    wide = x.astype(jnp.float32) if sending.is_narrow(x) else x
    share = jnp.where(active, (weight * wide).astype(wide.dtype), 0)
    return _mean_as(x.dtype, share, names)

  return jax.tree.map(one, tree)


def _mean_as(dtype: Any, x: Array, names: tuple[str, ...]) -> Array:
  """Averages over workers; sends and returns values in `dtype`, even if x is wider."""
  if not sending.is_narrow(jax.ShapeDtypeStruct((), dtype)):
    return lax.pmean(x, names)
  count = math.prod(lax.axis_size(name) for name in names)

  def send(x):
    return lax.psum((x.astype(jnp.float32) / count).astype(dtype), names)

  def simulated(size, x, here):
    rest = tuple(name for i, name in enumerate(names) if i != here)
    of_axis = jnp.mean(x.astype(jnp.float32), 0)
    return (lax.pmean(of_axis, rest) if rest else of_axis).astype(dtype)

  @jax.custom_jvp
  def found(x):
    return sending.by_axis(send, simulated, x, names, is_shared=True)

  @found.defjvp
  def _tangent(primals, tangents):
    return found(*primals), lax.pmean(tangents[0].astype(dtype), names)

  return found(x)


def packed_mean(tree: Tree, axes: Axes = WORKER_AXES) -> Tree:
  """Computes `mean` with one all-reduce per dtype, which is faster for trees of many small leaves.

  Every message has a fixed startup cost. If leaves are sharded within a worker, apply this function
  to the blocks of each device; otherwise, full leaves would have to be gathered first.

  Args:
    tree: this worker's arrays.
    axes: the worker axes of the exchange.
  """
  return sending.packed(tree, lambda x: mean(x, axes))


def total(tree: Tree, axes: Axes = WORKER_AXES) -> Tree:
  """Sums each leaf over the workers; the result is equal on all workers.

  Args:
    tree: this worker's arrays.
    axes: the worker axes.
  """
  return lax.psum(tree, in_scope(axes))


def gather(tree: Tree, axes: Axes = WORKER_AXES) -> Tree:
  """Gathers the arrays of all workers on every worker.

  Short leaves of the same dtype are sent as one message. The TPU compiler turns the gather of a
  flat array whose length is not a multiple of 128 into a sum, which sends twice as many bytes. Long
  arrays are therefore padded and sent as [n / 128, 128].

  Args:
    tree: this worker's arrays.
    axes: the worker axes of the exchange.

  Returns:
    The tree with leaves [W, ...] in the order of `worker_index`, equal on all workers.
  """
  names, count = in_scope(axes), worker_count(axes)

  def one(x):
    is_long = x.ndim == 1 and x.size >= 64 * _LANES
    found = jnp.pad(x, (0, -x.size % _LANES)).reshape(-1, _LANES) if is_long else x
    for name in reversed(names):
      found = lax.all_gather(found, name)
    if is_long:
      return found.reshape(count, -1)[:, : x.size]
    return found.reshape(count, *x.shape)

  at_last = count // lax.axis_size(names[0])  # number of rows gathered before the last axis
  return sending.packed(tree, sending.as_bits(sending.in_pieces(one, at_last)), longest=_SHORT)


def exchange(tree: Tree, axes: Axes = WORKER_AXES) -> Tree:
  """Sends row i of each leaf to worker i, and receives this worker's row from every worker.

  Short leaves of the same dtype are sent as one message. On a TPU, the rows of an array [W, n] are
  interleaved in memory, but those of an array [W, n / 128, 128] are not; long rows are therefore
  padded to a multiple of 128 elements and reshaped.

  Args:
    tree: this worker's messages, with leaves [W, ...].
    axes: the worker axes of the exchange.

  Returns:
    The received messages, with leaves [W, ...]; row i comes from worker i.
  """
  names = in_scope(axes)
  sizes = [lax.axis_size(name) for name in names]

  def one(x):
    length = x.size // x.shape[0] if x.ndim == 2 else 0
    fill = -length % _LANES if length >= 64 * _LANES else 0
    is_flat = length > 0 and (length + fill) % _LANES == 0
    found = jnp.pad(x, [(0, 0), (0, fill)]) if fill else x
    found = found.reshape(*sizes, *((-1, _LANES) if is_flat else x.shape[1:]))
    for place, name in enumerate(names):
      # JAX 0.10.2 returns a wrong shape when it batches an operand that is equal on all workers
      own = jnp.where(lax.axis_index(name) >= 0, found, found)
      found = lax.all_to_all(own, name, place, place)
    if is_flat:
      return found.reshape(x.shape[0], -1)[:, :length]
    return found.reshape(x.shape[0], *found.shape[len(names) :])

  send = sending.as_bits(sending.in_pieces(one, 1 / min(sizes), lead=1))
  return sending.packed(tree, send, lead=1, longest=_SHORT)


def permute(tree: Tree, links: Sequence[tuple[int, int]], axes: Axes = WORKER_AXES) -> Tree:
  """Sends this worker's message along its link, and receives the message sent to this worker.

  For simulated workers, this function uses its own batching rule, because JAX's rule requires every
  worker to send and drops one of two axes.

  Args:
    tree: this worker's message; the arrays may have any dtypes.
    links: the links, as (sender, receiver) worker indices; no worker may send or receive twice.
    axes: the worker axes of the exchange.

  Returns:
    The message from this worker's sender, or zeros if this worker has no sender.
  """
  names = in_scope(axes)
  sizes = [lax.axis_size(name) for name in names]
  sender = np.full(math.prod(sizes), -1)
  sender[[to for _, to in links]] = [from_ for from_, _ in links]

  def send(x):
    return lax.ppermute(x, names, links)

  def simulated(size, x, here):
    whole, others = x, [i for i in range(len(names)) if i != here]
    for i in reversed(others):
      whole = lax.all_gather(whole, names[i])
    whole = jnp.moveaxis(whole, len(others), here).reshape(len(sender), *x.shape[1:])
    mine = jnp.moveaxis(jnp.asarray(sender.reshape(sizes)), here, -1)
    mine = mine[tuple(lax.axis_index(names[i]) for i in others)]
    found = whole[mine]
    has_one = (mine >= 0).reshape(size, *[1] * (found.ndim - 1))
    return jnp.where(has_one, found, jnp.zeros((), found.dtype))

  one = lambda x: sending.by_axis(send, simulated, x, names, is_shared=False)
  return jax.tree.map(sending.as_bits(sending.in_pieces(one)), tree)
