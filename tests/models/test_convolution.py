"""The convolution of the small models is that of XLA, with a gradient of its own on CPUs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from research.models import classic
from research.models.convolution import conv_general_dilated

LAYOUT = ("NHWC", "HWIO", "NHWC")
CASES = [
  ((3, 3), (1, 1), "SAME"),
  ((3, 2), (2, 2), "SAME"),
  ((4, 4), (2, 1), "VALID"),
  ((1, 1), (2, 2), "SAME"),
  ((2, 3), (1, 2), [(3, 0), (-1, 2)]),
]


def drawn(*shape: int) -> jax.Array:
  return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def gradients(convolve, x, kernel, *arguments):
  loss = lambda x, kernel: jnp.sum(jnp.sin(convolve(x, kernel, *arguments)))
  return jax.value_and_grad(loss, (0, 1))(x, kernel)


@pytest.mark.parametrize(("size", "strides", "padding"), CASES)
def test_values_and_gradients_are_those_of_xla(size, strides, padding):
  """For each of three workers with kernels of their own, too."""
  x, kernel = drawn(3, 2, 9, 8, 4), drawn(3, *size, 4, 5)
  by_xla = lambda *args: lax.conv_general_dilated(*args, dimension_numbers=LAYOUT)
  ours = lambda *args: conv_general_dilated(*args, dimension_numbers=LAYOUT)
  program = lambda convolve: jax.jit(
    jax.vmap(lambda x, kernel: gradients(convolve, x, kernel, strides, padding))
  )
  found, want = (program(convolve)(x, kernel) for convolve in (ours, by_xla))
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
  jax.tree.map(close, found, want)


def test_gradients_in_bfloat16_are_close_and_those_of_zeros_are_zero():
  x, kernel = drawn(2, 6, 6, 3), drawn(3, 3, 3, 4)
  arguments = (1, 1), "SAME"
  ours = lambda *args: conv_general_dilated(*args, dimension_numbers=LAYOUT)
  narrow = (a.astype(jnp.bfloat16) for a in (x, kernel))
  found, want = (gradients(ours, *a, *arguments)[1] for a in (narrow, (x, kernel)))
  for got, one in zip(found, want, strict=True):
    assert got.dtype == jnp.bfloat16
    assert jnp.abs(got - one).max() <= 0.05 * jnp.abs(one).max()
  zeros = gradients(lambda *a: 0 * ours(*a), x, kernel, *arguments)[1]
  assert not any(jnp.any(zero) for zero in zeros)


@pytest.mark.parametrize(
  ("rest", "shape"),
  [
    ({"feature_group_count": 2}, (3, 3, 2, 6)),
    ({"rhs_dilation": (2, 2)}, (3, 3, 4, 6)),
    ({"dimension_numbers": ("NHWC", "OIHW", "NHWC")}, (6, 4, 3, 3)),
  ],
)
def test_groups_dilation_and_other_layouts_are_left_to_xla(rest, shape):
  rest = {"dimension_numbers": LAYOUT, **rest}
  arguments = drawn(2, 8, 8, 4), drawn(*shape), (1, 1), "SAME"
  found = conv_general_dilated(*arguments, **rest)
  np.testing.assert_array_equal(found, lax.conv_general_dilated(*arguments, **rest))
  traced = jax.make_jaxpr(lambda: conv_general_dilated(*arguments, **rest))()
  assert "custom_vjp" not in str(traced)


@pytest.mark.parametrize("model", [classic.cnn(), classic.resnet()], ids=["cnn", "resnet"])
def test_no_kernel_of_a_model_is_learned_by_a_convolution_on_cpus(model):
  """The program convolves forward, and back to each convolution's input but the task's images."""
  module, x = model(10), jnp.ones((2, 12, 12, 1))
  variables = jax.eval_shape(module.init, jax.random.key(0), x)
  count = sum(leaf.ndim == 4 for leaf in jax.tree.leaves(variables))
  loss = lambda variables, x: jnp.sum(module.apply(variables, x))
  text = jax.jit(jax.grad(loss)).lower(variables, x).as_text("hlo")
  assert text.count(" convolution(") == 2 * count - 1


def test_flax_takes_it():
  module = nn.Conv(3, (3, 3), conv_general_dilated=conv_general_dilated)
  plain, x = nn.Conv(3, (3, 3)), drawn(2, 6, 6, 2)
  variables = plain.init(jax.random.key(0), x)
  np.testing.assert_array_equal(module.apply(variables, x), plain.apply(variables, x))
