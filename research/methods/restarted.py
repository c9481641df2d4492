"""Re-initializes the workers' optimizers at the start of every round."""

from typing import NamedTuple

from research.core.method import Method
from research.methods._around import Around
from research.methods._steps import LocalStepping


class RestartedState(NamedTuple):
  inner: NamedTuple  # state of the inner method


class Restarted(Around, name="restarted"):
  """Runs the inner method and re-initializes the workers' optimizers after every round.

      m_{t,0}^i = 0   in place of   m_{t,0}^i = m_{t-1,H}^i

  The same holds for the second moment and the step count, so a learning rate schedule restarts too.
  A worker's momentum, which is computed from its own examples, then does not drive the next round
  away from the common model. Local SGD becomes federated averaging with full participation, and
  SlowMo uses the first of its paper's three strategies for the base optimizer's buffers.

  Args:
    inner: a method that keeps workers' optimizers from round to round, such as `local_sgd`,
      `slow_mo` or `diloco`.

  Raises:
    ValueError: if `inner` keeps no workers' optimizers from round to round.

  Reference: Wang, Tantia, Ballas, Rabbat 2020, arXiv 1910.00643, algorithm 1, line 2 (reset).
  """

  inner: Method

  def check(self):
    carries = isinstance(self.inner, LocalStepping)
    if not carries or type(self.inner).begin is not LocalStepping.begin:
      raise ValueError(
        "restarted is for methods that carry workers' optimizers from round to round, such as "
        "local_sgd, slow_mo and diloco"
      )

  def init(self, params):
    return RestartedState(self.inner.init(params))

  def finished(self, after, local, state, *, key, presence):
    del local, key, presence
    fresh = self.inner.init(self.inner.params(after)).inner
    return state._replace(inner=after._replace(inner=fresh))


restarted = Restarted
