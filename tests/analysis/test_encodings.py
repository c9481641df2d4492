"""Counts of what is encoded, decoded and combined, against counts by hand."""

import jax
import jax.numpy as jnp
import pytest

from research.analysis import encodings
from research.analysis.encodings import ARITHMETIC, Count
from research.analysis.network import Kernel
from research.core import registry

N, W = 48, 4
X = jax.ShapeDtypeStruct((N,), jnp.float32)


def counts(spec: str) -> dict[str, Count]:
  """The counts of one exchange of N elements among W workers."""
  aggregator = encodings.marked(registry.build("aggregator", spec))
  key = jax.eval_shape(lambda: jax.random.key(0))
  one = lambda x, key: aggregator.aggregate(x, aggregator.init(x), key)
  return encodings.counts(jax.make_jaxpr(one, axis_env=[("data", W)])(X, key))


@pytest.mark.parametrize(
  ("spec", "name", "encoded", "decoded"),
  [
    # chunks of N / W: all are encoded and decoded, W are received, one is answered, W are put
    # together
    ("two_phase(int8())", "int8()", N + N / W, N + N + N / W + N),
    ("gather_mean(sign())", "sign()", N, N + W * N),
    ("sum_mean(random_k(0.25))", "random_k(0.25)", N, 2 * N),
    ("error_feedback(gather_mean(sign()))", "sign()", N, N + W * N),
    ("majority_vote()", "majority_vote()", N, 0),
    ("error_feedback(power_sgd(2))", "power_sgd()", N, 0),
  ],
)
def test_the_elements_of_kernels_are_counted(spec, name, encoded, decoded):
  assert counts(spec)[name] == (encoded, decoded)


def test_arithmetic_is_what_is_left_outside_of_kernels():
  assert counts("majority_vote()").keys() == {"majority_vote()"}
  assert counts("mean()").keys() == {"mean()"}
  # the sum with the memory, which is zero here, and the difference from what was sent
  assert counts("error_feedback(mean())")[ARITHMETIC].encoded == 2 * N + 3 * N


def test_an_object_without_compressors_is_the_same():
  assert encodings.marked(3) == 3
  marked = encodings.marked(registry.build("aggregator", "error_feedback(power_sgd(2))"))
  assert repr(marked) == "error_feedback(power_sgd())"


def test_seconds_are_those_of_the_elements():
  assert Count(10, 100).seconds(Kernel(0.1, 0.01)) == pytest.approx(2.0)
