"""The example of each registered name, in the order of the catalogue; all examples are built."""

import functools
from typing import Any

from research.core import registry

# Kind -> heading -> names.
GROUPS: dict[str, dict[str, tuple[str, ...]]] = {
  "compressor": {
    "Number formats": ("identity", "bf16", "fp8", "natural"),
    "Quantization": ("int8", "int4", "qsgd", "terngrad", "statistical", "sign"),
    "Sparsification": ("top_k", "block_top_k", "random_k", "threshold", "dct_top_k"),
    "Sketches and rotations": ("count_sketch", "hadamard", "seeded"),
  },
  "aggregator": {
    "Averages": (
      *("mean", "hierarchical_mean", "gather_mean", "sum_mean", "two_phase", "majority_vote"),
      *("dct_mean", "shuffled", "partitioned", "power_sgd"),
    ),
    "Memories": (
      *("error_feedback", "loco", "ef21", "diana", "momentum_correction", "worker_momentum"),
    ),
    "Policies": ("only_large", "bucketed", "warm_up", "hierarchical"),
    "Robust rules": (
      *("median", "trimmed_mean", "krum", "multi_krum", "geometric_median", "centered_clip"),
      "edit_penalty",
    ),
    "Neighbours in a graph": ("gossip", "push_sum", "choco", "q1_gossip", "q2_gossip"),
    "Privacy": ("noisy", "secure_sum"),
    "Attacks, for studies": ("sign_flip", "gaussian", "a_little_is_enough", "inner_product"),
  },
  "method": {
    "Synchronous": ("data_parallel", "averaged", "dion2"),
    "Local updates": (
      *("local_sgd", "post_local_sgd", "hierarchical_local_sgd", "slow_mo", "restarted"),
      *("easgd", "eamsgd", "diloco", "sparta", "sparta_diloco", "desloc"),
    ),
    "Late exchanges": (*("late", "streaming_diloco", "eager_diloco", "overlap_local_sgd"),),
    "Federated": (
      *("fed_avg", "fed_prox", "fed_opt", "fed_adam", "fed_yogi", "fed_adagrad", "scaffold"),
    ),
    "Compressed by design": ("signum", "onebit_adam", "zero_one_adam", "demo", "marina", "dion"),
    "Asynchronous and delayed": (
      *("asgd", "delayed", "staleness_aware", "dc_asgd", "dc_asgd_constant", "hogwild"),
    ),
    "Decentralized": (
      *("d_psgd", "dgd", "sgp", "noloco", "gradient_tracking", "extra", "admm", "consensus_admm"),
    ),
  },
  "task": {
    "Images": ("digits", "mnist"),
    "Text": ("tinyshakespeare", "text", "stream", "random_tokens"),
    "Convex problems": ("least_squares", "libsvm", "mean_estimation"),
    "Counterexamples": (
      *("client_drift", "rare_large_gradient", "narrow_valley", "rosenbrock", "skewed_noise"),
    ),
    "Search": ("pagerank", "rank", "bm25", "cranfield"),
    "Finance": ("frontier", "cvar"),
    "Medicine": ("breast_cancer", "diabetes"),
    "Recommendation": (
      *("movielens", "movielens_als", "movielens_federated", "movielens_implicit"),
      *("movielens_implicit_federated", "movielens_bpr"),
    ),
    "Driving": ("driving",),
    "Molecules": ("molecules",),
  },
}

MOMENTUM = "sgd(0.1, momentum=0.9)"
NESTEROV = "sgd(0.7, momentum=0.9, nesterov=True)"
# Examples of names that need arguments or are clearer with arguments; all others are NAME().
_OWN: dict[str, str] = {
  "top_k": "top_k(0.01)",
  "random_k": "random_k(0.01)",
  "threshold": "threshold(0.001, capacity=0.05)",
  "count_sketch": "count_sketch(5, 10000)",
  "statistical": "statistical(2)",
  "hadamard": "hadamard(int4())",
  "seeded": "seeded(random_k(0.01, unbiased=True))",
  "gather_mean": "gather_mean(top_k(0.01))",
  "sum_mean": "sum_mean(random_k(0.01))",
  "two_phase": "two_phase(int8())",
  "dct_mean": "dct_mean(64, 8, one_bit=True)",
  "shuffled": "shuffled(0.01)",
  "partitioned": "partitioned(0.01)",
  "power_sgd": "power_sgd(4)",
  "error_feedback": "error_feedback(gather_mean(top_k(0.01)))",
  "loco": "loco(two_phase(int4()))",
  "ef21": "ef21(gather_mean(top_k(0.01)))",
  "diana": "diana(gather_mean(qsgd()), alpha=0.1)",
  "momentum_correction": "momentum_correction(gather_mean(top_k(0.01)), momentum=0.9)",
  "worker_momentum": "worker_momentum(krum(1), momentum=0.9)",
  "only_large": "only_large(gather_mean(sign()), min_size=1000)",
  "bucketed": "bucketed(two_phase(int8()))",
  "warm_up": "warm_up(power_sgd(4), steps=100)",
  "hierarchical": "hierarchical(two_phase(int8(), axis='slice'))",
  "trimmed_mean": "trimmed_mean(0.25)",
  "krum": "krum(1)",
  "multi_krum": "multi_krum(1, 4)",
  "geometric_median": "geometric_median()",
  "centered_clip": "centered_clip(1.0)",
  "edit_penalty": "edit_penalty(mean(), threshold=3.0, clip=10.0)",
  "sign_flip": "sign_flip(median(), faulty=2)",
  "gaussian": "gaussian(median(), faulty=2, deviation=10.0)",
  "a_little_is_enough": "a_little_is_enough(trimmed_mean(0.25), faulty=2)",
  "inner_product": "inner_product(multi_krum(2, 3), faulty=2, scale=0.5)",
  "choco": "choco(int8(), ring(), gamma=0.5)",
  "noisy": "noisy(mean(), clip=1.0, noise=1.0)",
  "secure_sum": "secure_sum(clip=8.0, threshold=0.5, dropout=0.2)",
  "data_parallel": f"data_parallel({MOMENTUM}, mean())",
  "averaged": "averaged(data_parallel(sgd(0.1), mean()), burn_in=100)",
  "local_sgd": f"local_sgd({MOMENTUM}, mean(), period=8)",
  "post_local_sgd": f"post_local_sgd({MOMENTUM}, mean(), period=8, switch=200)",
  "hierarchical_local_sgd": f"hierarchical_local_sgd({MOMENTUM}, mean(axis='data'), "
  "mean(axis='slice'), inner_period=4, outer_period=8)",
  "slow_mo": f"slow_mo({MOMENTUM}, mean(), period=12)",
  "restarted": f"restarted(local_sgd({MOMENTUM}, mean(), period=8))",
  "easgd": f"easgd({MOMENTUM}, mean(), period=8)",
  "eamsgd": "eamsgd(0.02, mean(), momentum=0.9, period=8)",
  "diloco": f"diloco(adamw(1e-3), {NESTEROV}, mean(), period=32)",
  "streaming_diloco": f"streaming_diloco(adamw(1e-3), {NESTEROV}, mean(), period=32, fragments=4)",
  "late": f"late(diloco(adamw(1e-3), {NESTEROV}, mean(), period=16), delay=16)",
  "eager_diloco": f"eager_diloco(adamw(1e-3), {NESTEROV}, mean(), period=16)",
  "overlap_local_sgd": f"overlap_local_sgd({MOMENTUM}, mean(), period=8)",
  "sparta": f"sparta({MOMENTUM}, sum_mean(random_k(0.01)))",
  "sparta_diloco": f"sparta_diloco(adamw(1e-3), {NESTEROV}, shuffled(0.01), mean(), "
  "outer_period=32)",
  "desloc": "desloc(adam(1e-3, b1=0.9, b2=0.99), mean(), period=16, moments={'mu': 48, 'nu': 96})",
  "fed_avg": "fed_avg(sgd(0.1), mean(), epochs=1)",
  "fed_prox": "fed_prox(sgd(0.1), mean(), mu=0.1, epochs=1)",
  "fed_opt": "fed_opt(sgd(0.1), adam(0.01), mean(), epochs=1)",
  "fed_adam": "fed_adam(sgd(0.1), mean(), epochs=1)",
  "fed_yogi": "fed_yogi(sgd(0.1), mean(), epochs=1)",
  "fed_adagrad": "fed_adagrad(sgd(0.1), mean(), epochs=1)",
  "scaffold": "scaffold(0.1, mean(), period=10)",
  "signum": "signum(0.001, majority_vote())",
  "onebit_adam": "onebit_adam(0.001, error_feedback(two_phase(sign())), warm_up=100)",
  "zero_one_adam": "zero_one_adam(0.001, error_feedback(two_phase(sign())), warm_up=100)",
  "dion": "dion(0.02, adamw(1e-3), mean())",
  "dion2": "dion2(0.02, adamw(1e-3), mean())",
  "demo": "demo(0.001, gather_mean(dct_top_k(64, 8)))",
  "marina": "marina(0.1, gather_mean(qsgd()), probability=0.1)",
  "asgd": "asgd(sgd(0.05), mean())",
  "delayed": "delayed(data_parallel(sgd(0.05), mean()), uniform(8))",
  "staleness_aware": "staleness_aware(data_parallel(sgd(0.05), mean()), last_pull())",
  "dc_asgd": "dc_asgd(0.05, mean(), last_pull())",
  "dc_asgd_constant": "dc_asgd_constant(0.05, mean(), last_pull())",
  "hogwild": "hogwild(0.05, mean(), bound=4)",
  "d_psgd": f"d_psgd({MOMENTUM}, gossip(ring()))",
  "dgd": "dgd(0.05, gossip(torus()))",
  "sgp": f"sgp({MOMENTUM}, one_peer_exponential())",
  "noloco": "noloco(adamw(1e-3), gossip(random_pairs()), period=32)",
  "gradient_tracking": "gradient_tracking(0.05, gossip(ring()))",
  "extra": "extra(0.05, gossip(ring()))",
  "admm": "admm(0.05, gossip(ring()))",
  "consensus_admm": "consensus_admm(0.1, mean(), penalty=1.0, period=10)",
  "muon": "muon(0.02, weight_decay=0.1, adam_learning_rate=1e-3)",
  "muon_bp": "muon_bp(0.02, period=5, adam_learning_rate=1e-3)",
  "mlp": "mlp(hidden=[128])",
  "text": "text('corpus.txt', context=256)",
  "gossip": "gossip(ring())",
  "push_sum": "push_sum(exponential())",
  "q1_gossip": "q1_gossip(int8(), ring())",
  "q2_gossip": "q2_gossip(int8(), ring())",
  "weights": "weights([[0.75, 0.25], [0.25, 0.75]])",
  "constant": "constant(2)",
  "uniform": "uniform(8)",
  "geometric": "geometric(1.5, bound=8)",
  "per_worker": "per_worker([0, 0, 0, 4])",
  "by_coordinate": "by_coordinate(4)",
  "steady": "steady(1.0, slowdown={0: 4})",
  "lognormal": "lognormal(1.0, 0.5)",
  "measured": "measured([[1.0, 2.0], [2.0, 1.0]])",
  "internet": "internet(['eastus', 'westeurope'], churn=on_off(3600, 600))",
  "on_off": "on_off(3600, 600)",
  "recorded": "recorded('presence.csv')",
  "dirichlet": "dirichlet(0.3)",
  "shards": "shards(2)",
  "transformer": "transformer('tiny')",
  "libsvm": "libsvm('a9a', l2=1e-4)",
  "frontier": "frontier('port1')",
  "molecules": "molecules('tox21')",
  "graph_network": "graph_network(128)",
  "stream": "stream('corpus.txt', tokenizer='bpe', context=512)",
}


def of(kind: str, name: str) -> str:
  """Returns a valid spec that calls a name."""
  if (kind, name) == ("speeds", "exponential"):
    return "exponential(0.8, shift=0.2)"
  return _OWN.get(name, f"{name}()")


@functools.cache
def built(kind: str, spec: str) -> Any:
  """Builds the object of an example; None for tasks, whose data may be missing."""
  return None if kind == "task" else registry.build(kind, spec)
