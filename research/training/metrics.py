"""Evaluates a model on a full data set, sharded over the devices."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from research.comm import mesh as meshes
from research.core.base import Array, Params, Tree
from research.core.task import Batch, Data, Task, value_and_grad


def evaluator(task: Task, mesh: Mesh, batch: int = 1) -> Callable[..., dict[str, Array]]:
  """Returns `evaluate(params, data, gradient=False)`, which averages metrics over placed data.

  The metrics are those of `task.evaluate`. With `gradient=True`, the metrics include
  `gradient_norm`, the norm of the full objective's gradient, and, if the task defines `grads`,
  `residual`, the L1 norm of the gradient. Each device of the worker axes processes its own examples
  in chunks.

  Args:
    task: provides the metrics.
    mesh: the mesh of the data.
    batch: number of examples that the devices of a worker share evenly; the size of a chunk is a
      multiple of this number.

  Returns:
    The compiled function, which returns scalars by name.
  """
  names = tuple(meshes.worker_axes(mesh.shape))
  apart = tuple(name for name in names if mesh.shape[name] > 1)

  def of_chunk(params: Params, chunk: Batch, total: Array, gradient: bool) -> Tree:
    share = jnp.sum(chunk["mask"]) / total
    found: dict[str, Any] = dict(task.evaluate(params, chunk))
    if gradient:
      found["gradient_norm"] = value_and_grad(task)(params, chunk, jax.random.key(0))[1]
    return jax.tree.map(lambda x: share * x, found)

  def of_place(params: Params, examples: Batch, sizes: Array, total: Array, gradient: bool) -> Tree:
    chunks = _chunks(examples, sizes, task.chunk, batch)
    one = lambda chunk: of_chunk(params, chunk, total, gradient)
    shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], chunks))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    add = lambda sums, chunk: (jax.tree.map(jnp.add, sums, one(chunk)), None)
    sums = lax.scan(add, zeros, chunks)[0]
    return lax.psum(sums, apart) if apart else sums

  def evaluate(params: Params, data: Data, gradient: bool = False) -> dict[str, Array]:
    total = jnp.sum(data.sizes).astype(float)
    sums = jax.shard_map(
      partial(of_place, gradient=gradient),
      mesh=mesh,
      in_specs=(P(), P(names), P(names), P()),
      out_specs=P(),
      axis_names=set(names),
      check_vma=False,
    )(params, data.examples, data.sizes, total)
    if gradient:
      leaves = jax.tree.leaves(sums["gradient_norm"])
      sums["gradient_norm"] = jnp.sqrt(sum(jnp.sum(g * g) for g in leaves))
      if task.grads:
        sums["residual"] = sum(jnp.sum(jnp.abs(g)) for g in leaves)
    return sums

  return jax.jit(evaluate, static_argnames="gradient")


def _chunks(examples: Batch, sizes: Array, chunk: int, batch: int) -> Batch:
  """Reshapes the examples [R, n, ...] of R owners to [chunks, examples, ...], with a mask."""
  owners, most = jax.tree.leaves(examples)[0].shape[:2]
  count = max(1, -(-owners * most // chunk))
  size = batch * -(-owners * most // (count * batch))
  mask = (jnp.arange(most)[None] < sizes[:, None]).astype(float)

  def cut(x):
    x = x.reshape(owners * most, *x.shape[2:])
    x = jnp.pad(x, [(0, count * size - owners * most)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(count, size, *x.shape[1:])

  return jax.tree.map(cut, {**examples, "mask": mask})
