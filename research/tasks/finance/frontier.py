"""Computes the mean-variance frontier: portfolios of least variance at required returns."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from research.core import checks, paths
from research.core.base import Array, Key, Params
from research.core.task import Batch, Task
from research.tasks import files, sampling
from research.tasks.finance import portfolio_files

MARKETS = ("port1", "port2", "port3")  # markets with published frontiers
URL = "http://people.brunel.ac.uk/~mastjjb/jeb/orlib/files/"
SHA256 = {
  "port1.txt": "8c570897a400635625fe14eb9a0868aebc6621586674a690493b085850f87886",
  "port2.txt": "00c7149e139cd0c6cf622515b7aa8691d67a0b98b1262984728c1104218cb720",
  "port3.txt": "fa04c266f3477c8758e81750ccfd810b467e7a03d8e58246fa8df4c6fc39468c",
  "portef1.txt": "55bc3289107f5cdbb3d1a44bab3a8bacd93ac5d0ce73ae12dddd6f334feaf1ac",
  "portef2.txt": "b918e1a8e0fd8ad38eb047d60daba791030e49721c547550385043a39f08656b",
  "portef3.txt": "4d0eb0a1cfbaddc2ef2049ec34ab9836e133f7dd0c0481f2932b345dc01c0cc3",
}
SCENARIOS = 8  # number of scenarios per asset
_HALVINGS = 60  # bisection steps for the multiplier


class Market(NamedTuple):
  """Contains the moments of n assets, and the published frontier of their portfolios, if any."""

  means: np.ndarray  # float64 [n], expected returns
  covariance: np.ndarray  # float64 [n, n]
  returns: np.ndarray  # float64 [points], descending
  variances: np.ndarray  # float64 [points], the least variances at these returns


def load(name: str, data_dir: str = "") -> Market:
  """Reads an instance of the OR-Library's portfolio problem.

  See `portfolio_files` for the format.

  Args:
    name: "port1", "port2", "port3", or the path of a file in the same format.
    data_dir: the folder to search first; see `files.find`.

  Raises:
    FileNotFoundError: if a published file is not found and cannot be downloaded.
    ValueError: if the file does not exist; a line is malformed, missing or repeated; or the
      covariance is not positive semidefinite.

  Reference: Chang, Meade, Beasley, Sharaiha, 2000, Heuristics for cardinality constrained portfolio
    optimisation, Computers & Operations Research 27; Beasley, 1990, OR-Library.
  """
  published = np.zeros((0, 2))
  if name in MARKETS:
    path, front = (
      files.find(f"orlib-portfolio/{n}", data_dir, URL + n, SHA256[n])
      for n in (f"{name}.txt", f"{name.replace('port', 'portef')}.txt")
    )
    published = np.array(front.read_text().split(), float).reshape(-1, 2)
  else:
    path = paths.local(name)
    if not path.is_file():
      raise ValueError(f"{name!r} is neither a file nor one of {', '.join(MARKETS)}")
  means, covariance = portfolio_files.read(path)
  try:
    check(covariance)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from None
  return Market(means, covariance, *published.T)


def check(covariance: np.ndarray) -> np.ndarray:
  """Checks that a covariance matrix is symmetric and positive semidefinite.

  Args:
    covariance: the covariance matrix [n, n].

  Returns:
    The eigenvalues of the covariance matrix [n], in ascending order.

  Raises:
    ValueError: if the matrix is not symmetric or not positive semidefinite, up to rounding.
  """
  if covariance.shape[0] != covariance.shape[1] or not np.allclose(covariance, covariance.T):
    raise ValueError(f"the covariance {list(covariance.shape)} is not symmetric")
  values = np.linalg.eigvalsh(covariance)
  if not values[0] >= -1e-9 * abs(values[-1]):
    raise ValueError(
      f"the covariance is not positive semidefinite: an eigenvalue is {values[0]:.3g}"
    )
  return values


def frontier(
  name: str = "port1", points: int = 50, returns: Sequence[float] = (), *, data_dir: str = ""
) -> Task:
  """Minimizes the variance w'Cw at several required returns, over weights w >= 0 with sum 1.

  The parameters are {"weights": [points, n]}. The examples are scenarios whose second moment is
  exactly C, eight times as many as assets, so that they can be partitioned over workers. The
  objective is half the sum of the points' variances divided by the largest eigenvalue of C. The
  curvature of the objective is therefore at most 1, so `sgd(1.0)` descends. Use a method that
  satisfies the constraints: `data_parallel` and `local_sgd` project their steps, and
  `consensus_admm` projects its consensus.

  The metrics are "variance", the mean over points; "violation", the largest constraint violation;
  and, for published frontiers, "gap", the largest relative difference between a variance and its
  published value. In float32, a gap of about 1e-5 remains; --x64 reduces it.

  Args:
    name: "port1" (Hang Seng, 31 assets), "port2" (DAX, 85 assets), "port3" (FTSE, 89 assets), or
      the path of a file.
    points: how many of the 2000 published returns to use, equally spaced in the list.
    returns: the required returns; empty to use published ones.
    data_dir: the folder to search first; see `files.find`.

  Raises:
    FileNotFoundError: if a published file is not found and cannot be downloaded.
    ValueError: if `load` raises it, points or a required return is out of range, or there are
      neither published nor required returns.

  Reference: Markowitz, 1952, Portfolio selection, Journal of Finance 7.
  """
  market = load(name, data_dir)
  if returns:
    return of_market(market._replace(returns=np.array(returns, float), variances=np.zeros(0)))
  if not len(market.returns):
    raise ValueError(f"{name} has no published frontier; say which returns=[...] are required")
  checks.in_range("points", points, f"[1, {len(market.returns)}]", note=", those published")
  at = np.linspace(0, len(market.returns) - 1, points).round().astype(int)
  chosen = {"returns": market.returns[at], "variances": market.variances[at]}
  return of_market(market._replace(**chosen))


def of_market(market: Market) -> Task:
  """Returns the task of finding the least-variance portfolios of a market; see `frontier`.

  Args:
    market: the moments of the assets, and the required returns with their published variances.

  Raises:
    ValueError: if the covariance is not positive semidefinite, or a return is not attainable.
  """
  means, required = market.means, market.returns
  largest = check(market.covariance)[-1]
  low, high = means.min(), means.max()
  if not high > low:
    raise ValueError("all assets have the same expected return: there is nothing to choose between")
  slack = 1e-6 * (high - low)  # published returns are rounded
  for value in required:
    if not low - slack <= value <= high + slack:
      raise ValueError(
        f"a return of {value:.6g} is required; attainable are those from {low:.6g} to {high:.6g}"
      )
  required = np.clip(required, low, high)

  def project(params: Params) -> Params:
    w = params["weights"]
    nearest = lambda y, r: portfolio(y, jnp.asarray(means, y.dtype), r)
    return {"weights": jax.vmap(nearest)(w, jnp.asarray(required, w.dtype))}

  def init(key: Key) -> Params:
    del key
    return project({"weights": jnp.full((len(required), len(means)), 1 / len(means))})

  def loss(params: Params, batch: Batch, key: Key) -> Array:
    del key
    squares = jnp.sum((batch["x"].astype(params["weights"].dtype) @ params["weights"].T) ** 2, 1)
    return sampling.mean(squares, batch) / 2

  def evaluate(params: Params, batch: Batch) -> dict[str, Array]:
    return {"loss": loss(params, batch, jax.random.key(0))}

  def measure(params: Params) -> dict[str, Array]:
    w = params["weights"]
    variances = jnp.sum((w @ jnp.asarray(market.covariance, w.dtype)) * w, 1)
    off = jnp.abs(w @ jnp.asarray(means / (high - low), w.dtype) - required / (high - low))
    outside = jnp.maximum(jnp.max(jnp.abs(jnp.sum(w, 1) - 1)), jnp.max(-w))
    found = {"variance": jnp.mean(variances), "violation": jnp.maximum(outside, jnp.max(off))}
    if len(market.variances):
      gaps = jnp.abs(variances / jnp.asarray(market.variances, w.dtype) - 1)
      found["gap"] = jnp.max(gaps)
    return found

  train = {"x": scenarios(market.covariance / largest)}
  train["y"] = np.zeros(len(train["x"]), np.int32)
  task = Task(init, loss, evaluate, sampling.epoch_sample, sampling.take, train)
  return task._replace(project=project, measure=measure)


def scenarios(covariance: np.ndarray) -> np.ndarray:
  """Builds scenarios x, float64 [S, n], such that x'x / S is the covariance up to rounding.

  Args:
    covariance: the covariance matrix [n, n].
  """
  values, vectors = np.linalg.eigh(covariance)
  count = SCENARIOS * len(values)
  rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((count, len(values))))[0]
  return np.sqrt(count) * (rotation * np.sqrt(np.maximum(values, 0))) @ vectors.T


def portfolio(y: Array, means: Array, required: Array) -> Array:
  """Projects y onto the set of portfolios with w >= 0, sum 1 and means'w = required.

  The result is the projection of y + t means onto the simplex, for the multiplier t at which the
  return equals the required return. The return is nondecreasing in t, so bisection finds t
  approximately. This approximation determines which assets have positive weight. Both multipliers
  then follow exactly from two linear equations.

  Args:
    y: the point [n] to project.
    means: the expected returns [n].
    required: the required return, a scalar in [min means, max means].

  Returns:
    The weights w [n].
  """
  scale = (jnp.max(y) - jnp.min(y) + 1) / (jnp.max(means) - jnp.min(means))
  # t = scale s / (1 - s^2) maps s in (-1, 1) onto all reals
  shifted = lambda s: y + scale * s / jnp.maximum(1 - s * s, jnp.finfo(y.dtype).eps) * means
  held = lambda s: optax.projections.projection_simplex(shifted(s))

  def halve(_, ends):
    low, high = ends
    middle = (low + high) / 2
    below = jnp.vdot(means, held(middle)) < required
    return jnp.where(below, middle, low), jnp.where(below, high, middle)

  ends = lax.fori_loop(0, _HALVINGS, halve, (-jnp.ones_like(scale), jnp.ones_like(scale)))
  rough = held((ends[0] + ends[1]) / 2)
  support = (rough > 0).astype(y.dtype)
  count, first = jnp.sum(support), jnp.sum(support * means)
  second, mean = jnp.sum(support * means**2), first / jnp.maximum(jnp.sum(support), 1)
  spread = second - first * mean
  excess = required - mean - (jnp.sum(support * means * y) - mean * jnp.sum(support * y))
  t = excess / jnp.where(spread > 0, spread, 1)
  a = (jnp.sum(support * y) + t * first - 1) / count
  exact = jnp.where(count > 1, support * (y + t * means - a), support)
  fits = ((spread > 0) | (count == 1)) & (jnp.min(exact) >= 0) & jnp.all(jnp.isfinite(exact))
  return jnp.where(fits, exact, rough)
