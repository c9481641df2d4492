"""Late exchanges: workers receive the result of an exchange after further local steps."""

from research.core.method import Method
from research.methods.overlapping import Overlapping


class Late(Overlapping, name="late"):
  """Runs a method whose exchange takes tau local steps, during which the workers keep computing.

  A round has h local steps. Round t ends at step t h; at this step, the exchange of the messages
  m_t^i starts. The models of the workers are x^i, the models at the start of exchange t are u_t^i,
  and theta is the inner method's model. Messages m_t^i are measured from u_{t-1}^i, the model at
  the start of the worker's previous exchange:

      theta_t = receive(aggregate_i(m_t^i), theta_{t-1})
      x^i <- theta_t + (x^i - u_t^i)                       tau steps after the end of round t

  This update keeps the steps that the worker has taken since exchange t started. It also moves
  u_t^i, and the u^i of later exchanges, by the same amount as x^i. With `mixing`, messages are
  measured from theta instead, and the worker's model is averaged with theta_t:

      x^i <- alpha x^i + (1 - alpha) theta_t

  With tau = 0, the method equals the inner method. If tau is at least one round, the next exchange
  starts before the result of the previous exchange is received. With P fragments, each exchange
  sends one fragment, each fragment is exchanged once per period of the inner method, and a round
  consists of the H / P steps from one exchange to the next. See `fragments_of` for how a model is
  cut. The deployed model is theta with all exchanges received.

  The executors `simulate`, `spmd` and `pmap` compute the exchange at the end of its round and hold
  the result back. The executor `overlapped` runs the exchange while the workers compute. On CPUs,
  overlap with a period of one gains nothing: the exchange of a gradient uses more processor time
  than overlap saves.

  Args:
    inner: a method with one exchange per round.
    delay: tau, the number of local steps that an exchange may take.
    fragments: P, the number of fragments; P > 1 requires a method whose workers keep an optimizer.
    mixing: alpha, the weight of the worker's own model; None keeps the steps taken during the
      exchange.

  Raises:
    ValueError: if the inner method does not have one exchange per round, its period is not a
      multiple of the number of fragments, or the delay is at least one period although there are
      several fragments or mixing.

  Reference: Wang et al. 2020, arXiv 2002.09539 (overlapped local SGD); Douillard et al. 2025, arXiv
    2501.18512 (fragments and mixing).
  """

  inner: Method
  delay: int
  fragments: int = 1
  mixing: float | None = None


late = Late
