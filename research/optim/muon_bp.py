"""MuonBP: Muon that orthogonalizes whole matrices periodically and devices' blocks otherwise."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from research.core import checks
from research.core.base import Array, Params
from research.core.dimensions import Dimensions, kinds_of, path
from research.optim import fitting
from research.optim.muon import Rule, beside_adam
from research.optim.owners import on_blocks


class MuonBPState(NamedTuple):
  rule = "muon"  # without annotation, so that this is not a field; see training/reach.py

  count: Array  # int32, completed updates
  momentum: Params  # m_t of the hidden matrices


def muon_bp(
  learning_rate: optax.ScalarOrSchedule,
  block_learning_rate: optax.ScalarOrSchedule | None = None,
  *,
  period: int = 5,
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
  """Block-periodic Muon, whose devices exchange matrices only in every `period`-th step.

      W_{t+1} = W_t - eta (weight_decay W_t + s U_t)               if period divides t
      B_{t+1} = B_t - eta weight_decay B_t - eta_block s_B U_t^B   else, for each block B of W

  U_t is the orthogonalized momentum of the whole matrix, as in `muon`, and U_t^B is the
  orthogonalized momentum of one device's block. The scales s and s_B are those of the shapes of W
  and B. If a worker is a single device, its block is the whole matrix, and only the learning rate
  differs between steps. `simulate` computes the same blocks if `--mesh` names the axes inside a
  worker.

  Args:
    learning_rate: eta, a number or a schedule.
    block_learning_rate: eta_block, a number or a schedule; None for eta.
    period: the number of steps from one exchange to the next.
    beta: see `muon`.
    nesterov: see `muon`.
    weight_decay: see `muon`.
    ns_steps: see `muon`.
    consistent_rms: see `muon`.
    adam_learning_rate: see `muon`.
    adam_b1: see `muon`.
    adam_b2: see `muon`.
    adam_weight_decay: see `muon`.
    dimensions: see `muon`.

  Raises:
    ValueError: if the period is not a positive integer, or if `muon` would reject an argument.

  Reference: Khaled et al. 2025, arXiv 2510.16981.
  """
  rule = Rule(beta, nesterov, ns_steps, consistent_rms)
  rule.check()
  checks.positive_integer("period", period)
  rates = learning_rate, learning_rate if block_learning_rate is None else block_learning_rate

  def own(model: fitting.Model) -> optax.GradientTransformation:
    return _periodic(rule, rates, period, weight_decay, model)

  rate = learning_rate if adam_learning_rate is None else adam_learning_rate
  return beside_adam(own, rate, adam_b1, adam_b2, adam_weight_decay, dimensions)


def _periodic(
  rule: Rule,
  rates: tuple[optax.ScalarOrSchedule, optax.ScalarOrSchedule],
  period: int,
  weight_decay: float,
  model: fitting.Model,
) -> optax.GradientTransformation:
  def init(params):
    return MuonBPState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

  def update(updates, state, params=None):
    momentum, ahead = rule.momenta(state.momentum, updates)
    kinds = kinds_of(updates, model.dimensions)
    rate, of_blocks = (r(state.count) if callable(r) else r for r in rates)
    times = lambda factor, tree: jax.tree.map(lambda x: factor * x, tree)
    whole = lambda tree: times(rate, rule.whole(tree, kinds, model))

    def blocks(tree: Params) -> Params:
      if model.cut is None:
        return times(of_blocks, rule.whole(tree, kinds, model))

      def one(at: tuple, x: Array) -> Array:
        kind = kinds[path(at)]
        return rule.scale(kind, x.shape) * rule.orthogonalized(kind.view(x)).reshape(x.shape)

      return times(of_blocks, on_blocks(one, tree, model.cut, model.simulated))

    step = lax.cond(state.count % period == 0, whole, blocks, ahead)
    if weight_decay and params is not None:
      step = jax.tree.map(lambda u, w: u + rate * weight_decay * w, step, params)
    return times(-1, step), MuonBPState(state.count + 1, momentum)

  return optax.GradientTransformation(init, update)
