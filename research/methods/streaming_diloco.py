"""Streaming DiLoCo: synchronises the model by fragments while the workers keep computing."""

from collections.abc import Callable
from dataclasses import KW_ONLY
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from research.aggregate.presence import kept
from research.core import checks
from research.core.base import EVERYONE, Aggregator, Array, Params, Presence, State
from research.core.method import Method


class StreamingState(NamedTuple):
  params: Params  # theta_t^i of this worker
  common: Params  # theta_t, each fragment as of its last synchronisation
  inner: State  # of this worker's optimizer
  outer: tuple[State, ...]  # of the outer optimizer, by fragment
  link: tuple[State, ...]  # of the aggregator, by fragment
  count: Array  # int32, completed rounds


class StreamingLocal(NamedTuple):
  params: Params
  inner: State
  number: Array  # int32, completed steps of this round


class StreamingDiLoCo(Method, name="streaming_diloco"):
  """DiLoCo over fragments of the model, with staggered and overlapped exchanges.

  Fragment p in [P] is synchronised every H steps, at t = (p + 1) H / P, (p + 1) H / P + H, ...:

      theta_t^i = theta_{t-1}^i + inner(grad f_i(theta_{t-1}^i))
      Delta_p = aggregate_i(weight_i (theta_p - theta_{t,p}^i))
      theta_p <- theta_p + outer(Delta_p)

  The workers receive the updated fragment tau steps later, after their inner step:

      theta_{t+tau,p}^i <- alpha theta_{t+tau,p}^i + (1 - alpha) theta_p

  A round is the H / P steps from one exchange to the next; each exchange sends one fragment. The
  deployed model is theta, with each fragment as of its last exchange. The aggregator decides the
  precision on the wire: the paper's 4 bits are `error_feedback(two_phase(int4()))`. With one
  fragment, no delay and no mixing this is DiLoCo.

  Args:
    inner: each worker's optimizer; its state is private.
    outer: the optimizer of the common model, with a separate state for each fragment.
    aggregator: combines the workers' outer gradients, with a separate state for each fragment.
    period: H, steps between two exchanges of a fragment.
    fragments: P, number of fragments, which are sets of leaves.
    delay: tau, steps that an exchange may take; 0 disables overlap.
    mixing: alpha, weight of the worker's own fragment; 0 replaces it by the common fragment.
    strided: if true, leaf l belongs to fragment l mod P; otherwise fragments are contiguous runs of
      leaves.

  Raises:
    ValueError: if period or fragments < 1, period is not a multiple of fragments, delay is outside
      [0, period), or mixing outside [0, 1]; at trace time, if there are more fragments than leaves.

  Reference: Douillard et al. 2025, arXiv 2501.18512, algorithm 2.
  """

  inner: optax.GradientTransformation
  outer: optax.GradientTransformation
  aggregator: Aggregator
  _: KW_ONLY
  period: int = 100
  fragments: int = 2
  delay: int = 1
  mixing: float = 0.5
  strided: bool = True

  def check(self):
    checks.at_least("period", self.period)
    checks.at_least("fragments", self.fragments)
    if self.period % self.fragments:
      raise ValueError(f"period={self.period} is not a multiple of fragments={self.fragments}")
    checks.in_range("delay", self.delay, f"[0, {self.period})", note=", a period")
    checks.in_range("mixing", self.mixing, "[0, 1]")

  @property
  def local_steps(self):
    return self.period // self.fragments

  @property
  def later(self):
    return ()

  def in_rounds(self, steps, participation):
    del steps, participation
    return self

  @property
  def late(self) -> tuple[int, int]:
    """The delay as (full rounds, remaining steps)."""
    return divmod(self.delay, self.local_steps)

  def members(self, tree: Params) -> list[list[int]]:
    """Returns the leaf indices of each fragment.

    Raises:
      ValueError: if there are more fragments than leaves.
    """
    count, fragments = len(jax.tree.leaves(tree)), self.fragments
    if fragments > count:
      raise ValueError(f"fragments={fragments} of a model that has {count} leaves")
    of = lambda leaf: leaf % fragments if self.strided else leaf * fragments // count
    return [[leaf for leaf in range(count) if of(leaf) == p] for p in range(fragments)]

  def init(self, params):
    leaves = jax.tree.leaves(params)
    parts = [[leaves[i] for i in part] for part in self.members(params)]
    outers, links = (tuple(map(f, parts)) for f in (self.outer.init, self.aggregator.init))
    zero = jnp.zeros((), jnp.int32)
    return StreamingState(params, params, self.inner.init(params), outers, links, zero)

  def params(self, state):
    return state.common

  def received(self, params: Params, state: StreamingState) -> Params:
    """Mixes the fragment whose exchange ends in this round into the worker's model.

    Args:
      params: this worker's model.
      state: the state at the round's start.
    """
    number = state.count - 1 - self.late[0]  # the round in which the exchange started
    leaves, treedef = jax.tree.flatten(params)
    common = jax.tree.leaves(state.common)
    for fragment, part in enumerate(self.members(params)):
      now = (number >= 0) & (number % self.fragments == fragment)
      for i in part:
        mixed = self.mixing * leaves[i] + (1 - self.mixing) * common[i]
        leaves[i] = jnp.where(now, mixed, leaves[i])
    return treedef.unflatten(leaves)

  def begin(self, state):
    params = state.params if self.late[1] else self.received(state.params, state)
    return StreamingLocal(params, state.inner, jnp.zeros((), jnp.int32))

  def step(self, grads, local, state, *, key, grad_fn=None):
    del key, grad_fn
    updates, optimizer = self.inner.update(grads, local.inner, local.params)
    params, number = optax.apply_updates(local.params, updates), local.number + 1
    if self.late[1]:
      take = lambda params: self.received(params, state)
      params = lax.cond(number == self.late[1], take, lambda params: params, params)
    return StreamingLocal(params, optimizer, number)

  def sync(self, local, state, *, key, presence=EVERYONE):
    gradient = jax.tree.leaves(optax.tree.sub(state.common, local.params))
    parts = self.members(local.params)
    branches = [self._exchange(p, part, gradient, key, presence) for p, part in enumerate(parts)]
    held = jax.tree.leaves(state.common), state.outer, state.link
    leaves, outers, links = lax.switch(state.count % self.fragments, branches, *held)
    common = jax.tree.structure(state.common).unflatten(leaves)
    own = kept(presence.active, (local.params, local.inner), (state.params, state.inner))
    return StreamingState(own[0], common, own[1], outers, links, state.count + 1)

  def _exchange(
    self, fragment: int, part: list[int], gradient: list[Array], key: Array, presence: Presence
  ) -> Callable[..., tuple]:
    """Returns (leaves, outers, links) -> the same three after the exchange of one fragment."""

    def run(leaves, outers, links):
      leaves = list(leaves)
      model = [leaves[i] for i in part]
      sent = [gradient[i] for i in part]
      value, _, link = self.aggregator.aggregate(sent, links[fragment], key, presence)
      updates, optimizer = self.outer.update(value, outers[fragment], model)
      for i, leaf in zip(part, jax.tree.leaves(optax.apply_updates(model, updates)), strict=True):
        leaves[i] = leaf
      return leaves, _put(outers, fragment, optimizer), _put(links, fragment, link)

    return run


streaming_diloco = StreamingDiLoCo


def _put(parts: tuple[State, ...], place: int, part: State) -> tuple[State, ...]:
  return (*parts[:place], part, *parts[place + 1 :])
