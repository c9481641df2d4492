"""Polyak-Juditsky averaging: deploy the mean of a method's iterates instead of the last one."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from research.core.base import Array, Params, State
from research.core.method import Method


class AveragedState(NamedTuple):
  inner: State
  mean: Params  # of the iterates after the burn-in, float32 or wider
  count: Array  # int32, rounds so far


def averaged(inner: Method, *, burn_in: int = 0) -> Method:
  """Keeps the running mean of the inner method's parameters, one term per round.

      m_t = m_{t-1} + (x_t - m_{t-1}) / max(1, t - burn_in)

  With step sizes that fall slower than 1/t the mean is asymptotically optimal: its covariance is
  H^-1 S H^-1 / t.

  Args:
    inner: any method; its own iterates are unchanged.
    burn_in: rounds whose iterates are left out; until then the mean is the last iterate.

  Raises:
    ValueError: if burn_in < 0.

  Reference: Polyak and Juditsky 1992, SIAM J. Control Optim. 30(4).
  """
  if burn_in < 0:
    raise ValueError(f"burn_in={burn_in}; it counts rounds and is at least 0")

  def init(params):
    wide = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return AveragedState(inner.init(params), jax.tree.map(wide, params), jnp.zeros((), jnp.int32))

  def begin(state):
    return inner.begin(state.inner)

  def step(grads, local, state, *, key, grad_fn=None):
    return inner.step(grads, local, state.inner, key=key, grad_fn=grad_fn)

  def sync(local, state, *, key, weight=1.0, active=True):
    after = inner.sync(local, state.inner, key=key, weight=weight, active=active)
    count = state.count + 1
    terms = jnp.maximum(1, count - burn_in)
    mean = jax.tree.map(lambda m, x: m + (x - m) / terms, state.mean, inner.params(after))
    return AveragedState(after, mean, count)

  inner_over = inner.over
  over = inner_over and (lambda wrap: averaged(inner_over(wrap), burn_in=burn_in))
  inner_of = inner.of_rounds
  of_rounds = inner_of and (lambda *rounds: averaged(inner_of(*rounds), burn_in=burn_in))
  inner_onto = inner.onto
  onto = inner_onto and (lambda project: averaged(inner_onto(project), burn_in=burn_in))
  rest = (inner.period, over, of_rounds, inner.later, inner.epochs, inner.one_by_one, onto)
  narrowed = lambda m, x: m.astype(x.dtype)
  params = lambda state: jax.tree.map(narrowed, state.mean, inner.params(state.inner))
  return Method(init, begin, step, sync, params, *rest)
