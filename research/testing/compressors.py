"""Checks the contracts of compressors."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from research.comm import mesh as meshes
from research.core.base import Compressor
from research.testing.contract import require

SHAPES = ((), (0,), (1,), (3, 5), (300,), (2, 3, 4))
SHORT, LONG, HALF = 40, 1000, (6, 50)  # leaves that are computed; those of HALF are float16
DRAWS = 100  # of each test vector
LARGE = (2**15, 2**16)  # shape of a leaf that is traced but never computed
CONTENT_OF = (1, 1000, 4096, 2**27, 2**31)


class Case(NamedTuple):
  """A compressor and the properties that its docstring promises."""

  compressor: Compressor
  error: Callable[[int], float] | None = None
  content: Callable[[int, int], float] | None = None
  unbiased: bool = False
  idempotent: bool = False


def check_compressor(
  compressor: Compressor,
  *,
  error: Callable[[int], float] | None = None,
  content: Callable[[int, int], float] | None = None,
  unbiased: bool = False,
  idempotent: bool = False,
) -> None:
  """Checks the contracts of a compressor, and further properties that its docstring promises.

  The contracts are: The decoded leaf has the shape and dtype of the original leaf. The shapes of
  payloads depend only on this shape and dtype. Zero is decoded to zero. If the compressor declares
  itself `contractive`, `linear` or `sparse`, it is. Non-finite elements remain detectable. The
  result is the same for a single worker, under `vmap` and in `shard_map`. No array is larger than
  twice the leaf.

  Args:
    compressor: the compressor to check.
    error: a function from n to the bound on E ||C(x) - x||^2 / ||x||^2 for a leaf of n elements;
      the default bound is 1 if the compressor is contractive.
    content: a function of (n, bytes per element) that returns the payload's bytes, before packed
      bits are rounded up.
    unbiased: whether to check that E C(x) = x.
    idempotent: whether to check that C(C(x)) = C(x) with the same shared key.

  Raises:
    ContractError: if a contract is broken; the error describes the first broken contract.
  """
  case = Case(compressor, error, content, unbiased, idempotent)
  with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
    for contract in CONTRACTS:
      contract(case)


def _keys(seed: int, *shape: int) -> jax.Array:
  return jax.random.split(jax.random.key(seed), shape or 2)


def _like(x: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _sent(compressor: Compressor, x: jax.Array, shared: jax.Array, own: jax.Array) -> Any:
  """Encodes and decodes x.

  Returns:
    The payload and C(x).
  """
  payload = compressor.encode(x, shared, own)
  return payload, compressor.decode(payload, _like(x), shared)


@functools.cache
def _alone(compressor: Compressor) -> Callable[..., Any]:
  """Compiles `_sent` for a single worker."""
  return jax.jit(functools.partial(_sent, compressor))


@functools.cache
def _together(compressor: Compressor) -> Callable[..., jax.Array]:
  """Compiles C for rows x [n, ...], shared [n], own [n] under vmap."""
  return jax.jit(jax.vmap(lambda *row: _sent(compressor, *row)[1]))


def _rows(compressor: Compressor, x: np.ndarray, shared: jax.Array, own: jax.Array) -> np.ndarray:
  """Computes C of at most 5 * DRAWS rows x [n, ...] with keys own [n] or [1].

  The rows are padded to 5 * DRAWS, the number for which `error` compiles the same program.
  """
  count = 5 * DRAWS
  fill = lambda rows: np.concatenate([rows, np.zeros((count - len(x), *x.shape[1:]), x.dtype)])
  keys = own[np.arange(count) % len(own)]
  shared = jnp.broadcast_to(shared, count)
  return np.asarray(_together(compressor)(fill(x), shared, keys))[: len(x)]


def _vectors(n: int) -> np.ndarray:
  """Returns test vectors [5, n]: normal, heavy-tailed, one nonzero element, constant, zero."""
  random = np.random.default_rng(n)
  single = np.zeros(n)
  single[n // 3] = -3
  heavy = random.standard_cauchy(n) ** 3
  rows = [random.standard_normal(n), heavy, single, np.full(n, 0.7), np.zeros(n)]
  return np.stack(rows).astype(np.float32)


def _square(x: Any) -> np.ndarray:
  return np.sum(np.square(np.asarray(x, np.float64)), axis=-1)


def _payload_bytes(compressor: Compressor, like: jax.ShapeDtypeStruct) -> int:
  payload = jax.eval_shape(compressor.encode, like, *_keys(7))
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(payload))


def types(case: Case) -> None:
  """Checks that the decoded leaf has the leaf's shape and dtype."""
  leaves = [(shape, jnp.float32) for shape in SHAPES]
  leaves += [(shape, dtype) for shape in ((), (3, 5)) for dtype in (jnp.bfloat16, jnp.float16)]
  for shape, dtype in leaves:
    x = jax.ShapeDtypeStruct(shape, dtype)
    _, found = jax.eval_shape(functools.partial(_sent, case.compressor), x, *_keys(7))
    says = "decode returns an array of the leaf's shape and dtype."
    require(_like(found) == x, case.compressor, says, f"{_named(found)} of a leaf {_named(x)}")


def _named(x: Any) -> str:
  return f"{x.dtype}{list(x.shape)}"


def payloads(case: Case) -> None:
  """Checks that payloads have as many bytes as when traced, and as many as promised, if any."""
  leaves = _vectors(LONG)
  want = _payload_bytes(case.compressor, _like(leaves[0]))
  for x in leaves:
    payload, _ = _alone(case.compressor)(x, *_keys(7))
    got = sum(leaf.nbytes for leaf in jax.tree.leaves(payload))
    says = "A payload has as many bytes as its traced shapes say."
    require(got == want, case.compressor, says, f"{got} where {want} were traced")
  if not case.content:
    return
  leaves = [(n, jnp.float32) for n in CONTENT_OF]
  leaves += [(n, jnp.bfloat16) for n in (LONG, 2**27)]
  for n, dtype in leaves:
    x = jax.ShapeDtypeStruct((n,) if n < 2**20 else (2**15, n // 2**15), dtype)
    rest = _payload_bytes(case.compressor, x) - case.content(n, x.dtype.itemsize)
    says = "A payload has the promised bytes, rounded up by less than 4."
    require(0 <= rest < 4, case.compressor, says, f"{rest} bytes more for {_named(x)}")


def error(case: Case) -> None:
  """Checks that C(0) = 0, and that the mean squared error is within its bound.

  The check allows four standard errors.
  """
  for n in (SHORT, LONG):
    x = _vectors(n)
    rows, count = np.repeat(x, DRAWS, 0), len(x) * DRAWS
    sent = _together(case.compressor)(rows, _keys(1, count), _keys(2, count))
    errors = _square(sent - rows).reshape(len(x), DRAWS)
    says = "Zero is sent as zero."
    require((errors[-1] == 0).all(), case.compressor, says, f"||C(0)||^2 = {errors[-1].max():.3g}")
    bound = case.error or ((lambda n: 1.0) if case.compressor.contractive else None)
    if bound is None:
      continue
    slack = 4 * errors.std(1) / math.sqrt(DRAWS) + 1e-12 * _square(x)
    held = errors.mean(1) <= bound(n) * _square(x) * (1 + 1e-5) + slack
    worst = (errors.mean(1)[:-1] / _square(x)[:-1]).max()
    says = f"E ||C(x) - x||^2 <= {bound(n):.4g} ||x||^2 for {n} elements."
    require(held.all(), case.compressor, says, f"{worst:.4g} ||x||^2")


def unbiased(case: Case) -> None:
  """Checks that E C(x) = x within four standard errors, if promised."""
  if not case.unbiased:
    return
  x = _vectors(SHORT)[0]
  rows = np.tile(x, (5 * DRAWS, 1))
  keys = [(_keys(seed, len(rows)), _keys(10 + seed, len(rows))) for seed in range(3, 9)]
  draws = np.concatenate([_together(case.compressor)(rows, *of) for of in keys], dtype=np.float64)
  standard_error = draws.std(0) / math.sqrt(len(draws))
  away = np.abs(draws.mean(0) - x) - 4 * standard_error - 1e-6
  says = f"E C(x) = x, within four standard errors of {len(draws)} draws."
  require((away <= 0).all(), case.compressor, says, f"{away.max():.3g} beyond these")


def idempotent(case: Case) -> None:
  """Checks that C(C(x)) = C(x), if promised."""
  send, (shared, own), other = _alone(case.compressor), _keys(7), jax.random.key(99)
  for x in _vectors(LONG) if case.idempotent else ():
    _, once = send(x, shared, own)
    _, twice = send(once, shared, other)
    away = np.abs(np.asarray(twice) - once).max() / max(np.abs(x).max(), 1e-30)
    says = "C(C(x)) = C(x) with the same shared key."
    require(away <= 2e-6, case.compressor, says, f"a difference of {away:.3g} of max|x|")


def linear(case: Case) -> None:
  """Checks that a sum of payloads decodes to the sum of the decoded values, if `linear`."""
  if not case.compressor.linear:
    return
  (x, y), (shared, own) = _vectors(LONG)[:2] / 10, _keys(7)
  decode = jax.jit(lambda payload: case.compressor.decode(payload, _like(x), shared))
  (first, of_x), (second, of_y) = (
    _alone(case.compressor)(leaf, shared, key) for leaf, key in ((x, shared), (y, own))
  )
  total = jax.tree.map(lambda a, b: np.asarray(a) + np.asarray(b), first, second)
  together, apart = np.asarray(decode(total)), np.asarray(of_x) + np.asarray(of_y)
  precision = max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(total))
  away = np.abs(together - apart).max() / np.abs(apart).max()
  says = "`linear`: the sum of payloads is decoded to the sum of the values."
  require(away <= 4 * precision, case.compressor, says, f"a difference of {away:.3g}")


def sparse(case: Case) -> None:
  """Checks that at most half of the elements of C(x) are nonzero, if `sparse`."""
  if not case.compressor.sparse:
    return
  _, sent = _alone(case.compressor)(_vectors(LONG)[0], *_keys(7))
  share = np.mean(np.asarray(sent) != 0)
  says = "`sparse`: C(x) is zero at most positions."
  require(share <= 0.5, case.compressor, says, f"{share:.0%} of {sent.size} are not")


def finite(case: Case) -> None:
  """Checks that finite leaves stay finite, and that a non-finite element remains detectable."""
  shared, own = _keys(7)
  for dtype, shape in ((jnp.float32, (LONG,)), (jnp.float16, HALF)):
    n = math.prod(shape)
    wrong, at = np.tile([np.nan, np.inf, -np.inf], 3), np.repeat([0, n // 2, n - 1], 3)
    broken = np.tile(_vectors(n)[0], (9, 1))
    broken[np.arange(9), at] = wrong
    with np.errstate(over="ignore"):  # heavy tails may overflow in float16
      rows = np.concatenate([_vectors(n), broken]).reshape(-1, *shape).astype(dtype)
    arrives = _are_finite(_rows(case.compressor, rows, shared, own[None]))
    whole = _are_finite(rows[:5])
    says = "A finite leaf is sent as finite numbers."
    require(arrives[:5][whole].all(), case.compressor, says, f"others, in {dtype.__name__}")
    says = "If a leaf has a non-finite element, so has the decoded leaf."
    lost = [f"{wrong[i]} at {at[i]}" for i in np.flatnonzero(arrives[5:])]
    require(not lost, case.compressor, says, f"nothing of {', '.join(lost)} in {dtype.__name__}")


def _are_finite(rows: np.ndarray) -> Any:
  return np.isfinite(rows).reshape(len(rows), -1).all(1)


def executions(case: Case) -> None:
  """Checks that a single worker, `vmap` and a scan in `shard_map` agree up to rounding."""
  x = np.random.default_rng(0).standard_normal((8, LONG)).astype(np.float32)
  shared, own = _keys(7)[0], _keys(8, 8)
  one = lambda x, key: _sent(case.compressor, x, shared, key)[1]
  want = np.stack([_alone(case.compressor)(row, shared, own[i])[1] for i, row in enumerate(x)])
  count = max(k for k in (1, 2, 4) if k <= len(jax.devices()))
  sharded = jax.shard_map(
    lambda x, own: jax.lax.scan(lambda _, worker: (None, one(*worker)), None, (x, own))[1],
    mesh=meshes.device_mesh({"data": count}, jax.devices()[:count]),
    in_specs=(P("data"), P("data")),
    out_specs=P("data"),
    check_vma=False,
  )
  under = {"vmap": _rows(case.compressor, x, shared, own), "shard_map": jax.jit(sharded)(x, own)}
  for name, found in under.items():
    away = np.abs(np.asarray(found) - want).max() / np.abs(want).max()
    says = f"Under {name}, a worker sends the same as on its own."
    require(away <= 1e-6, case.compressor, says, f"a difference of {away:.3g} of the largest")


def size(case: Case) -> None:
  """Checks that no array is larger than twice the leaf, so that memory is bounded."""
  n = math.prod(LARGE)
  x = jax.ShapeDtypeStruct(LARGE, jnp.float32)
  traced = jax.make_jaxpr(functools.partial(_sent, case.compressor))(x, *_keys(7))
  found = _largest(traced.jaxpr)
  says = "No array is larger than twice the leaf."
  require(found <= 2 * n, case.compressor, says, f"{found} elements for a leaf of {n}")


def _largest(jaxpr: Any) -> int:
  """Returns the size of the largest array in a program, including loops and branches."""
  made = [math.prod(v.aval.shape) for eqn in jaxpr.eqns for v in eqn.outvars]
  inner = [getattr(p, "jaxpr", p) for eqn in jaxpr.eqns for p in jax.tree.leaves(eqn.params)]
  return max([*made, *(_largest(sub) for sub in inner if hasattr(sub, "eqns"))], default=0)


CONTRACTS = (
  types, payloads, error, unbiased, idempotent, linear, sparse, finite, executions, size,
)  # fmt: skip
