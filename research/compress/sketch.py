"""Count sketch: a small linear table from which every element can be estimated."""

import jax
import jax.numpy as jnp
from jax import lax

from research.compress.blocks import flatten, restore, widened
from research.compress.rotation import random_signs
from research.core import checks
from research.core.base import Array, Compressor, Key


class CountSketch(Compressor, name="count_sketch"):
  """Hashes a leaf of any size into a table of rows x columns float32 numbers.

      table[r, h_r(i)] += s_r(i) x_i,   C(x)_i = median over r of s_r(i) table[r, h_r(i)]

  with random positions h and signs s that are equal on all workers. The table is linear in x, and C
  is unbiased. For one row, and for the median of an odd number of rows, E ||C(x) - x||^2 <= (ceil(n
  / columns) - 1) ||x||^2. Elements much larger than ||x|| / sqrt(columns) are estimated well. The
  sketch pays off if only these elements are needed, as in FetchSGD, which selects the largest
  elements of C(x). A leaf of at most rows x columns elements is sent uncompressed. The table is
  float64 for a float64 leaf.

  h_r shifts each segment of `columns` consecutive elements by a random offset. Elements of the same
  segment never collide, and others collide with probability 1 / columns, which is all that the
  bound requires. There is no scatter, and no hash is stored.

  Args:
    rows: number of independent estimates of each element.
    columns: entries per row.

  Raises:
    ValueError: if rows or columns is below 1.

  Reference: Charikar, Chen, Farach-Colton 2002; Rothchild et al. 2020 (FetchSGD),
    arXiv:2007.07682, algorithm 1; Ivkin et al. 2019 (SketchedSGD), arXiv:1903.04488.
  """

  rows: int
  columns: int
  linear = True
  contractive = False

  def check(self):
    checks.at_least("rows", self.rows)
    checks.at_least("columns", self.columns)

  def encode(self, x, shared, own):
    del own
    rows, columns, flat = self.rows, self.columns, widened(flatten(x))
    if x.size <= rows * columns:
      return flat
    stretches = jnp.pad(flat, (0, -flat.size % columns)).reshape(-1, columns)

    def add(table, stretch):
      index, values = stretch
      shifts, signs = _hash(shared, index, rows, columns)
      signed = signs.astype(flat.dtype) * values[None, :]
      return table + _turned(signed, shifts), None

    index = jnp.arange(len(stretches), dtype=jnp.uint32)
    return lax.scan(add, jnp.zeros((rows, columns), flat.dtype), (index, stretches))[0]

  def decode(self, payload, like, shared):
    rows, columns = self.rows, self.columns
    if like.size <= rows * columns:
      return restore(payload, like)

    def estimate(_, index):
      shifts, signs = _hash(shared, index, rows, columns)
      return None, _median(signs.astype(payload.dtype) * _turned(payload, -shifts))

    index = jnp.arange(-(-like.size // columns), dtype=jnp.uint32)
    return restore(lax.scan(estimate, None, index)[1], like)


count_sketch = CountSketch


def _hash(key: Key, stretch: Array, rows: int, columns: int) -> tuple[Array, Array]:
  """Returns the shifts int32 [rows] and the signs int8 [rows, columns] of one segment."""
  shifts_key, signs_key = jax.random.split(jax.random.fold_in(key, stretch))
  signs = random_signs(signs_key, rows * columns).reshape(rows, columns)
  return jax.random.randint(shifts_key, (rows,), 0, columns, jnp.int32), signs


def _turned(table: Array, shifts: Array) -> Array:
  """Shifts each row cyclically."""
  return jnp.stack([jnp.roll(row, shift) for row, shift in zip(table, shifts, strict=True)])


def _median(estimates: Array) -> Array:
  """Computes the median over the first axis by a sorting network; a sort takes 10 times as long."""
  rows = list(estimates)
  for turn in range(len(rows)):
    for i in range(turn % 2, len(rows) - 1, 2):
      rows[i], rows[i + 1] = jnp.minimum(rows[i], rows[i + 1]), jnp.maximum(rows[i], rows[i + 1])
  return 0.5 * rows[(len(rows) - 1) // 2] + 0.5 * rows[len(rows) // 2]
