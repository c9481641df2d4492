"""Verifies checkpoints by checksums of files and leaves."""

import json
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from research.core.base import Array, Tree
from research.training.reports import report

FILES = "files.json"


def list_files(folder: Path) -> None:
  """Writes FILES, a list of sizes and CRC-32s, into each finished checkpoint without such a list.

  This function is called when the previous save is on disk, and at the end of a run.

  Args:
    folder: the folder of all checkpoints.
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


def is_whole(step: Path) -> bool:
  """Returns whether a checkpoint's files are intact; True for a checkpoint without a list.

  The files are checked before reading, because Orbax reads in background threads of several
  processes; a process would notice damage late, and the other processes not at all.

  Args:
    step: the folder of one checkpoint.
  """
  try:
    written = json.loads((step / FILES).read_text()) if (step / FILES).exists() else None
    return written is None or written == _files(step)
  except (OSError, json.JSONDecodeError):
    return False


@jax.jit
def checksums(tree: Tree) -> Array:
  """Computes a 32-bit checksum of each leaf: uint32 [leaves].

  Args:
    tree: arrays of any shapes and dtypes.
  """
  return jnp.stack([checksum(leaf) for leaf in jax.tree.leaves(tree)])


def checksum(leaf: Array) -> Array:
  """Computes a uint32 checksum: the sum of a hash of each element's bits and position.

  Args:
    leaf: an array of any shape and dtype.
  """
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
