"""Muon: orthogonalized steps of exactly the hidden matrices, as a transcription computes them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.core import registry
from research.core.dimensions import MATRIX
from research.models.transformer import DIMENSIONS, PRESETS, transformer
from research.optim import fitting
from research.optim.muon import Rule, muon, orthogonalized
from research.training import reach

DECLARED = ((r"^(query|stack)$", ("in", "out")), (r"scale$", ("out",)))
SHAPES = {"query": (6, 4), "stack": (3, 4, 5), "embedding": (7, 4), "scale": (3, 4)}


def draw(seed: int, shapes=SHAPES) -> dict:
  draws = np.random.default_rng(seed)
  return {name: draws.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def take(tx: optax.GradientTransformation):
  """One step: (grads, state, params) -> (params, state)."""

  def step(grads, state, params):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  return jax.jit(step)


def newton_schulz(x: np.ndarray) -> np.ndarray:
  if x.shape[0] > x.shape[1]:
    return newton_schulz(x.T).T
  x = x / np.linalg.norm(x)
  for _ in range(5):
    a = x @ x.T
    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
  return x


def test_three_steps_are_those_of_a_transcription():
  rate, beta, decay, own = 0.1, 0.9, 0.01, 0.003
  params = draw(0)
  tx = muon(
    rate, beta=beta, weight_decay=decay, adam_learning_rate=own, adam_weight_decay=0.2,
    dimensions=DECLARED,
  )  # fmt: skip
  adam = optax.adamw(own, weight_decay=0.2)
  rest = {name: params[name] for name in ("embedding", "scale")}
  state, others = tx.init(params), adam.init(rest)
  want = {name: np.asarray(params[name], np.float64) for name in ("query", "stack")}
  momentum = {name: np.zeros_like(x) for name, x in want.items()}
  for step in range(3):
    grads = draw(step + 1)
    params, state = take(tx)(grads, state, params)
    rest, others = take(adam)({name: grads[name] for name in rest}, others, rest)
    for name, x in want.items():
      g = np.asarray(grads[name], np.float64)
      momentum[name] = beta * momentum[name] + g
      ahead = (g + beta * momentum[name]).reshape(-1, *x.shape[-2:])
      u = np.stack([newton_schulz(matrix) for matrix in ahead]).reshape(x.shape)
      want[name] = x - rate * (decay * x + np.sqrt(x.shape[-1] / x.shape[-2]) * u)
  for name, x in (want | rest).items():
    np.testing.assert_allclose(params[name], x, rtol=0, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("shape", [(8, 8), (2, 16, 6)])
def test_singular_values_come_near_one(shape):
  x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  found = np.asarray(jax.jit(orthogonalized, static_argnums=1)(x, 5))
  values = np.linalg.svd(found, compute_uv=False)
  assert 0.3 < values.min() <= values.max() < 1.25


def test_a_constant_root_mean_square():
  rule = Rule(0.9, False, 5, 0.2)
  for shape in ((32, 32), (16, 64), (64, 16)):
    update = rule.scale(MATRIX, shape) * np.eye(*shape)  # whose singular values are one
    assert np.sqrt(np.mean(update**2)) == pytest.approx(0.2)


def shapes_of(preset: str, **options) -> dict:
  module = transformer(preset, **options)(65)
  tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
  return jax.eval_shape(module.init, jax.random.key(0), tokens)["params"]


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize(("preset", "experts"), [*((name, 0) for name in PRESETS), ("tiny", 4)])
def test_exactly_the_hidden_matrices_of_every_preset_are_reached(preset, experts, scan):
  params = shapes_of(preset, experts=experts, scan=scan, layers=2)
  hidden = sum(
    leaf.size
    for at, leaf in jax.tree_util.tree_leaves_with_path(params)
    if jax.tree_util.keystr(at).endswith("['kernel']")
  )
  optimizer = registry.build("optimizer", "chain(clip_by_global_norm(1.0), muon(0.02))")
  fitted = fitting.fitted(optimizer, fitting.Model(DIMENSIONS))
  state = jax.eval_shape(fitted.init, params)
  (found,) = reach.reaches(state, DIMENSIONS).values()
  assert found.hidden == (hidden, hidden)
  assert found.reached == hidden
  assert found.exact
  assert not found.embeds
  reach.check(state, DIMENSIONS)


def test_fitting_keeps_the_spec_and_tells_the_two_apart():
  optimizer = registry.build("optimizer", "chain(sgd(0.1), muon(0.02))")
  fitted = fitting.fitted(optimizer, fitting.Model(DIMENSIONS))
  assert repr(fitted) == repr(optimizer)
  assert fitted != optimizer
  assert fitted == fitting.fitted(fitted, fitting.Model(DIMENSIONS))
  plain = registry.build("optimizer", "adam(0.1)")
  assert fitting.fitted(plain, fitting.Model(DIMENSIONS)) is plain


def test_one_s_own_declaration_is_kept():
  own = muon(0.02, dimensions=DECLARED)
  fitted = fitting.fitted(own, fitting.Model(((r"embedding", ("in", "out")),)))
  (found,) = reach.reaches(jax.eval_shape(fitted.init, draw(0)), DECLARED).values()
  assert found.names == {"query", "stack"}


def test_wrong_values_are_rejected():
  for spec in ("muon(0.1, beta=1.0)", "muon(0.1, ns_steps=0)", "muon(0.1, consistent_rms=-1.0)"):
    with pytest.raises(ValueError, match="muon"):
      registry.build("optimizer", spec)
