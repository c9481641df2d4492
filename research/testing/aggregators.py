"""Checks the contracts of aggregators; one program can check several aggregators."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from research.core.base import Aggregator, Chunk, Presence, Trait
from research.methods.data_parallel import data_parallel
from research.methods.decentralized import d_psgd
from research.parallel import layout
from research.testing import methods
from research.testing.absence import (
  ABSENT,
  AXES,
  WEIGHTS,
  W,
  drawn,
  folded,
  in_two_rounds,
  same,
  unknown,
)
from research.testing.contract import require
from research.testing.problem import distance

Named = Mapping[str, Aggregator]
# Traits of aggregators whose value may differ from the contributions if these are equal.
_UNLIKE = Trait.FORGED | Trait.NOISE | Trait.EXPANSIVE | Trait.SECRET


def check_aggregator(aggregator: Aggregator, *, axes: Mapping[str, int] | None = None) -> None:
  """Checks the contracts of an aggregator.

  The contracts are: `value` and `sent` have the shapes and dtypes of a worker's tree. The state
  keeps its dtypes. All workers receive the same value, unless the aggregator has Trait.LOCAL. If
  all workers contribute the same value, this value is the aggregate. The values of an absent worker
  do not reach the others, and its private state does not change. Training gives the same result in
  `simulate` and `spmd` on the available CPU devices.

  Args:
    aggregator: the aggregator to check.
    axes: the axes of eight workers; None means {"data": 8}. Pass {"slice": 2, "data": 4} if the
      aggregator needs slices.

  Raises:
    ContractError: if a contract is broken; the error describes the first broken contract.
  """
  named, axes = {repr(aggregator): aggregator}, dict(axes or AXES)
  types(named, axes)
  if can_miss(aggregator, axes):
    absent(named, axes)
    if not aggregator.traits & _UNLIKE:
      equal(named, axes)
  around = d_psgd if Trait.LOCAL in aggregator.traits else data_parallel
  methods.agree({repr(aggregator): around(optax.sgd(0.1), aggregator)}, sliced="slice" in axes)


def types(named: Named, axes: Mapping[str, int]) -> None:
  """Checks that `value` and `sent` have the types of the tree, and that the state keeps its types.

  Args:
    named: the aggregators by name.
    axes: the worker axes.
  """
  tree = drawn(0, *axes.values())
  for name, aggregator in named.items():

    def worker(tree, aggregator=aggregator):
      first = aggregator.init(tree)
      return (tree, tree, first), tuple(aggregator.aggregate(tree, first, jax.random.key(0)))

    want, got = jax.eval_shape(layout.over_workers(worker, axes, 0, 0), tree)
    for part, a, b in zip(("value", "sent", "state"), want, got, strict=True):
      like = "what a worker has" if part != "state" else "that of init"
      says = f"The {part} has the structure, shapes and types of {like}."
      require(a == b, aggregator, says, f"{b} where {a} is needed ({name})")


def can_miss(aggregator: Aggregator, axes: Mapping[str, int]) -> bool:
  """Returns whether workers may be absent; if they may not, tracing an absence raises ValueError.

  Args:
    aggregator: the aggregator.
    axes: the worker axes.
  """
  if Trait.EVERYONE in aggregator.traits:
    return False
  one = lambda tree, there: (
    aggregator.aggregate(tree, aggregator.init(tree), jax.random.key(0), Presence(1.0, there)).value
  )
  there = jnp.ones(tuple(axes.values()), bool)
  try:
    jax.eval_shape(layout.over_workers(one, axes, 0, 0), drawn(0, *axes.values()), there)
  except ValueError:
    return False
  return True


def absent(named: Named, axes: Mapping[str, int]) -> None:
  """Checks that an absent worker affects no other worker and keeps its private state.

  Args:
    named: the aggregators by name.
    axes: the worker axes.
  """

  def worker(first, second, weight, active):
    rounds = (jnp.arange(2), *in_two_rounds((first, second), weight, active))

    def one(aggregator: Aggregator):
      def step(state, of_round):
        number, tree, presence = of_round
        out = aggregator.aggregate(tree, state, jax.random.key(number), presence)
        return out.state, (out.value, out.state)

      values, states = jax.lax.scan(step, aggregator.init(first), rounds)[1]
      before, after = (jax.tree.map(lambda x, i=i: x[i], states) for i in range(2))
      return jax.tree.map(lambda x: x[1], values), before, after

    return {name: one(aggregator) for name, aggregator in named.items()}

  first, second = drawn(0, W), drawn(1, W)
  program = folded(worker, axes)
  want = program(first, second, WEIGHTS, ~ABSENT)
  got = program(first, unknown(second), WEIGHTS, ~ABSENT)
  for name, aggregator in named.items():
    says = "An absent worker's values do not affect the others or its own state."
    require(same(got[name], want[name]), aggregator, says, "another result if it has NaN")
    value, before, after = got[name]
    finite = all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(value))
    require(finite, aggregator, says, "a value that is not finite")
    if Trait.LOCAL not in aggregator.traits:
      apart = [x for x in map(np.asarray, jax.tree.leaves(value)) if (x != x[:1]).any()]
      says = "All workers receive the same value; one that differs has Trait.LOCAL."
      require(not apart, aggregator, says, "different values")
    _own_rows(aggregator, before, after)


def _own_rows(aggregator: Aggregator, before: Any, after: Any) -> None:
  """Checks that the private state of absent workers is unchanged; shared state may change."""
  is_chunk = lambda node: isinstance(node, Chunk)
  leaves = lambda tree: jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_chunk)
  for (path, old), (_, new) in zip(leaves(before), leaves(after), strict=True):
    if is_chunk(old):  # a part of a shared array; an absent worker updates its part, too
      continue
    old, new = np.asarray(old), np.asarray(new)
    is_shared = (new == new[:1]).all()
    held = is_shared or (old[ABSENT] == new[ABSENT]).all()
    says = "The private state of an absent worker does not change."
    require(held, aggregator, says, f"a change of state{jax.tree_util.keystr(path)}")


def equal(named: Named, axes: Mapping[str, int] = AXES) -> None:
  """Checks that equal contributions give the same value, whichever workers are present.

  Args:
    named: the aggregators by name.
    axes: the worker axes.
  """
  one = drawn(2)
  rows = jax.tree.map(lambda x: jnp.broadcast_to(x, (W, *x.shape)), one)

  def worker(tree, weight, active):
    run = lambda a, *presence: a.aggregate(tree, a.init(tree), jax.random.key(0), *presence).value
    presence = Presence(weight, active)
    return {n: (run(a), run(a, presence)) for n, a in named.items()}

  program = folded(worker, axes)
  for present in (8, 5, 3, 1):
    active = np.arange(W) < present
    uneven = np.where(active, np.linspace(1, 3, W), 0)
    found = program(rows, (W * uneven / uneven.sum()).astype(np.float32), active)
    for name, aggregator in named.items():
      away = distance(found[name][1], found[name][0])
      says = "Equal contributions give that value, for any number and weights of workers."
      require(away <= 1e-5, aggregator, says, f"a difference of {away:.3g}, {present} present")
