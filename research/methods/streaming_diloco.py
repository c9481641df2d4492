"""Streaming DiLoCo: the model is synchronised piece by piece, while the workers go on computing."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from research.aggregate.composition import refuse
from research.aggregate.presence import kept, presence_of
from research.core.base import Aggregator, Array, Params, State
from research.core.method import Method
from research.methods.local import check_steps, minus


class StreamingState(NamedTuple):
  params: Params  # theta_t^i of this worker
  common: Params  # theta_t, each fragment as of its last synchronisation
  inner: State  # of this worker's optimizer
  outer: tuple[State, ...]  # of the outer optimizer, by fragment
  link: tuple[State, ...]  # of the aggregator, by fragment
  count: Array  # int32, rounds so far


class StreamingLocal(NamedTuple):
  params: Params
  inner: State
  number: Array  # int32, steps of this round so far


def streaming_diloco(
  inner: optax.GradientTransformation,
  outer: optax.GradientTransformation,
  aggregator: Aggregator,
  *,
  period: int = 100,
  fragments: int = 2,
  delay: int = 1,
  mixing: float = 0.5,
  strided: bool = True,
) -> Method:
  """DiLoCo by fragments of the model, with staggered and overlapped exchanges.

  Fragment p in [P] is synchronised every H steps, at t = (p + 1) H / P, (p + 1) H / P + H, ...:

      theta_t^i = theta_{t-1}^i + inner(grad f_i(theta_{t-1}^i))
      Delta_p = aggregate_i(weight_i (theta_p - theta_{t,p}^i))
      theta_p <- theta_p + outer(Delta_p)

  and is received by the workers tau steps later, after their inner step:

      theta_{t+tau,p}^i <- alpha theta_{t+tau,p}^i + (1 - alpha) theta_p

  A round is the H / P steps from one exchange to the next, each of one fragment. theta, of which
  each fragment is as new as its last exchange, is deployed. What is sent in 4 bits is the
  aggregator's part: `error_feedback(two_phase(int4()))`. With one fragment, no delay and no mixing
  this is DiLoCo.

  Args:
    inner: each worker's optimizer; its state stays with the worker.
    outer: the optimizer of the common model, for each fragment apart.
    aggregator: how the workers' outer gradients become one; keeps a state for each fragment.
    period: H, steps between two exchanges of a fragment.
    fragments: P. Fragments are sets of leaves.
    delay: tau, steps that an exchange may take. 0: nothing is overlapped.
    mixing: alpha, what a worker keeps of its own fragment. 0: it takes the common one as it is.
    strided: leaf l belongs to fragment l mod P; otherwise fragments are runs of leaves.

  Raises:
    ValueError: if period or fragments < 1, period is not a multiple of fragments, delay is outside
      [0, period), or mixing outside [0, 1]; when traced, if there are more fragments than leaves.

  Reference: Douillard et al. 2025, arXiv 2501.18512, algorithm 2.
  """
  _check(period, fragments, delay, mixing)
  refuse("streaming_diloco", aggregator)
  steps = period // fragments
  rounds_late, steps_late = divmod(delay, steps)

  def members(tree: Params) -> list[list[int]]:
    """The numbers of the leaves of each fragment."""
    count = len(jax.tree.leaves(tree))
    if fragments > count:
      raise ValueError(f"fragments={fragments} of a model that has {count} leaves")
    of = lambda leaf: leaf % fragments if strided else leaf * fragments // count
    return [[leaf for leaf in range(count) if of(leaf) == p] for p in range(fragments)]

  def init(params):
    leaves = jax.tree.leaves(params)
    parts = [[leaves[i] for i in part] for part in members(params)]
    outers, links = (tuple(map(f, parts)) for f in (outer.init, aggregator.init))
    return StreamingState(
      params, params, inner.init(params), outers, links, jnp.zeros((), jnp.int32)
    )

  def received(params: Params, state: StreamingState) -> Params:
    """The worker's model with the fragment in it whose exchange ends now."""
    number = state.count - 1 - rounds_late  # of the round in which the exchange began
    leaves, treedef = jax.tree.flatten(params)
    common = jax.tree.leaves(state.common)
    for fragment, part in enumerate(members(params)):
      now = (number >= 0) & (number % fragments == fragment)
      for i in part:
        mixed = mixing * leaves[i] + (1 - mixing) * common[i]
        leaves[i] = jnp.where(now, mixed, leaves[i])
    return treedef.unflatten(leaves)

  def begin(state):
    params = state.params if steps_late else received(state.params, state)
    return StreamingLocal(params, state.inner, jnp.zeros((), jnp.int32))

  def step(grads, local, state, *, key, grad_fn=None):
    del key, grad_fn
    updates, optimizer = inner.update(grads, local.inner, local.params)
    params, number = optax.apply_updates(local.params, updates), local.number + 1
    if steps_late:
      take = lambda params: received(params, state)
      params = lax.cond(number == steps_late, take, lambda params: params, params)
    return StreamingLocal(params, optimizer, number)

  def sync(local, state, *, key, weight=1.0, active=True):
    parts = members(local.params)
    treedef = jax.tree.structure(state.common)
    gradient = jax.tree.leaves(minus(state.common, local.params))
    presence = presence_of(weight, active)

    def exchange(fragment: int) -> Callable[..., tuple]:
      def run(leaves, outers, links):
        part, leaves = parts[fragment], list(leaves)
        model = [leaves[i] for i in part]
        sent = [gradient[i] for i in part]
        value, _, link = aggregator.aggregate(sent, links[fragment], key, presence)
        updates, optimizer = outer.update(value, outers[fragment], model)
        for i, leaf in zip(part, jax.tree.leaves(optax.apply_updates(model, updates)), strict=True):
          leaves[i] = leaf
        return leaves, _put(outers, fragment, optimizer), _put(links, fragment, link)

      return run

    branches = [exchange(fragment) for fragment in range(fragments)]
    held = jax.tree.leaves(state.common), state.outer, state.link
    leaves, outers, links = lax.switch(state.count % fragments, branches, *held)
    common = treedef.unflatten(leaves)
    own = kept(active, (local.params, local.inner), (state.params, state.inner))
    return StreamingState(own[0], common, own[1], outers, links, state.count + 1)

  rates = {"period": period, "fragments": fragments, "delay": delay}
  rest = {**rates, "mixing": mixing, "strided": strided}
  over = lambda wrap: streaming_diloco(inner, outer, wrap(aggregator), **rest)
  return Method(init, begin, step, sync, lambda state: state.common, steps, over)


def _put(parts: tuple[State, ...], place: int, part: State) -> tuple[State, ...]:
  return (*parts[:place], part, *parts[place + 1 :])


def _check(period: int, fragments: int, delay: int, mixing: float) -> None:
  check_steps("period", period)
  check_steps("fragments", fragments)
  if period % fragments:
    raise ValueError(f"period={period} is not a multiple of fragments={fragments}")
  if not 0 <= delay < period:
    raise ValueError(f"delay={delay} is not in [0, {period}), a period")
  if not 0 <= mixing <= 1:
    raise ValueError(f"mixing={mixing} is not in [0, 1]")
