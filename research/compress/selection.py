"""Finds the positions of the k largest magnitudes of an array, exactly, without sorting it.

Floating-point magnitudes are ordered like their bits read as integers, with NaN above infinity. The
k-th largest magnitude is found by bisection on these integers; each step of the bisection counts
elements in one pass over the array. In a large array, a sorted sample gives the initial guess, one
count confirms the guess, and the elements above the guess, slightly more than k, are compacted
first. A wrong guess costs time, but the result is always exact.

Positions are uint32, and arrays are indexed by (row, column), since JAX's own indices are int32.
This indexing supports arrays of fewer than 2^32 elements, or fewer than 2^31 if the number of
elements is odd.
"""

import math

import jax.numpy as jnp
from jax import lax

from research.core.base import Array

WORD = 32
SAMPLE = 2**16
LARGE = 2**20  # minimum number of elements for sampling
_COLUMNS = 2**16


def largest(x: Array, k: int) -> Array:
  """Returns the positions of the k largest |x|, ascending; ties go to the first elements.

  Args:
    x: floating-point [n].
    k: the number of positions, in [0, n], static.

  Returns:
    uint32 [k].
  """
  stride = x.size // SAMPLE | 1  # odd: a stride of one row would sample a single column
  expected = k / stride
  margin = 4 * math.sqrt(expected) + 4
  room = k + math.ceil(2 * margin * stride)
  if x.size < LARGE or room > x.size // 2:
    return _at_least(x, k, k)[0]
  sample = jnp.sort(magnitude(x[::stride]))
  guess = sample[max(0, sample.size - 1 - math.ceil(expected + margin))]
  positions, found = _at_least(x, k, room, guess)
  slots = jnp.arange(room, dtype=jnp.uint32)
  candidates = jnp.where(slots < found, take(x, positions), 0)
  return positions[_at_least(candidates, k, k)[0]]


def count(mask: Array) -> Array:
  """Counts the true elements of a mask, as uint32; a plain sum would first write n integers.

  Args:
    mask: bool [n].
  """
  return _count(_words(mask))


def magnitude(x: Array) -> Array:
  """Returns |x| as unsigned integers of the same width and in the same order.

  Args:
    x: a floating-point array.
  """
  bits = lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
  return bits & (jnp.iinfo(bits.dtype).max >> 1)


def take(x: Array, positions: Array) -> Array:
  """Gathers the elements of x [n] at distinct positions, uint32 [k].

  Args:
    x: an array [n].
    positions: distinct positions, uint32 [k].
  """
  rows, columns = grid(x.size)
  at = x.reshape(rows, columns).at[positions // columns, positions % columns]
  return at.get(mode="promise_in_bounds", unique_indices=True)


def put(values: Array, positions: Array, size: int) -> Array:
  """Writes values to distinct positions of an array of zeros, [size].

  Args:
    values: the values, [k].
    positions: distinct positions, uint32 [k].
    size: length of the result.
  """
  rows, columns = grid(size)
  at = jnp.zeros((rows, columns), values.dtype).at[positions // columns, positions % columns]
  return at.set(values, mode="promise_in_bounds", unique_indices=True).reshape(size)


def grid(size: int) -> tuple[int, int]:
  """Returns (rows, columns) for `size` elements, both below 2^31; columns is a power of two.

  Args:
    size: number of elements.

  Raises:
    ValueError: if positions do not fit in 32 bits.
  """
  columns = min(size & -size, _COLUMNS) or 1
  rows = size // columns
  if rows >= 2**31 or size >= 2**32:
    raise ValueError(f"a leaf of {size} elements cannot be indexed in 32 bits; shard it")
  return rows, columns


def _at_least(x: Array, k: int, room: int, guess: Array | None = None) -> tuple[Array, Array]:
  """Returns ascending positions [room] of the k or slightly more largest |x|, and their number.

  The threshold is bisected until between k and `room` elements reach it. If ties make this
  impossible, the elements above the threshold and the first tied elements are returned. Entries
  after the count are invalid.
  """
  if room == 0:
    return jnp.zeros(0, jnp.uint32), jnp.uint32(0)
  dtype = magnitude(x[:0]).dtype
  top = jnp.iinfo(dtype).max // 2 + 1  # above every magnitude
  first = jnp.asarray(top // 2, dtype) if guess is None else guess

  def narrow(state):
    low, high, words, _, step = state
    pivot = jnp.where(step < 2, first + step.astype(dtype), low + (high - low) // 2)
    pivot = jnp.clip(pivot, low + 1, high - 1)  # the guess, guess + 1 for ties, then middles
    # The barrier keeps XLA from hoisting |x| out of the loop, which would write it to memory.
    pivot, values = lax.optimization_barrier((pivot, x))
    reaching = _words(magnitude(values) >= pivot)
    enough = _count(reaching) >= k
    low, high = jnp.where(enough, pivot, low), jnp.where(enough, high, pivot)
    words = jnp.where(enough, reaching, words)
    return low, high, words, _count(words), step + 1

  undecided = lambda state: (state[3] > room) & (state[1] - state[0] > 1)
  low, high = jnp.asarray(0, dtype), jnp.asarray(top, dtype)
  start = (low, high, _words(magnitude(x) >= low), jnp.uint32(x.size), jnp.uint32(0))
  low, high, words, reach, _ = lax.while_loop(undecided, narrow, start)

  def without_some_ties():
    above = _words(magnitude(x) >= high)
    return above | _first(words & ~above, room - _count(above))

  words = lax.cond(reach > room, without_some_ties, lambda: words)
  return _positions(words, room), _count(words)


def _words(mask: Array) -> Array:
  """Packs bool [n] into uint32 [ceil(n / 32)], the first element in the lowest bit."""
  mask = jnp.pad(mask, (0, -mask.size % WORD)) if mask.size % WORD else mask
  places = jnp.arange(WORD, dtype=jnp.uint32)
  return jnp.sum(
    mask.reshape(-1, WORD).astype(jnp.uint32) << places[None, :], axis=-1, dtype=jnp.uint32
  )


def _count(words: Array) -> Array:
  return jnp.sum(lax.population_count(words), dtype=jnp.uint32)


def _first(words: Array, count: Array) -> Array:
  """Clears all set bits of the words except the first `count`."""
  counts = lax.population_count(words)
  before = jnp.cumsum(counts, dtype=jnp.uint32) - counts
  left = jnp.where(before < count, jnp.minimum(count - before, counts), 0)
  cut = (left > 0) & (left < counts)  # true for at most one word
  word, keep = jnp.max(jnp.where(cut, words, 0)), jnp.max(jnp.where(cut, left, 0))
  bits = word >> jnp.arange(WORD, dtype=jnp.uint32) & 1
  partial = _words((bits == 1) & (jnp.cumsum(bits, dtype=jnp.uint32) <= keep))[0]
  return jnp.where(cut, partial, jnp.where(left > 0, words, 0))


def _positions(words: Array, room: int) -> Array:
  """Returns the positions of the first `room` set bits, ascending."""
  ends = jnp.cumsum(lax.population_count(words), dtype=jnp.uint32)
  slots = jnp.arange(room, dtype=jnp.uint32)
  ended = jnp.zeros(room, jnp.uint32).at[ends].add(1, mode="drop")  # words ending at each slot
  at = jnp.minimum(jnp.cumsum(ended, dtype=jnp.uint32), words.size - 1)
  word = words[at]
  rank = slots - (ends[at] - lax.population_count(word))
  place = jnp.zeros_like(word)
  for width in (16, 8, 4, 2, 1):  # select the half of the word that has the bit of this rank
    below = lax.population_count(word >> place & ((1 << width) - 1))
    upper = rank >= below
    place, rank = jnp.where(upper, place + width, place), jnp.where(upper, rank - below, rank)
  return at * WORD + place
