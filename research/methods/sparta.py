"""SPARTA: after every optimizer step the workers average a small random part of their models."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from research.aggregate.composition import refuse
from research.aggregate.presence import alike, kept, presence_of, weighted
from research.core.base import Aggregator, Params, State
from research.core.method import Method
from research.methods.local import begin, minus, plus, stepping


class SpartaState(NamedTuple):
  params: Params  # x_t^i of this worker
  inner: State  # of its optimizer
  link: State  # of the aggregator


def sparta(inner: optax.GradientTransformation, aggregator: Aggregator) -> Method:
  """Sparse parameter averaging, with any inner optimizer.

      y_t^i = x_t^i + weight_i inner(grad f_i(x_t^i))
      x_{t+1}^i = y_t^i + aggregate_j(y_t^j) - sent_t^i

  With `sum_mean(random_k(0.005))` an element of the model in the random support S_t, the same on
  all workers, becomes the workers' mean, and the others stay. The exchange keeps the mean of the
  models, which is deployed; they differ for good. With `mean()` this is local SGD with a period of
  one. Optimizers' states stay with their workers. The support has a fixed size in every leaf.
  Whoever drops out of a round keeps its model, and the others average theirs.

  Args:
    inner: each worker's optimizer.
    aggregator: what part of the models is averaged; it takes the same part of each.

  Raises:
    ValueError: for an aggregator in `composition.REFUSED`.

  Reference: Beton et al. 2025, Improving the efficiency of distributed training using sparse
    parameter averaging, OpenReview stFPf3gzq1.
  """
  refuse("sparta", aggregator)

  def init(params):
    return SpartaState(params, inner.init(params), aggregator.init(params))

  def sync(local, state, *, key, weight=1.0, active=True):
    step = weighted(minus(local.params, state.params), presence_of(weight, active))
    moved, presence = plus(state.params, step), alike(active)
    value, sent, link = aggregator.aggregate(moved, state.link, key, presence)
    own = jax.tree.map(lambda s: s / jnp.maximum(presence.weight, 1), sent)  # W / n of who is there
    after = SpartaState(plus(moved, minus(value, own)), local.inner, link)
    return kept(active, after, state._replace(link=link))

  over = lambda wrap: sparta(inner, wrap(aggregator))
  return Method(init, begin, stepping(inner), sync, lambda state: state.params, 1, over)
