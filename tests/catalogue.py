"""Every name that specs may use, in specs: each contract test runs over all of its kind.

What each compressor promises stands in promises.py.

`drifting` and `residual` exist only here: a method whose models differ between workers and an
aggregator with private memory, so that private state is tested before the first published ones.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import optax
from promises import COMPRESSORS

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
  "desloc": "desloc(adam(0.02), mean(), period=3, moments={'mu': 6, 'nu': 3})",
  "slow_mo": "slow_mo(sgd(0.1, momentum=0.9), mean(), period=3)",
  "restarted": "restarted(local_sgd(sgd(0.1, momentum=0.9), mean(), period=3))",
  "easgd": "easgd(sgd(0.1, momentum=0.9), mean(), period=3)",
  "eamsgd": "eamsgd(0.02, mean(), momentum=0.9, period=3)",
  "diloco": "diloco(adam(0.01), sgd(0.7, momentum=0.9, nesterov=True), mean(), period=3)",
  "streaming_diloco": "streaming_diloco(adam(0.01), sgd(0.7, momentum=0.9), mean(), period=6, "
  "fragments=2)",
  "eager_diloco": "eager_diloco(adam(0.01), sgd(0.7, momentum=0.9), mean(), period=3)",
  "overlap_local_sgd": "overlap_local_sgd(sgd(0.1, momentum=0.9), mean(), period=3)",
  "late": "late(diloco(adam(0.01), sgd(0.7), error_feedback(two_phase(int8())), period=3), 2)",
  "fed_avg": "fed_avg(sgd(0.1), error_feedback(gather_mean(int8())), period=3)",
  "fed_prox": "fed_prox(sgd(0.1), mean(), period=3)",
  "fed_opt": "fed_opt(sgd(0.1), adam(0.1), mean(), period=3)",
  "fed_adam": "fed_adam(sgd(0.1), mean(), period=3)",
  "fed_yogi": "fed_yogi(sgd(0.1), mean(), period=3)",
  "fed_adagrad": "fed_adagrad(sgd(0.1), mean(), period=3)",
  "scaffold": "scaffold(0.1, mean(), period=3)",
  "consensus_admm": "consensus_admm(0.1, mean(), period=3)",
  "sparta": "sparta(sgd(0.1, momentum=0.9), sum_mean(random_k(0.3)))",
  "sparta_diloco": "sparta_diloco(adam(0.01), sgd(0.7, momentum=0.9), shuffled(0.3), mean(), "
  "outer_period=2)",
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
  "dion": "dion(0.02, adamw(0.01), mean())",
  "dion2": "dion2(0.02, adamw(0.01), mean())",
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
  "noloco": "noloco(sgd(0.1), gossip(random_pairs()), period=3)",
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


# ---- aggregators

# Each of these runs in every execution, hence few of them and none that only repeats another.
EXCHANGES = {
  "mean": "mean()",
  "vote": "majority_vote()",
  "feedback_sum": "error_feedback(sum_mean(random_k(0.3)))",
  "dct_mean": "dct_mean(2, 2)",
  "partitioned": "error_feedback(partitioned(0.3))",
  "shuffled": "shuffled(0.3)",
  "feedback_two_phase": "error_feedback(two_phase(int8()))",
  "feedback_power_sgd": "error_feedback(power_sgd(1))",
  "loco": "loco(two_phase(sign()), reset=3)",
  "ef21": "ef21(gather_mean(sign()))",
  "diana": "diana(gather_mean(natural()), alpha=0.5)",
  "momentum": "momentum_correction(gather_mean(top_k(0.2)), clip_norm=1.0)",
  "worker_momentum": "worker_momentum(krum(0), momentum=0.5)",
  "only_large": "error_feedback(only_large(gather_mean(sign()), min_size=9))",
  "bucketed": "error_feedback(bucketed(two_phase(sign())))",
  "warm_up": "error_feedback(warm_up(two_phase(int8()), steps=2, stages=[mean(), power_sgd(1)]))",
  "geometric_median": "geometric_median(iterations=2)",
  "centered_clip": "centered_clip(0.5)",
  "edit_penalty": "edit_penalty(error_feedback(two_phase(sign())), warm_up=1, threshold=0.5)",
  "sign_flip": "sign_flip(error_feedback(gather_mean(sign())), faulty=1)",
  "gaussian": "gaussian(median(), faulty=1, deviation=1.0)",
  "a_little_is_enough": "a_little_is_enough(trimmed_mean(0.25), faulty=1)",
  "inner_product": "inner_product(multi_krum(0, 2), faulty=1, scale=0.5)",
  "noisy": "noisy(mean(), clip=1.0, noise=0.1)",
  "secure_sum": "secure_sum(clip=8.0, threshold=0.5, dropout=0.2)",
}
SLICED_EXCHANGES = {
  "hierarchical_mean": "hierarchical_mean()",
  "hierarchical": "error_feedback(hierarchical(two_phase(sign(), axis='slice')))",
  "hierarchical_ef21": "ef21(hierarchical(gather_mean(sign(), axis='slice')))",
  "two_axes": "error_feedback(two_phase(int8()))",
}
# What wrappers are put around besides: pieces without a wrapper of their own.
PIECES = {
  "gather": "gather_mean(sign())",
  "expansive": "gather_mean(terngrad())",
  "sparse": "gather_mean(top_k(0.2))",
  "senders": "gather_mean(top_k(0.2), over='senders')",
  "sum": "sum_mean(random_k(0.5))",
  "two_phase": "two_phase(int8())",
  "power_sgd": "power_sgd(1)",
  "attacked": "gaussian(mean(), faulty=1, deviation=1.0)",
  "gossip": "gossip(ring())",
  "push_sum": "push_sum(exponential())",
  "choco": "choco(int8(), ring(), gamma=0.5)",
  "q1_gossip": "q1_gossip(int8(), ring())",
  "q2_gossip": "q2_gossip(int8(), ring())",
  "median": "median()",
  "trimmed_mean": "trimmed_mean(0.25)",
  "multi_krum": "multi_krum(0, 2)",
}

# ---- the other kinds: each name once

OTHERS = {
  "optimizer": ("muon(0.02)", "muon_bp(0.02, period=3)"),
  "topology": (
    *("ring()", "torus()", "complete()", "star()", "exponential()", "one_peer_exponential()"),
    "random_pairs()",
    "weights([[0.75, 0.25], [0.25, 0.75]])",
  ),
  "delays": (
    *("constant(2)", "uniform(3)", "geometric(1.5, bound=4)", "per_worker([0, 2])"),
    *("by_coordinate(3)", "last_pull()"),
  ),
  "speeds": (
    *("steady(1.0, slowdown={0: 4})", "exponential(1.0)", "lognormal(1.0, 0.5)"),
    "measured([[1.0, 2.0], [2.0, 1.0]])",
  ),
  "network": ("internet(['eastus', 'japaneast'], churn=on_off(3600, 600), scale=10.0)",),
  "churn": ("always()", "on_off(3600, 600)", "recorded('presence.csv')"),
  "partition": (
    *("iid()", "in_order()", "sorted()", "dirichlet(0.3)", "shards(2)", "by_owner()"),
    "by_scaffold()",
  ),
  "model": (
    "linear()",
    "logistic()",
    "mlp(hidden=[8])",
    "cnn()",
    "resnet()",
    "transformer('tiny')",
    "ego_attention(width=8)",
    "graph_network(8, layers=1)",
  ),
  "task": (
    *("digits()", "mnist()", "least_squares()", "libsvm('a9a')", "tinyshakespeare()"),
    *("text('PATH')", "mean_estimation()", "random_tokens()", "client_drift()"),
    *("rare_large_gradient()", "narrow_valley()", "rosenbrock()", "skewed_noise()"),
    *("stream('PATH')", "pagerank()", "rank()", "bm25()", "cranfield()", "frontier('port1')"),
    *("cvar()", "breast_cancer()", "diabetes()", "movielens()", "movielens_als()"),
    *("movielens_federated()", "movielens_implicit()", "movielens_implicit_federated()"),
    *("movielens_bpr()", "driving('PATH')"),
    "molecules('esol')",
  ),
}
# All specs by kind.
ALL = {
  "compressor": (*COMPRESSORS,),
  "aggregator": (*EXCHANGES.values(), *SLICED_EXCHANGES.values(), *PIECES.values()),
  "method": (*SPECS.values(),),
  **OTHERS,
}


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
