"""Exchanges between workers, over whichever worker axes are in scope.

Every function runs per worker, under `vmap(axis_name=...)`, `shard_map` or `pmap`. `axes` names the
worker axes to talk over; those of the default that the execution does not have are left out, so the
same line runs on a mesh with and without slices.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from research.core.base import EVERYONE, WORKER_AXES, Array, Key, Presence, Tree, platform

Axes = str | Sequence[str]
_OWN = 0x776F726B
_LANES = 128
_SHORT = 2**16  # bytes: about what a fast link carries while a message begins
_PIECE = 2**18  # bytes: what gloo sends another worker at once, see `_in_pieces`


_NAMES: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar(
  "axes", default=WORKER_AXES
)


@contextlib.contextmanager
def named(axes: Axes) -> Iterator[None]:
  """Other names for the worker axes in what is traced inside: those of somebody's own mesh.

  What talks over the default axes then talks over these; an axis that is named stays what it is.

  Args:
    axes: the name or names, slow links first; all of them in scope.
  """
  token = _NAMES.set((axes,) if isinstance(axes, str) else tuple(axes))
  try:
    yield
  finally:
    _NAMES.reset(token)


def in_scope(axes: Axes = WORKER_AXES) -> tuple[str, ...]:
  """The axes of `axes` that the execution has, in order.

  Raises:
    ValueError: if it has none, or lacks an axis that was asked for by name.
  """
  names = (axes,) if isinstance(axes, str) else tuple(axes)
  names = _NAMES.get() if names == WORKER_AXES else names
  found = tuple(name for name in names if _is_bound(name))
  missing = [name for name in names if name not in found]
  if not names or len(set(names)) < len(names):
    raise ValueError(f"axis={list(names)} is no mesh axis, or names one twice")
  if not found or (missing and names != WORKER_AXES):
    raise ValueError(
      f"workers talk over mesh axis {' and '.join(map(repr, missing))}, which this execution does "
      f"not have; a mesh such as 'slice:2,data:4' has both, 'data:8' has 'data' alone"
    )
  return found


def _is_bound(name: str) -> bool:
  try:
    lax.axis_size(name)
  except NameError:
    return False
  return True


def worker_count(axes: Axes = WORKER_AXES) -> int:
  """W, the number of workers: static."""
  return lax.axis_size(in_scope(axes))


def worker_index(axes: Axes = WORKER_AXES) -> Array:
  """This worker's number in [0, W), the slices' workers one after the other. int32."""
  return lax.axis_index(in_scope(axes))


def are_summed(tree: Tree, axes: Axes = WORKER_AXES) -> bool:
  """Whether JAX has added up any leaf over the workers already, as a `shard_map` that tracks what
  varies (`check_vma=True`, its default) does with gradients of replicated parameters."""
  names = in_scope(axes)
  varying = lambda x: jax.typeof(x).manual_axis_type.varying
  tracked = [name for name in names if name in varying(lax.axis_index(name))]
  return any(name not in varying(x) for x in jax.tree.leaves(tree) for name in tracked)


def worker_key(key: Key, axes: Axes = WORKER_AXES) -> Key:
  """A key of this worker's own from one that all share."""
  return key_of(key, worker_index(axes))


def key_of(key: Key, worker: Array) -> Key:
  """A worker's own key. Tagged, since `fold_in(key, i)` alone is the i-th of `split(key)` too."""
  return jax.random.fold_in(jax.random.fold_in(key, _OWN), worker)


def round_keys(key: Key, number: Array) -> Key:
  """A round's three keys, equal on all workers: of its sync, its steps, and its cohort."""
  return jax.random.split(jax.random.fold_in(key, number), 3)


def mean(tree: Tree, axes: Axes = WORKER_AXES, presence: Presence = EVERYONE) -> Tree:
  """The mean over workers of what they have, equal on all of them: an all-reduce of each leaf.

      1/W sum_i weight_i x_i, where nothing counts that an absent worker has

  Floats of 16 bits and fewer travel as such, and are weighted and divided before they are added up,
  since a product or a sum may be out of range where the mean is not. Simulated workers' are added
  up in float32; on devices float16 terms below 6e-8 W lose digits.
  """
  names, (weight, active) = in_scope(axes), presence

  def one(x):
    if presence is EVERYONE:
      return _mean_as(x.dtype, x, names)
    wide = x.astype(jnp.float32) if _is_narrow(x) else x
    share = jnp.where(active, (weight * wide).astype(wide.dtype), 0)
    return _mean_as(x.dtype, share, names)

  return jax.tree.map(one, tree)


def _is_narrow(x: Array | jax.ShapeDtypeStruct) -> bool:
  return jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4


def _mean_as(dtype: Any, x: Array, names: tuple[str, ...]) -> Array:
  """The mean over workers in a dtype, in which it travels; x may be wider."""
  if not _is_narrow(jax.ShapeDtypeStruct((), dtype)):
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
    return _by_axis(send, simulated, x, names, is_shared=True)

  @found.defjvp
  def _tangent(primals, tangents):
    return found(*primals), lax.pmean(tangents[0].astype(dtype), names)

  return found(x)


def packed_mean(tree: Tree, axes: Axes = WORKER_AXES) -> Tree:
  """`mean`, with one all-reduce for all leaves of a type: for many that are small.

  A message costs what it takes to begin it, however short. Where a mesh cuts leaves inside a worker
  this is for the blocks that a device holds: whole leaves would have to be gathered first.
  """
  return _packed(tree, lambda x: mean(x, axes))


def total(tree: Tree, axes: Axes = WORKER_AXES) -> Tree:
  """The sum over workers, equal on all of them."""
  return lax.psum(tree, in_scope(axes))


def gather(tree: Tree, axes: Axes = WORKER_AXES) -> Tree:
  """What every worker has, in the order of `worker_index`: leaves [W, ...], equal on all.

  Short leaves of a type travel as one message. TPU compilers turn the gather of a flat array whose
  length is no multiple of 128 into a sum of twice the bytes; long ones are therefore filled up, and
  sent as arrays [n / 128, 128].
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

  at_last = count // lax.axis_size(names[0])  # what was gathered along all axes but one
  return _packed(tree, _as_bits(_in_pieces(one, at_last)), longest=_SHORT)


def exchange(tree: Tree, axes: Axes = WORKER_AXES) -> Tree:
  """Sends row i of each leaf [W, ...] to worker i; returns the rows that this one was sent.

  Short leaves of a type travel as one message. A TPU interleaves flat rows in its memory, and does
  not those of arrays [W, n / 128, 128]: long ones are filled up to that.
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
      found = lax.all_to_all(found, name, place, place)
    if is_flat:
      return found.reshape(x.shape[0], -1)[:, :length]
    return found.reshape(x.shape[0], *found.shape[len(names) :])

  send = _as_bits(_in_pieces(one, 1 / min(sizes), lead=1))
  return _packed(tree, send, lead=1, longest=_SHORT)


def _as_bits(send: Callable[[Array], Array]) -> Callable[[Array], Array]:
  """`send` of numbers by their bits, where XLA would widen them on the way: a CPU's bfloat16."""

  def one(x):
    if not _is_narrow(x) or platform() != "cpu":
      return send(x)
    bits = lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    return lax.bitcast_convert_type(send(bits), x.dtype)

  return one


def _in_pieces(
  send: Callable[[Array], Array], share: float = 1, lead: int = 0
) -> Callable[[Array], Array]:
  """`send`, what is long in pieces one after the other, where gloo carries it between processes.

  Of two processes that send each other more than half a megabyte at once, one waits for the other:
  a megabyte each way took 127 ms at 100 Mbit/s, a quarter of one 21. Sums go whole: gloo cuts them.

  Args:
    send: from an array [*first, n] to one [*any, n], whose places do not depend on each other.
    share: how much of the array, or how many of it, goes to another worker at once.
    lead: how many dimensions `first` has.
  """

  def one(x):
    count = math.ceil(x.size * x.dtype.itemsize * share / _PIECE)
    if count <= 1 or platform() != "cpu" or jax.process_count() == 1:
      return send(x)
    flat = x.reshape(*x.shape[:lead], -1)
    length = -(-flat.shape[-1] // count)
    filled = jnp.pad(flat, [*[(0, 0)] * lead, (0, count * length - flat.shape[-1])])
    pieces = filled.reshape(*flat.shape[:-1], count, length)
    one_after_other = lambda _, piece: (None, send(piece))
    found = lax.scan(one_after_other, None, jnp.moveaxis(pieces, lead, 0), unroll=16)[1]
    whole = jnp.moveaxis(found, 0, -2).reshape(*found.shape[1:-1], -1)
    return whole[..., : flat.shape[-1]].reshape(*found.shape[1:-1], *x.shape[lead:])

  return one


def _packed(
  tree: Tree, send: Callable[[Array], Array], lead: int = 0, longest: float = math.inf
) -> Tree:
  """`send` of each leaf, those of a type up to `longest` bytes put together along the last axis.

  Args:
    tree: arrays whose first `lead` dimensions are the same.
    send: from an array [*first, n] to one [*any, n], whose places do not depend on each other.
    lead: how many dimensions `first` has.
    longest: bytes of what is put together, each.
  """
  leaves, treedef = jax.tree.flatten(tree)
  messages: dict[Any, list[int]] = {}
  for i, x in enumerate(leaves):
    is_short = x.size * x.dtype.itemsize <= longest
    messages.setdefault(x.dtype if is_short else i, []).append(i)
  found = list(leaves)
  for places in messages.values():
    if len(places) == 1:
      found[places[0]] = send(leaves[places[0]])
      continue
    lengths = [math.prod(leaves[i].shape[lead:]) for i in places]
    flat = [
      leaves[i].reshape(*leaves[i].shape[:lead], length)
      for i, length in zip(places, lengths, strict=True)
    ]
    message = send(jnp.concatenate(flat, -1))
    parts = jnp.split(message, np.cumsum(lengths)[:-1], -1)
    for i, part in zip(places, parts, strict=True):
      found[i] = part.reshape(*message.shape[:-1], *leaves[i].shape[lead:])
  return treedef.unflatten(found)


def permute(tree: Tree, links: Sequence[tuple[int, int]], axes: Axes = WORKER_AXES) -> Tree:
  """What the worker that has a link to this one sent; zeros where none has.

  A permutation of simulated workers is a rule of its own: JAX's wants every worker to send, and
  forgets one of two axes.

  Args:
    tree: arrays, this worker's message.
    links: (sender, receiver) by worker number; nobody sends or receives twice.
    axes: the worker axes to talk over.
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

  one = lambda x: _by_axis(send, simulated, x, names, is_shared=False)
  return jax.tree.map(_as_bits(_in_pieces(one)), tree)


def _by_axis(
  send: Callable[[Array], Array],
  simulated: Callable[[int, Array, int], Array],
  x: Array,
  names: tuple[str, ...],
  is_shared: bool,
) -> Array:
  """`send(x)`, with a rule of our own where one of the workers' axes is a dimension of arrays.

  Args:
    send: what one worker does.
    simulated: (size, x [size, ...], which of the names is simulated) -> the results, [size, ...].
    x: this worker's array.
    names: the worker axes in scope.
    is_shared: whether the result is one for all workers, without the leading dimension.
  """

  @jax.custom_batching.custom_vmap
  def of_worker(x, places):
    del places  # tells the rule which axis is being simulated, if it is one of the workers'
    return send(x)

  @of_worker.def_vmap
  def _of_many(size, batched, x, places):
    if not any(batched[1]):
      return of_worker(x, places), True
    (here,) = (i for i, is_here in enumerate(batched[1]) if is_here)
    whole = x if batched[0] else jnp.broadcast_to(x, (size, *x.shape))
    return simulated(size, whole, here), not is_shared

  return of_worker(x, tuple(lax.axis_index(name) for name in names))
