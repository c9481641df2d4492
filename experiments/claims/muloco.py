"""MuLoCo, which is DiLoCo with Muon as its inner optimizer, ends below DiLoCo with AdamW.

Paper: Thérien et al. 2025, MuLoCo, arXiv:2505.23725 (losses of models with 150 million parameters
and K = 1: MuLoCo 3.120, data-parallel Muon 3.124, DiLoCo 3.142, data-parallel AdamW 3.158).

Same: Muon without Nesterov momentum and with decay 0.9 for the hidden matrices of the workers,
AdamW for the embedding and the norms, rounds of 30 steps, outer Nesterov momentum 0.6 with step
size 0.7; every method takes the same number of sequential steps with batches of the same size, and
its inner learning rate is the best of three.

Scaled: a transformer of 31 thousand parameters on the characters of tinyshakespeare, 8 workers, 16
rounds from scratch. DiLoCo has the same outer optimizer as MuLoCo; the paper gives DiLoCo an outer
momentum of 0.8.
"""

import numpy as np

from experiments.claims.support.claim import Beside, Findings, Found, Gate, Lab, Line, Panel
from research.core.spec import Call, calls

TITLE = "DiLoCo with Muon inside ends below DiLoCo with AdamW, and as near to its own large batch"
DATASET = "tinyshakespeare(context=64)"
FULL = {
  "workers": 8,
  "batch": 2,
  "period": 30,
  "rounds": 16,
  "adamw_rates": [6e-3, 1.2e-2, 2.4e-2],
  "muon_rates": [0.01, 0.02, 0.04],
  "adam_rate": 1.2e-2,  # the learning rate of AdamW within Muon
  "outer_rate": 0.7,
  "outer_momentum": 0.6,
  "model": "layers=1, width=48, heads=4, kv_heads=4, hidden=128, deviation=0.1",
  "apart": 0.0,  # nats
  "bits_apart": 0.02,  # nats
  "bits_times": 15.0,  # 0: without the runs with 2 bits
}
QUICK = {
  "workers": 4,
  "period": 10,
  "rounds": 6,
  "adamw_rates": [1.2e-2],
  "muon_rates": [0.04],
  "model": "layers=1, width=32, heads=2, kv_heads=2, hidden=96, deviation=0.1",
  "apart": 0.02,
  "bits_times": 0.0,
}
SEEDS = {"full": 2, "quick": 1}
X64 = False

ADAMW, MUON, DILOCO, MULOCO = "data-parallel AdamW", "data-parallel Muon", "DiLoCo", "MuLoCo"
BITS = "MuLoCo, 2 bits"


def measure(lab: Lab) -> Findings:
  """Measures each method's held-out loss at its best inner rate on seed 0, on all seeds."""
  runs, rates, grids = {}, {}, {}
  for name in (ADAMW, MUON, DILOCO, MULOCO):
    of_muon = name in (MUON, MULOCO)
    tried = {r: run(lab, name, r, 0) for r in lab["muon_rates" if of_muon else "adamw_rates"]}
    score = lambda rate, tried=tried: tried[rate].last("loss")
    rates[name], scores = lab.tune(f"{name}: inner rate, by held-out loss", tried, score)
    grids[name] = Line(name, list(scores), list(scores.values()), "o")
    more = [run(lab, name, rates[name], seed) for seed in lab.seeds if seed > 0]
    runs[name] = [tried[rates[name]], *more]
  if lab["bits_times"]:
    runs[BITS] = [run(lab, BITS, rates[MULOCO], seed) for seed in lab.seeds]
  loss = {name: np.array([of.last("loss") for of in found]) for name, found in runs.items()}
  mean = {name: float(of.mean()) for name, of in loss.items()}
  gaps = {MULOCO: mean[MULOCO] - mean[MUON], DILOCO: mean[DILOCO] - mean[ADAMW]}
  paper = {MULOCO: 3.120, MUON: 3.124, DILOCO: 3.142, ADAMW: 3.158}
  besides = [
    Beside("MuLoCo less DiLoCo, nats", mean[MULOCO] - mean[DILOCO], 3.120 - 3.142),
    Beside("MuLoCo less data-parallel Muon, nats", gaps[MULOCO], 3.120 - 3.124),
    Beside("DiLoCo less data-parallel AdamW, nats", gaps[DILOCO], 3.142 - 3.158),
    *[Beside(f"nats, {name}", of, paper.get(name)) for name, of in mean.items()],
    *[Beside(f"inner rate, {name}", of) for name, of in rates.items()],
  ]
  gates = [
    Gate("MuLoCo less DiLoCo, nats", mean[MULOCO] - mean[DILOCO], "<=", lab["apart"], True),
    Gate(
      "its gap to data parallelism less DiLoCo's", gaps[MULOCO] - gaps[DILOCO], "<=", lab["apart"]
    ),
  ]
  if lab["bits_times"]:
    times = runs[MULOCO][0].bytes_per_step / runs[BITS][0].bytes_per_step
    above = mean[BITS] - mean[MULOCO]
    gates += [
      Gate("2 bits with error feedback, nats above MuLoCo", above, "<=", lab["bits_apart"], True),
      Gate("bytes of MuLoCo over those with 2 bits", times, ">=", lab["bits_times"], True),
    ]
  nats = "nats per character held out"
  curves = [
    Line(name, of.column("step"), of.column("loss"), "o")
    for name, found in runs.items()
    for of in found
  ]
  return Findings(
    besides,
    gates,
    [
      Panel(f"{lab['workers']} workers, {lab['period']} steps per round", "steps", nats, curves),
      Panel("seed 0", "inner rate", nats, list(grids.values()), x_scale="log"),
    ],
  )


def run(lab: Lab, name: str, rate: float, seed: int) -> Found:
  """Runs one method with an inner learning rate that falls to zero."""
  steps, workers = lab["rounds"] * lab["period"], lab["workers"]
  falling = lambda peak: calls.warmup_cosine_decay_schedule(0.0, peak, steps // 10, steps)
  inner = calls.adamw(falling(rate))
  if name in (MUON, MULOCO, BITS):
    inner = calls.muon(
      falling(rate), beta=0.9, nesterov=False, adam_learning_rate=falling(lab["adam_rate"])
    )
  return lab.run(
    model=f"transformer('tiny', {lab['model']}, dtype='float32', scan=False)",
    method=method(lab, name, inner),
    mesh=f"data:{workers}",
    batch_size=lab["batch"] * workers,
    steps=steps,
    eval_every=steps // 5,
    steps_per_dispatch=steps,
    seed=seed,
  )


def method(lab: Lab, name: str, inner: Call) -> Call:
  """Returns the spec of a method with its inner optimizer."""
  if name in (ADAMW, MUON):
    return calls.data_parallel(inner, calls.mean())
  outer = calls.sgd(lab["outer_rate"], momentum=lab["outer_momentum"], nesterov=True)
  exchange = calls.mean()
  if name == BITS:
    coded = calls.bucketed(calls.two_phase(calls.statistical(2)))
    exchange = calls.error_feedback(coded, decay=0.9)
  return calls.diloco(inner, outer, exchange, period=lab["period"])
