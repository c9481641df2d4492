"""SPARTA: after each optimizer step, workers average a small random part of their models."""

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from research.aggregate.presence import alike, kept, weighted
from research.core.base import EVERYONE, Aggregator, Params, State, Trait
from research.methods._steps import LocalStepping


class SpartaState(NamedTuple):
  params: Params  # x_t^i of this worker
  inner: State  # state of its optimizer
  link: State  # state of the aggregator


class Sparta(LocalStepping, name="sparta"):
  """Sparse parameter averaging with any inner optimizer.

      y_t^i = x_t^i + weight_i inner(grad f_i(x_t^i))
      x_{t+1}^i = y_t^i + aggregate_j(y_t^j) - sent_t^i

  With `sum_mean(random_k(0.005))`, the elements in a random support S_t that is equal on all
  workers are replaced by the workers' mean; the other elements do not change. The support has a
  fixed size in each leaf. The exchange preserves the mean of the models, which is the deployed
  model; the workers' models never become equal. With `mean()` this is local SGD with a period of
  one. Optimizer states are private. A worker that drops out of a round keeps its model, and the
  others average theirs.

  Args:
    inner: each worker's optimizer.
    aggregator: selects and averages a part of the models, the same part on every worker.

  Raises:
    ValueError: for an incompatible aggregator.

  Reference: Beton et al. 2025, Improving the efficiency of distributed training using sparse
    parameter averaging, OpenReview stFPf3gzq1.
  """

  inner: optax.GradientTransformation
  aggregator: Aggregator

  refuses: ClassVar[Mapping[Trait, str]] = {
    Trait.MEMORY: "a memory would accumulate parts of models, not of changes",
    Trait.VOTE: "signs cannot replace elements of a model",
    Trait.SELECTS: "the exchange would not preserve the mean of the models",
    Trait.NOISE: "each worker would subtract its own noise from its model",
    Trait.EXPANSIVE: "the models would diverge",
    Trait.PARTIAL: "an absent worker would add the others' models to its own",
    Trait.SENDERS: "a worker would add the senders' models to its own",
    Trait.LOCAL: "neighbours receive different averages; use d_psgd",
    Trait.APART: "different elements per worker would be averaged with zeros",
  }

  def init(self, params):
    return SpartaState(params, self.inner.init(params), self.aggregator.init(params))

  def message(self, local, state, *, key, presence=EVERYONE):
    del key
    step = weighted(optax.tree.sub(local.params, state.params), presence)
    moved = optax.tree.add(state.params, step)
    own = (moved, local.inner), (state.params, state.inner)
    params, inner = kept(presence.active, *own)
    return moved, SpartaState(params, inner, state.link)

  def receive(self, value, sent, state, *, key, presence=EVERYONE):
    del key
    share = jnp.maximum(self.counted(presence).weight, 1)  # W / n for n workers present
    own = jax.tree.map(lambda s: s / share, sent)
    params = optax.tree.add(state.params, optax.tree.sub(value, own))
    return state._replace(params=kept(presence.active, params, state.params))

  def counted(self, presence):
    return alike(presence.active)


sparta = Sparta
