"""Rounds of federated methods: passes of each client over its own examples, or numbers of steps."""

from typing import ClassVar

from research.core import checks
from research.core.method import Method
from research.core.part import hidden


class ByPasses(Method):
  """A method in rounds of `period` steps or, where that is 0, of `epochs` passes.

  The executors fill in `steps` and `participation`: the steps of the owner that has most, and the
  share of all owners that takes part in a round.
  """

  epochs: ClassVar[int]
  period: ClassVar[int]
  steps: int = hidden(0)
  participation: float = hidden(1.0)

  def check(self):
    checks.at_least("epochs", self.epochs)
    checks.at_least("period", self.period, 0)
    if self.period and self.epochs > 1:
      raise ValueError(
        f"epochs={self.epochs} and period={self.period}: a round has so many passes or steps"
      )

  @property
  def local_steps(self):
    return self.steps or self.period or 1

  @property
  def later(self):
    return ()

  @property
  def passes(self):
    return 0 if self.period else self.epochs

  def in_rounds(self, steps, participation):
    return self.replace(steps=steps, participation=participation)
