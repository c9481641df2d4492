"""Computes metrics of molecular properties from the known labels, averaged over the targets."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from research.core.base import Array, Params
from research.tasks.medicine.medicine import auc
from research.tasks.networks import network

CHUNK = 256  # number of molecules that are evaluated at once


def measured(
  module: nn.Module, x: Any, y: np.ndarray, scale: Any
) -> Callable[[Params], dict[str, Array]]:
  """Returns the function `measure` of a task: it computes the AUC or RMSE, averaged over targets.

  Args:
    module: a network that takes fingerprints or graphs.
    x: the inputs [n, ...].
    y: the labels [n, T]; NaN marks a missing label.
    scale: the mean and the deviation of the labels, each [T], for standardization; None for
      classes.

  Raises:
    ValueError: if there are no labels, or no target has both classes.
  """
  predict = predictions(module, x)
  known = [np.flatnonzero(~np.isnan(column)) for column in y.T]
  if scale is None:
    used = [t for t, rows in enumerate(known) if len(np.unique(y[rows, t])) == 2]
    if not used:
      raise ValueError("no target has both classes among the molecules to evaluate on")

    def mean_auc(params: Params) -> dict[str, Array]:
      scores = predict(params)
      each = [auc(scores[known[t], t], jnp.asarray(y[known[t], t])) for t in used]
      return {"auc": jnp.mean(jnp.stack(each))}

    return mean_auc
  spread = jnp.asarray(scale[1], jnp.float32)
  wanted = jnp.asarray((np.nan_to_num(y) - scale[0]) / scale[1], jnp.float32)
  used = [t for t, rows in enumerate(known) if len(rows)]
  if not used:
    raise ValueError("no molecule to evaluate on has a label")

  def mean_rmse(params: Params) -> dict[str, Array]:
    errors = (predict(params) - wanted) * spread
    each = [jnp.sqrt(jnp.mean(errors[known[t], t] ** 2)) for t in used]
    return {"rmse": jnp.mean(jnp.stack(each))}

  return mean_rmse


def predictions(module: nn.Module, x: Any) -> Callable[[Params], Array]:
  """Returns a function from params to a module's outputs [n, T], which are computed in chunks.

  Args:
    module: a network that takes fingerprints or graphs.
    x: the inputs [n, ...].
  """
  apply = network(module).apply
  count = len(jax.tree.leaves(x)[0])
  size = min(CHUNK, count)
  chunks = -(-count // size)

  def chunked(leaf: np.ndarray) -> np.ndarray:
    padding = [(0, chunks * size - count)] + [(0, 0)] * (leaf.ndim - 1)
    return np.pad(leaf, padding).reshape(chunks, size, *leaf.shape[1:])

  stacked = jax.tree.map(chunked, x)

  def predict(params: Params) -> Array:
    def of_chunk(x: Any) -> Array:
      return apply(params, x if isinstance(x, dict) else x.astype(jnp.float32), None)

    found = jax.lax.map(of_chunk, jax.tree.map(jnp.asarray, stacked))
    return found.reshape(chunks * size, -1)[:count]

  return predict
