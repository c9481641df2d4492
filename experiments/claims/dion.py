"""Dion and Dion2 train like Muon on a quarter of the momentum; Dion also sends only thin factors.

Paper: Ahn, Xu, Abreu, Fan, Magakyan, Sharma, Zhan, Langford 2025, Dion, arXiv:2504.05295: decoupled
momenta give the updates of Dion on the mean gradient, and a quarter of the rank loses little at 3
billion parameters. Ahn, Amsel, Langford 2025, Dion2, arXiv:2512.16928: so does a quarter of the
rows.

Same: mu = 0.95, rank 1/4, a quarter of the rows for Dion2, updates scaled by sqrt(outputs /
inputs), AdamW with a learning rate of its own for embedding and norms.

Scaled: a transformer of 45 thousand parameters on the characters of tinyshakespeare, 4 workers with
batches of 4. Every method has the same number of learning rates, and the best by its training loss
is compared on held-out text. The weights are compared with those of one worker on digits, after 100
steps on all examples.

At this size, neither comes within 0.03 nats of Muon, and the weights of eight workers and of one
differ by 4e-5 in float32; on the regression of the tests they agree to 1e-6. A round removes the
share 1 - mu of a quarter of the directions or rows from the momenta: with mu = 0.95 their memory is
about 80 steps, a fifth of the run; with mu = 0.8 it is 20 steps, as Muon's. The claim shows both.
"""

import math

import jax
import numpy as np

from experiments.claims.support.claim import Beside, Findings, Found, Gate, Lab, Line, Panel
from research.core.dimensions import kinds_of
from research.core.spec import Call, calls

TITLE = "Dion sends thin factors, and is Dion on the mean gradient"
DATASET = "tinyshakespeare(context=64)"
FULL = {
  "workers": 4,
  "batch": 4,
  "steps": 384,
  "rates": [0.01, 0.02, 0.04, 0.08],
  "adam_rate": 6e-3,
  "sample": 512,  # training examples on which learning rates are compared
  "model": "layers=1, width=64, heads=4, kv_heads=4, hidden=128",
  "rank": 0.25,
  "same": 1e-5,  # largest difference of a weight
  "above": 0.03,  # nats
  "methods": ["Muon", "Dion", "Dion, mu 0.8", "Dion2", "Dion2, mu 0.8"],
}
QUICK = {
  "steps": 48,
  "rates": [0.02],
  "sample": 64,
  "same": 1e-4,
  "above": 0.5,
  "methods": ["Muon", "Dion, mu 0.8", "Dion2, mu 0.8"],
}
SEEDS = {"full": 3, "quick": 1}
X64 = False


def measure(lab: Lab) -> Findings:
  """Compares momenta with those of one worker, bytes with sizes, and losses with Muon's."""
  apart = difference(lab)
  runs, rates, grids = {}, {}, {}
  for name in lab["methods"]:
    tried = {rate: run(lab, name, rate, 0) for rate in lab["rates"]}
    score = lambda rate, tried=tried: tried[rate].last("train_loss")
    rates[name], scores = lab.tune(f"{name}: learning rate, by training loss", tried, score)
    grids[name] = Line(name, list(scores), list(scores.values()), "o")
    more = [run(lab, name, rates[name], seed) for seed in lab.seeds if seed > 0]
    runs[name] = [tried[rates[name]], *more]
  loss = {name: float(np.mean([f.last("loss") for f in of])) for name, of in runs.items()}
  sent = {name: of[0].bytes_per_step for name, of in runs.items()}
  nats = "nats per character held out"
  return Findings(
    [
      Beside("largest difference of a weight from one worker's, 100 steps", apart),
      Beside("Dion: bytes over those of gradients", sent["Dion, mu 0.8"] / sent["Muon"]),
      *(Beside(f"{name}: nats above Muon", of - loss["Muon"]) for name, of in loss.items()),
      *(Beside(f"{name}: nats per character", of) for name, of in loss.items()),
      *(Beside(f"{name}: learning rate", rate) for name, rate in rates.items()),
    ],
    [
      Gate("largest difference of a weight from one worker's", apart, "<=", lab["same"], True),
      Gate(
        "bytes minus 8 (W-1)/W (r (m+n) + ...)",
        sent["Dion, mu 0.8"] - expected(lab),
        "==",
        0.0,
        True,
      ),
      *(
        Gate(f"{name}, a quarter: nats above Muon", of - loss["Muon"], "<=", lab["above"])
        for name, of in loss.items()
        if name != "Muon"
      ),
    ],
    [
      Panel(
        "by steps",
        "steps",
        nats,
        [Line(n, f.column("step"), f.column("loss"), "o") for n, of in runs.items() for f in of],
      ),
      Panel("seed 0", "learning rate", "training loss", list(grids.values()), x_scale="log"),
    ],
  )


def difference(lab: Lab) -> float:
  """Returns the largest difference between the weights of eight workers and those of one worker."""
  method = calls.dion(0.02, calls.adamw(1e-3), calls.mean(), rank=lab["rank"])
  eight, one = (
    lab.run(
      task="digits()",
      model="mlp(hidden=[32])",
      method=method,
      mesh=f"data:{workers}",
      batch_size="all",
      steps=100,
    ).params
    for workers in (8, 1)
  )
  return max(jax.tree.leaves(jax.tree.map(lambda a, b: float(np.abs(a - b).max()), eight, one)))


def expected(lab: Lab) -> float:
  """Returns the bytes of the factors of all matrices, and of the other leaves, in ring sums."""
  task = lab.task(model=model(lab))
  params = jax.eval_shape(task.init, jax.random.key(0))
  kinds, elements = kinds_of(params, task.dimensions), 0
  for of, x in zip(kinds.values(), jax.tree.leaves(params), strict=True):
    if of.is_matrix:
      m, n = of.fans(x.shape)
      elements += x.size // (m * n) * math.ceil(lab["rank"] * min(m, n)) * (m + n)
    else:
      elements += x.size
  return 2 * (lab["workers"] - 1) / lab["workers"] * 4 * elements


def model(lab: Lab) -> str:
  """Returns the spec of the model."""
  return f"transformer('tiny', {lab['model']}, dtype='float32', scan=True)"


def run(lab: Lab, name: str, rate: float, seed: int) -> Found:
  """Runs a method with learning rates that fall to zero."""
  steps, task = lab["steps"], lab.task(model=model(lab))
  key, count = jax.random.key(0), len(jax.tree.leaves(task.train)[0])
  sample = task.batch(task.train, task.sample(count, 0, key, batch_size=lab["sample"]))
  on_sample = jax.jit(lambda params: task.loss(params, sample, key))
  falling = lambda peak: calls.warmup_cosine_decay_schedule(0.0, peak, steps // 10, steps)
  return lab.run(
    model=model(lab),
    method=method_of(lab, name, falling(rate), falling(lab["adam_rate"])),
    mesh=f"data:{lab['workers']}",
    batch_size=lab["workers"] * lab["batch"],
    steps=steps,
    eval_every=steps // 4,
    steps_per_dispatch=steps,
    watch=lambda params, _: {"train_loss": float(on_sample(params))},
    seed=seed,
  )


def method_of(lab: Lab, name: str, rate: Call, adam_rate: Call) -> Call:
  """Returns the spec of a method of the comparison."""
  adam, mean = calls.adamw(adam_rate), calls.mean()
  if name == "Muon":
    return calls.data_parallel(calls.muon(rate, adam_learning_rate=adam_rate), mean)
  memory = 0.8 if "0.8" in name else 0.95
  if name.startswith("Dion2"):
    return calls.dion2(rate, adam, mean, fraction=lab["rank"], decay=memory)
  return calls.dion(rate, adam, mean, rank=lab["rank"], momentum=memory)
