"""FLOPs of known programs, counted by hand; loops, meshes, kernels, gradients."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P

from research.analysis import flops
from research.comm import mesh as meshes


def f32(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def count(function, *args, axes=None):
  return flops.flops(jax.make_jaxpr(function)(*args), axes)


def scan(length, body, x):
  return lax.scan(lambda c, _: (body(c), None), x, None, length)[0]


SQUARE = f32(4, 4)  # a product with itself: 2 * 4^3 FLOPs
PROGRAMS = {
  "product": (lambda a, b: a @ b, (f32(3, 5), f32(5, 7)), 2 * 3 * 5 * 7),
  "batch": (lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (f32(6, 3, 5), f32(6, 5, 7)), 1260),
  "two sums": (lambda a, b: jnp.einsum("ijk,kjl", a, b), (f32(3, 5, 7), f32(7, 5, 2)), 420),
  "elementwise": (lambda a: jnp.exp(a) + a, (SQUARE,), 0),
  "loop in loop": (lambda a: scan(3, lambda a: scan(5, lambda a: a @ a, a), a), (SQUARE,), 1920),
  "fori": (lambda a: lax.fori_loop(0, 7, lambda i, a: a @ a, a), (SQUARE,), 7 * 128),
  "nested jit": (lambda a: jax.jit(lambda a: jax.jit(lambda a: a @ a)(a) @ a)(a), (SQUARE,), 256),
  "branches": (lambda a: lax.cond(a[0, 0] < 1, lambda a: a @ a @ a, jnp.sin, a), (SQUARE,), 256),
  "mapped": (jax.vmap(lambda a: a @ a), (f32(9, 4, 4),), 9 * 128),
  "groups of rows": (lax.ragged_dot, (f32(12, 5), f32(3, 5, 7), jnp.array([2, 0, 10])), 840),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_known_programs(name):
  function, args, expected = PROGRAMS[name]
  assert count(function, *args) == expected


def test_xla_counts_a_product_alike():
  a, b = f32(30, 50), f32(50, 70)
  found = jax.jit(lambda a, b: a @ b).lower(a, b).compile().cost_analysis()
  assert found is not None
  assert found["flops"] == count(lambda a, b: a @ b, a, b)


CONVOLUTIONS = {
  "plain": ((2, 5, 9, 8), (3, 3, 5, 6), {}),
  "same": ((2, 5, 9, 8), (3, 3, 5, 6), {"padding": "SAME"}),
  "strides": ((2, 5, 9, 8), (3, 2, 5, 6), {"padding": "SAME", "window_strides": (2, 3)}),
  "spread window": ((1, 4, 9, 8), (3, 2, 4, 2), {"rhs_dilation": (2, 3)}),
  "spread input": (
    (1, 4, 5, 6),
    (3, 3, 4, 2),
    {"lhs_dilation": (2, 3), "padding": ((2, 1), (0, 4))},
  ),
  "groups": ((2, 6, 7, 7), (3, 3, 2, 9), {"padding": "SAME", "feature_group_count": 3}),
  "groups of examples": ((6, 4, 7, 7), (3, 3, 4, 9), {"batch_group_count": 3}),
}


def convolve(x, window, **options):
  options = {"window_strides": (1, 1), "padding": "VALID"} | options
  numbers = ("NCHW", "HWIO", "NCHW")
  return lax.conv_general_dilated(x, window, dimension_numbers=numbers, **options)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_counts_products_with_elements_of_the_input(name):
  """Of ones with ones it is the number of its products; each gradient has as many."""
  shape, window, options = CONVOLUTIONS[name]
  x, w = jnp.ones(shape), jnp.ones(window)
  convolution = lambda x, w: convolve(x, w, **options)
  products = 2 * float(convolution(x, w).sum())
  assert count(convolution, x, w) == products
  gradients = jax.grad(lambda x, w: convolution(x, w).sum(), (0, 1))
  assert count(gradients, x, w) == pytest.approx(3 * products)


def test_a_gradient_costs_three_times_but_for_the_first_layer():
  def loss(params, x):
    return jnp.sum((jnp.tanh(x @ params[0]) @ params[1]) ** 2)

  first, second = 2 * 16 * 5 * 8, 2 * 16 * 8 * 3
  args = ((f32(5, 8), f32(8, 3)), f32(16, 5))
  assert count(loss, *args) == first + second
  assert flops.of_gradient(loss, *args) == 2 * first + 3 * second


def layered(remat):
  """Layers of two products each, of which `remat` computes the first again."""
  layer = lambda x, w: jnp.tanh(x @ w) @ w
  layer = jax.checkpoint(layer) if remat else layer
  return lambda ws, x: lax.scan(lambda x, w: (layer(x, w), None), x, ws)[0].sum()


def test_what_is_computed_again_is_run_and_not_needed():
  args, layer = (f32(3, 8, 8), f32(16, 8)), 2 * 2 * 16 * 8 * 8
  assert flops.of_gradient(layered(False), *args) == 3 * 3 * layer
  assert flops.of_gradient(layered(True), *args) == 3 * 3 * layer
  assert count(jax.grad(layered(False)), *args) == 3 * 3 * layer
  assert count(jax.grad(layered(True)), *args) == 3 * (3 * layer + layer / 2)


def test_remat_is_taken_out_inside_of_everything():
  def loss(w, x):
    once = jax.checkpoint(lambda w, x: jnp.sin(jnp.sin(x @ w) @ w) @ w)
    branch = lambda w, x: lax.cond(x[0, 0] < 1, jax.jit(once), lambda w, x: x, w, x)
    return branch(w, x).sum()

  args, product = (f32(8, 8), f32(16, 8)), 2 * 16 * 8 * 8
  assert flops.of_gradient(loss, *args) == (3 + 2 * 3 - 1) * product  # x needs no gradient
  assert count(jax.grad(loss), *args) > 8 * product


def test_devices_share_what_the_compiler_cuts():
  """Over `data` a device has its part, over `fsdp` it shares a worker's, or holds a shard of it."""
  axes = {"data": 4, "fsdp": 2}
  mesh = meshes.device_mesh(axes)
  square = lambda x: x @ x.T

  def worker(x):  # [2, 8] of [8, 8]
    cut = jax.shard_map(
      square, in_specs=P("fsdp"), out_specs=P("fsdp"), axis_names={"fsdp"}, check_vma=False
    )
    return square(x)[:, :1] + cut(x)  # 2 * 2 * 8 * 2 by both, then [1, 8]: 2 * 8 by each

  spread = jax.shard_map(
    worker, mesh=mesh, in_specs=P("data"), out_specs=P("data"), axis_names={"data"}, check_vma=False
  )
  assert count(jax.jit(spread), f32(8, 8), axes=axes) == 2 * 2 * 8 * 2 / 2 + 2 * 8
  both = lambda x: spread(x)[:1] + square(x)  # 2 * 8^3 by all
  assert count(jax.jit(both), f32(8, 8), axes=axes) == 32 + 16 + 2 * 8**3 / 8


def test_a_kernel_is_counted_over_its_grid_or_as_it_says():
  def kernel(x, y, out):
    out[...] = jnp.dot(x[...], y[...])

  def multiplied(x, y, **options):
    return pl.pallas_call(
      kernel,
      out_shape=jax.ShapeDtypeStruct((32, 24), jnp.float32),
      grid=(4, 3),
      in_specs=[
        pl.BlockSpec((8, 16), lambda i, j: (i, 0)),
        pl.BlockSpec((16, 8), lambda i, j: (0, j)),
      ],
      out_specs=pl.BlockSpec((8, 8), lambda i, j: (i, j)),
      **options,
    )(x, y)

  args = (f32(32, 16), f32(16, 24))
  assert count(multiplied, *args) == 2 * 32 * 16 * 24
  said = pl.CostEstimate(flops=99, transcendentals=0, bytes_accessed=0)
  assert count(lambda x, y: multiplied(x, y, cost_estimate=said), *args) == 99


def test_a_loop_of_unknown_length_is_refused_if_it_multiplies():
  search = lambda body: lambda x: lax.while_loop(lambda x: x[0, 0] < 1, body, x)
  assert count(search(jnp.sin), SQUARE) == 0
  with pytest.raises(ValueError, match="not static"):
    count(search(lambda x: x @ x), SQUARE)


def test_loops_carry_their_state_and_go_through_rows():
  """Four turns: 10 floats in and out in each, 4 rows of 3 read, 4 of 10 and of 1 written."""

  def body(state, row):
    return state + row.sum(), (state, row[0])

  program = jax.make_jaxpr(lambda x, rows: lax.scan(body, x, rows))(f32(10), f32(4, 3))
  total = 4 * (4 * 2 * 10 + 4 * 3 + 4 * 10 + 4)
  assert flops.carried(program) == total
  assert flops.carried(program, {"fsdp": 2}) == total / 2
  twice = jax.make_jaxpr(lambda x, rows: scan(2, lambda x: lax.scan(body, x, rows)[0], x))
  assert flops.carried(twice(f32(10), f32(4, 3))) == 2 * total + 2 * 4 * 2 * 10
