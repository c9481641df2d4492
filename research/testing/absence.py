"""Creates inputs and programs to test rounds in which three of eight workers are absent."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.core.base import Array, Presence, Tree
from research.parallel import layout

W = 8
ABSENT = np.asarray([False, True, False, False, True, False, True, False])
WEIGHTS = np.where(ABSENT, 0, W / np.sum(~ABSENT)).astype(np.float32)
LEAVES = {"w": (6, 4), "b": (3,)}
AXES = {"data": W}


def drawn(seed: int, *lead: int) -> dict[str, jax.Array]:
  """Draws standard normal leaves [*lead, 6, 4] and [*lead, 3].

  Args:
    seed: the seed of the random numbers.
    *lead: the leading dimensions.
  """
  random = np.random.default_rng(seed)
  normal = lambda shape: random.normal(size=(*lead, *shape)).astype(np.float32)
  return {name: jnp.asarray(normal(shape)) for name, shape in LEAVES.items()}


def unknown(rows: Tree) -> Tree:
  """Replaces the rows of absent workers with NaN, to detect any dependence on them.

  Args:
    rows: the rows of all workers, with leaves [W, ...].
  """
  absent = lambda x: ABSENT.reshape(-1, *[1] * (x.ndim - 1))
  return jax.tree.map(lambda x: np.where(absent(x), np.float32(np.nan), x), rows)


def in_two_rounds(rows: tuple[Tree, Tree], weight: Array, active: Array) -> tuple[Tree, Presence]:
  """Stacks what a worker has in two rounds; it is present in the first.

  Args:
    rows: what the worker has in each round.
    weight: its weight in the second round.
    active: whether it is present in the second round.
  """
  both = lambda first, second: jnp.stack([first, second])
  presence = Presence(both(jnp.ones_like(weight), weight), both(jnp.ones_like(active), active))
  return jax.tree.map(both, *rows), presence


def folded(one: Callable[..., Any], axes: Mapping[str, int]) -> Callable[..., Any]:
  """Compiles a function of one worker to a function of the rows [W, ...] of all workers.

  Args:
    one: the function of one worker.
    axes: the sizes of the worker axes by name; their product is W.
  """
  fold = lambda x: jnp.asarray(x).reshape(*axes.values(), *x.shape[1:])
  unfold = lambda x: x.reshape(W, *x.shape[len(axes) :])
  program = jax.jit(layout.over_workers(one, axes, 0, 0))
  return lambda *rows: jax.tree.map(unfold, program(*jax.tree.map(fold, rows)))


def same(a: Tree, b: Tree) -> bool:
  """Returns whether all leaves of two trees are bitwise equal; NaN equals NaN.

  Args:
    a: a tree.
    b: a tree of the same structure.
  """
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return all(np.array_equal(x, y, equal_nan=_is_float(x)) for x, y in pairs)


def _is_float(x: Any) -> bool:
  return jnp.issubdtype(x.dtype, jnp.inexact)
