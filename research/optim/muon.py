"""Muon: steps of orthogonalized momentum for hidden matrices, and of AdamW for all else."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from research.core import checks
from research.core.base import Array, Params
from research.core.dimensions import Dimensions, Kinds, kinds_of, path
from research.optim import fitting
from research.optim.owners import on_owners

# Of the quintic a s + b s^3 + c s^5, whose steps bring every singular value in (0, 1] near one;
# they maximize the slope a at zero (Jordan et al. 2024).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class MuonState(NamedTuple):
  momentum: Params  # m_t of the hidden matrices


def muon(
  learning_rate: optax.ScalarOrSchedule,
  *,
  beta: float = 0.95,
  nesterov: bool = True,
  weight_decay: float = 0.0,
  ns_steps: int = 5,
  consistent_rms: float | None = None,
  adam_learning_rate: optax.ScalarOrSchedule | None = None,
  adam_b1: float = 0.9,
  adam_b2: float = 0.999,
  adam_weight_decay: float = 0.0,
  dimensions: Dimensions = (),
) -> optax.GradientTransformation:
  """Orthogonalizes the momentum of each hidden matrix, and updates all other leaves by AdamW.

      m_t = beta m_{t-1} + g_t
      U_t = orthogonalized(g_t + beta m_t), or of m_t without nesterov
      W_{t+1} = W_t - eta (weight_decay W_t + sqrt(d_out / d_in) U_t)

  The model says which leaves are hidden matrices and which of their dimensions are inputs, outputs
  and stacked layers or experts (`core/dimensions.py`); each matrix of a stack is orthogonalized by
  itself, and an attention kernel [in, heads, head_dim] is one matrix [in, heads head_dim].
  Embeddings, the head, norms and biases are AdamW's. For a model that does not say it, every leaf
  of two dimensions is a hidden matrix, as in optax; the run then prints the share of the parameters
  that are reached, and a share below one half is rejected. `orthogonalized` is an approximation by
  Newton-Schulz steps: singular values become about 0.7 to 1.2. Unlike optax's muon, the scale is
  sqrt(d_out / d_in) also below one, the momentum has no bias correction, which the normalization
  removes, and Adam has no Nesterov momentum. If the run's mesh has an axis `fsdp`, each matrix is
  orthogonalized once, by one device.

  Args:
    learning_rate: eta, a number or a schedule.
    beta: decay of the momentum.
    nesterov: whether the next gradient is looked ahead to.
    weight_decay: of hidden matrices, times the learning rate.
    ns_steps: number of Newton-Schulz steps.
    consistent_rms: replaces the scale by consistent_rms sqrt(max(d_in, d_out)), so that an update's
      root mean square is that of every other matrix; with 0.2 about that of an AdamW update.
    adam_learning_rate: learning rate of AdamW; None for eta.
    adam_b1: decay of AdamW's first moments.
    adam_b2: decay of AdamW's second moments.
    adam_weight_decay: of AdamW, times its learning rate.
    dimensions: the declaration of a model; a run supplies its model's.

  Raises:
    ValueError: if a decay is not in [0, 1), the number of steps or consistent_rms is not positive,
      or the declaration is invalid.

  Reference: Jordan et al. 2024, Muon: an optimizer for hidden layers in neural networks; Bernstein
    2025, Deriving Muon (the scale); Liu et al. 2025, arXiv 2502.16982 (weight decay,
    consistent_rms).
  """
  for name, value in (("beta", beta), ("adam_b1", adam_b1), ("adam_b2", adam_b2)):
    checks.in_range(name, value, "[0, 1)")
  checks.positive_integer("ns_steps", ns_steps)
  if consistent_rms is not None:
    checks.above("consistent_rms", consistent_rms)
  rate = learning_rate if adam_learning_rate is None else adam_learning_rate
  adam = optax.adamw(rate, adam_b1, adam_b2, weight_decay=adam_weight_decay)

  def build(model: fitting.Model) -> optax.GradientTransformation:
    own = optax.chain(
      _momentum(beta, nesterov, ns_steps, consistent_rms, model),
      optax.add_decayed_weights(weight_decay),
      optax.scale_by_learning_rate(learning_rate),
    )
    return optax.partition({"muon": own, "adam": adam}, lambda tree: labels(tree, model.dimensions))

  return fitting.for_models(build, dimensions)


def labels(tree: Params, dimensions: Dimensions) -> Any:
  """Returns "muon" for hidden matrices and "adam" for all other leaves.

  Args:
    tree: the parameters.
    dimensions: the model's declaration.
  """
  kinds = kinds_of(tree, dimensions)
  label = lambda at, _: "muon" if kinds[path(at)].is_matrix else "adam"
  return jax.tree_util.tree_map_with_path(label, tree)


def _momentum(
  beta: float, nesterov: bool, steps: int, rms: float | None, model: fitting.Model
) -> optax.GradientTransformation:
  def init(params):
    return MuonState(jax.tree.map(jnp.zeros_like, params))

  def update(updates, state, params=None):
    del params
    momentum = jax.tree.map(lambda m, g: beta * m + g, state.momentum, updates)
    ahead = jax.tree.map(lambda m, g: g + beta * m, momentum, updates) if nesterov else momentum
    kinds = kinds_of(updates, model.dimensions)
    whole = _orthogonalized(ahead, kinds, steps, model)
    scaled = lambda at, x: scale(kinds[path(at)], x.shape, rms) * x
    return jax.tree_util.tree_map_with_path(scaled, whole), MuonState(momentum)

  return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def _orthogonalized(
  tree: Params, kinds: dict[str, Kinds], steps: int, model: fitting.Model
) -> Params:
  """Orthogonalizes each matrix of a tree, on its owner if the worker is sharded."""
  function = lambda x: orthogonalized(x, steps)
  if model.cut is not None:
    return on_owners(function, tree, kinds, model.cut)
  one = lambda at, x: function(kinds[path(at)].view(x)).reshape(x.shape)
  return jax.tree_util.tree_map_with_path(one, tree)


def scale(kinds: Kinds, shape: tuple[int, ...], rms: float | None) -> float:
  """Returns the factor of an orthogonalized update.

  Args:
    kinds: the kinds of the parameter's dimensions.
    shape: the parameter's shape.
    rms: see `consistent_rms` of `muon`.
  """
  into, out = kinds.fans(shape)
  return math.sqrt(out / into) if rms is None else rms * math.sqrt(max(into, out))


def orthogonalized(x: Array, steps: int) -> Array:
  """Moves the singular values of each matrix of a stack near one, by Newton-Schulz steps.

      x_0 = x / ||x||;   x_{k+1} = a x_k + (b A + c A^2) x_k  with  A = x_k x_k^T

  Args:
    x: [..., rows, columns].
    steps: number of steps.
  """
  tall = x.shape[-2] > x.shape[-1]
  x = jnp.swapaxes(x, -2, -1) if tall else x
  x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-8)
  a, b, c = COEFFICIENTS
  for _ in range(steps):
    gram = x @ jnp.swapaxes(x, -2, -1)
    x = a * x + (b * gram + c * gram @ gram) @ x
  return jnp.swapaxes(x, -2, -1) if tall else x
