"""Projects every step of an optimizer onto a convex set."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from research.core.base import Params


def projected(
  inner: optax.GradientTransformation, project: Callable[[Params], Params]
) -> optax.GradientTransformation:
  """Projects every step of an optimizer: x_{t+1} = P(x_t + inner(g_t)).

  A model that starts in the set stays in the set, and so does a mean of such models.

  Args:
    inner: the optimizer to project.
    project: P, which maps parameters to the nearest point of a convex set.

  Reference: Goldstein, 1964, Convex programming in Hilbert space; Levitin, Polyak, 1966.
  """

  def update(grads, state, params=None):
    assert params is not None, "a projection needs to know the model"
    updates, state = inner.update(grads, state, params)
    moved = project(optax.apply_updates(params, updates))
    return jax.tree.map(jnp.subtract, moved, params), state

  return optax.GradientTransformation(inner.init, update)  # pyright: ignore[reportArgumentType]
