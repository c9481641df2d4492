"""NoLoCo: local steps, then a momentum step of each worker that averages with few other workers."""

from collections.abc import Mapping
from dataclasses import KW_ONLY
from typing import ClassVar, NamedTuple

import jax
import optax

from research.aggregate.presence import alike, kept, weighted
from research.core import checks
from research.core.base import EVERYONE, Aggregator, Params, State, Trait, Tree
from research.core.method import Period
from research.methods._steps import LocalStepping
from research.methods.decentralized import AMONG_NEIGHBOURS


class NoLoCoState(NamedTuple):
  params: Params  # phi_t^i, slow weights of this worker
  momentum: Tree  # delta_t^i of this worker
  inner: State  # state of its optimizer
  link: State  # state of the aggregator


class NoLoCo(LocalStepping, name="noloco"):
  """Low-communication training without collectives: each round averages random pairs of workers.

      theta_{t,0}^i = phi_t^i,   theta_{t,h+1}^i = theta_{t,h}^i + inner(grad f_i(theta_{t,h}^i))
      Delta_t^i = weight_i (theta_{t,H}^i - phi_t^i)
      D_t^i = aggregate_i(Delta_t),   P_t^i = aggregate_i(phi_t)
      delta_{t+1}^i = alpha delta_t^i + beta D_t^i + gamma (P_t^i - phi_t^i)
      phi_{t+1}^i = phi_t^i + delta_{t+1}^i

  With `gossip(random_pairs())`, D and P are means over two workers, and each worker sends two trees
  to one other worker per round, however many workers there are. Any other graph also works. The
  mean of the workers' models, which is deployed, follows local SGD with slow momentum alpha and
  slow learning rate beta. With `mean()`, all models are equal, and the method is local SGD with
  slow momentum. The deviations from the mean contract in mean square for 0 < gamma < 2 (1 -
  alpha^2). This condition follows from the second moments of (phi, delta) for random pairs of many
  workers.

  Args:
    inner: each worker's optimizer; its state is private.
    aggregator: averages changes and models among workers, such as `gossip(random_pairs())`.
    period: H, number of local steps per round, or a schedule [[first round, H], ...].
    slow_momentum: alpha, in [0, 1).
    slow_learning_rate: beta, the factor of the averaged changes.
    consensus: gamma, the strength with which a worker's slow weights are pulled towards the slow
      weights that it receives; above 0 and below 2 (1 - alpha^2). The authors use gamma = beta.

  Raises:
    ValueError: if a number is out of range, or the aggregator is incompatible.

  Reference: Kolehmainen et al. 2025, arXiv 2506.10911.
  """

  inner: optax.GradientTransformation
  aggregator: Aggregator
  _: KW_ONLY
  period: Period = 50
  slow_momentum: float = 0.5
  slow_learning_rate: float = 0.7
  consensus: float = 0.7

  refuses: ClassVar[Mapping[Trait, str]] = AMONG_NEIGHBOURS | {
    Trait.MEMORY: "a memory would mix models with changes of models",
    Trait.VOTE: "signs cannot replace a model",
  }

  def check(self):
    checks.in_range("slow_momentum", self.slow_momentum, "[0, 1)")
    checks.above("slow_learning_rate", self.slow_learning_rate)
    checks.above("consensus", self.consensus)
    limit = 2 * (1 - self.slow_momentum**2)
    if self.consensus >= limit:
      raise ValueError(
        f"consensus={self.consensus} is not below 2 (1 - slow_momentum^2) = {limit:.4g}; the "
        "workers' models would drift apart"
      )

  def init(self, params):
    zeros, link = optax.tree.zeros_like(params), self.aggregator.init((params, params))
    return NoLoCoState(params, zeros, self.inner.init(params), link)

  def message(self, local, state, *, key, presence=EVERYONE):
    del key
    change = weighted(optax.tree.sub(local.params, state.params), presence)
    own = kept(presence.active, local.inner, state.inner)
    return (change, state.params), state._replace(inner=own)

  def receive(self, value, sent, state, *, key, presence=EVERYONE):
    del sent, key
    move = lambda m, change, near, x: (
      self.slow_momentum * m + self.slow_learning_rate * change + self.consensus * (near - x)
    ).astype(m.dtype)
    momentum = jax.tree.map(move, state.momentum, *value, state.params)
    new = optax.tree.add(state.params, momentum), momentum
    params, momentum = kept(presence.active, new, (state.params, state.momentum))
    return state._replace(params=params, momentum=momentum)

  def counted(self, presence):
    return alike(presence.active)


noloco = NoLoCo
