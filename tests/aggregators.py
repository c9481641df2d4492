"""Every aggregator and wrapper of the codebase, as specs: each contract runs over all of them.

SLICED ones run on slices of workers. What an execution makes of a compressor is tested in
test_compress.py; here it is a cheap one wherever it does not matter.
"""

import ast
import inspect
from typing import Any

from research.aggregate import composition
from research.core import registry
from research.core.builtin import TABLE

# Each of these runs in every execution, hence few of them and none that only repeats another.
FLAT = {
  "mean": "mean()",
  "vote": "majority_vote()",
  "feedback_sum": "error_feedback(sum_mean(random_k(0.3)))",
  "feedback_two_phase": "error_feedback(two_phase(int8()))",
  "feedback_power_sgd": "error_feedback(power_sgd(1))",
  "ef21": "ef21(gather_mean(sign()))",
  "diana": "diana(gather_mean(qsgd(3)), alpha=0.5)",
  "momentum": "momentum_correction(gather_mean(top_k(0.2)))",
  "momentum_clipped": "momentum_correction(sum_mean(random_k(0.3)), clip_norm=1.0)",
  "worker_momentum": "worker_momentum(krum(0), momentum=0.5)",
  "only_large": "error_feedback(only_large(gather_mean(sign()), min_size=9))",
  "bucketed": "error_feedback(bucketed(two_phase(sign())))",
  "warm_up": "error_feedback(warm_up(two_phase(int8()), steps=2, stages=[mean(), power_sgd(1)]))",
  "geometric_median": "geometric_median(iterations=2)",
  "centered_clip": "centered_clip(0.5)",
  "sign_flip": "sign_flip(error_feedback(gather_mean(sign())), faulty=1)",
  "gaussian": "gaussian(median(), faulty=1, deviation=1.0)",
  "a_little_is_enough": "a_little_is_enough(trimmed_mean(0.25), faulty=1)",
  "inner_product": "inner_product(multi_krum(0, 2), faulty=1, scale=0.5)",
  "noisy": "noisy(mean(), clip=1.0, noise=0.1)",
  "secure_sum": "secure_sum(clip=8.0, threshold=0.5, dropout=0.2)",
}
SLICED = {
  "hierarchical_mean": "hierarchical_mean()",
  "hierarchical": "error_feedback(hierarchical(two_phase(int8(), axis='slice')))",
  "hierarchical_ef21": "ef21(hierarchical(gather_mean(sign(), axis='slice')))",
  "two_axes": "error_feedback(two_phase(int8()))",
}
SPECS = FLAT | SLICED
# What wrappers are put around besides: pieces without a wrapper of their own.
PLAIN = {
  "gather": "gather_mean(sign())",
  "expansive": "gather_mean(terngrad())",
  "sparse": "gather_mean(top_k(0.2))",
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

# Those in which a worker's number matters: it lies, or draws with a key of its own.
NUMBERED = (
  "diana", "sign_flip", "gaussian", "a_little_is_enough", "inner_product", "noisy",
  "secure_sum",
)  # fmt: skip


REFUSED = composition.refused()
AGGREGATORS = {name: registry.build("aggregator", spec) for name, spec in (SPECS | PLAIN).items()}


def refusal(wrapper: str, name: str) -> str | None:
  """Why the wrapper does not go with an entry, if it does not."""
  traits = AGGREGATORS[name].traits
  rows = (row for row in REFUSED if wrapper in row[0] and row[1] in traits)
  return next((why for _, _, why in rows), None)


def names_in(spec: str) -> set[str]:
  """The aggregators that a spec calls."""
  return {call.func.id for call in _calls(ast.parse(spec, mode="eval"))}


def between_slices(spec: str) -> str:
  """The spec with each aggregator over the slow axis alone, as `hierarchical` wants it."""
  tree = ast.parse(spec, mode="eval")
  for call in _calls(tree):
    takes = inspect.signature(registry.lookup(("aggregator",), call.func.id)).parameters
    if "axis" in takes and "axis" not in [keyword.arg for keyword in call.keywords]:
      call.keywords.append(ast.keyword("axis", ast.Constant("slice")))
  return ast.unparse(tree)


def _calls(tree: ast.AST) -> list[Any]:
  calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
  return [c for c in calls if getattr(c.func, "id", None) in TABLE["aggregator"]]
