"""A pipeline of n stages and m micro-batches idles for (n-1)/(m+n-1) of its time.

Paper: Huang et al. 2018, GPipe, arXiv:1811.06965, section 2.3 and figure 2.

Same: we count the ticks of the schedule that `research/models/pipeline.py` runs with one stage per
device. The layers of a stage record their micro-batch at each tick. A tick is idle if it has no
micro-batch, or a micro-batch that the stage has already processed.

Scaled: the layers do almost no work, so a tick is the unit of time and transfers take no time, as
in the paper's formula. Only the forward pass is recorded; the backward pass is the same loop in
reverse.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments.claims.support.claim import Beside, Findings, Gate, Lab, Line, Panel, with_devices
from research.comm import mesh as meshes
from research.models import pipeline

TITLE = "A pipeline of n stages and m micro-batches idles for (n-1)/(m+n-1) of its time"
DATASET = ""
FULL = {"stages": [2, 4, 8], "microbatches": [1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32]}
QUICK = {"microbatches": [1, 2, 4, 8, 32]}
SEEDS = {}  # the claim uses a single seed
X64 = False

Trace = list[list[int]]  # the number of the micro-batch, from 1, indexed by stage and tick


def measure(lab: Lab) -> Findings:
  """Counts the idle slots of each schedule, and draws one of the schedules."""
  stages, microbatches = lab["stages"], lab["microbatches"]
  pairs = [(n, m) for n in stages for m in microbatches]
  found = with_devices(max(stages), traces, pairs)
  slots = {pair: sum(map(len, trace)) for pair, (trace, _) in found.items()}
  idle = {pair: slots[pair] - sum(map(len, map(worked, found[pair][0]))) for pair in pairs}
  share = {pair: idle[pair] / slots[pair] for pair in pairs}
  formula = {(n, m): (n - 1) / (m + n - 1) for n, m in pairs}
  # idle / slots == (n - 1) / (m + n - 1), checked in integers
  unequal = sum(idle[n, m] * (m + n - 1) != (n - 1) * slots[n, m] for n, m in pairs)
  drawn = (4, 4) if (4, 4) in found else pairs[0]
  most, schedule = range(1, max(microbatches) + 1), [worked(of) for of in found[drawn][0]]
  shown = sorted(
    ((n, m) for n, m in pairs if m in (drawn[1], max(microbatches))),
    key=lambda pair: (pair[1], pair != drawn),
  )
  of_stages = [(n, [share[n, m] for m in microbatches]) for n in stages]
  return Findings(
    [
      Beside(f"idle share, {n} stages, {m} micro-batches", share[n, m], formula[n, m])
      for n, m in shown
    ],
    [
      Gate("schedules whose idle share is another", unequal, "==", 0),
      Gate("micro-batches that missed a stage", sum(of[1] for of in found.values()), "==", 0),
    ],
    [
      Panel(
        "share of their time in which stages idle",
        "micro-batches m",
        "idle share",
        [Line(f"n={n} stages, counted", microbatches, shares, "o") for n, shares in of_stages]
        + [Line("(n-1)/(m+n-1)", most, [(n - 1) / (m + n - 1) for m in most]) for n in stages],
        x_scale="log",
      ),
      Panel(
        f"when {drawn[0]} stages have each of {drawn[1]} micro-batches",
        "tick",
        "stage",
        [
          Line(f"micro-batch {i}", [of[i] for of in schedule], range(1, drawn[0] + 1), "s")
          for i in schedule[0]
        ],
      ),
    ],
  )


def worked(given: Sequence[int]) -> dict[int, int]:
  """Returns the tick at which a stage first receives each micro-batch."""
  first: dict[int, int] = {}
  for tick, microbatch in enumerate(given):
    if microbatch:
      first.setdefault(microbatch, tick)
  return first


def traces(pairs: Sequence[tuple[int, int]]) -> dict[tuple[int, int], tuple[Trace, int]]:
  """Returns each stage's micro-batches, and the number of micro-batches that missed a stage."""
  return {(n, m): trace(n, m) for n, m in pairs}


def trace(stages: int, microbatches: int) -> tuple[Trace, int]:
  """Runs one pipeline, with one layer per stage and one example per micro-batch."""
  given: Trace = [[] for _ in range(stages)]
  plan = pipeline.schedule(stages, microbatches, microbatches, 1)

  def layers(number, x, rest):
    note = lambda stage, x: given[int(stage)].append(int(x[0, 0, 0]))
    jax.debug.callback(note, number[0], x)
    return x + jnp.array([0.0, 1.0]), jnp.zeros(1)  # counts the stage

  names = np.arange(1.0, microbatches + 1, dtype=np.float32)
  x = np.stack([names, np.zeros_like(names)], -1)[:, None]
  with jax.set_mesh(meshes.device_mesh({"stage": stages}, jax.devices()[:stages])):
    run = jax.jit(lambda numbers, x: pipeline.pipelined(layers, numbers, x, (), plan)[0])
    out = np.asarray(run(np.arange(stages)[None], x))
    jax.effects_barrier()
  whole = np.stack([names, np.full_like(names, stages)], -1)[:, None]
  return given, int(np.sum(np.any(out != whole, (1, 2))))
