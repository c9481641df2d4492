"""Sets the length of a federated round: a number of local steps, or of passes over examples."""

from typing import ClassVar

from research.core import checks
from research.core.method import Method
from research.core.part import hidden


class ByPasses(Method):
  """Makes each round last `period` steps or, if `period` is 0, `epochs` passes.

  The executors set `steps`, the number of steps of the owner with the most examples, and
  `participation`, the fraction of owners in a round.
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
        f"epochs={self.epochs} and period={self.period}: a round has passes or steps, not both"
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
