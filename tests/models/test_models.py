"""Models: one table of them, crossed with what every model promises."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.models import classic

OUTPUTS = 3

MODELS = {
  "linear": classic.linear(),
  "linear with bias": classic.linear(bias=True),
  "logistic": classic.logistic(),
  "mlp": classic.mlp([7, 5]),
  "cnn": classic.cnn([4, 6], 8),
  "cnn with strides": classic.cnn(
    [4, 6], 8, kernels=[4, 2], strides=[2, 1], padding=["SAME", "VALID"], pool_stride=1
  ),
  "resnet": classic.resnet([4, 8], 2),
}


@pytest.fixture(autouse=True)
def strict():
  with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
    yield


@pytest.fixture(params=MODELS)
def module(request):
  return MODELS[request.param](OUTPUTS)


def images(*shape, seed=0):
  return np.random.default_rng(seed).random(shape, np.float32)


def drawn(module, x, seed=0):
  """Variables of the right shapes, drawn by numpy: no leaf is zero, and nothing is compiled."""
  shapes = jax.eval_shape(module.init, jax.random.key(0), x)
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda s: rng.normal(0, 0.3, s.shape).astype(np.float32), shapes)


def paths(params):
  return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]


@pytest.mark.parametrize("shape", [(2, 8, 8), (2, 28, 28), (2, 8, 8, 3)])
def test_output_and_parameters(module, shape):
  x = images(*shape)
  variables = jax.eval_shape(module.init, jax.random.key(0), x)
  assert set(variables) == {"params"}
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype("float32")}
  y = jax.eval_shape(module.apply, variables, x)
  assert (y.shape, y.dtype) == ((2, OUTPUTS), np.float32)


def test_every_module_is_named(module):
  params = jax.eval_shape(module.init, jax.random.key(0), images(1, 8, 8))["params"]
  assert not [path for path in paths(params) if re.search(r"'[A-Z]", path)]


def test_rows_are_independent(module):
  x = images(4, 8, 8)
  variables, apply = drawn(module, x), jax.jit(module.apply)
  alone = np.concatenate([apply(variables, x[i : i + 1]) for i in range(4)])
  together = apply(variables, x)
  np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_workers_under_vmap(module):
  x = images(3, 2, 8, 8)
  workers = [drawn(module, x[0], seed) for seed in range(3)]
  mapped = jax.jit(jax.vmap(module.apply))(jax.tree.map(lambda *p: np.stack(p), *workers), x)
  apply = jax.jit(module.apply)
  for i in range(3):
    single = apply(workers[i], x[i])
    np.testing.assert_allclose(mapped[i], single, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["linear", "linear with bias", "logistic"])
def test_linear_starts_at_zero(name):
  variables = MODELS[name](OUTPUTS).init(jax.random.key(0), images(1, 8, 8))
  assert all(not np.any(leaf) for leaf in jax.tree.leaves(variables))
  assert len(jax.tree.leaves(variables)) == 1 + (name != "linear")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet"])
def test_deep_models_start_at_unit_scale(name):
  start = jax.jit(lambda key: MODELS[name](OUTPUTS).init_with_output(key, images(16, 8, 8))[0])
  assert 0.05 < jnp.std(start(jax.random.key(0))) < 5


def test_mlp_is_its_transcription():
  x = images(5, 6)
  module = classic.mlp([7, 5])(OUTPUTS)
  variables = drawn(module, x)
  y = x
  for name in ("hidden_0", "hidden_1"):
    layer = variables["params"][name]
    y = np.maximum(y @ layer["kernel"] + layer["bias"], 0)
  layer = variables["params"]["output"]
  y = y @ layer["kernel"] + layer["bias"]
  np.testing.assert_allclose(jax.jit(module.apply)(variables, x), y, rtol=1e-4, atol=1e-5)


def sparse_and_dense(*batch):
  rng = np.random.default_rng(0)
  index = np.argsort(rng.random((*batch, 9)), axis=-1)[..., :4].astype(np.int32)
  value = rng.standard_normal(index.shape).astype(np.float32)
  index[..., 3:], value[..., 3:] = 0, 0  # padding
  dense = np.zeros((*batch, 9), np.float32)
  np.put_along_axis(dense, index[..., :3], value[..., :3], axis=-1)
  return {"index": index, "value": value}, dense


@pytest.mark.parametrize("name", ["linear", "logistic"])
def test_sparse_rows_equal_dense_ones(name):
  sparse, dense = sparse_and_dense(2, 3, 5)  # steps, workers, batch
  module = MODELS[name](OUTPUTS)
  variables = drawn(module, dense[0, 0])

  def gradients(x):
    loss = lambda v, x: jnp.sum(jnp.sin(jax.jit(module.apply)(v, x)))
    workers = jax.vmap(jax.grad(loss), (None, 0))
    return jax.jit(lambda x: jax.lax.scan(lambda c, x: (c, workers(variables, x)), 0, x)[1])(x)

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    gradients(sparse),
    gradients(dense),
  )


@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet"])
def test_dense_models_refuse_sparse_rows(name):
  with pytest.raises(ValueError, match=f"{name} takes dense rows, got sparse ones"):
    MODELS[name](OUTPUTS).init(jax.random.key(0), sparse_and_dense(2)[0])


def test_linear_cannot_start_from_sparse_rows():
  with pytest.raises(ValueError, match="initialise with a dense row"):
    classic.linear()(1).init(jax.random.key(0), sparse_and_dense(2)[0])


@pytest.mark.parametrize("name", ["cnn", "resnet"])
def test_image_models_refuse_vectors(name):
  with pytest.raises(ValueError, match=rf"{name} needs images .* shape \[2, 10\]"):
    MODELS[name](OUTPUTS).init(jax.random.key(0), images(2, 10))


def test_cnn_refuses_images_that_pool_to_nothing():
  with pytest.raises(ValueError, match=r"8 x 8 pixels are too small .* convolution 3 leaves 1 x 1"):
    classic.cnn([1, 1, 1, 1])(1).init(jax.random.key(0), images(1, 8, 8))


def test_the_cnn_of_the_tutorial_of_differential_privacy():
  """16 kernels 8x8, 32 of 4x4, both of stride 2, pooling of stride 1: 26,010 parameters."""
  module = classic.cnn(
    [16, 32], 32, kernels=[8, 4], strides=[2, 2], padding=["SAME", "VALID"], pool_stride=1
  )(10)
  params = jax.eval_shape(module.init, jax.random.key(0), images(1, 28, 28))["params"]
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 26_010
  assert params["hidden"]["kernel"].shape == (4 * 4 * 32, 32)


@pytest.mark.parametrize(
  ("factory", "hyper"),
  [
    (classic.linear, {"bias": 1}),
    (classic.logistic, {"bias": "yes"}),
    (classic.mlp, {"hidden": []}),
    (classic.mlp, {"hidden": 128}),
    (classic.mlp, {"hidden": [128, 0]}),
    (classic.cnn, {"channels": [True]}),
    (classic.cnn, {"hidden": -1}),
    (classic.cnn, {"kernels": [3]}),
    (classic.cnn, {"strides": [1, 0]}),
    (classic.cnn, {"padding": ["SAME", "same"]}),
    (classic.cnn, {"pool_stride": 0}),
    (classic.resnet, {"channels": [16.0]}),
    (classic.resnet, {"blocks": 0}),
  ],
)
def test_hyper_parameters_are_checked(factory, hyper):
  (name,) = hyper
  with pytest.raises(ValueError, match=name) as caught:
    factory(**hyper)
  assert "\n" not in str(caught.value)
