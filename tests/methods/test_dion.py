"""Dion and Dion2: transcriptions, what equals what, rank-deficient momenta, bytes, ranges."""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import Running, distance

from research.aggregate.feedback import error_feedback
from research.aggregate.mean import mean
from research.analysis import wire
from research.core.base import Presence
from research.core.dimensions import Declared
from research.core.method import Method
from research.methods.dion import dion, unit_columns
from research.methods.dion2 import dion2

W = 3
ROUNDS = 3
SHAPES = {"bias": (4,), "heads": (6, 2, 5), "kernel": (8, 6), "layers": (2, 4, 7)}
FEW = ("bias", "kernel")  # these compile fast
DECLARED = Declared(
  (("heads", ("in", "out", "out")), ("kernel", ("in", "out")), ("layers", ("in", "out")))
)


def drawn(seed: int, *lead: int, names: Collection[str] = SHAPES) -> dict[str, np.ndarray]:
  random = np.random.default_rng(seed)
  draw = lambda name: random.normal(size=(*lead, *SHAPES[name])).astype(np.float32)
  return {name: draw(name) for name in names}


def made(method: Method) -> Method:
  return method.with_dimensions(DECLARED.dimensions)


def after(method: Method, params: Any, rounds: list[Any], *presence: np.ndarray) -> Any:
  """States [W, ...] after rounds of given gradients [W, ...]."""

  def one(rounds, *presence):
    there = {"presence": Presence(*presence)} if presence else {}

    def step(state, of_round):
      grads, key = of_round
      local = method.step(grads, method.begin(state), state, key=key)
      return method.sync(local, state, key=key, **there), None

    keys = jax.random.split(jax.random.key(0), len(rounds))
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *rounds)
    return jax.lax.scan(step, method.init(jax.tree.map(jnp.asarray, params)), (stacked, keys))[0]

  return jax.jit(jax.vmap(one, axis_name="data"))(rounds, *presence)


def gradients(rounds: int = ROUNDS, names: Collection[str] = SHAPES) -> list[Any]:
  return [drawn(7 + number, W, names=names) for number in range(rounds)]


# ---- in numpy

MATRICES = {  # leaf -> its matrices [inputs, outputs], and the way back
  "heads": (lambda x: [x.reshape(6, 10)], lambda m: m[0].reshape(6, 2, 5)),
  "kernel": (lambda x: [x], lambda m: m[0]),
  "layers": (lambda x: [*x.copy()], np.stack),
}


def numpy_dion(params, rounds, first, rate, decay, mu):
  w = {k: MATRICES[k][0](params[k].astype(np.float64)) for k in MATRICES}
  m = {k: [[np.zeros_like(x) for x in w[k]] for _ in range(W)] for k in w}
  q = {k: [x.astype(np.float64) for x in first[k]] for k in w}
  for grads in rounds:
    for k, stack in w.items():
      for j, x in enumerate(stack):
        b = [m[k][i][j] + MATRICES[k][0](grads[k][i].astype(np.float64))[j] for i in range(W)]
        p = np.linalg.qr(np.mean([one @ q[k][j] for one in b], 0))[0]
        r = np.mean([one.T @ p for one in b], 0)
        for i in range(W):
          m[k][i][j] = b[i] - (1 - mu) * p @ r.T
        q[k][j] = r / np.linalg.norm(r, axis=0)
        step = np.sqrt(x.shape[1] / x.shape[0]) * p @ q[k][j].T
        w[k][j] = (1 - rate * decay) * x - rate * step
  return {k: MATRICES[k][1](w[k]) for k in w}, {
    k: np.stack([MATRICES[k][1](one) for one in m[k]]) for k in w
  }


def newton_schulz(x):
  x = x / np.linalg.norm(x)
  for _ in range(5):
    gram = x @ x.T
    x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
  return x


def numpy_dion2(params, rounds, rate, decay, fraction):
  w = {k: MATRICES[k][0](params[k].astype(np.float64)) for k in MATRICES}
  m = {k: [np.zeros_like(x) for x in w[k]] for k in w}
  for grads in rounds:
    for k, stack in w.items():
      for j, x in enumerate(stack):
        m[k][j] += MATRICES[k][0](grads[k].astype(np.float64).mean(0))[j]
        is_wide = x.shape[0] <= x.shape[1]
        rows = m[k][j] if is_wide else m[k][j].T  # a view
        count = int(np.ceil(fraction * len(rows)))
        chosen = np.argsort(-np.abs(rows).sum(1), kind="stable")[:count]
        u = np.zeros_like(rows)
        u[chosen] = newton_schulz(rows[chosen])
        rows[chosen] *= 0.95
        scale = np.sqrt(x.shape[1] / x.shape[0])
        w[k][j] = (1 - rate * decay) * x - rate * scale * (u if is_wide else u.T)
  return {k: MATRICES[k][1](w[k]) for k in w}, {k: MATRICES[k][1](m[k]) for k in w}


def test_dion_equals_numpy():
  method = made(dion(0.1, optax.sgd(0.2), mean(), rank=0.5, momentum=0.8, weight_decay=0.3))
  params, rounds = drawn(0), gradients()
  right = jax.device_get(method.init(params).right)
  first = {name: [*q] if q.ndim == 3 else [q] for name, q in right.items()}
  shapes = {"heads": (10, 3), "kernel": (6, 3), "layers": (2, 7, 2)}
  assert {name: q.shape for name, q in right.items()} == shapes
  found = jax.device_get(after(method, params, rounds))
  models, momenta = numpy_dion(params, rounds, first, 0.1, 0.3, 0.8)
  for name, model in models.items():
    np.testing.assert_allclose(found.params[name][0], model, atol=2e-5, err_msg=name)
    momentum = found.momentum[name]
    np.testing.assert_allclose(momentum, momenta[name], atol=5e-5, err_msg=name)
  bias = params["bias"] - 0.2 * sum(grads["bias"].mean(0) for grads in rounds)
  np.testing.assert_allclose(found.params["bias"][0], bias, atol=1e-6)


def test_dion2_equals_numpy():
  method = made(dion2(0.1, optax.sgd(0.2), mean(), fraction=0.4, weight_decay=0.3))
  params, rounds = drawn(0), gradients()
  found = jax.device_get(after(method, params, rounds))
  models, momenta = numpy_dion2(params, rounds, 0.1, 0.3, 0.4)
  for name, model in models.items():
    np.testing.assert_allclose(found.params[name][0], model, atol=2e-5, err_msg=name)
    momentum = found.momentum[name][0]
    np.testing.assert_allclose(momentum, momenta[name], atol=2e-5, err_msg=name)


# ---- what they are known for


@pytest.mark.slow
def test_momenta_of_their_own_are_dion_on_the_mean_gradient():
  method = made(dion(0.02, optax.adam(0.01), mean(), weight_decay=0.1))
  params, rounds = drawn(0, names=FEW), gradients(8, FEW)
  alone = [jax.tree.map(lambda x: x.mean(0, keepdims=True), grads) for grads in rounds]
  apart, one = after(method, params, rounds), after(method, params, alone)
  first = lambda state: jax.tree.map(lambda x: x[0], state)
  assert distance(first(apart).params, first(one).params) <= 1e-5
  means = jax.tree.map(lambda x: x.mean(0), apart.momentum)
  assert distance(means, first(one).momentum) <= 1e-5
  spread = max(float(jnp.abs(x - x[:1]).max()) for x in jax.tree.leaves(apart.momentum))
  assert spread > 1


def test_a_gradient_of_low_rank_moves_nothing_beyond_its_rank():
  """Rounding errors of vanishing columns are not scaled to unit length."""
  random = np.random.default_rng(3)
  grads = {"kernel": np.outer(*(random.normal(size=n) for n in (16, 12))).astype(np.float32)[None]}
  params = {"kernel": np.zeros((16, 12), np.float32)}
  method = dion(1.0, optax.sgd(0.1), mean(), rank=0.5)
  state = jax.tree.map(lambda x: x[0], after(method, params, [grads] * 4))
  sizes = np.linalg.svd(np.asarray(state.params["kernel"]))[1]
  np.testing.assert_allclose(sizes[0], 4 * np.sqrt(12 / 16), rtol=1e-5)
  assert sizes[1] <= 1e-5
  away = np.abs(
    np.asarray(state.right["kernel"]) - np.asarray(method.init(params).right["kernel"])
  ).max(0)
  assert int((away <= 1e-6).sum()) == 5


def test_columns_have_unit_length_or_none():
  x = jnp.asarray([[3.0, 0.0, 1e-7], [4.0, 0.0, 0.0]])
  np.testing.assert_allclose(unit_columns(x), [[0.6, 0, 0], [0.8, 0, 0]], rtol=1e-6)


@pytest.mark.slow
def test_an_absent_worker_keeps_its_momentum_and_the_others_are_as_if_alone():
  params, (grads,) = drawn(0, names=FEW), gradients(1, FEW)
  lost = jax.tree.map(
    lambda x: np.where(np.arange(W).reshape(-1, *[1] * (x.ndim - 1)) == 1, np.nan, x), grads
  )
  weights, active = np.asarray([2.0, 0.0, 1.0], np.float32), np.asarray([True, False, True])
  method = made(dion(0.1, optax.sgd(0.1), mean()))
  found = after(method, params, [lost], weights, active)
  both = jax.tree.map(lambda x: x[[0, 2]], grads)
  want = after(method, params, [both], np.asarray([4 / 3, 2 / 3], np.float32), active[[0, 2]])
  at = lambda tree, places: jax.tree.map(lambda x: x[np.asarray(places)], tree)
  assert distance(at(found.right, [0, 2]), want.right) <= 1e-5
  assert distance(at(found.momentum, [0, 2]), want.momentum) <= 1e-5
  assert all(float(jnp.abs(x[1]).max()) == 0 for x in jax.tree.leaves(found.momentum))
  bias = params["bias"] - 0.1 * (2 * grads["bias"][0] + grads["bias"][2]) / W
  np.testing.assert_allclose(found.params["bias"][0], bias, atol=1e-6)


def test_only_the_factors_and_the_vectors_are_sent():
  """2 (W - 1) / W r (m + n) elements of a matrix, by the collectives of the traced program."""
  method = dion(0.1, optax.adamw(0.1), mean(), rank=0.25)
  params = {
    "b": jax.ShapeDtypeStruct((7,), jnp.float32),
    "w": jax.ShapeDtypeStruct((40, 24), jnp.float32),
  }
  state = jax.eval_shape(method.init, params)
  local = jax.eval_shape(method.begin, state)
  key = jax.eval_shape(lambda: jax.random.key(0))
  sync = lambda local, state, key: method.sync(local, state, key=key)
  found = wire.traffic(sync, local, state, key, axes={"data": 8})
  assert {transfer.operation for transfer in found} == {"all-reduce"}
  assert sum(transfer.total for transfer in found) == 2 * 7 / 8 * 4 * (6 * (40 + 24) + 7)


@pytest.mark.slow
def test_a_mesh_that_cuts_a_worker_agrees():
  """The factorization is of full matrices, so that it is no other one than on a single device."""
  axes, sizes = {"data": 4, "fsdp": 2}, (60,) * 4
  for method in (dion(0.02, optax.adam(0.01), mean()), dion2(0.02, optax.adam(0.01), mean())):
    got = Running(method, "spmd", axes, sizes).rounds(6)
    want = Running(method, "simulate", {"data": 4}, sizes).rounds(6)
    assert distance(got.params(), want.params()) <= 1e-5
    assert "fsdp" in got.state.method.momentum["w"].sharding.spec


@pytest.mark.parametrize(
  ("make", "words"),
  [
    (lambda: dion(0.0, optax.sgd(0.1), mean()), "learning_rate=0.0 is not above 0"),
    (lambda: dion(0.1, optax.sgd(0.1), mean(), rank=0.6), r"rank=0.6 is not in \(0, 0.5\]"),
    (lambda: dion(0.1, optax.sgd(0.1), mean(), momentum=1.0), r"momentum=1.0 is not in \[0, 1\)"),
    (lambda: dion(0.1, optax.sgd(0.1), mean(), weight_decay=-1.0), "weight_decay=-1.0"),
    (lambda: dion(0.1, optax.sgd(0.1), error_feedback(mean())), "cannot be combined"),
    (lambda: dion2(0.1, optax.sgd(0.1), mean(), fraction=0.0), r"fraction=0.0 is not in \(0, 1\]"),
    (lambda: dion2(0.1, optax.sgd(0.1), mean(), decay=1.0), r"decay=1.0 is not in \[0, 1\)"),
    (
      lambda: dion(0.1, optax.sgd(0.1), mean()).init({"w": jnp.zeros(8)}),
      "dion finds no hidden matrix in this model",
    ),
  ],
)
def test_ranges_are_checked(make, words):
  with pytest.raises(ValueError, match=words):
    make()
