"""Every method of the codebase, as specs: each contract test runs over all of them.

`drifting` and `residual` exist only here: a method whose models differ between workers and an
aggregator with private memory, so that private state is tested before the first published ones.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import optax

from research.aggregate.mean import mean
from research.aggregate.presence import kept, unweighted, weighted
from research.core import registry
from research.core.base import EVERYONE, Aggregate, Aggregator, Params, State
from research.core.method import Method
from research.methods.data_parallel import data_parallel

# Synchronous data parallelism: with `mean()` these are the optimizer on all examples.
SYNCHRONOUS = {
  "sgd": "data_parallel(sgd(0.1), mean())",
  "momentum": "data_parallel(sgd(0.1, momentum=0.9), mean())",
  "adam": "data_parallel(adam(0.01), mean())",
  "chain": "data_parallel(chain(clip_by_global_norm(0.1), "
  "adamw(cosine_decay_schedule(0.01, 30))), mean())",
  "accumulation": "data_parallel(sgd(0.1, momentum=0.9), mean(), period=3)",
  "averaged": "averaged(data_parallel(sgd(0.1), mean()), burn_in=2)",
  "top_k": "data_parallel(sgd(0.1), error_feedback(gather_mean(top_k(0.3))))",
  "two_phase": "data_parallel(adam(0.01), error_feedback(two_phase(int8())))",
}
FLAT = SYNCHRONOUS | {
  "local_sgd": "local_sgd(sgd(0.1, momentum=0.9), error_feedback(gather_mean(int8())), period=3)",
  "post_local_sgd": "post_local_sgd(sgd(0.1, momentum=0.9), mean(), period=2, switch=2)",
  "slow_mo": "slow_mo(sgd(0.1, momentum=0.9), mean(), period=3)",
  "restarted": "restarted(local_sgd(sgd(0.1, momentum=0.9), mean(), period=3))",
  "easgd": "easgd(sgd(0.1, momentum=0.9), mean(), period=3)",
  "eamsgd": "eamsgd(0.02, mean(), momentum=0.9, period=3)",
  "diloco": "diloco(adam(0.01), sgd(0.7, momentum=0.9, nesterov=True), mean(), period=3)",
  "streaming_diloco": "streaming_diloco(adam(0.01), sgd(0.7, momentum=0.9), mean(), period=6, "
  "fragments=2)",
  "fed_avg": "fed_avg(sgd(0.1), error_feedback(gather_mean(top_k(0.3))), period=3)",
  "fed_prox": "fed_prox(sgd(0.1), mean(), period=3)",
  "fed_opt": "fed_opt(sgd(0.1), adam(0.1), mean(), period=3)",
  "fed_adam": "fed_adam(sgd(0.1), mean(), period=3)",
  "fed_yogi": "fed_yogi(sgd(0.1), mean(), period=3)",
  "fed_adagrad": "fed_adagrad(sgd(0.1), mean(), period=3)",
  "scaffold": "scaffold(0.1, mean(), period=3)",
  "consensus_admm": "consensus_admm(0.1, mean(), period=3)",
  "sparta": "sparta(sgd(0.1, momentum=0.9), sum_mean(random_k(0.3)))",
  "d_psgd": "d_psgd(sgd(0.1, momentum=0.9), mean())",
  "dgd": "dgd(0.05, mean())",
  "gradient_tracking": "gradient_tracking(0.05, mean())",
  "extra": "extra(0.05, mean())",
  "admm": "admm(0.05, mean())",
  "signum": "signum(0.01, mean())",
  "signum_vote": "signum(0.01, majority_vote())",
  "onebit_adam": "onebit_adam(0.01, error_feedback(two_phase(int8())), warm_up=2)",
  "zero_one_adam": "zero_one_adam(0.01, error_feedback(gather_mean(int8())), warm_up=2, "
  "double_every=1, longest=2)",
  "demo": "demo(0.01, gather_mean(dct_top_k(2, 2)))",
  "marina": "marina(0.1, gather_mean(int8()), probability=0.3)",
  "delayed": "delayed(data_parallel(sgd(0.05), mean()), constant(2))",
  "staleness_aware": "staleness_aware(data_parallel(sgd(0.05), mean()), constant(2))",
  "dc_asgd": "dc_asgd(0.05, mean(), constant(2))",
  "dc_asgd_constant": "dc_asgd_constant(0.05, mean(), constant(2))",
  "asgd": "asgd(sgd(0.05), mean())",
}
# The same on graphs of neighbours, who must all be there.
GRAPHS = {
  "d_psgd_choco": "d_psgd(sgd(0.1), choco(int8(), ring(), gamma=0.5))",
  "sgp": "sgp(sgd(0.1, momentum=0.5), one_peer_exponential())",
  "dgd_torus": "dgd(0.05, gossip(torus()))",
  "gradient_tracking_ring": "gradient_tracking(0.05, gossip(ring()))",
  "extra_ring": "extra(0.05, gossip(ring()))",
  "admm_ring": "admm(0.05, gossip(ring()))",
}
# With delays of each worker's own.
DRAWN = {
  "delayed_uniform": "delayed(data_parallel(sgd(0.05), mean()), uniform(3))",
  "delayed_per_worker": "staleness_aware(data_parallel(sgd(0.05), mean()), per_worker([0, 2]))",
  "hogwild": "hogwild(0.005, mean(), bound=3)",
}
# Those that take slices of workers.
SLICED = {
  "hierarchical_local_sgd": "hierarchical_local_sgd(sgd(0.1, momentum=0.9), mean(axis='data'), "
  "mean(axis='slice'), inner_period=3, outer_period=2)",
}
SPECS = FLAT | GRAPHS | DRAWN | SLICED
# Those that take signs: a sum near zero may have another one in another order.
SIGNS = ("signum", "signum_vote", "demo")


class DriftingState(NamedTuple):
  params: Params
  inner: State


class DriftingLocal(NamedTuple):
  params: Params
  inner: State


class Drifting(Method, name="drifting"):
  """Workers that never talk: their parameters and momenta are private."""

  learning_rate: float
  period: int = 2

  @property
  def optimizer(self) -> optax.GradientTransformation:
    return optax.sgd(self.learning_rate, momentum=0.9)

  def init(self, params):
    return DriftingState(params, self.optimizer.init(params))

  def begin(self, state):
    return DriftingLocal(state.params, state.inner)

  def step(self, grads, local, state, *, key, grad_fn=None):
    del state, key, grad_fn
    updates, inner = self.optimizer.update(grads, local.inner, local.params)
    return DriftingLocal(optax.apply_updates(local.params, updates), inner)

  def sync(self, local, state, *, key, presence=EVERYONE):
    del key
    return kept(presence.active, DriftingState(local.params, local.inner), state)


drifting = Drifting


class Residual(Aggregator, name="residual"):
  """Sends a part of each value and keeps the rest: shared result, private memory."""

  fraction: float

  def init(self, params):
    return optax.tree.zeros_like(params)

  def aggregate(self, tree, state, key, presence=EVERYONE):
    corrected = optax.tree.add(weighted(tree, presence), state)
    sent = jax.tree.map(lambda x: self.fraction * x, corrected)
    value, sent, _ = mean().aggregate(sent, (), key, unweighted(presence))
    memory = optax.tree.sub(corrected, sent)
    return Aggregate(value, sent, kept(presence.active, memory, state))


residual = Residual


def methods() -> dict[str, Method]:
  built = {name: registry.build("method", spec) for name, spec in SPECS.items()}
  built["drifting"] = drifting(0.05)
  built["residual"] = data_parallel(optax.sgd(0.1), residual(0.6))
  return built


METHODS = methods()
NAMES = [name for name in METHODS if name not in SLICED]
BASIC = [*SYNCHRONOUS, "drifting", "residual"]
EXACT = [name for name, spec in SYNCHRONOUS.items() if ", mean()" in spec]


def by_period(names: Sequence[str] = NAMES) -> dict[int, tuple[str, ...]]:
  """The names by the steps of a round: such methods run side by side, in one program."""
  periods = sorted({METHODS[name].local_steps for name in names})
  return {p: tuple(name for name in names if METHODS[name].local_steps == p) for p in periods}
