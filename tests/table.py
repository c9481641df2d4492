"""Every method of the codebase, as specs: each contract test runs over all of them.

`drifting` and `residual` exist only here: a method whose models differ between workers and an
aggregator with private memory, so that private state is tested before the first published ones.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from research import registry
from research.aggregate.mean import mean
from research.base import Aggregate, Aggregator, Method, Params, State, Tree
from research.methods.data_parallel import data_parallel

SPECS = {
  "sgd": "data_parallel(sgd(0.1), mean())",
  "momentum": "data_parallel(sgd(0.1, momentum=0.9), mean())",
  "adam": "data_parallel(adam(0.01), mean())",
  "chain": "data_parallel(chain(clip_by_global_norm(0.1), "
  "adamw(cosine_decay_schedule(0.01, 30))), mean())",
  "accumulation": "data_parallel(sgd(0.1, momentum=0.9), mean(), period=3)",
  "averaged": "averaged(data_parallel(sgd(0.1), mean()), burn_in=2)",
  "top_k": "data_parallel(sgd(0.1), error_feedback(gather_mean(top_k(0.3))))",
  "two_phase": "data_parallel(adam(0.01), error_feedback(two_phase(int8())))",
}


class DriftingState(NamedTuple):
  params: Params
  inner: State


class DriftingLocal(NamedTuple):
  params: Params
  inner: State


def drifting(learning_rate: float, period: int = 2) -> Method:
  """Workers that never talk: their parameters and momenta are private."""
  optimizer = optax.sgd(learning_rate, momentum=0.9)

  def step(grads, local, state, *, key, grad_fn=None):
    del state, key, grad_fn
    updates, inner = optimizer.update(grads, local.inner, local.params)
    return DriftingLocal(optax.apply_updates(local.params, updates), inner)

  def sync(local, state, *, key, weight=1.0, active=True):
    del state, key, weight, active
    return DriftingState(local.params, local.inner)

  return Method(
    lambda params: DriftingState(params, optimizer.init(params)),
    lambda state: DriftingLocal(state.params, state.inner),
    step,
    sync,
    lambda state: state.params,
    period,
  )


def residual(fraction: float) -> Aggregator:
  """Sends a part of each value and keeps the rest: shared result, private memory."""

  def init(params: Params) -> Tree:
    return jax.tree.map(jnp.zeros_like, params)

  def aggregate(tree, state, key):
    corrected = jax.tree.map(jnp.add, tree, state)
    sent = jax.tree.map(lambda x: fraction * x, corrected)
    out = mean().aggregate(sent, (), key)
    return Aggregate(out.value, sent, jax.tree.map(jnp.subtract, corrected, sent))

  return Aggregator(init, aggregate)


def methods() -> dict[str, Method]:
  built = {name: registry.build("method", spec) for name, spec in SPECS.items()}
  built["drifting"] = drifting(0.05)
  built["residual"] = data_parallel(optax.sgd(0.1), residual(0.6))
  return built


METHODS = methods()
NAMES = list(METHODS)
EXACT = [name for name, spec in SPECS.items() if ", mean()" in spec]
