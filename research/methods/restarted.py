"""Methods of local steps whose workers' optimizers start anew in every round."""

from typing import NamedTuple

from research.core.method import Method
from research.methods._around import Around
from research.methods._steps import LocalStepping


class RestartedState(NamedTuple):
  inner: NamedTuple  # of the inner method


class Restarted(Around, name="restarted"):
  """The inner method, where nothing of a worker's optimizer outlives a round.

      m_{t,0}^i = 0   in place of   m_{t,0}^i = m_{t-1,H}^i

  for its momentum, its second moment and its count of steps, with which a schedule begins anew too.
  What a worker's momentum has of its own examples does then not go on against the common model.
  Local SGD is so federated averaging of everybody, and SlowMo has the first of its paper's three
  strategies for the buffers of the base optimizer.

  Args:
    inner: a method that carries workers' optimizers from round to round, such as `local_sgd`,
      `slow_mo` or `diloco`.

  Raises:
    ValueError: if it is none.

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
