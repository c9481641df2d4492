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


def _sent(compressor: Compressor, x: jax.Array, shared: jax.Array, own: jax.Array) -> jax.Array:
  """Computes C(x) by encoding and decoding x."""
  return compressor.decode(compressor.encode(x, shared, own), _like(x), shared)


@functools.cache
def _sender(compressor: Compressor) -> Callable[..., jax.Array]:
  return jax.jit(functools.partial(_sent, compressor))


def _vectors(n: int) -> jax.Array:
  """Returns test vectors [5, n]: normal, heavy-tailed, one nonzero element, constant, zero."""
  random = np.random.default_rng(n)
  single = np.zeros(n)
  single[n // 3] = -3
  heavy = random.standard_cauchy(n) ** 3
  rows = [random.standard_normal(n), heavy, single, np.full(n, 0.7), np.zeros(n)]
  return jnp.asarray(np.stack(rows), jnp.float32)


def _square(x: Any) -> np.ndarray:
  return np.sum(np.square(np.asarray(x, np.float64)), axis=-1)


def _payload_bytes(compressor: Compressor, like: jax.ShapeDtypeStruct) -> int:
  payload = jax.eval_shape(compressor.encode, like, *_keys(7))
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(payload))


def types(case: Case) -> None:
  """Checks that the decoded leaf has the leaf's shape and dtype."""
  for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
    for shape in SHAPES:
      x = jax.ShapeDtypeStruct(shape, dtype)
      found = jax.eval_shape(functools.partial(_sent, case.compressor), x, *_keys(7))
      says = "decode returns an array of the leaf's shape and dtype."
      require(_like(found) == x, case.compressor, says, f"{_named(found)} of a leaf {_named(x)}")


def _named(x: Any) -> str:
  return f"{x.dtype}{list(x.shape)}"


def payloads(case: Case) -> None:
  """Checks that payloads have as many bytes as when traced, and as many as promised, if any."""
  encode = jax.jit(case.compressor.encode)
  want = _payload_bytes(case.compressor, _like(_vectors(1000)[0]))
  for x in _vectors(1000):
    got = sum(leaf.nbytes for leaf in jax.tree.leaves(encode(x, *_keys(7))))
    says = "A payload has as many bytes as its traced shapes say."
    require(got == want, case.compressor, says, f"{got} where {want} were traced")
  if not case.content:
    return
  for n in CONTENT_OF:
    for dtype in (jnp.float32, jnp.bfloat16):
      x = jax.ShapeDtypeStruct((n,) if n < 2**20 else (2**15, n // 2**15), dtype)
      rest = _payload_bytes(case.compressor, x) - case.content(n, x.dtype.itemsize)
      says = "A payload has the promised bytes, rounded up by less than 4."
      require(0 <= rest < 4, case.compressor, says, f"{rest} bytes more for {_named(x)}")


def error(case: Case) -> None:
  """Checks that C(0) = 0, and that the mean squared error is within its bound.

  The check allows four standard errors.
  """
  keys = _keys(1, 100, 2)
  for n in (40, 1000):
    x = _vectors(n)
    over = lambda v: jax.vmap(lambda k: _sent(case.compressor, v, k[0], k[1]))(keys)
    errors = _square(jax.jit(jax.vmap(over))(x) - x[:, None])  # [vectors, keys]
    says = "Zero is sent as zero."
    require((errors[-1] == 0).all(), case.compressor, says, f"||C(0)||^2 = {errors[-1].max():.3g}")
    bound = case.error or ((lambda n: 1.0) if case.compressor.contractive else None)
    if bound is None:
      continue
    slack = 4 * errors.std(1) / math.sqrt(len(keys)) + 1e-12 * _square(x)
    held = errors.mean(1) <= bound(n) * _square(x) * (1 + 1e-5) + slack
    worst = (errors.mean(1)[:-1] / _square(x)[:-1]).max()
    says = f"E ||C(x) - x||^2 <= {bound(n):.4g} ||x||^2 for {n} elements."
    require(held.all(), case.compressor, says, f"{worst:.4g} ||x||^2")


def unbiased(case: Case) -> None:
  """Checks that E C(x) = x within four standard errors, if promised."""
  if not case.unbiased:
    return
  x, keys = _vectors(60)[0], _keys(3, 3000, 2)
  draws = jax.jit(jax.vmap(lambda k: _sent(case.compressor, x, k[0], k[1])))(keys)
  draws = np.asarray(draws, np.float64)
  standard_error = draws.std(0) / math.sqrt(len(draws))
  away = np.abs(draws.mean(0) - x) - 4 * standard_error - 1e-6
  says = "E C(x) = x, within four standard errors of 3000 draws."
  require((away <= 0).all(), case.compressor, says, f"{away.max():.3g} beyond these")


def idempotent(case: Case) -> None:
  """Checks that C(C(x)) = C(x), if promised."""
  send = _sender(case.compressor)
  for x in _vectors(1000) if case.idempotent else ():
    once = send(x, *_keys(7))
    twice = send(once, _keys(7)[0], jax.random.key(99))
    away = float(jnp.abs(twice - once).max() / jnp.maximum(jnp.abs(x).max(), 1e-30))
    says = "C(C(x)) = C(x) with the same shared key."
    require(away <= 2e-6, case.compressor, says, f"a difference of {away:.3g} of max|x|")


def linear(case: Case) -> None:
  """Checks that a sum of payloads decodes to the sum of the decoded values, if `linear`."""
  if not case.compressor.linear:
    return
  (x, y), (shared, own) = _vectors(1000)[:2] / 10, _keys(7)
  encode = jax.jit(case.compressor.encode)
  decode = jax.jit(lambda payload: case.compressor.decode(payload, _like(x), shared))
  first, second = encode(x, shared, shared), encode(y, shared, own)
  total = jax.tree.map(jnp.add, first, second)
  together, apart = (
    np.asarray(decode(total)),
    np.asarray(decode(first)) + np.asarray(decode(second)),
  )
  precision = max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(total))
  away = np.abs(together - apart).max() / np.abs(apart).max()
  says = "`linear`: the sum of payloads is decoded to the sum of the values."
  require(away <= 4 * precision, case.compressor, says, f"a difference of {away:.3g}")


def sparse(case: Case) -> None:
  """Checks that at most half of the elements of C(x) are nonzero, if `sparse`."""
  if not case.compressor.sparse:
    return
  sent = _sender(case.compressor)(_vectors(1000)[0], *_keys(7))
  share = float(jnp.mean(sent != 0))
  says = "`sparse`: C(x) is zero at most positions."
  require(share <= 0.5, case.compressor, says, f"{share:.0%} of 1000 are not")


def finite(case: Case) -> None:
  """Checks that finite leaves stay finite, and that a non-finite element remains detectable."""
  send = jax.jit(jax.vmap(lambda x: _sent(case.compressor, x, *_keys(7))))
  wrong = jnp.asarray([jnp.nan, jnp.inf, -jnp.inf] * 3)
  at = jnp.asarray([0, 0, 0, 150, 150, 150, 299, 299, 299])
  plain = _vectors(300)
  x = jnp.broadcast_to(plain[0], (9, 300)).at[jnp.arange(9), at].set(wrong)
  for dtype in (jnp.float32, jnp.float16):
    rows = jnp.concatenate([plain, x]).astype(dtype)
    whole = np.asarray(jnp.isfinite(rows[:5]).all(1))  # heavy tails may overflow in float16
    arrives = np.asarray(jnp.isfinite(send(rows)).all(1))
    says = "A finite leaf is sent as finite numbers."
    require(arrives[:5][whole].all(), case.compressor, says, f"others, in {dtype.__name__}")
    says = "If a leaf has a non-finite element, so has the decoded leaf."
    lost = [f"{float(wrong[i])} at {int(at[i])}" for i in np.flatnonzero(arrives[5:])]
    require(not lost, case.compressor, says, f"nothing of {', '.join(lost)} in {dtype.__name__}")


def executions(case: Case) -> None:
  """Checks that a single worker, `vmap` and a scan in `shard_map` agree up to rounding."""
  x = jnp.asarray(np.random.default_rng(0).standard_normal((8, 6, 50)), jnp.float32)
  shared, own = _keys(7)[0], _keys(8, 8)
  one = lambda x, key: _sent(case.compressor, x, shared, key)
  alone = jax.jit(one)
  want = np.stack([alone(leaf, key) for leaf, key in zip(x, own, strict=True)])
  count = max(k for k in (1, 2, 4) if k <= len(jax.devices()))
  sharded = jax.shard_map(
    lambda x, own: jax.lax.scan(lambda _, worker: (None, one(*worker)), None, (x, own))[1],
    mesh=meshes.device_mesh({"data": count}, jax.devices()[:count]),
    in_specs=(P("data"), P("data")),
    out_specs=P("data"),
    check_vma=False,
  )
  for name, run in (("vmap", jax.vmap(one)), ("shard_map", sharded)):
    away = np.abs(np.asarray(jax.jit(run)(x, own)) - want).max() / np.abs(want).max()
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
