"""Finds the portfolio of least conditional value at risk (CVaR), the mean of the worst losses."""

import math
from collections.abc import Sequence
from statistics import NormalDist

import jax.numpy as jnp
import numpy as np
import optax

from research.core import checks, paths
from research.core.base import Array, Key, Params
from research.core.task import Batch, Task
from research.tasks import files, sampling, texts
from research.tasks.finance import price_table

URL = (
  "https://raw.githubusercontent.com/robertmartin8/PyPortfolioOpt/master/tests/resources/"
  "stock_prices.csv"
)
SHA256 = "1f3bc5da6d4b589a34704be69a1a8cd382f643dbedbefbc73319c3b21d9d9c71"
PERCENT = 100.0  # the objective is in percent, so that steps of 0.01 to 1 are sensible


def cvar(
  name: str = "stocks",
  level: float = 0.95,
  scenarios: int = 0,
  smoothing: float = 0.0,
  portfolio: Sequence[float] = (),
  confidence: float = 0.95,
  seed: int = 0,
  *,
  data_dir: str = "",
) -> Task:
  """Minimizes the CVaR of a portfolio over weights w >= 0 with sum 1 and a threshold a.

  With scenarios of returns r, the objective is

      a + mean((-r'w - a)_+) / (1 - level).

  The minimum of the objective over a is the CVaR of w: the mean of the losses above their quantile,
  which is the VaR. The parameters are {"weights": [n], "threshold"}. The objective, "loss", is in
  percent of the investment. The positive part is smoothed by `smoothing`, except in `evaluate`. The
  objective has kinks, so use a decreasing learning rate, and a method that satisfies constraints
  (see `frontier`). Optimizers that scale each coordinate, such as Adam, make steps that the
  projection undoes.

  The metrics are computed from the historical returns, as fractions: "var" and "cvar" of the
  weights, each with the ends of its confidence interval, "var_low", "var_high", ... If `portfolio`
  is given, its metrics are "given_var", ... See `tail`.

  Args:
    name: "stocks" for the daily returns of 20 stocks, from the first day on which all have a price;
      or the path of a table of prices, see `price_table`.
    level: the level of the CVaR, in (0, 1).
    scenarios: the number of days to draw with replacement (the bootstrap); 0 uses every day once.
    smoothing: e, in percent; for |x| <= e, (x)_+ becomes (x + e)^2 / 4e, which exceeds (x)_+ by at
      most e/4.
    portfolio: the weights of a given portfolio that is also evaluated; empty for none.
    confidence: the confidence level of the intervals, in (0, 1).
    seed: the seed of the scenarios.
    data_dir: the folder to search first; see `files.find`.

  Raises:
    FileNotFoundError: if the file is not found and cannot be downloaded.
    ValueError: if a number is out of range, or the file is not a table of prices.

  Reference: Rockafellar, Uryasev, 2000, Optimization of conditional value-at-risk, Journal of Risk
    2, theorem 1.
  """
  for what, value in (("level", level), ("confidence", confidence)):
    checks.in_range(what, value, "(0, 1)")
  if scenarios < 0 or not smoothing >= 0:
    raise ValueError(f"scenarios={scenarios}, smoothing={smoothing}: neither may be negative")
  days = load(name, data_dir)
  if portfolio and len(portfolio) != days.shape[1]:
    raise ValueError(f"portfolio has {len(portfolio)} weights for {days.shape[1]} stocks")
  drawn = days
  if scenarios:
    drawn = days[np.random.default_rng(seed).integers(len(days), size=scenarios)]
  return of_scenarios(drawn, days, level, smoothing, portfolio, confidence)


def of_scenarios(
  drawn: np.ndarray,
  seen: np.ndarray,
  level: float,
  smoothing: float = 0.0,
  portfolio: Sequence[float] = (),
  confidence: float = 0.95,
) -> Task:
  """Returns the task for given scenarios and historical returns; see `cvar`.

  Args:
    drawn: the returns [S, n] of the scenarios, as fractions.
    seen: the historical returns [T, n], as fractions.
    level: the level of the CVaR, in (0, 1).
    smoothing: the width of the smoothing, in percent; see `cvar`.
    portfolio: the weights [n] of a given portfolio; empty for none.
    confidence: the confidence level of the intervals, in (0, 1).
  """
  assets = drawn.shape[1]

  def project(params: Params) -> Params:
    return {**params, "weights": optax.projections.projection_simplex(params["weights"])}

  def init(key: Key) -> Params:
    del key
    return {"weights": jnp.full(assets, 1 / assets), "threshold": jnp.zeros(())}

  def objective(params: Params, batch: Batch, width: float) -> Array:
    x = batch["x"].astype(params["weights"].dtype)
    excess = -PERCENT * (x @ params["weights"]) - params["threshold"]
    over = jnp.maximum(excess, 0)
    if width:
      over = jnp.where(jnp.abs(excess) <= width, (excess + width) ** 2 / (4 * width), over)
    return params["threshold"] + sampling.mean(over, batch) / (1 - level)

  def loss(params: Params, batch: Batch, key: Key) -> Array:
    del key
    return objective(params, batch, smoothing)

  def evaluate(params: Params, batch: Batch) -> dict[str, Array]:
    return {"loss": objective(params, batch, 0.0)}

  def measure(params: Params) -> dict[str, Array]:
    w = params["weights"]
    losses = lambda weights: -jnp.asarray(seen, w.dtype) @ weights
    found = tail(losses(w), level, confidence)
    if portfolio:
      given = tail(losses(jnp.asarray(portfolio, w.dtype)), level, confidence)
      found |= {f"given_{key}": value for key, value in given.items()}
    return found

  train = {"x": drawn.astype(np.float32), "y": np.zeros(len(drawn), np.int8)}
  task = Task(init, loss, evaluate, sampling.epoch_sample, sampling.take, train)
  return task._replace(project=project, measure=measure, measured_on="historical", chunk=2**16)


def tail(losses: Array, level: float, confidence: float = 0.95) -> dict[str, Array]:
  """Computes the VaR and the CVaR of a sample of losses, with confidence intervals.

  The VaR is the order statistic of rank ceil(level T). Its interval is binomial: the ends are the
  order statistics z sqrt(T level (1 - level)) ranks away. The CVaR is the minimum of Rockafellar
  and Uryasev's objective, which is attained at the VaR. Its variance is that of the influence
  function, (var(losses | losses >= VaR) + level (CVaR - VaR)^2) / (T (1 - level)).

  Args:
    losses: the losses [T].
    level: the level of the VaR and the CVaR, in (0, 1).
    confidence: the confidence level of the intervals, in (0, 1).

  Returns:
    The scalars "var", "var_low", "var_high", "cvar", "cvar_low" and "cvar_high".

  Reference: Manistre, Hancock, 2005, Variance of the CTE estimator, North American Actuarial
    Journal 9; David, Nagaraja, 2003, Order statistics, section 7.1.
  """
  count = len(losses)
  z = NormalDist().inv_cdf((1 + confidence) / 2)
  rank = math.ceil(level * count - 1e-9)
  away = z * math.sqrt(count * level * (1 - level))
  ordered = jnp.sort(losses)
  at = lambda place: ordered[min(max(int(place), 1), count) - 1]
  value = at(rank)
  over = jnp.maximum(losses - value, 0)
  mean = value + jnp.mean(over) / (1 - level)
  worst = (losses >= value).astype(losses.dtype)
  center = jnp.sum(worst * losses) / jnp.sum(worst)
  spread = jnp.sum(worst * (losses - center) ** 2) / jnp.sum(worst)
  error = z * jnp.sqrt((spread + level * (mean - value) ** 2) / (count * (1 - level)))
  return {
    "var": value,
    "var_low": at(math.floor(rank - away)),
    "var_high": at(math.ceil(rank + away)),
    "cvar": mean,
    "cvar_low": mean - error,
    "cvar_high": mean + error,
  }


def load(name: str = "stocks", data_dir: str = "") -> np.ndarray:
  """Loads daily returns [T, n], p_t / p_{t-1} - 1, from days on which all stocks have both prices.

  The returns are sorted by date.

  Args:
    name: "stocks", or the path of a table of prices.
    data_dir: the folder to search first; see `files.find`.

  Raises:
    FileNotFoundError: if the published file is not found and cannot be downloaded.
    ValueError: if the file does not exist or is not a table of prices.
  """
  if name == "stocks":
    path = files.find("stocks/stock_prices.csv", data_dir, URL, SHA256)
  elif not (path := paths.local(name)).is_file():
    raise ValueError(f"{name!r} is neither a file nor 'stocks'")
  lines, prices = price_table.read(path)
  whole = np.atleast_1d(~np.isnan(prices).any(1))
  both = whole[1:] & whole[:-1]
  if both.sum() < 2:
    raise ValueError(f"{path} does not have three days on which all stocks have prices")
  with np.errstate(over="ignore"):
    returns = prices[1:] / prices[:-1] - 1
    large = np.flatnonzero(both & ~np.isfinite(returns.astype(np.float32)).all(1))
  if len(large):
    raise texts.at(path, int(lines[1 + large[0]]), "a return since the day before is not finite")
  return returns[both]
