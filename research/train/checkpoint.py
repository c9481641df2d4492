"""Checkpoints: the complete TrainState and its checksums, saved in the background by Orbax."""

import contextlib
import gc
import json
import logging
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
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
from research.train import interrupt, report

KEEP = 3
FILES = "files.json"


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
    _list_files(self._folder)

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
        if not interrupt.of_first_process(is_whole(self._folder / str(step))):
          raise ValueError("files are missing or not as they were written")
        return step, self._restore_one(step, like, private)
      except (CheckpointError, MemoryError):
        raise
      except Exception as error:  # whatever a damaged file makes the reader raise
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        warn(f"checkpoint {step} is damaged and set aside as {step}.damaged: {reason}")
        self._set_aside(step)
    if steps or list(self._folder.glob("*.damaged")):
      raise CheckpointError(f"none of the checkpoints in {self._folder} is whole")
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
    kind = dict(zip(_names(like), jax.tree.leaves(kinds), strict=True))
    wanted = {
      name: _struct(leaf, tuple(saved[name].shape), kind[name]) for name, leaf in target.items()
    }
    for name, leaf in target.items():
      had = (tuple(saved[name].shape), saved[name].dtype)
      if had[0] != wanted[name].shape or had[1] != leaf.dtype:
        raise CheckpointError(
          f"checkpoint {step} in {self._folder} is of another model or method: "
          f"{name} is {had[1]} {list(had[0])} there and {leaf.dtype} {list(leaf.shape)} here"
        )
    sums = jax.ShapeDtypeStruct((len(target),), jnp.uint32, sharding=like.round.sharding)
    item = {"state": wanted, "checksums": sums}
    with quietly():
      found = self._manager.restore(step, args=ocp.args.StandardRestore(item))
    matches = np.asarray(found["checksums"]) == np.asarray(checksums(found["state"]))
    if not matches.all():
      wrong = sorted(target)[int(np.argmin(matches))]
      raise ValueError(f"the checksum of {wrong} does not match")
    leaves = {
      name: _fitted(found["state"][name], leaf, kind[name]) for name, leaf in target.items()
    }
    return _rebuilt(leaves, like)

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
  finished = ocp.AsyncOptions(post_finalization_callback=partial(_list_files, folder))
  options = ocp.CheckpointManagerOptions(max_to_keep=KEEP, async_options=finished)
  handlers = ocp.StandardCheckpointHandler()
  return ocp.CheckpointManager(folder, options=options, item_handlers=handlers)


def _list_files(folder: Path) -> None:
  """Writes FILES into each finished checkpoint that lacks it: its files' sizes and CRC-32s.

  Called when a save is finishing, when the one before it is on disk, and at the end.
  """
  if jax.process_index() == 0:
    for step in folder.glob("[0-9]*"):
      if step.name.isdecimal() and not (step / FILES).exists():
        report.write_json(step / FILES, _files(step))


def _files(step: Path) -> dict[str, list[int]]:
  found = sorted(path for path in step.rglob("*") if path.is_file() and path.name != FILES)
  return {
    str(path.relative_to(step)): [path.stat().st_size, zlib.crc32(path.read_bytes())]
    for path in found
  }


@contextlib.contextmanager
def quietly() -> Iterator[None]:
  """Silences what Orbax's threads print of a failure beside the exception that they raise."""
  hook, logger = sys.unraisablehook, logging.getLogger("asyncio")
  level = logger.level
  sys.unraisablehook = lambda unraisable: None
  logger.setLevel(logging.CRITICAL)
  try:
    yield
  except Exception:
    gc.collect()  # lets what will complain do so now
    raise
  finally:
    sys.unraisablehook = hook
    logger.setLevel(level)


def is_whole(step: Path) -> bool:
  """Whether a checkpoint's files are as they were written; one without a list is not judged.

  Orbax reads files in the background of several processes, where damage shows late, in one of them
  and loudly: hence this look ahead.
  """
  try:
    written = json.loads((step / FILES).read_text()) if (step / FILES).exists() else None
    return written is None or written == _files(step)
  except (OSError, json.JSONDecodeError):
    return False


def _is_key(leaf: Any) -> bool:
  return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _names(state: TrainState) -> list[str]:
  paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(state)]
  return [jax.tree_util.keystr(path, simple=True, separator=".") for path in paths]


def _leaves(state: TrainState) -> dict[str, Array]:
  """Leaves by name, typed keys as integers; without empty ones, which no file can hold."""
  named = zip(_names(state), jax.tree.leaves(state), strict=True)
  data = lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf
  return {name: data(leaf) for name, leaf in named if leaf.size}


def _rebuilt(leaves: dict[str, Array], like: TrainState) -> TrainState:
  """The state of `_leaves`."""

  def one(name, was):
    if not was.size:
      return was
    found = leaves[name]
    return jax.random.wrap_key_data(found, impl=jax.random.key_impl(was)) if _is_key(was) else found

  flat, tree = jax.tree.flatten(like)
  return tree.unflatten([one(*pair) for pair in zip(_names(like), flat, strict=True)])


def _struct(leaf: Array, saved: tuple[int, ...], kind: str) -> jax.ShapeDtypeStruct:
  """Restores into the leaf's own sharding, or, where it will be resized, everywhere."""
  shape, sharding = leaf.shape, leaf.sharding
  same_blocks = kind != "chunks of blocks" or saved[1:2] == shape[1:2]
  if (kind.startswith("chunks") and same_blocks) or (kind == "rows" and saved[1:] == shape[1:]):
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
  elif kind == "chunks of blocks":
    of_block = partial(layouts.recut_chunks, shape=(like.shape[0], *like.shape[2:]))
    resize = jax.vmap(of_block, 1, 1)
  else:
    resize = partial(layouts.resize_rows, owners=like.shape[0])
  return jax.jit(resize, out_shardings=like.sharding)(found)


@jax.jit
def checksums(tree: Tree) -> Array:
  """A 32-bit checksum of each leaf's bits, position by position: uint32 [leaves]."""
  return jnp.stack([checksum(leaf) for leaf in jax.tree.leaves(tree)])


def checksum(leaf: Array) -> Array:
  """A uint32 hash of the leaf's bits by position: each is mixed before all are added."""
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
  mixed = (bits ^ position * np.uint32(0x9E3779B9)) * np.uint32(0x85EBCA6B)
  mixed = (mixed ^ mixed >> 15) * np.uint32(0xC2B2AE35)
  return jnp.sum(mixed ^ mixed >> 13, dtype=jnp.uint32)
