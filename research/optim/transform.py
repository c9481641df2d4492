"""The optax face: aggregators and methods as gradient transformations of somebody's own train step.

Both run where the worker axis is in scope (inside `shard_map`, `pmap` or `vmap(axis_name=...)`) on
one worker's gradients. Inside `shard_map` pass `check_vma=False`: with it on, `jax.grad` sums the
gradients of replicated parameters over the workers before the aggregator sees them, and such sums
are rejected. What each worker keeps for itself, such as the memory of an error feedback, comes out
of `shard_map` by the specs that `parallel/state_specs.py` finds.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from research.comm.collectives import Axes, are_summed, named, round_keys, worker_key
from research.core.base import EVERYONE, WORKER_AXES, Aggregator, Array, Key, Presence, State, Tree
from research.core.method import Method


class AggregatedState(NamedTuple):
  count: Array  # int32, updates so far
  key: Key
  link: State


def aggregated(
  aggregator: Aggregator, *, axis: Axes = WORKER_AXES, seed: int = 0
) -> optax.GradientTransformation:
  """Replaces each worker's gradients by what the aggregator makes of all of them.

  `optax.chain(optax.clip_by_global_norm(1.0), aggregated(mean()), optax.adamw(3e-4))` clips each
  worker's gradient, averages, and steps. Anything may stand before it, on a worker's own gradient,
  and after it, on what all agree on.

  Args:
    aggregator: how the workers' gradients become one.
    axis: the name of the worker axis, or the names, slow links first; 'slice' and 'data' by
      default, or which of them is in scope.
    seed: of the aggregator's randomness; the same on all workers.

  Raises:
    ValueError: when traced, if the axis is not in scope, or `shard_map` has summed the gradients
      already.

  Example:
    >>> tx = optax.chain(aggregated(error_feedback(two_phase(int8())), axis="batch"), optax.sgd(.1))
  """

  def init(params):
    with named(axis):
      link = aggregator.init(params)
    return AggregatedState(jnp.zeros((), jnp.int32), jax.random.key(seed), link)

  def update(updates, state, params=None):
    del params
    _refuse_sums(updates, axis)
    key = jax.random.fold_in(state.key, state.count)
    with named(axis):
      value, _, link = aggregator.aggregate(updates, state.link, key)
    return value, AggregatedState(state.count + 1, state.key, link)

  return optax.GradientTransformation(init, update)


def _refuse_sums(grads: Tree, axis: Axes) -> None:
  with named(axis):
    summed = are_summed(grads)
  if summed:
    raise ValueError(
      "shard_map has added up the gradients of replicated parameters over the workers already, so "
      "that aggregating them would count each W times: pass check_vma=False to shard_map"
    )


class MethodState(NamedTuple):
  count: Array  # int32, local steps so far
  key: Key
  local: Any  # of the method
  state: State


def as_optax(
  method: Method, *, axis: Axes = WORKER_AXES, seed: int = 0
) -> optax.GradientTransformationExtraArgs:
  """A whole method as an optimizer: a local step at each update, a sync after each round of them.

  The first argument of `update` is the worker's gradient at its current parameters; pass
  `grad_fn=...` as an extra argument where the method needs gradients elsewhere, and `weight=...`
  where the workers' shares of the objective differ. Keep one set of parameters per worker: they
  differ between syncs for methods that step locally. In a chain it stands last, since it sets the
  parameters that it has computed: decay and masks belong into its inner optimizer, clipping of a
  worker's gradient before it.

  Args:
    method: the algorithm.
    axis: the name of the worker axis, or the names, slow links first; 'slice' and 'data' by
      default, or which of them is in scope.
    seed: of its randomness; the same on all workers.

  Raises:
    ValueError: if the method's rounds have no one length: its period changes, or it is by epochs;
      when traced, if the axis is not in scope, or `shard_map` has summed the gradients already.

  Example:
    >>> tx = as_optax(diloco(optax.adamw(3e-4), optax.sgd(0.7), mean(), period=50), axis="batch")
  """
  if method.later or method.passes:
    raise ValueError("as_optax takes rounds of one length: give the method one period")
  steps = method.local_steps

  def init(params):
    with named(axis):
      state = method.init(params)
      local = method.begin(state)
    return MethodState(jnp.zeros((), jnp.int32), jax.random.key(seed), local, state)

  def update(updates, state, params=None, *, grad_fn=None, weight=1.0, **unused):
    del unused
    if params is None:
      raise ValueError("as_optax needs the parameters: update(grads, state, params)")
    _refuse_sums(updates, axis)
    whole = isinstance(weight, (int, float)) and weight == 1
    presence = EVERYONE if whole else Presence(weight)
    with named(axis):
      local, inner = one(updates, state, grad_fn, presence)
    change = optax.tree.sub(local.params, params)
    return change, MethodState(state.count + 1, state.key, local, inner)

  def one(grads, state, grad_fn, presence):
    """A local step, and a sync where a round ends with it."""
    sync_key, step_key, _ = round_keys(state.key, state.count // steps)
    key = jax.random.fold_in(worker_key(step_key), state.count % steps)
    local = method.step(grads, state.local, state.state, key=key, grad_fn=grad_fn)

    def sync(local, inner):
      inner = method.sync(local, inner, key=sync_key, presence=presence)
      return method.begin(inner), inner

    if steps == 1:
      return sync(local, state.state)
    ends = (state.count + 1) % steps == 0
    return lax.cond(ends, sync, lambda *same: same, local, state.state)

  return optax.GradientTransformationExtraArgs(init, update)
