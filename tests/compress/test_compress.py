"""Compressors: every contract over the whole table, then what each one is known for."""

import functools
import math

import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from promises import COMPRESSORS as TABLE
from promises import QUICK
from subset import slow_except

from research.compress import selection
from research.compress.blocks import saturated
from research.compress.packing import pack, packed_size, unpack
from research.compress.rotation import walsh_hadamard
from research.compress.sparsify import support
from research.core import registry
from research.core.base import Compressor
from research.testing import check_compressor

BUILT: dict[str, Compressor] = {spec: registry.build("compressor", spec) for spec in TABLE}
KEYS = jax.random.split(jax.random.key(7))
every = pytest.mark.parametrize("spec", TABLE)
LEAVES = {  # that hypothesis fills: each compiles a program
  "float32": [(300,), (), (0,)],
  "bfloat16": [(3, 5)],
  "float16": [(1,)],
}


@pytest.fixture(autouse=True)
def strict():
  with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
    yield


def like(x):
  return jax.ShapeDtypeStruct(x.shape, x.dtype)


def send(compressor, x, shared, own):
  """What the receivers of x make of it."""
  return compressor.decode(compressor.encode(x, shared, own), like(x), shared)


@functools.cache
def sender(spec):
  return jax.jit(functools.partial(send, BUILT[spec]))


def sent(spec, x, shared=None, own=None):
  return sender(spec)(x, KEYS[0] if shared is None else shared, KEYS[1] if own is None else own)


def payload_bytes(compressor, x):
  payload = jax.eval_shape(compressor.encode, like(x), *KEYS)
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(payload))


def vectors(n):
  """Plain, heavy-tailed, one large element, constant, zero: float32 [5, n]."""
  rng = np.random.default_rng(n)
  single = np.zeros(n)
  single[n // 3] = -3
  heavy = rng.standard_cauchy(n) ** 3
  rows = [rng.standard_normal(n), heavy, single, np.full(n, 0.7), np.zeros(n)]
  return np.stack(rows).astype(np.float32)


def square(x):
  return np.sum(np.square(np.asarray(x, np.float64)), axis=-1)


@pytest.mark.parametrize("spec", slow_except(QUICK, TABLE))
def test_every_contract_is_kept(spec):
  row = TABLE[spec]
  check_compressor(
    BUILT[spec],
    error=row.error,
    content=row.content,
    unbiased=row.unbiased,
    idempotent=row.idempotent,
  )


@every
def test_linearity_is_declared(spec):
  assert BUILT[spec].linear == TABLE[spec].linear


@st.composite
def leaves(draw):
  """Shapes and dtypes; values of all magnitudes, most of them equal: heavy-tailed."""
  dtype, shape = draw(st.sampled_from([(t, shape) for t in LEAVES for shape in LEAVES[t]]))
  limit, width = (1e3, 16) if dtype == "float16" else (1e30, 32)
  limit = float(np.float16(limit) if width == 16 else np.float32(limit))
  values = st.floats(-limit, limit, width=width, allow_subnormal=False)
  return jnp.asarray(draw(arrays.arrays(f"float{width}", shape, elements=values)), dtype)


@pytest.mark.slow
@every
@settings(derandomize=True, deadline=None, database=None, max_examples=10)
@given(x=leaves())
def test_any_leaf(spec, x):
  decoded = sent(spec, x)
  assert decoded.shape == x.shape
  assert decoded.dtype == x.dtype
  before, after = (np.asarray(v, np.float64).ravel() for v in (x, decoded))
  assert np.all(np.isfinite(after))
  bound = (TABLE[spec].worst or TABLE[spec].error)(max(x.size, 1))
  rounding = float(jnp.finfo(x.dtype).eps) * (np.linalg.norm(before) + np.linalg.norm(after))
  smallest = x.size * float(jnp.finfo(x.dtype).tiny)
  error = np.linalg.norm(after - before)
  assert error <= math.sqrt(bound) * np.linalg.norm(before) * (1 + 1e-5) + rounding + smallest


@pytest.mark.slow
@every
def test_extremes_are_kept_or_visible(spec):
  """At the ends of float32 a finite value that comes out finite is as near as any."""
  ends = np.asarray([3.4028235e38, -3.4028235e38, 1e-40, -1e-45, 1e-38, 0], np.float32)
  bound = TABLE[spec].worst or TABLE[spec].error
  for x in (np.resize(some, 300) for some in (ends[:1], ends[:2], ends[2:], ends)):
    decoded = np.asarray(sent(spec, x), np.float64)
    x = x.astype(np.float64)
    if np.all(np.isfinite(decoded)):
      near = np.sqrt(bound(len(x))) * np.linalg.norm(x) * (1 + 1e-5)
      assert np.linalg.norm(decoded - x) <= near + len(x) * 2.0**-126
    else:
      assert np.linalg.norm(x, np.inf) > 1e37


def without_conversions(function, x):
  """function(x) as a compiler may compute it that keeps more digits than it was asked to."""
  with jax.disable_jit():  # as one flat program
    program = jax.make_jaxpr(function)(x).jaxpr
  known = dict(zip(program.invars, [x], strict=True))
  for step in program.eqns:
    values = [v.val if hasattr(v, "val") else known[v] for v in step.invars]
    if step.primitive.name != "convert_element_type":
      values = [step.primitive.bind(*values, **step.params)]
    (known[step.outvars[0]],) = values
  return known[program.outvars[0]]


def test_rounding_to_bfloat16_does_not_hang_on_a_conversion():
  """XLA drops one that it sees undone on a GPU: of what a worker encodes and decodes itself."""
  x = jnp.asarray(vectors(300)[0])
  there_and_back = without_conversions(lambda x: saturated(x, jnp.bfloat16).astype(x.dtype), x)
  np.testing.assert_array_equal(there_and_back, x.astype(jnp.bfloat16).astype(x.dtype))
  assert np.any(there_and_back != x)


@pytest.mark.parametrize("of", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("to", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_what_another_type_cannot_hold_is_rounded_and_stays_finite(of, to):
  """Small numbers are those that the types have besides normal ones, too."""
  within = lambda x, dtype: np.clip(x, -float(jnp.finfo(dtype).max), float(jnp.finfo(dtype).max))
  values = [1e-5, -3e-5, 6e-8, 1e-3, 0, -0.0, 1 / 3, 65504, -7e4]
  x = within(np.asarray(values), of).astype(of)
  found = jax.jit(functools.partial(saturated, dtype=to))(jnp.asarray(x))
  assert found.dtype == to
  np.testing.assert_array_equal(found, within(x.astype(np.float64), to).astype(to))
  ends = jnp.asarray([jnp.inf, -jnp.inf, jnp.nan], of)
  np.testing.assert_array_equal(saturated(ends, to).astype(float), ends.astype(float))


@pytest.mark.slow
@every
def test_float64_leaves(spec):
  payload = jax.tree.map(like, jax.eval_shape(BUILT[spec].encode, vectors(300)[0], *KEYS))
  with jax.enable_x64(True):
    keys = jax.random.split(jax.random.key(7))
    narrow = jax.eval_shape(BUILT[spec].encode, jnp.zeros(300, jnp.float32), *keys)
    assert jax.tree.map(like, narrow) == payload
    x = jnp.asarray(np.random.default_rng(1).standard_normal(300))
    decoded = jax.jit(functools.partial(send, BUILT[spec]))(x, *keys)
    assert decoded.dtype == x.dtype == jnp.float64
    bound = (TABLE[spec].worst or TABLE[spec].error)(300)
    assert square(decoded - x) <= (bound + 1e-10) * square(x) * (1 + 1e-5)


@every
def test_whole_numbers_are_refused(spec):
  with pytest.raises(ValueError, match="dtype=int32 cannot be compressed; legal: floating"):
    BUILT[spec].encode(jnp.zeros(3, jnp.int32), *KEYS)


@pytest.mark.parametrize("spec", ["top_k(0.1)", "random_k(0.3)", "threshold(0.5)"])
@pytest.mark.parametrize("shape", [(2**31 + 1,), (2**16, 2**16)])
def test_what_32_bits_cannot_index_is_refused(spec, shape):
  with pytest.raises(ValueError, match=r"a leaf of \d+ elements cannot be indexed in 32 bits"):
    payload_bytes(registry.build("compressor", spec), jax.ShapeDtypeStruct(shape, jnp.float32))


WRONG = {
  "int8(block=0)": "block=0 is not at least 1",
  "int4(block=-1)": "block=-1 is not at least 1",
  "fp8(block=0)": "block=0 is not at least 1",
  "qsgd(levels=0)": "levels=0 is not in [1, 32767]",
  "qsgd(levels=32768)": "levels=32768 is not in [1, 32767]",
  "qsgd(bucket=0)": "bucket=0 is not at least 1",
  "statistical(1)": "bits=1 is not in [2, 8]",
  "statistical(2, block=0)": "block=0 is not at least 1",
  "top_k(0.0)": "fraction=0.0 is not in (0, 1]",
  "top_k(1.5)": "fraction=1.5 is not in (0, 1]",
  "block_top_k(0)": "k=0 is not in [1, block] = [1, 4096]",
  "block_top_k(9, block=8)": "k=9 is not in [1, block] = [1, 8]",
  "block_top_k(bits=1)": "bits=1 is not in [2, 8]",
  "random_k(-0.1)": "fraction=-0.1 is not in (0, 1]",
  "dct_top_k(0)": "chunk=0 is not at least 1",
  "dct_top_k(4, 17)": "k=17 is not in [1, chunk^2] = [1, 16]",
  "threshold(0)": "value=0 is not in (0, inf)",
  "threshold(1.0, capacity=2)": "capacity=2 is not in (0, 1]",
  "count_sketch(0, 8)": "rows=0 is not at least 1",
  "count_sketch(3, 0)": "columns=0 is not at least 1",
  "hadamard(int4(), block=100)": "block=100 is not a power of two",
  "hadamard(0.5)": "a compressor",
  "hadamard(mean())": "unknown compressor 'mean'",
}


@pytest.mark.parametrize("spec", WRONG)
def test_wrong_arguments_are_refused_when_built(spec):
  with pytest.raises(ValueError, match=r"\S") as caught:
    registry.build("compressor", spec)
  assert WRONG[spec] in str(caught.value)
  assert "\n" not in str(caught.value)


# packing


@pytest.mark.parametrize(
  "bits", slow_except((1, 3, 4, 8, 9, 32), [*range(1, 10), 12, 16, 17, 24, 31, 32])
)
def test_packing_round_trip(bits):
  for count in (0, 1, 9, 257):
    codes = np.random.default_rng(count).integers(0, 2**bits, count, dtype=np.uint64)
    codes = jnp.asarray(codes.astype(np.uint32 if bits > 16 else np.uint16))
    packed = jax.jit(pack, static_argnums=1)(codes, bits)
    assert packed.dtype == jnp.uint8
    assert len(packed) == packed_size(count, bits)
    assert 0 <= packed_size(count, bits) - count * bits / 8 < 4
    unpacked = jax.jit(unpack, static_argnums=(1, 2))(packed, bits, count)
    np.testing.assert_array_equal(unpacked, codes)


def test_packed_bytes_are_filled_from_the_lowest_bit():
  bits = jnp.asarray([1, 0, 1, 1, 0, 0, 0, 0, 1], jnp.uint8)
  fours, nines = jnp.asarray([1, 14, 7], jnp.uint8), jnp.asarray([0x1FF, 0x001], jnp.uint16)
  found = jax.jit(lambda: (pack(bits, 1), pack(fours, 4), pack(nines, 9)))()
  assert [x.tolist() for x in found] == [[0b00001101, 1], [0xE1, 0x07], [0xFF, 0x01, 0b01]]


# selection


def order(x):
  """Positions by |x| descending, equal ones ascending; NaN first."""
  return np.argsort(-np.nan_to_num(np.abs(x.astype(np.float64)), nan=np.inf), kind="stable")


@functools.cache
def candidates(n):
  rng = np.random.default_rng(n)
  plain = rng.standard_normal(n)
  mostly_zero = np.where(rng.random(n) < 1e-3, plain, 0)
  hidden = np.where(np.arange(n) % (n // selection.SAMPLE | 1) == 0, 0, plain)  # from the sample
  return {
    "plain": plain,
    "ties": np.round(2 * plain),
    "mostly zero": mostly_zero,
    "constant": np.full(n, -2.0),
    "hidden": hidden,
    "denormal": plain * 1e-40,
    "infinite": np.where(np.arange(n) % 97 == 0, np.inf, plain),
  }


@pytest.mark.parametrize("kind", candidates(1))
@pytest.mark.parametrize("n", slow_except((1, 33, 1000), (1, 33, 1000, selection.LARGE + 37)))
def test_the_largest_are_found_exactly(kind, n):
  x = candidates(n)[kind].astype(np.float32)
  ordered = order(x)
  for k in {1, min(n, 7), math.ceil(n / 100), n if n < 2**16 else n // 3}:
    found = jax.jit(selection.largest, static_argnums=1)(x, k)
    np.testing.assert_array_equal(found, np.sort(ordered[:k]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_the_largest_in_other_dtypes(dtype):
  with jax.enable_x64(True):
    x = jnp.asarray(np.random.default_rng(0).standard_normal(500), dtype)
    found = jax.jit(selection.largest, static_argnums=1)(x, 50)
    np.testing.assert_array_equal(found, np.sort(order(np.asarray(x))[:50]))


def test_nan_is_larger_than_everything():
  x = jnp.asarray([1.0, jnp.nan, jnp.inf, -jnp.nan, 2.0])
  assert jax.jit(selection.largest, static_argnums=1)(x, 3).tolist() == [1, 2, 3]


# what each is known for


def test_int8_is_its_equation():
  x = vectors(1000)[0]
  padded = np.pad(np.asarray(x), (0, 24)).reshape(4, 256)
  scale = np.abs(padded).max(1, keepdims=True) / np.float32(127)
  want = (np.rint(padded / scale) * scale).ravel()[:1000]
  np.testing.assert_allclose(sent("int8()", x), want, atol=1e-6)


def test_qsgd_levels_are_multiples_of_the_norm():
  x = vectors(1000)[0]
  level = np.asarray(sent("qsgd(levels=2, bucket=None)", x)) / np.linalg.norm(x) * 2
  np.testing.assert_allclose(level, np.rint(level), atol=1e-5)
  assert set(np.rint(level)) <= {-1, 0, 1}
  assert np.all(level * x >= 0)


def test_terngrad_sends_three_values():
  x = vectors(1000)[0]
  values = np.unique(np.asarray(sent("terngrad()", x)))
  np.testing.assert_allclose(values, np.asarray([-1, 0, 1]) * np.abs(x).max(), rtol=1e-6)


def test_natural_sends_powers_of_two_beside_each_value():
  x = vectors(1000)[1]
  ratio = np.asarray(sent("natural()", x)) / np.asarray(x)
  mantissa, _ = np.frexp(np.asarray(sent("natural()", x)))
  assert np.all(np.abs(mantissa) == 0.5)
  assert np.all((ratio > 0.5) & (ratio <= 2))


def test_sign_is_the_mean_magnitude_and_zero_counts_as_positive():
  x = jnp.asarray([-3.0, 0.0, 1.0, -0.0])
  assert sent("sign()", x).tolist() == [-1.0, 1.0, 1.0, 1.0]


def test_float8_saturates():
  x = jnp.asarray([3.4e38, -3.4e38, 1e38])
  np.testing.assert_allclose(sent("fp8()", x), x, rtol=1 / 16)


def test_top_k_is_the_nearest_sparse_vector():
  x = vectors(1000)[1]
  want = np.zeros_like(x)
  want[order(x)[:100]] = x[order(x)[:100]]
  np.testing.assert_array_equal(sent("top_k(0.1)", x), want)


def test_every_position_is_drawn_equally_often_and_once():
  keys, sizes = jax.random.split(jax.random.key(0), 4000), ((10, 3), (7, 7), (64, 16), (5, 4))
  found = jax.jit(jax.vmap(lambda key: [support(key, n, k) for n, k in sizes]))(keys)
  for (n, k), drawn in zip(sizes, map(np.asarray, found), strict=True):
    assert all(len(set(row)) == k for row in drawn[:200].tolist())
    frequency = np.bincount(drawn.ravel(), minlength=n) / len(keys)
    assert len(frequency) == n
    assert np.all(np.abs(frequency - k / n) <= 4 * math.sqrt(0.25 / len(keys)))


def test_threshold_says_how_many_did_not_fit():
  compressor = BUILT["threshold(0.5, capacity=0.2)"]
  x = np.asarray([0.1, 0.6, 0.0, -0.7, 0.5, 0.4, 0.1, 0.1, -0.2, 0.9], np.float32)

  @jax.jit
  def both(x, shared, own):
    payload = compressor.encode(x, shared, own)
    return payload.reached, compressor.decode(payload, like(x), shared)

  for scale, reached, positions in ((1, 4, [3, 9]), (0.8, 2, [3, 9]), (0.1, 0, [])):
    scaled = np.float32(scale) * x
    count, decoded = both(scaled, *KEYS)
    assert count == reached
    want = np.zeros_like(x)
    want[positions] = scaled[positions]
    np.testing.assert_array_equal(decoded, want)


def test_a_sketch_shows_the_heavy_elements():
  x = 0.01 * vectors(4096)[0]
  x[[5, 777, 4000]] = [9.0, -8.0, 7.0]
  sketch = registry.build("compressor", "count_sketch(5, 256)")
  decoded = np.asarray(jax.jit(functools.partial(send, sketch))(x, *KEYS))
  assert set(order(decoded)[:3].tolist()) == {5, 777, 4000}
  np.testing.assert_allclose(decoded[[5, 777, 4000]], [9, -8, 7], atol=0.2)


def test_the_rotation_is_the_hadamard_matrix_and_its_own_inverse():
  draw = lambda width: np.random.default_rng(width).standard_normal((2, width))
  rows = {width: draw(width).astype(np.float32) for width in (1, 2, 32, 64, 256, 4096)}
  once = jax.jit(lambda rows: jax.tree.map(walsh_hadamard, rows))
  turned = once(rows)
  back = once(turned)
  for width, x in rows.items():
    matrix = np.ones((1, 1))
    while len(matrix) < width:
      matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    want = np.asarray(x, np.float64) @ matrix / math.sqrt(width)
    bound = 2 * 13 * 2**-24 * np.abs(want).max()  # one rounding for each of up to 12 sums, scaling
    np.testing.assert_allclose(turned[width], want, atol=bound)
    np.testing.assert_allclose(back[width], x, atol=2 * bound)


def test_a_rotation_helps_where_one_element_hides_the_others():
  x = np.full((32, 128), 0.5, np.float32)
  x[:, 9] = 7.0
  x = x.reshape(-1)
  error = lambda spec: square(sent(spec, x) - x)
  assert error("hadamard(int4())") < 0.2 * error("int4()")


def test_seeded_draws_of_workers_average_out():
  """The mean over W workers errs W times less; drawn alike it errs as one of them does."""
  x, workers = jnp.asarray(vectors(60)[0]), 20
  keys = jax.random.split(jax.random.key(5), (200, workers + 1))

  def error(spec):
    """E ||1/W sum_i C_i(x) - x||^2 over that of one worker."""
    compressor = registry.build("compressor", spec)
    one = lambda shared, own: send(compressor, x, shared, own)
    draws = jax.jit(jax.vmap(lambda k: jax.vmap(one, (None, 0))(k[0], k[1:])))(keys)
    errors = np.asarray(draws) - np.asarray(x)
    return square(errors.mean(1)).mean() / square(errors[:, 0]).mean()

  assert error("random_k(0.3, unbiased=True)") == pytest.approx(1)
  assert error("seeded(random_k(0.3, unbiased=True))") == pytest.approx(1 / workers, rel=0.3)
