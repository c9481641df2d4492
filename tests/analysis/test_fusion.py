"""What fused elementwise operations read and write, against counts by hand."""

import jax
import jax.numpy as jnp
import pytest

from research.analysis import fusion

N = 48
X = jax.ShapeDtypeStruct((N,), jnp.float32)


def sorted_and_added(x, y):
  both = x + y
  return jnp.sort(both) + both


@pytest.mark.parametrize(
  ("function", "elements"),
  [
    (lambda x, y: jnp.exp(x + y) * 2, 2 * N + N),  # one loop
    (lambda x, y: x * y + x, 2 * N + N),  # an input is read once
    (lambda x, y: (x + y, x - y), 2 * (2 * N + N)),  # a loop per result
    (lambda x, y: jnp.where(x > y, x, y), 2 * N + N),  # through calls
    (lambda x, y: jnp.sum(x * y), 2 * N + 1),  # a sum ends a loop
    (lambda x, y: x * y / jnp.sum(x * y), (2 * N + 1) + (2 * N + 1 + N)),  # and is read
    (sorted_and_added, (2 * N + N) + (2 * N + N)),  # a sort needs its input in memory
    (lambda x, y: (x.reshape(6, 8), y), 0),  # no arithmetic
    (lambda x, y: x + 0 * jnp.sin(y)[:1], N + 1 + N),  # other operations are not counted
  ],
)
def test_what_loops_read_and_write(function, elements):
  program = fusion.flat(jax.make_jaxpr(function)(X, X), "kernel ")
  assert fusion.traffic(program) == 4 * elements


def test_bytes_are_those_of_the_dtype():
  half = fusion.flat(jax.make_jaxpr(lambda x, y: (x + y).astype(jnp.int8))(X, X), "kernel ")
  assert fusion.traffic(half) == 2 * 4 * N + N
