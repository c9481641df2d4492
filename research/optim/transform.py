"""The optax face: aggregators and methods as gradient transformations of somebody's own train step.

Both run where the worker axis is in scope (inside `shard_map`, `pmap` or `vmap(axis_name="data")`)
on one worker's gradients. Inside `shard_map` pass `check_vma=False`: with it on, `jax.grad` sums
the gradients of unvarying parameters over the workers before the aggregator sees them, and such
sums are refused. What each worker keeps for itself, such as the memory of an error feedback, comes
out of `shard_map` by the specs that `parallel/state_specs.py` finds.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from research.comm.collectives import are_summed, round_keys, worker_key
from research.core.base import EVERYONE, Aggregator, Array, Key, Presence, State, Tree
from research.core.method import Local, Method


class AggregatedState(NamedTuple):
  count: Array  # int32, updates so far
  key: Key
  link: State


def aggregated(aggregator: Aggregator, *, seed: int = 0) -> optax.GradientTransformation:
  """Replaces each worker's gradients by what the aggregator makes of all of them.

  `optax.chain(optax.clip_by_global_norm(1.0), aggregated(mean()), optax.adamw(3e-4))` clips each
  worker's gradient, averages, and steps.

  Args:
    aggregator: how the workers' gradients become one.
    seed: of the aggregator's randomness; the same on all workers.

  Raises:
    ValueError: when traced, if `shard_map` has summed the gradients already.
  """

  def init(params):
    return AggregatedState(jnp.zeros((), jnp.int32), jax.random.key(seed), aggregator.init(params))

  def update(updates, state, params=None):
    del params
    _refuse_sums(updates)
    key = jax.random.fold_in(state.key, state.count)
    value, _, link = aggregator.aggregate(updates, state.link, key)
    return value, AggregatedState(state.count + 1, state.key, link)

  return optax.GradientTransformation(init, update)


def _refuse_sums(grads: Tree) -> None:
  if are_summed(grads):
    raise ValueError(
      "shard_map has added up the gradients of replicated parameters over the workers already, so "
      "that aggregating them would count each W times: pass check_vma=False to shard_map"
    )


class MethodState(NamedTuple):
  count: Array  # int32, local steps so far
  key: Key
  local: Local
  state: State


def as_optax(method: Method, *, seed: int = 0) -> optax.GradientTransformationExtraArgs:
  """A whole method as an optimizer: a local step at each update, a sync after every `period`.

  The first argument of `update` is the worker's gradient at its current parameters; pass
  `grad_fn=...` as an extra argument where the method needs gradients elsewhere, and `weight=...`
  where the workers' shares of the objective differ. Keep one set of parameters per worker:
  they differ between syncs for methods that step locally.

  Args:
    method: the algorithm.
    seed: of its randomness; the same on all workers.

  Raises:
    ValueError: if the method's rounds have no one length: its period changes, or it is by epochs;
      when traced, if `shard_map` has summed the gradients already.
  """
  if method.later or method.passes:
    raise ValueError("as_optax takes rounds of one length: give the method one period")

  def init(params):
    state = method.init(params)
    zero = jnp.zeros((), jnp.int32)
    return MethodState(zero, jax.random.key(seed), method.begin(state), state)

  def update(updates, state, params=None, *, grad_fn=None, weight=1.0, **unused):
    del unused
    if params is None:
      raise ValueError("as_optax needs the parameters: update(grads, state, params)")
    _refuse_sums(updates)
    presence = EVERYONE if isinstance(weight, (int, float)) and weight == 1 else Presence(weight)
    sync_key, step_key, _ = round_keys(state.key, state.count // method.local_steps)
    key = jax.random.fold_in(worker_key(step_key), state.count % method.local_steps)
    local = method.step(updates, state.local, state.state, key=key, grad_fn=grad_fn)
    count = state.count + 1

    def sync(local, inner):
      inner = method.sync(local, inner, key=sync_key, presence=presence)
      return method.begin(inner), inner

    if method.local_steps == 1:
      local, inner = sync(local, state.state)
    else:
      rest = count % method.local_steps
      local, inner = lax.cond(rest == 0, sync, lambda *same: same, local, state.state)
    change = jax.tree.map(jnp.subtract, local.params, params)
    return change, MethodState(count, state.key, local, inner)

  return optax.GradientTransformationExtraArgs(init, update)
