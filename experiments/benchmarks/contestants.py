"""Defines the methods of the leaderboard, and the ranges from which trials draw parameters."""

import math
import zlib
from typing import NamedTuple

import numpy as np

Range = tuple[float, float]  # smallest and largest value; drawn uniformly on a logarithmic scale


class Contestant(NamedTuple):
  """A method with parameters to tune.

  The spec contains each parameter's name in braces. {steps} and {warmup} in the spec are replaced
  by the number of steps of a run and of its warm-up.
  """

  name: str
  spec: str
  ranges: dict[str, Range]

  def drawn(self, trial: int) -> dict[str, float]:
    """Draws the parameters of a trial, independently of all other methods and trials.

    Args:
      trial: the number of the trial.
    """
    random = np.random.default_rng([trial, zlib.crc32(self.name.encode())])
    values = {}
    for name, (least, greatest) in self.ranges.items():
      value = math.exp(random.uniform(math.log(least), math.log(greatest)))
      values[name] = float(f"{value:.3g}")
    return values

  def built(self, values: dict[str, float], steps: int) -> str:
    """Returns the spec with its parameters filled in.

    Args:
      values: the parameters by name.
      steps: the number of local steps of the run.
    """
    spec = self.spec
    for name, value in {**values, "steps": steps, "warmup": max(1, steps // 10)}.items():
      spec = spec.replace("{" + name + "}", f"{value:g}")
    return spec


SCHEDULE = "warmup_cosine_decay_schedule(0.0, {rate}, {warmup}, {steps})"
ADAMW = f"adamw({SCHEDULE})"
MUON = f"muon({SCHEDULE})"
RATE: dict[str, Range] = {"rate": (1e-3, 3e-2)}
OUTER: dict[str, Range] = {**RATE, "outer": (0.2, 1.0)}
NESTEROV = "sgd({outer}, momentum=0.6, nesterov=True)"
PERIOD = 16


def contestant(name: str, spec: str, ranges: dict[str, Range] = RATE) -> Contestant:
  """Returns a contestant whose spec may contain the abbreviations above."""
  short = {"ADAMW": ADAMW, "MUON": MUON, "OUTER": NESTEROV, "SCHEDULE": SCHEDULE}
  short |= {"period=H": f"period={PERIOD}"}
  for word, text in short.items():
    spec = spec.replace(word, text)
  return Contestant(name, spec, ranges)


CONTESTANTS = (
  contestant("AdamW", "data_parallel(ADAMW, mean())"),
  contestant("Muon", "data_parallel(MUON, mean())"),
  contestant("AdamW int8", "data_parallel(ADAMW, error_feedback(two_phase(int8())))"),
  contestant("AdamW PowerSGD", "data_parallel(ADAMW, error_feedback(power_sgd(4)))"),
  contestant("AdamW top 1%", "data_parallel(ADAMW, error_feedback(gather_mean(top_k(0.01))))"),
  contestant(
    "1-bit Adam",
    "onebit_adam(SCHEDULE, error_feedback(two_phase(sign())), warm_up={warmup})",
    {"rate": (3e-4, 1e-2)},
  ),
  contestant("signSGD majority", "signum(SCHEDULE, majority_vote())", {"rate": (1e-4, 3e-3)}),
  contestant(
    "DeMo", "demo(SCHEDULE, gather_mean(dct_top_k(chunk=32, k=8)))", {"rate": (3e-4, 1e-2)}
  ),
  contestant("Dion", "dion(SCHEDULE, adamw(3e-3), mean())", {"rate": (3e-3, 1e-1)}),
  contestant("local AdamW", "local_sgd(ADAMW, mean(), period=H)"),
  contestant("DiLoCo", "diloco(ADAMW, OUTER, mean(), period=H)", OUTER),
  contestant("MuLoCo", "diloco(MUON, OUTER, mean(), period=H)", OUTER),
  contestant(
    "MuLoCo 2 bits",
    "diloco(MUON, OUTER, error_feedback(gather_mean(statistical(2))), period=H)",
    OUTER,
  ),
  contestant(
    "SparseLoCo",
    "diloco(ADAMW, sgd({outer}), error_feedback(gather_mean(block_top_k()), decay=0.95), period=H)",
    OUTER,
  ),
  contestant(
    "streaming DiLoCo",
    "streaming_diloco(ADAMW, OUTER, mean(), period=H, fragments=2, delay=4)",
    OUTER,
  ),
  contestant(
    "eager DiLoCo", "eager_diloco(ADAMW, OUTER, mean(), period=H)", {**RATE, "outer": (0.05, 0.5)}
  ),
  contestant("SPARTA", "sparta(ADAMW, sum_mean(random_k(0.005)))"),
  contestant("gossip on a ring", "d_psgd(ADAMW, gossip(ring()))"),
)
