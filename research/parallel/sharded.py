"""Where arrays lie: private rows with their workers, shared leaves everywhere or cut by `fsdp`."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from research.base import Array, Batch, Data, Key, TrainState, Tree


def of_state(private: Tree, mesh: Mesh | None, workers: tuple[str, ...], shapes: Tree = None):
  """Shardings of a TrainState, or with `mesh=None` the specs that `shard_map` takes.

  Args:
    private: which leaves of the method's state have rows [P, ...].
    mesh: the devices.
    workers: the mesh axes over which rows are spread.
    shapes: of one worker's state, where its leaves are cut along `fsdp` too.
  """
  shapes = (
    jax.tree.map(lambda _: jax.ShapeDtypeStruct((), jnp.float32), private)
    if shapes is None
    else shapes
  )
  size = mesh.shape.get("fsdp", 1) if mesh is not None else 1
  place = (lambda spec: spec) if mesh is None else (lambda spec: NamedSharding(mesh, spec))

  def one(is_private, shape):
    inner = fsdp_spec(shape.shape, size)
    return place(P(workers, *inner) if is_private else P(*inner))

  return TrainState(place(P()), place(P()), jax.tree.map(one, private, shapes))


def fsdp_spec(shape: tuple[int, ...], size: int) -> tuple[str | None, ...]:
  """Cuts the largest dimension that `size` divides; leaves without one lie everywhere.

  Reference: Rajbhandari et al. 2019, arXiv 1910.02054 (ZeRO, stage 3).
  """
  if size == 1:
    return ()
  fitting = [d for d, length in enumerate(shape) if length % size == 0 and length >= size]
  if not fitting:
    return ()
  cut = max(fitting, key=lambda d: shape[d])
  return tuple("fsdp" if d == cut else None for d in range(cut + 1))


def split_batch(axes: Mapping[str, int], batch: Batch) -> Batch:
  """Tells the compiler to cut a worker's batch [b, ...] along `fsdp`, where b allows it."""
  size = axes.get("fsdp", 1)
  cut = lambda x: lax.with_sharding_constraint(x, P("fsdp")) if x.shape[0] % size == 0 else x
  return jax.tree.map(cut, batch) if size > 1 else batch


def of_data(rows: Any) -> Data:
  """Specs of `Data`: examples by owner, the rest everywhere."""
  return Data(rows, P(), P())


def place(
  mesh: Mesh, workers: tuple[str, ...], examples: Batch, sizes: np.ndarray, key: Key
) -> Data:
  """Puts examples [P, n, ...] on the devices of their owners; each process brings only its rows."""
  rows, everywhere = NamedSharding(mesh, P(workers)), NamedSharding(mesh, P())
  put = lambda x: on_devices(x, rows)
  return Data(
    jax.tree.map(put, examples),
    on_devices(sizes.astype(np.int32), everywhere),
    jax.jit(lambda k: k, out_shardings=everywhere)(key),
  )


def on_devices(x: np.ndarray, sharding: NamedSharding) -> Array:
  """A numpy array that every process has, as one global array."""
  return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
