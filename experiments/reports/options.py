"""Defines the methods that `advise.py` ranks, and reads the shapes of models."""

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.reports import evidence, work
from experiments.reports.advice import EXACT, Option
from research.analysis.network import Network
from research.core import checks, paths, registry

INNER = "adamw(1e-3)"
OUTER = "sgd(0.7, momentum=0.6, nesterov=True)"
SIDE = 4096  # of the square matrices of a model of which only the size is known
POWER_SGD = 55  # the factor by which PowerSGD divides the bytes in results/compression
_UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}


class Candidate(NamedTuple):
  """A method to rank."""

  name: str
  spec: str
  evidence: str  # key of `evidence.READERS`; '' if no result says how many steps it needs
  serves: tuple[str, ...] = ()
  note: str = ""  # the recorded result about what it serves
  board: str = ""  # its name on the leaderboard


def _data_parallel(aggregator: str) -> str:
  return f"data_parallel({INNER}, {aggregator})"


def _diloco(aggregator: str, period: int) -> str:
  return f"diloco({INNER}, {OUTER}, {aggregator}, period={period})"


_INT8 = "error_feedback(two_phase(int8()))"
CANDIDATES = (
  Candidate(EXACT, _data_parallel("mean()"), "exact", board="AdamW"),
  Candidate("int8", _data_parallel(_INT8), "int8", board="AdamW int8"),
  Candidate(
    "top 1%",
    _data_parallel("error_feedback(gather_mean(top_k(0.01)))"),
    "top_k",
    board="AdamW top 1%",
  ),
  Candidate("sign", _data_parallel("error_feedback(gather_mean(sign()))"), "sign"),
  Candidate("PowerSGD", _data_parallel("error_feedback(power_sgd({rank}))"), "power_sgd"),
  Candidate(
    "local steps, 16", f"local_sgd({INNER}, mean(), period=16)", "local_sgd_16", board="local AdamW"
  ),
  Candidate("DiLoCo, 8", _diloco("mean()", 8), "diloco_8"),
  Candidate("DiLoCo, 32", _diloco("mean()", 32), "diloco_32"),
  Candidate("DiLoCo, 32, int8", _diloco(_INT8, 32), "diloco_32_int8"),
  Candidate(
    "SparseLoCo, 32",
    f"diloco({INNER}, sgd(0.7), error_feedback(gather_mean(block_top_k()), decay=0.95), period=32)",
    "sparseloco",
    board="SparseLoCo",
  ),
  Candidate(
    "noisy average",
    _data_parallel("noisy(mean(), clip=1.0, noise=1.0)"),
    "",
    ("privacy",),
    "results/dp_sgd",
  ),
  Candidate(
    "centered clipping",
    _data_parallel("centered_clip(1.0)"),
    "",
    ("faulty",),
    "results/byzantine",
  ),
  Candidate(
    "asynchronous server",
    f"asgd({INNER}, error_feedback(gather_mean(int8())))",
    "",
    ("unlike",),
    "results/server",
  ),
)


def spec_of(one: Candidate, shapes: Any, workers: int) -> str:
  """Returns a candidate's spec for a model; {rank} becomes the rank with the recorded compression.

  The same rank compresses large matrices more than small ones. The number of steps was recorded for
  `POWER_SGD`, so the rank is the one that divides the bytes of this model by as much.

  Args:
    one: the candidate.
    shapes: the tree of the parameters' shapes.
    workers: the number of workers.
  """
  if "{rank}" not in one.spec:
    return one.spec
  at = lambda spec: work.of_shapes(registry.build("method", spec), shapes, workers)[0].load.sent
  low, high = (at(one.spec.format(rank=rank)) for rank in (1, 2))
  target = at(_data_parallel("mean()")) / POWER_SGD
  more = (target - low) / (high - low) if high > low else 0.0  # small matrices are sent as they are
  return one.spec.format(rank=max(1, round(1 + more)))


def options(
  shapes: Any,
  workers: int,
  network: Network,
  tell: Callable[[str], None] = lambda name: None,
  more: Sequence[str] = (),
) -> list[Option]:
  """Traces every candidate on a model, and returns the numbers of the ranking.

  Args:
    shapes: the tree of the parameters' shapes.
    workers: the number of workers.
    network: the network, whose kernels determine the times of encoding.
    tell: called with the name of each candidate before it is traced.
    more: specs of further methods, for which no result says how many steps they need.

  Raises:
    ValueError: if a further spec is invalid.
  """
  boards, found = evidence.leaderboard(), []
  for one in (*CANDIDATES, *(Candidate(spec, spec, "") for spec in more)):
    tell(one.name)
    spec = spec_of(one, shapes, workers)
    method = registry.build("method", spec)
    if method.one_by_one:
      push, pull, memory = work.of_server(method, shapes)
      pushes = push, pull
      load, encoding, period, delay = work.cost.Load(push, 1.0), 0.0, 1, 0
    else:
      pushes = None
      done, memory = work.of_shapes(method, shapes, workers)
      load, encoding = done.load, done.encoding(network)
      period, delay = done.period, done.delay
    known = evidence.READERS[one.evidence]() if one.evidence else None
    ratios = (known.counted, *known[1:3]) if known else (None, math.nan, math.nan)
    source = known.source if known else one.note
    found.append(
      Option(
        one.name,
        spec,
        one.serves,
        load,
        encoding,
        memory,
        period,
        delay,
        *ratios,
        source,
        pushes,
        tuple(boards[one.board]["losses"]) if one.board in boards else (),
      )
    )
  return found


def _bytes(shapes: Any) -> int:
  import jax

  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def shapes_of(model: str) -> Any:
  """Returns the shapes of a model's parameters, in float32.

  Args:
    model: a preset of `transformer`, a folder with .safetensors files, or a size such as 500MB.

  Raises:
    ValueError: if the text is none of them.
  """
  import jax
  import jax.numpy as jnp

  from research.models.transformer import PRESETS, transformer

  if model in PRESETS:
    vocabulary = 128_256 if model in ("1b", "8b") else 32_000
    key = jax.eval_shape(lambda: jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    return jax.eval_shape(transformer(model)(vocabulary).init, key, tokens)["params"]
  array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  if found := re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(kB|MB|GB|TB)", model):
    count = int(float(found[1]) * _UNITS[found[2]] / 4)
    if not count:
      raise ValueError("holds no parameter; one takes 4 bytes")
    side = min(SIDE, math.isqrt(count))
    matrices, rest = divmod(count, side * side)
    whole = {"matrices": array(matrices, side, side)}
    return whole | ({"rest": array(rest // side, side)} if rest >= side else {})
  folder = paths.local(model)
  files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
  if files:
    tensors = {name: shape for file in files for name, shape in _header(file).items()}
    return {name: array(*shape) for name, shape in tensors.items()}
  legal = "a preset, a size such as 500MB, or a folder with .safetensors files"
  raise ValueError(f"not {legal}{checks.hint(model, PRESETS)} presets: {', '.join(PRESETS)}")


def _header(file: Path) -> dict[str, list[int]]:
  """Reads the shapes of the tensors in a .safetensors file from the file's header."""
  try:
    with file.open("rb") as opened:
      length = int.from_bytes(opened.read(8), "little")
      if length > 100_000_000:
        raise ValueError(f"{file.name} has no header of safetensors")
      header = json.loads(opened.read(length))
    return {name: one["shape"] for name, one in header.items() if name != "__metadata__"}
  except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
    raise ValueError(f"{file.name} is not a file of safetensors: {error}") from error
