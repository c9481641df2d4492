"""Checkpoints: the complete TrainState and its checksums, saved in the background by Orbax."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from research.base import Array, TrainState, Tree
from research.parallel import layout as layouts

KEEP = 3


class CheckpointError(Exception):
  """No checkpoint of a run can be read."""


class Checkpoints:
  """The checkpoints of one run, by step. All processes of the run call every method."""

  def __init__(self, folder: Path, like: TrainState):
    """Makes the folder if need be; `like` is a state as those that will be saved."""
    self._folder = folder
    self._manager = _manager(folder)
    self.saved_at = 0.0
    jax.block_until_ready(checksums(_leaves(like)))

  def save(self, step: int, state: TrainState, now: float) -> None:
    """Copies the state and writes it in the background; `now` becomes `saved_at`."""
    self.saved_at = now
    leaves = _leaves(state)
    item = {"state": leaves, "checksums": checksums(leaves)}
    self._manager.save(step, args=ocp.args.StandardSave(item), force=True)

  def wait(self) -> None:
    """Returns when everything saved is on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    self._manager.close()

  def latest(self) -> int | None:
    """The newest step saved, or None."""
    return self._manager.latest_step()

  def restore(
    self, like: TrainState, private: Tree, warn: Callable[[str], None]
  ) -> tuple[int, TrainState] | None:
    """The newest checkpoint that is whole, in the shardings of `like`.

    Shared leaves come back as they were. Private rows come back by owner where there are as many
    owners as before; for another number every owner gets the mean of all rows (`resize_rows`), but
    chunks of a whole are cut anew (`recut_chunks`).
    A damaged checkpoint is renamed to STEP.damaged, and the one before it is tried.

    Args:
      like: shapes, dtypes and shardings of the state.
      private: a tree like the method's state: whether a leaf has rows by owner.
      warn: told about each damaged checkpoint, in one line.

    Returns:
      Its step and its state, or None if nothing was ever saved.

    Raises:
      CheckpointError: if there are checkpoints and none is whole, or they hold another state.
    """
    steps = sorted(self._manager.all_steps(), reverse=True)
    for step in steps:
      try:
        return step, self._restore_one(step, like, private)
      except CheckpointError:
        raise
      except Exception as error:  # whatever a damaged file makes the reader raise
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        warn(f"checkpoint {step} is damaged and set aside as {step}.damaged: {reason}")
        self._set_aside(step)
    if steps:
      raise CheckpointError(f"none of the checkpoints {steps[::-1]} in {self._folder} is whole")
    return None

  def _restore_one(self, step: int, like: TrainState, private: Tree) -> TrainState:
    metadata = self._manager.item_metadata(step)
    if metadata is None:
      raise ValueError("its metadata is missing")
    saved, target = metadata["state"], _leaves(like)
    if set(saved) != set(target):
      other = sorted(set(saved) ^ set(target))[0]
      raise CheckpointError(
        f"checkpoint {step} in {self._folder} is of another model or method: only one has {other}"
      )
    kinds = layouts.kinds(TrainState(False, False, private))
    kind = dict(zip(target, jax.tree.leaves(kinds), strict=True))
    wanted = {
      name: _struct(leaf, tuple(saved[name].shape), kind[name]) for name, leaf in target.items()
    }
    sums = jax.ShapeDtypeStruct((len(target),), jnp.uint32, sharding=like.round.sharding)
    item = {"state": wanted, "checksums": sums}
    found = self._manager.restore(step, args=ocp.args.StandardRestore(item))
    matches = np.asarray(found["checksums"]) == np.asarray(checksums(found["state"]))
    if not matches.all():
      wrong = sorted(target)[int(np.argmin(matches))]
      raise ValueError(f"the checksum of {wrong} does not match")
    leaves = [_fitted(found["state"][name], leaf, kind[name]) for name, leaf in target.items()]
    return _typed(jax.tree.structure(like).unflatten(leaves), like)

  def _set_aside(self, step: int) -> None:
    if jax.process_index() == 0:
      source = self._folder / str(step)
      goal = self._folder / f"{step}.damaged"
      if goal.exists():
        shutil.rmtree(goal)
      if source.exists():
        source.rename(goal)
    if jax.process_count() > 1:
      from jax.experimental import multihost_utils

      multihost_utils.sync_global_devices(f"set aside {step}")
    self._manager.reload()


def _manager(folder: Path) -> ocp.CheckpointManager:
  options = ocp.CheckpointManagerOptions(max_to_keep=KEEP, enable_async_checkpointing=True)
  handlers = ocp.StandardCheckpointHandler()
  return ocp.CheckpointManager(folder, options=options, item_handlers=handlers)


def _is_key(leaf: Any) -> bool:
  return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _leaves(state: TrainState) -> dict[str, Array]:
  """Leaves by name, typed keys as the integers that they are: what files hold."""
  data = lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf
  return {
    jax.tree_util.keystr(path, simple=True, separator="."): data(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state)
  }


def _typed(state: TrainState, like: TrainState) -> TrainState:
  def typed(leaf, was):
    return jax.random.wrap_key_data(leaf, impl=jax.random.key_impl(was)) if _is_key(was) else leaf

  return jax.tree.map(typed, state, like)


def _struct(leaf: Array, saved: tuple[int, ...], kind: str) -> jax.ShapeDtypeStruct:
  """Restores into the leaf's own sharding, or, where it will be resized, everywhere."""
  shape, sharding = leaf.shape, leaf.sharding
  if kind == "chunks" or (kind == "rows" and saved[1:] == shape[1:]):
    shape = saved
  if shape != leaf.shape:
    assert isinstance(sharding, NamedSharding)
    sharding = NamedSharding(sharding.mesh, P())
  return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)


def _fitted(found: Array, like: Array, kind: str) -> Array:
  """Rows or chunks for as many owners as `like` has, in its sharding."""
  if found.shape == like.shape:
    return found
  if kind == "chunks":
    resize = partial(layouts.recut_chunks, shape=like.shape)
  else:
    resize = partial(layouts.resize_rows, owners=like.shape[0])
  return jax.jit(resize, out_shardings=like.sharding)(found)


@jax.jit
def checksums(tree: Tree) -> Array:
  """A 32-bit checksum of each leaf's bits, position by position: uint32 [leaves]."""
  return jnp.stack([checksum(leaf) for leaf in jax.tree.leaves(tree)])


def checksum(leaf: Array) -> Array:
  """Sum over positions i of (2 i + 1) bits_i modulo 2^32: any one changed element changes it."""
  if leaf.size == 0:
    return jnp.zeros((), jnp.uint32)
  width = 8 * leaf.dtype.itemsize
  bits = leaf.astype(jnp.uint8) if leaf.dtype == jnp.bool_ else leaf
  bits = jax.lax.bitcast_convert_type(bits, jnp.dtype(f"uint{min(width, 32)}")).astype(jnp.uint32)
  position = jnp.zeros(bits.shape, jnp.uint32)
  stride = 1
  for dimension in reversed(range(bits.ndim)):
    position += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, dimension) * np.uint32(stride)
    stride = stride * bits.shape[dimension] % 2**32
  return jnp.sum((2 * position + 1) * bits, dtype=jnp.uint32)
