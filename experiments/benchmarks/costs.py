"""Benchmarks compressors: compares encode and decode with a memory copy.

The benchmark runs on one device of the default backend. `experiments/bench.py --cases=compress`
runs this benchmark and writes the table.
"""

import math
import re
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

from experiments.benchmarks.turns import in_turn, milliseconds, ratios, seconds

COMPRESSORS = (
  "int8()",
  "sign()",
  "top_k(0.01)",
  "bf16()",
  "fp8()",
  "int4()",
  "statistical(2)",
  "block_top_k()",
  "random_k(0.01)",
  *("int8(stochastic=True)", "int4(stochastic=True)", "qsgd()", "terngrad()", "natural()"),
)
LEAF = 2**24  # float32 elements: 64 MiB
LEAST_SECONDS = 0.02  # minimum duration of one timing; shorter functions are repeated


class Timed(NamedTuple):
  """A compiled function that runs repeatedly; each result overwrites the previous result."""

  seconds: Callable[[], float]  # measures one call
  result: Any  # the first result
  sorted: int  # number of elements of the largest array that the function sorts


def timed(function: Callable[..., Any], *args: Any) -> Timed:
  """Compiles a function and runs it once.

  The previous result is donated, so that no call waits for the system to allocate fresh pages. On a
  CPU, this wait would dominate a copy of 64 MiB.

  Args:
    function: a function of arrays.
    *args: the arguments of the function.
  """
  import jax

  run = jax.jit(lambda held, *args: function(*args), donate_argnums=0, keep_unused=True)
  result = jax.jit(function)(*args)
  held = [jax.block_until_ready(jax.jit(function)(*args))]
  sorts = re.findall(
    r":\w+\[([\d,]+)\]\s+=\s+(?:sort|top_k)\[", str(jax.make_jaxpr(function)(*args))
  )
  largest = max((math.prod(map(int, shape.split(","))) for shape in sorts), default=0)

  def repeat(calls: int) -> None:
    for _ in range(calls):
      held[0] = run(held[0], *args)
    jax.block_until_ready(held[0])

  repeat(1)
  calls = math.ceil(LEAST_SECONDS / max(seconds(lambda: repeat(1)), 1e-6))
  return Timed(lambda: seconds(lambda: repeat(calls)) / calls, result, largest)


def compress(repeats: int) -> list[dict[str, Any]]:
  """Times each compressor on a 64 MiB leaf of normal values, in turn with `jnp.copy`.

  A row's `encode_bandwidth` is the rate of encoding in bytes per second, divided by the rate of
  copying. Encoding counts as moving the leaf once and the payload once; copying counts as moving
  the leaf twice.

  Args:
    repeats: the number of measured turns of each function.
  """
  import jax
  import jax.numpy as jnp

  from research.core import registry

  x = jax.random.normal(jax.random.key(0), (LEAF,))
  shared, own = jax.random.split(jax.random.key(1))
  like = jax.ShapeDtypeStruct(x.shape, x.dtype)
  copy = timed(jnp.copy, x)
  rows = []
  for spec in COMPRESSORS:
    compressor = registry.build("compressor", spec)
    encode = timed(compressor.encode, x, shared, own)
    decode = timed(lambda p, key, c=compressor: c.decode(p, like, key), encode.result, shared)
    payload = sum(leaf.nbytes for leaf in jax.tree.leaves(encode.result))
    found = in_turn([t.seconds for t in (copy, encode, decode)], repeats)
    row = {"compressor": spec, "device": jax.devices()[0].device_kind, "payload_bytes": payload}
    rows.append(row | _against_copy(*found) | {"largest_sort": encode.sorted})
    moved = (x.nbytes + payload) / (2 * x.nbytes)
    rows[-1]["encode_bandwidth"] = moved / statistics.median(ratios(found[1], found[0]))
  return rows


def _against_copy(copied: list[float], encoded: list[float], decoded: list[float]):
  both = ratios([sum(pair) for pair in zip(encoded, decoded, strict=True)], copied)
  return {
    "copy_ms": milliseconds(copied),
    "encode_ms": milliseconds(encoded),
    "decode_ms": milliseconds(decoded),
    "ratio": statistics.median(both),
    "ratios": [round(r, 3) for r in both],
  }


def compress_table(rows: list[dict[str, Any]]) -> list[str]:
  """Formats the Markdown table that compares compressors with a copy."""
  device, copied = rows[0]["device"], statistics.median(row["copy_ms"] for row in rows)
  lines = [
    f"\nEncode and decode of 64 MiB of float32 on {device}, as ratio to `jnp.copy` of them "
    f"({copied:.3g} ms), each written over the result before:\n"
  ]
  lines.append(
    "| compressor | bytes | encode, ms | decode, ms | ratio (median) | encode, of the copy's "
    "bandwidth | largest sort |"
  )
  lines.append("|---|---|---|---|---|---|---|")
  for row in rows:
    times = f"{row['encode_ms']:.3g} | {row['decode_ms']:.3g} | {row['ratio']:.2f}"
    rest = f"{row['encode_bandwidth']:.0%} | {row['largest_sort']:,}"
    lines.append(f"| {row['compressor']} | {row['payload_bytes']:,} | {times} | {rest} |")
  return lines
