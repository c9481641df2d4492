"""Converts aggregators and methods to optax gradient transformations, for any train step.

Aggregators and methods run on one worker's gradients, with the worker axis in scope: inside
`shard_map`, `pmap` or `vmap(axis_name=...)`. Pass `check_vma=False` to `shard_map`: otherwise,
`jax.grad` sums the gradients of replicated parameters over the workers before the aggregator
receives them, and such sums are rejected. To return private state, such as an error feedback
memory, from `shard_map`, use the PartitionSpecs from `parallel/state_specs.py`.
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
  count: Array  # int32, number of completed updates
  key: Key
  link: State


def aggregated(
  aggregator: Aggregator, *, axis: Axes = WORKER_AXES, seed: int = 0
) -> optax.GradientTransformation:
  """Replaces each worker's gradients by the aggregate over all workers.

  `optax.chain(optax.clip_by_global_norm(1.0), aggregated(mean()), optax.adamw(3e-4))` clips each
  worker's gradient, averages the gradients, and takes a step. Transformations before `aggregated`
  receive one worker's gradient; later ones receive the aggregate, which is equal on all workers.

  Args:
    aggregator: the aggregator that combines the workers' gradients.
    axis: the name or names of the worker axes, slow links first; by default, those of 'slice' and
      'data' that are in scope.
    seed: the seed of the aggregator's randomness, equal on all workers.

  Returns:
    The transformation. Its state contains the aggregator's state, which may be private
    (`state_specs`).

  Raises:
    ValueError: at trace time, if the axis is not in scope or `shard_map` has already summed the
      gradients.

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
      "shard_map has already summed the gradients of replicated parameters over the workers, and "
      "the aggregate would count each W times: pass check_vma=False to shard_map"
    )


class MethodState(NamedTuple):
  count: Array  # int32, number of completed local steps
  key: Key
  local: Any  # the method's Local
  state: State


def as_optax(
  method: Method, *, axis: Axes = WORKER_AXES, seed: int = 0
) -> optax.GradientTransformationExtraArgs:
  """Runs a method as an optimizer: each update is a local step, and each round ends with a sync.

  The first argument of `update` is the worker's gradient at its current parameters. Pass
  `grad_fn=...` as an extra argument if the method needs gradients at other parameters, and
  `weight=...` if the workers' weights in the objective differ. Keep separate parameters for each
  worker: with local steps, the workers' parameters differ between syncs. In a chain, this
  transformation must be last, since it sets the parameters to the values that the method has
  computed. Put weight decay and masks into the method's inner optimizer, and clip a worker's
  gradient before this transformation.

  Args:
    method: the method to run.
    axis: the name or names of the worker axes, slow links first; by default, those of 'slice' and
      'data' that are in scope.
    seed: the seed of the method's randomness, equal on all workers.

  Returns:
    The transformation. Its state contains the method's state, which may be private (`state_specs`).

  Raises:
    ValueError: if the length of the method's rounds is not constant, because its period has a
      schedule or is in epochs; or, at trace time, if the axis is not in scope or `shard_map` has
      already summed the gradients.

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
    """Runs a local step, followed by a sync if the step ends the round."""
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
