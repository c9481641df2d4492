"""Evaluates drivers in closed loop, with confidence intervals."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from research.tasks.driving import episodes, recorded, scenarios
from research.tasks.driving.scene import Driver, features

RESAMPLES = 2000
_Z = 1.959964  # normal quantile of a two-sided 95% interval


class Interval(NamedTuple):
  """Contains a value and its 95% confidence interval."""

  value: float
  low: float
  high: float


def policy(model: Callable[[Any], Any]) -> Driver:
  """Returns the driver that takes the action with the highest output.

  Args:
    model: a function that maps scenes [b, 9, 10] to outputs [b, 5].
  """
  choose = jax.jit(lambda x: jnp.argmax(model(x[None])[0]))
  return lambda scene: int(choose(features(scene)))


def judge(
  driver: Driver,
  name: str,
  count: int,
  first: int = 0,
  told: Callable[[int], None] = lambda episodes: None,
) -> list[episodes.Outcome]:
  """Drives held-out episodes and returns their outcomes; no recording contains their seeds.

  Args:
    driver: the driver to evaluate.
    name: the scenario.
    count: the number of episodes.
    first: the number of the first episode; a number denotes the same episode for all drivers.
    told: a function that is called with 1 after each episode.
  """
  environment, found = scenarios.make(name), []
  for seed in range(recorded.HELD_OUT + first, recorded.HELD_OUT + first + count):
    found.append(episodes.drive(environment, name, seed, driver).outcome)
    told(1)
  return found


def measures(outcomes: Sequence[episodes.Outcome]) -> dict[str, Interval]:
  """Computes collisions per 100 km, speed (m/s), headway (s) and success rate, with intervals.

  The success rate has Wilson's interval. The other measures are ratios of sums over episodes, and
  their intervals are percentiles of a bootstrap over episodes. Two sets with the same number of
  episodes get the same resamples.

  Args:
    outcomes: the outcomes of one or more episodes.
  """
  crashed, success, metres, seconds, headway = np.array(outcomes, float).T
  near = np.isfinite(headway)
  ratios = {
    "collisions per 100 km": (1e5 * crashed, metres),
    "speed": (metres, seconds),
    "headway": (np.where(near, headway, 0), near.astype(float)),
  }
  found = {name: bootstrapped(*pair) for name, pair in ratios.items()}
  return found | {"success": wilson(int(success.sum()), len(success))}


def bootstrapped(above: np.ndarray, below: np.ndarray) -> Interval:
  """Computes the ratio of two sums over episodes, with a bootstrap confidence interval.

  The interval consists of percentiles over resampled episodes.

  Args:
    above: the numerators [n], one per episode.
    below: the denominators [n].

  Reference: Efron, 1979, Bootstrap methods: another look at the jackknife.
  """
  draws = np.random.default_rng(0).integers(0, len(above), (RESAMPLES, len(above)))
  sums = above[draws].sum(1), below[draws].sum(1)
  ratios = sums[0][sums[1] > 0] / sums[1][sums[1] > 0]
  if not len(ratios) or not below.sum():
    return Interval(np.nan, np.nan, np.nan)
  low, high = np.percentile(ratios, [2.5, 97.5])
  return Interval(float(above.sum() / below.sum()), float(low), float(high))


def wilson(successes: int, count: int) -> Interval:
  """Computes the success rate, with Wilson's score interval.

  Args:
    successes: the number of successes.
    count: the number of trials, above 0.

  Reference: Wilson, 1927, Probable inference, the law of succession, and statistical inference.
  """
  share, weight = successes / count, _Z**2 / count
  middle = (share + weight / 2) / (1 + weight)
  half = _Z * np.sqrt(share * (1 - share) / count + weight / (4 * count)) / (1 + weight)
  return Interval(share, float(middle - half), float(middle + half))


def together(found: Iterable[Sequence[episodes.Outcome]]) -> list[episodes.Outcome]:
  """Joins the outcomes of several scenarios."""
  return [outcome for outcomes in found for outcome in outcomes]
