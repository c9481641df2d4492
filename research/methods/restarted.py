"""Methods of local steps whose workers' optimizers start anew in every round."""

from research.core.method import Method
from research.methods.local import begin


def restarted(inner: Method) -> Method:
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
  if inner.begin is not begin:
    raise ValueError(
      "restarted is for methods that carry workers' optimizers from round to round, such as "
      "local_sgd, slow_mo and diloco"
    )

  def sync(local, state, *, key, weight=1.0, active=True):
    after = inner.sync(local, state, key=key, weight=weight, active=active)
    return after._replace(inner=inner.init(inner.params(after)).inner)

  inner_over, inner_of, inner_onto = inner.over, inner.of_rounds, inner.onto
  return inner._replace(
    sync=sync,
    over=inner_over and (lambda wrap: restarted(inner_over(wrap))),
    of_rounds=inner_of and (lambda *rounds: restarted(inner_of(*rounds))),
    onto=inner_onto and (lambda project: restarted(inner_onto(project))),
    served=None,
  )
