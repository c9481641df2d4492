"""ZeRO divides the 16 bytes per parameter that Adam needs by the number of devices, in stages.

Paper: Rajbhandari et al. 2019, ZeRO, arXiv:1910.02054, section 3.1 and figure 1.

Same: the memory that XLA allocates on each of N = 8 devices for parameters, gradients and Adam's
two moments, from the memory analysis of the compiled step. Stage 1 shards the moments into N parts,
stage 2 also the gradients, and stage 3 also the parameters.

Scaled: a perceptron of about a million parameters. All arrays are float32, so 4 + 4 + 8 bytes
replace the 2 + 2 + 12 bytes of the paper's mixed precision. The sum is 16 bytes without ZeRO and
16/N in stage 3, as in the paper; stages 1 and 2 have 8 + 8/N and 4 + 12/N bytes, whereas the paper
has 4 + 12/N and 2 + 14/N. Gradients are measured in a program that computes only the gradient,
sharded as in the step, since the step reuses the gradients' memory as early as possible. The step's
temporaries, which include gradients and the full matrices gathered for XLA:CPU, are shown without
gates.
"""

from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec as P

from experiments.claims.support.claim import Beside, Findings, Gate, Lab, Line, Panel, with_devices
from experiments.reports import ahead
from research.core.spec import calls
from research.parallel import sharded, workers
from research.parallel.local_phase import measured_and_clipped_grad
from research.training import assemble
from research.training.config import Config

TITLE = "ZeRO cuts the 16 bytes per parameter of training with Adam by the number of devices"
DATASET = ""
FULL = {"devices": 8, "hidden": [1024, 1024], "within": 0.03}
QUICK = {"hidden": [1024]}
SEEDS = {}  # the claim uses a single seed
X64 = False


class Bytes(NamedTuple):
  """The bytes on one device, per parameter of the model."""

  state: float  # parameters and Adam's moments
  grads: float
  temporaries: float  # temporaries of the full step, including gradients


def measure(lab: Lab) -> Findings:
  """Measures the bytes per parameter in every stage."""
  n, within = lab["devices"], lab["within"]
  found = with_devices(n, stages, n, lab["hidden"])
  held = [of.state + of.grads for of in found]
  formula = [16, 8 + 8 / n, 4 + 12 / n, 16 / n]
  names = ["whole", "stage 1", "stage 2", "stage 3"]
  paper = [16, None, None, 16 / n]
  numbers = range(4)
  return Findings(
    [Beside(f"{name}: bytes per parameter", held[i], paper[i]) for i, name in enumerate(names)]
    + [
      Beside(f"{name}: temporaries of the step", found[i].temporaries)
      for i, name in enumerate(names)
    ],
    [
      Gate(f"{name}: relative error of the formula", abs(held[i] / formula[i] - 1), "<=", within)
      for i, name in enumerate(names)
    ],
    [
      Panel(
        f"on each of {n} devices",
        "stage of ZeRO (0: none)",
        "bytes per parameter",
        [
          Line("parameters, gradients, Adam", numbers, held, "o"),
          Line("parameters and Adam", numbers, [of.state for of in found], "s"),
          Line("gradients", numbers, [of.grads for of in found], "^"),
          Line("16, 8 + 8/N, 4 + 12/N, 16/N", numbers, formula),
        ],
      )
    ],
  )


def stages(devices: int, hidden: list[int]) -> list[Bytes]:
  """Returns the bytes without ZeRO, and then the bytes of the three stages of ZeRO."""
  config = Config(
    task="digits()",
    model=str(calls.mlp(hidden=hidden)),
    method="data_parallel(adam(1e-3), mean())",
    executor="spmd",
    mesh=f"data:{devices}",
    batch_size=devices,
  )
  cut = config.replace(mesh=f"data:1,fsdp:{devices}")
  return [compiled(config), *(compiled(cut.replace(zero=zero)) for zero in (1, 2, 3))]


def compiled(config: Config) -> Bytes:
  """Compiles one step, and the gradient alone with the same sharding."""
  problem = assemble.assemble(config, assemble.check(config))
  job = problem.job
  state, data = ahead.arguments(problem)
  step: Any = problem.executor.run.lower(state, data, rounds=1).compile().memory_analysis()
  inside = sharded.inside(job.axes, sharded.cut_of(job.axes, job.task), job.zero)
  gradient = measured_and_clipped_grad(job, inside)
  own = jax.shard_map(
    lambda *args: gradient(*args)[1],
    mesh=state.round.sharding.mesh,
    in_specs=P(),
    out_specs=P(),
    axis_names={"data"},
    check_vma=False,
  )
  _, batch, key = workers.of_loss(job)
  grads: Any = jax.jit(own).lower(state.method.params, batch, key).compile().memory_analysis()
  count = sum(leaf.size for leaf in jax.tree.leaves(state.method.params))
  sizes = step.output_size_in_bytes, grads.output_size_in_bytes, step.temp_size_in_bytes
  return Bytes(*(size / count for size in sizes))
