"""Rounds of federated methods: so many passes of each client over its own examples."""

from collections.abc import Callable

from research.core.base import Aggregator
from research.core.method import Method
from research.methods.local import check_steps


def in_rounds(
  build: Callable[[Aggregator, float], Method], aggregator: Aggregator, epochs: int, period: int
) -> Method:
  """A method in rounds of `period` steps or, where that is 0, of `epochs` passes.

  Args:
    build: (aggregator, share of all clients that take part in a round) -> the method, whose steps
      do not depend on how many a round has.
    aggregator: the one that `over` wraps.
    epochs: E; until the executors know the steps of a pass, the method's period is 1.
    period: K, or 0.

  Raises:
    ValueError: if epochs < 1, period < 0, or both are set.
  """
  check_steps("epochs", epochs)
  check_steps("period", period, at_least=0)
  if period and epochs > 1:
    raise ValueError(f"epochs={epochs} and period={period}: a round has so many passes or steps")

  def rounds(aggregator: Aggregator, period: int, participation: float) -> Method:
    return build(aggregator, participation)._replace(
      period=period,
      over=lambda wrap: rounds(wrap(aggregator), period, participation),
      of_rounds=lambda period, participation: rounds(aggregator, period, participation),
      epochs=passes,
    )

  passes = 0 if period else epochs
  return rounds(aggregator, period or 1, 1.0)
