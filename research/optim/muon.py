"""Muon: orthogonalized momentum for hidden matrices, and AdamW for all other parameters."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from research.core import checks
from research.core.base import Array, Params
from research.core.dimensions import Dimensions, Kinds, kinds_of, path
from research.optim import fitting
from research.optim.owners import on_owners

# a, b and c of a s + b s^3 + c s^5, whose steps bring each singular value in (0, 1] near one;
# chosen to maximize the slope a at zero (Jordan et al. 2024).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class MuonState(NamedTuple):
  rule = "muon"  # without annotation, so that this is not a field; see training/reach.py

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

  The model declares which leaves are hidden matrices and which of their dimensions are inputs,
  outputs and stacked layers or experts (`core/dimensions.py`). Each matrix of a stack is
  orthogonalized separately, and an attention kernel [in, heads, head_dim] is one matrix [in, heads
  head_dim]. AdamW updates embeddings, the head, norms and biases. If the model has no declaration,
  every leaf with two dimensions is a hidden matrix, as in optax; the run then prints the share of
  the parameters in such leaves, and a share below one half is rejected. `orthogonalized`
  approximates orthogonalization by Newton-Schulz steps: singular values end between about 0.7 and
  1.2. There are three differences from optax's muon: the scale sqrt(d_out / d_in) may be below one,
  the momentum has no bias correction, because the normalization would cancel it, and Adam has no
  Nesterov momentum. If the run's mesh has an axis `fsdp`, each matrix is orthogonalized once, by
  one device.

  Args:
    learning_rate: eta, a number or a schedule.
    beta: the decay of the momentum.
    nesterov: whether to use Nesterov momentum.
    weight_decay: the weight decay of hidden matrices, which is multiplied by the learning rate.
    ns_steps: the number of Newton-Schulz steps.
    consistent_rms: if given, replaces the scale by consistent_rms sqrt(max(d_in, d_out)), so that
      the updates of all matrices have the same root mean square; with 0.2, it is about that of an
      AdamW update.
    adam_learning_rate: the learning rate of AdamW; None for eta.
    adam_b1: decay of AdamW's first moments.
    adam_b2: decay of AdamW's second moments.
    adam_weight_decay: the weight decay of AdamW, which is multiplied by AdamW's learning rate.
    dimensions: the declaration of a model; if it is empty, a run supplies its model's declaration.

  Raises:
    ValueError: if a decay is not in [0, 1), the number of steps or consistent_rms is not positive,
      or the declaration is invalid.

  Reference: Jordan et al. 2024, Muon: an optimizer for hidden layers in neural networks; Bernstein
    2025, Deriving Muon (the scale); Liu et al. 2025, arXiv 2502.16982 (weight decay,
    consistent_rms).
  """
  rule = Rule(beta, nesterov, ns_steps, consistent_rms)
  rule.check()
  own = lambda model: optax.chain(
    _momentum(rule, model),
    optax.add_decayed_weights(weight_decay),
    optax.scale_by_learning_rate(learning_rate),
  )
  rate = learning_rate if adam_learning_rate is None else adam_learning_rate
  return beside_adam(own, rate, adam_b1, adam_b2, adam_weight_decay, dimensions)


class Rule(NamedTuple):
  """The parameters of a Muon step, and its computations; see `muon`."""

  beta: float
  nesterov: bool
  ns_steps: int
  consistent_rms: float | None

  def check(self) -> None:
    """Rejects values that are out of range.

    Raises:
      ValueError: see `muon`.
    """
    checks.in_range("beta", self.beta, "[0, 1)")
    checks.positive_integer("ns_steps", self.ns_steps)
    if self.consistent_rms is not None:
      checks.above("consistent_rms", self.consistent_rms)

  def momenta(self, before: Params, grads: Params) -> tuple[Params, Params]:
    """Returns the updated momentum, and the matrices to orthogonalize."""
    momentum = jax.tree.map(lambda m, g: self.beta * m + g, before, grads)
    ahead = lambda m, g: g + self.beta * m
    return momentum, jax.tree.map(ahead, momentum, grads) if self.nesterov else momentum

  def orthogonalized(self, x: Array) -> Array:
    """Orthogonalizes a stack of matrices [..., rows, columns]."""
    return orthogonalized(x, self.ns_steps)

  def scale(self, kinds: Kinds, shape: tuple[int, ...]) -> float:
    """Returns the factor of an orthogonalized update of a parameter or block of this shape."""
    into, out = kinds.fans(shape)
    rms = self.consistent_rms
    return math.sqrt(out / into) if rms is None else rms * math.sqrt(max(into, out))

  def whole(self, ahead: Params, kinds: dict[str, Kinds], model: fitting.Model) -> Params:
    """Computes the scaled update of whole matrices, on their owners if the worker is sharded."""
    scaled = lambda at, x: self.scale(kinds[path(at)], x.shape) * x
    if model.cut is not None and not model.simulated:
      found = on_owners(self.orthogonalized, ahead, kinds, model.cut)
      return jax.tree_util.tree_map_with_path(scaled, found)

    def one(at: tuple, x: Array) -> Array:
      return scaled(at, self.orthogonalized(kinds[path(at)].view(x)).reshape(x.shape))

    return jax.tree_util.tree_map_with_path(one, ahead)


def beside_adam(
  own: Callable[[fitting.Model], optax.GradientTransformation],
  learning_rate: optax.ScalarOrSchedule,
  b1: float,
  b2: float,
  weight_decay: float,
  dimensions: Dimensions,
) -> optax.GradientTransformation:
  """Combines an optimizer for hidden matrices with AdamW for all other leaves.

  Args:
    own: builds the optimizer of hidden matrices for a model.
    learning_rate: the learning rate of AdamW, a number or a schedule.
    b1: decay of AdamW's first moments.
    b2: decay of AdamW's second moments.
    weight_decay: the weight decay of AdamW, which is multiplied by the learning rate.
    dimensions: the declaration of a model, possibly empty.

  Raises:
    ValueError: if a decay is not in [0, 1), or the declaration is invalid.
  """
  checks.in_range("adam_b1", b1, "[0, 1)")
  checks.in_range("adam_b2", b2, "[0, 1)")
  adam = optax.adamw(learning_rate, b1, b2, weight_decay=weight_decay)

  def build(model: fitting.Model) -> optax.GradientTransformation:
    both: Any = {"muon": own(model), "adam": adam}
    return optax.partition(both, lambda tree: labels(tree, model.dimensions))

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


def _momentum(rule: Rule, model: fitting.Model) -> optax.GradientTransformation:
  def init(params):
    return MuonState(jax.tree.map(jnp.zeros_like, params))

  def update(updates, state, params=None):
    del params
    momentum, ahead = rule.momenta(state.momentum, updates)
    kinds = kinds_of(updates, model.dimensions)
    return rule.whole(ahead, kinds, model), MuonState(momentum)

  return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def orthogonalized(x: Array, steps: int) -> Array:
  """Brings the singular values of each matrix of a stack near one, by Newton-Schulz steps.

      x_0 = x / ||x||;   x_{k+1} = a x_k + (b A + c A^2) x_k  with  A = x_k x_k^T

  Args:
    x: the matrices [..., rows, columns].
    steps: the number of Newton-Schulz steps.
  """
  tall = x.shape[-2] > x.shape[-1]
  x = jnp.swapaxes(x, -2, -1) if tall else x
  x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-8)
  a, b, c = COEFFICIENTS
  for _ in range(steps):
    gram = x @ jnp.swapaxes(x, -2, -1)
    x = a * x + (b * gram + c * gram @ gram) @ x
  return jnp.swapaxes(x, -2, -1) if tall else x
