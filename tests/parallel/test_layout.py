"""What is private is found, no more and no less, and private rows are resized by their rule."""

import contextlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue import EXACT, METHODS
from problems import Running

from research.comm import collectives
from research.core.base import EVERYONE, Params
from research.core.method import Method
from research.parallel import layout as layouts
from research.parallel import resize


class Box(NamedTuple):
  params: Params


AXIS = "data"
AXES = [{"data": 8}, {"slice": 2, "data": 4}]


def private(name: str, axes) -> list[str]:
  run = Running(METHODS[name], "simulate", axes)
  found = jax.tree_util.tree_leaves_with_path(run.layout.state)
  return [jax.tree_util.keystr(path) for path, is_private in found if is_private]


@pytest.mark.parametrize("axes", AXES, ids=str)
@pytest.mark.parametrize("name", EXACT)
def test_exact_data_parallelism_keeps_nothing_private(name, axes):
  """So its checkpoint does not grow with the number of workers."""
  assert private(name, axes) == []


@pytest.mark.parametrize("axes", AXES, ids=str)
def test_residuals_and_drifting_models_are_private(axes):
  assert private("residual", axes) == [".link['b']", ".link['w']"]
  found = private("drifting", axes)
  assert ".params['w']" in found
  assert ".params['b']" in found
  assert any("trace" in name for name in found)


class Spreading(Method):
  """a becomes private in one round, b only through a in the next, c never."""

  def init(self, params):
    zero = jnp.zeros(())
    return {"a": zero, "b": zero, "c": zero, "params": params}

  def begin(self, state):
    return Box(state["params"])

  def step(self, grads, local, state, *, key, grad_fn=None):
    return local

  def sync(self, local, state, *, key, presence=EVERYONE):
    own = collectives.worker_index().astype(jnp.float32)
    return {"a": own, "b": state["a"], "c": state["c"] + 1, "params": state["params"]}

  def params(self, state):
    return state["params"]


def test_privacy_spreads_to_a_fixed_point():
  """a becomes private in one round, b only through a in the next, c never."""
  run = Running(Spreading(), "simulate", {"data": 8})
  assert {k: run.layout.state[k] for k in "abc"} == {"a": True, "b": True, "c": False}
  got = run.rounds(3).state.method
  np.testing.assert_array_equal(got["a"], np.arange(8))
  np.testing.assert_array_equal(got["b"], np.arange(8))
  assert got["c"] == 3


@pytest.mark.parametrize("axes", AXES, ids=str)
def test_private_outputs_of_collectives(axes):
  def fn(shared, own):
    return {
      "mean": collectives.mean(own),
      "own": own + shared,
      "shared": shared * 2,
      "slice_mean": collectives.mean(own, "data"),
    }

  found = layouts.private_outputs(
    fn, axes, (None, 0), jnp.zeros(()), jnp.zeros((*axes.values(), 3))
  )
  want = {"mean": False, "own": True, "shared": False, "slice_mean": "slice" in axes}
  assert found == want


@jax.custom_jvp
def mean_and_tangent(x):
  return jax.lax.pmean(x, AXIS)


mean_and_tangent.defjvp(lambda x, tangent: (mean_and_tangent(*x), tangent[0]))


@jax.custom_vjp
def mean_and_gradient(x):
  return jax.lax.pmean(x, AXIS)


mean_and_gradient.defvjp(lambda x: (mean_and_gradient(x), None), lambda _, grads: (grads,))


def programs(own, shared):
  """Values through loops, branches and collectives; `own` differs between workers."""
  worker = collectives.worker_index()
  return {
    "branch": jax.lax.cond(jax.lax.pmax(own, AXIS) > 0, lambda: shared, lambda: 2 * shared),
    "own branch": jax.lax.cond(own > 0, lambda: shared, lambda: 2 * shared),
    "carry": jax.lax.scan(lambda c, _: ((c[1], c[0] + own), c[0]), (shared, shared), None, 3),
    "mean of a carry": jax.lax.scan(
      lambda c, _: (jax.lax.pmean(c + own, AXIS),) * 2, shared, None, 3
    ),
    "own end": jax.lax.while_loop(lambda c: c < own, lambda c: c + 1, shared),
    "barrier": jax.lax.optimization_barrier((own, shared)),
    "gathered": jax.lax.all_gather(own, AXIS),
    "scattered": jax.lax.psum_scatter(jnp.broadcast_to(shared, 4), "data"),
    "shape of own": jnp.zeros_like(own) + shared,
    "worker": jax.jit(lambda x: x + worker)(shared),
    "root": jax.nn.relu(own) + jax.checkpoint(jnp.sin)(shared),
    "own derivative": mean_and_tangent(own),
    "own gradient": mean_and_gradient(own),
    "gradient": jax.grad(lambda x: shared * jax.lax.pmean(x, AXIS))(own),
    "solution": jnp.linalg.solve(shared * jnp.eye(2), jnp.ones(2)),
    "of others": jax.checkpoint(jnp.sin)(shared),
  }


def test_what_differs_is_what_vmap_has_rows_of():
  """A result has rows, one for each worker, if it cannot leave `vmap` without."""
  shape = jax.ShapeDtypeStruct((), jnp.float32)
  rows = jax.ShapeDtypeStruct((4,), jnp.float32)
  found = layouts.private_outputs(programs, {AXIS: 4}, (0, None), rows, shape)
  for place, (path, differs) in enumerate(jax.tree_util.tree_leaves_with_path(found)):
    one = lambda own, shared, place=place: jax.tree.leaves(programs(own, shared))[place]
    whole = jax.vmap(one, (0, None), None, axis_name=AXIS, axis_size=4)
    leaves = contextlib.nullcontext() if not differs else pytest.raises(ValueError, match="vmap")
    with leaves:
      jax.eval_shape(whole, rows, shape)
      assert not differs, jax.tree_util.keystr(path)
  assert len({*jax.tree.leaves(found)}) == 2


def test_resized_rows_keep_their_mean_and_their_counters():
  rows = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
  for owners in (1, 4, 16):
    resized = resize.resize_rows(rows, owners)
    assert resized.shape == (owners, 3)
    np.testing.assert_allclose(resized.mean(0), rows.mean(0), rtol=1e-6)
  counters = resize.resize_rows(jnp.full((8,), 7, jnp.int32), 3)
  assert counters.dtype == jnp.int32
  assert (counters == 7).all()
