"""Streaming DiLoCo: synchronises the model in fragments while the workers keep computing."""

from dataclasses import KW_ONLY
from functools import cached_property

import optax

from research.core import checks
from research.core.base import Aggregator
from research.core.method import COMMON_MODEL, Method
from research.methods.diloco import DiLoCo
from research.methods.overlapping import Overlapping


class StreamingDiLoCo(Overlapping, name="streaming_diloco"):
  """DiLoCo over fragments of the model, with staggered and overlapped exchanges.

  Fragment p in [P] is synchronised every H steps, at t = (p + 1) H / P, (p + 1) H / P + H, ...:

      theta_t^i = theta_{t-1}^i + inner(grad f_i(theta_{t-1}^i))
      Delta_p = aggregate_i(weight_i (theta_p - theta_{t,p}^i))
      theta_p <- theta_p + outer(Delta_p)

  The workers receive the updated fragment tau steps later, after their inner step:

      theta_{t+tau,p}^i <- alpha theta_{t+tau,p}^i + (1 - alpha) theta_p

  This is `late(diloco(...), delay, fragments=P, mixing=alpha)`. A round consists of the H / P steps
  from one exchange to the next; each exchange sends one fragment. Fragments are sets of layers of
  about equal size; see `fragments_of`. The deployed model is theta, with each fragment as of its
  last exchange. The aggregator decides the precision on the wire: the paper's 4 bits are
  `error_feedback(two_phase(int4()))`. With one fragment, no delay and no mixing, the method is
  DiLoCo.

  Args:
    inner: each worker's optimizer; its state is private.
    outer: the optimizer of the common model, with a separate state for each fragment.
    aggregator: combines the workers' outer gradients, with a separate state for each fragment.
    period: H, number of steps between two exchanges of a fragment.
    fragments: P, number of fragments.
    delay: tau, number of steps that an exchange may take; 0 disables overlap.
    mixing: alpha, weight of the worker's own fragment; 0 replaces the worker's fragment by the
      common fragment.

  Raises:
    ValueError: if period or fragments < 1, period is not a multiple of fragments, delay is outside
      [0, period), or mixing is outside [0, 1]; at trace time, if the model cannot be cut into that
      many fragments.

  Reference: Douillard et al. 2025, arXiv 2501.18512, algorithm 2.
  """

  inner: optax.GradientTransformation
  outer: optax.GradientTransformation
  aggregator: Aggregator
  _: KW_ONLY
  period: int = 100
  fragments: int = 2
  delay: int = 1
  mixing: float = 0.5

  refuses = COMMON_MODEL

  def check(self):
    checks.at_least("period", self.period)
    super().check()

  @cached_property
  def method(self) -> Method:
    """The inner method, DiLoCo, which synchronises each fragment."""
    return DiLoCo(self.inner, self.outer, self.aggregator, period=self.period)


streaming_diloco = StreamingDiLoCo
