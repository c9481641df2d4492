"""DeMo: workers keep their momenta private and send only the largest components."""

from collections.abc import Mapping
from dataclasses import KW_ONLY
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from research.aggregate import composition
from research.aggregate.dct_mean import DCTMean
from research.aggregate.presence import kept, unweighted, weighted
from research.core import checks
from research.core.base import EVERYONE, Aggregator, Array, Params, State, Trait, Tree
from research.core.method import COMMON_MODEL
from research.methods._steps import OneGradient, check_rate, decayed, moved, rate_at


class DeMoState(NamedTuple):
  params: Params  # theta_t
  momentum: Tree  # m_t of this worker
  link: State  # state of the aggregator
  count: Array  # int32, t


class DeMo(OneGradient, name="demo"):
  """Decoupled momentum: each worker sends its momentum's largest components and subtracts them.

      m_{t+1/2}^i = beta m_t^i + weight_i grad f_i(theta_t)
      q_t^i = sent part of m_{t+1/2}^i,   m_{t+1}^i = m_{t+1/2}^i - q_t^i
      theta_{t+1} = theta_t - eta_t (sign(1/W sum_i q_t^i) + lambda theta_t),   sign(0) = 0

  The aggregator chooses the components: `gather_mean(dct_top_k(64, 8))` sends the largest cosine
  coefficients of each block, and averages over all workers, as in the paper. The authors' code
  divides each coefficient by the number of workers that sent it, as `dct_mean(64, 8)` does; for
  values of one bit, use `dct_mean(64, 8, one_bit=True)`.

  With `lookahead`, gradients are taken at theta_t - eta_{t-1} sign(m_t^i), the model that would
  result if the worker's unsent momentum were applied. This point differs between workers.

  Args:
    learning_rate: eta, a constant or a schedule over rounds; without weight decay, each parameter
      changes by eta or not at all.
    aggregator: selects the components to send, and averages the selected components.
    decay: beta, decay of the momentum, in [0, 1).
    weight_decay: lambda, at least 0; the authors' code has weight decay, but the paper's algorithm
      does not.
    lookahead: whether to take gradients at the model after a step along the unsent momentum.

  Raises:
    ValueError: if an argument is out of range, or the aggregator is incompatible.

  Reference: Peng, Quesnelle, Kingma 2024, arXiv 2411.19870, algorithm 1, the variant with signs;
    lookahead: the code of Psyche.
  """

  learning_rate: float | optax.Schedule
  aggregator: Aggregator
  _: KW_ONLY
  decay: float = 0.999
  weight_decay: float = 0.0
  lookahead: bool = False

  refuses: ClassVar[Mapping[Trait, str]] = {
    trait: why
    for trait, why in (COMMON_MODEL | composition.MEMORY | composition.BOUNDED).items()
    if trait != Trait.SELECTS
  }

  def check(self):
    check_rate(self.learning_rate)
    checks.in_range("decay", self.decay, "[0, 1)")
    checks.at_least("weight_decay", self.weight_decay, 0)

  def __post_init__(self):
    super().__post_init__()
    if Trait.SELECTS in self.aggregator.traits and not [*self.aggregator.parts(DCTMean)]:
      reason = composition.MEMORY[Trait.SELECTS]
      raise ValueError(f"demo cannot be combined with this aggregator (selects): {reason}")

  def init(self, params):
    zeros = optax.tree.zeros_like(params)
    return DeMoState(params, zeros, self.aggregator.init(params), jnp.zeros((), jnp.int32))

  def begin(self, state):
    local = super().begin(state)
    if not self.lookahead:
      return local
    rate = rate_at(self.learning_rate, jnp.maximum(state.count - 1, 0))
    return local._replace(params=moved(local.params, rate, jax.tree.map(jnp.sign, state.momentum)))

  def message(self, local, state, *, key, presence=EVERYONE):
    del key
    grads = weighted(local.grads, presence)
    momentum = jax.tree.map(lambda m, g: self.decay * m + g, state.momentum, grads)
    own = kept(presence.active, momentum, state.momentum)
    return momentum, state._replace(momentum=own)

  def receive(self, value, sent, state, *, key, presence=EVERYONE):
    del key
    left = optax.tree.sub(state.momentum, sent)
    own = kept(presence.active, left, state.momentum)
    direction = decayed(jax.tree.map(jnp.sign, value), self.weight_decay, state.params)
    params = moved(state.params, rate_at(self.learning_rate, state.count), direction)
    return state._replace(params=params, momentum=own, count=state.count + 1)

  def counted(self, presence):
    return unweighted(presence)


demo = DeMo
