"""SparseLoCo trains like DiLoCo with one hundredth of DiLoCo's bytes.

Paper: Sarfi, Thérien, Lidin, Belilovsky 2025, Communication efficient LLM pre-training with
SparseLoCo, arXiv:2508.15706 (512 million parameters: sparse messages of 1 to 3% of the elements, in
2 bits, reach a lower loss than DiLoCo for rounds of 15 to 100 steps).

Same: 8 workers, rounds of 15 steps, inner AdamW with a warm-up and a cosine schedule; the memory
decays by 0.95 per round; the 64 largest of 4096 elements are sent, with positions of 12 bits and
values of 2 bits; no outer momentum.

Scaled: a transformer of 15 thousand parameters on the characters of tinyshakespeare, one sequence
per worker and step, 600 rounds. Each element is averaged over the workers that sent it, as in the
authors' later code; the paper averages over all workers. The leaves are small, so they are joined,
and a block is 4096 consecutive elements of the joined array; in the paper, a block is a tile of 64
x 64 elements.
"""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.claims.support.claim import Beside, Findings, Found, Gate, Lab, Line, Panel
from research.compress.block_top_k import block_top_k
from research.core.spec import Call, calls

TITLE = "SparseLoCo trains like DiLoCo on one hundredth of its bytes"
DATASET = "tinyshakespeare(context=64)"
FULL = {
  "workers": 8,
  "period": 15,
  "steps": 9000,
  "dense_rate": 6e-3,
  "sparse_rate": 3e-3,
  "outer": [0.7, 0.6],  # DiLoCo's outer learning rate and momentum
  "decay": 0.95,
  "model": "layers=1, width=32, heads=2, kv_heads=2, hidden=96, deviation=0.1",
  "nats": 0.02,
  "times_fewer_bytes": 100.0,
}
QUICK = {"steps": 180, "nats": 0.4}
SEEDS = {"full": 2, "quick": 1}
X64 = False

DENSE, SPARSE = "DiLoCo", "SparseLoCo"
NOTE = (
  "The inner learning rates are the best of those that were tried on one seed with 6000 steps: "
  "0.006 and 0.012 for DiLoCo; 0.002, 0.003 and 0.006 for SparseLoCo, each leaf on its own. "
  "SparseLoCo prefers a smaller rate, because an element that few workers send is divided by their "
  "number. On a ring, the all-reduce of DiLoCo sends 2 (W - 1) / W dense messages, and the "
  "all-gather of SparseLoCo W - 1 sparse ones; the traffic of eight workers therefore differs by a "
  "smaller factor than the messages."
)


def measure(lab: Lab) -> Findings:
  """Measures held-out losses and bytes of all methods and seeds."""
  rate, momentum = lab["outer"]
  outer, plain = calls.sgd(rate, momentum=momentum, nesterov=True), calls.sgd(1.0)
  mean = calls.bucketed(calls.gather_mean(calls.block_top_k(), over="senders"))
  feedback = lambda inner: calls.error_feedback(inner, decay=lab["decay"])
  several = lambda rate, outer, mean: [_run(lab, (rate, outer, mean), seed) for seed in lab.seeds]
  found = {
    DENSE: several(lab["dense_rate"], outer, calls.mean()),
    SPARSE: several(lab["sparse_rate"], plain, feedback(mean)),
  }
  loss = {name: np.array([of.last("loss") for of in runs]) for name, runs in found.items()}
  dense, sparse = found[DENSE][0], found[SPARSE][0]
  others = lab["workers"] - 1
  message = sparse.bytes_per_step * lab["period"] / others
  whole = 4 * sum(x.size for x in jax.tree.leaves(sparse.params))
  curves = lambda x: [
    Line(name, x(of), of.column("loss"), "o") for name, runs in found.items() for of in runs
  ]
  nats = "nats per character held out"
  return Findings(
    [
      *(Beside(f"nats a character, {name}", float(of.mean())) for name, of in loss.items()),
      Beside("bytes of a message, SparseLoCo", message),
      Beside("bytes of a dense message", whole),
      Beside("times fewer bytes on a ring", dense.bytes_per_step / sparse.bytes_per_step),
    ],
    [
      Gate(f"nats above {DENSE}", float((loss[SPARSE] - loss[DENSE]).mean()), "<=", lab["nats"]),
      Gate("times fewer bytes in a message", whole / message, ">=", lab["times_fewer_bytes"]),
      Gate("bytes of 4096 elements, without the table", _bytes_of_block(), "==", 112, True),
    ],
    [
      Panel("by steps", "steps", nats, curves(lambda of: of.column("step"))),
      Panel(
        "by traffic",
        "MB sent by a worker",
        nats,
        curves(lambda of: of.column("step") * of.bytes_per_step / 1e6),
        x_scale="log",
      ),
    ],
    NOTE,
  )


def _bytes_of_block() -> float:
  """Counts the bytes of a matrix of 64 x 64 elements, without the table of the leaf."""
  key = jax.random.key(0)
  payload = jax.eval_shape(
    block_top_k().encode, jax.ShapeDtypeStruct((64, 64), jnp.float32), key, key
  )
  return float(payload.places.size + payload.codes.size)


def _run(lab: Lab, how: tuple[float, Call, Call], seed: int) -> Found:
  """Runs DiLoCo with an inner learning rate, an outer optimizer and an aggregator."""
  rate, outer, aggregator = how
  steps, workers = lab["steps"], lab["workers"]
  schedule = calls.warmup_cosine_decay_schedule(0.0, rate, steps // 10, steps)
  return lab.run(
    model=f"transformer('tiny', {lab['model']}, dtype='float32', scan=False)",
    method=calls.diloco(calls.adamw(schedule), outer, aggregator, period=lab["period"]),
    mesh=f"data:{workers}",
    batch_size=workers,
    steps=steps,
    eval_every=steps // 8,
    steps_per_dispatch=steps,
    seed=seed,
  )
