"""optax's optimizers that depend on shapes: all are known, and treat each layer as a leaf."""

import inspect
from typing import Any

import jax
import numpy as np
import optax
import pytest

from research.core import optimizers
from research.core.dimensions import checked
from research.core.optimizers import Made, named
from research.optim import fitting, stacked
from research.optim.muon import muon

LAYERS = 3
DECLARED = checked([[r"query$", ["in", "out", "out"]], [r"up$", ["in", "out"]], ["scale", ["out"]]])
SHAPES = {"query": (LAYERS, 6, 2, 3), "up": (LAYERS, 6, 8), "scale": (LAYERS, 6)}
RANDOM = ("add_noise", "noisy_sgd")
ACROSS = ("scale_by_distance_over_gradients",)  # needs the model's start: used by `dog` alone


def draw(seed: int) -> dict:
  draws = np.random.default_rng(seed)
  dtype = jax.dtypes.canonicalize_dtype(float)
  normal = lambda *shape: draws.normal(size=shape).astype(dtype)
  stacks = {name: normal(*shape) for name, shape in SHAPES.items()}
  return {"embedding": normal(5, 6), "layers": stacks}


def apart(tree: Any) -> dict:
  of = lambda i: jax.tree.map(lambda x: x[i], tree["layers"])
  return {"embedding": tree["embedding"], **{f"layers_{i}": of(i) for i in range(LAYERS)}}


def updates(tx: optax.GradientTransformation, as_layers: bool) -> list:
  form = apart if as_layers else lambda tree: tree

  def steps(params: Any, *grads: Any) -> list:
    state, found = tx.init(params), []
    for of_step in grads:
      moved, state = tx.update(of_step, state, params)
      params = optax.apply_updates(params, moved)
      found.append(moved if as_layers else apart(moved))
    return found

  found = jax.device_get(jax.jit(steps)(*(form(draw(seed)) for seed in range(3))))
  return jax.tree.leaves(found)


def differs(tx: optax.GradientTransformation) -> float:
  """The largest difference between stacked layers and single ones, over the largest update."""
  one, other = updates(tx, False), updates(tx, True)
  largest = max(float(np.max(np.abs(x))) for x in one)
  return max(float(np.max(np.abs(x - y))) for x, y in zip(one, other, strict=True)) / largest


def made(factory) -> Made:
  parameters = inspect.signature(factory).parameters.values()
  needed = [p.name for p in parameters if p.default is p.empty]
  rank = {"rank": 2} if "galore" in factory.__name__ else {}
  return Made(factory, (), dict.fromkeys(needed, 0.1) | rank)


@pytest.mark.slow
def test_every_optimizer_of_optax_that_depends_on_shapes_is_known():
  found = set()
  for name, factory in optimizers.factories("optimizer").items():
    try:
      tx = factory(**made(factory).kwargs)
      with jax.enable_x64(True):  # in float32, schedule_free_adamw rounds by 1e-4
        dependent = differs(tx) > 1e-5
    except Exception:  # a wrapper, or one that needs more than averaged gradients
      continue
    found |= {name} if dependent else set()
  known = {factory.__name__ for factory in stacked.DEPENDENT}
  found -= {"muon", "scale_by_muon", *RANDOM, *ACROSS}
  assert found <= known
  assert known - found == {"scale_by_factored_rms"}  # factors only matrices of 128 rows or more


@pytest.mark.slow
@pytest.mark.parametrize("factory", stacked.DEPENDENT, ids=lambda factory: factory.__name__)
def test_a_stack_changes_no_update(factory):
  call = made(factory)
  optimizer = named("optimizer", factory(**call.kwargs), "it", call)
  tx = fitting.fitted(optimizer, fitting.Model(DECLARED))
  assert differs(tx) < 1e-5


def test_muon_on_a_stack_changes_no_update():
  assert differs(muon(0.1, ns_steps=2, dimensions=DECLARED)) < 1e-5


@pytest.mark.slow
def test_galore_projects_each_hidden_matrix_and_no_embedding():
  call = Made(optax.contrib.galore, (0.1,), {"rank": 2})
  tx = stacked.per_matrix(call, DECLARED)
  state = tx.init(draw(0))
  shapes = {x.shape for x in jax.tree.leaves(state)}
  assert {(LAYERS, 6, 2), (LAYERS, 2, 6), (5, 6), (LAYERS, 6)} <= shapes
  moved: Any = tx.update(draw(1), state, draw(0))[0]
  ranks = np.linalg.matrix_rank(np.asarray(moved["layers"]["query"]).reshape(LAYERS, 6, 6), 1e-4)
  assert ranks.tolist() == [2] * LAYERS
  step = np.asarray(moved["embedding"])
  np.testing.assert_allclose(np.abs(step), 0.1, rtol=1e-3)  # Adam's first step has the rate's size
