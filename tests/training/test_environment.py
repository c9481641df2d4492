"""JAX's environment variables: those it cannot use end in one line, its debug switches work.

Without jit a run takes a minute; what it stands on is tested here by itself.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aggregators import FLAT, PLAIN
from catalogue import METHODS
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from subset import slow_except

from research.comm.mesh import device_mesh
from research.core import registry
from research.core.task import Data
from research.parallel import sharded
from research.parallel.job import Job
from research.parallel.simulate import simulate
from research.tasks import sampling
from research.tasks.convex.synthetic import mean_estimation

ROOT = Path(__file__).parents[2]
SMALL = ("--task=mean_estimation(8, 4)", "--mesh=data:2", "--batch_size=2", "--steps=2")
COMMANDS = {
  "run": SMALL,
  "compare": (*SMALL, "--methods=data_parallel(sgd(0.1), mean())"),
  "sweep": SMALL,
  "reproduce": ("--claim=ef21", "--scale=quick"),
  "bench": ("--cases=memory",),
}
WRONG = {
  "JAX_PLATFORMS": ("garbage", "cuda", "tpu"),
  "JAX_NUM_CPU_DEVICES": ("abc", "0", "100000", "9" * 5000),
  "JAX_ENABLE_X64": ("maybe",),
  "JAX_DEFAULT_MATMUL_PRECISION": ("foo",),
  "JAX_NUM_PROCESSES": ("x",),
}
CASES = [(command, "JAX_PLATFORMS", "garbage") for command in COMMANDS] + [
  ("run", name, value) for name, values in WRONG.items() for value in values if value != "garbage"
]


def start(command: str, flags: tuple[str, ...], folder: Path, **variables: str) -> subprocess.Popen:
  paths = {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache")}
  clean = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "SLURM_"))}
  return subprocess.Popen(
    [sys.executable, str(ROOT / "experiments" / f"{command}.py"), *flags],
    cwd=folder,
    env=clean | {"JAX_PLATFORMS": "cpu"} | paths | variables,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


QUICK = (("run", "JAX_PLATFORMS", "garbage"), ("run", "JAX_NUM_CPU_DEVICES", "abc"))


@pytest.mark.parametrize(
  ("command", "name", "value"),
  slow_except(QUICK, CASES),
  ids=["-".join(case)[:60] for case in CASES],
)
def test_a_variable_that_jax_cannot_use_is_one_line(command, name, value, tmp_path):
  process = start(command, COMMANDS[command], tmp_path, **{name: value})
  _, err = process.communicate(timeout=300)
  assert process.returncode == 2, err
  *before, line = err.splitlines()
  assert not before or value == "tpu"  # libtpu, where it is installed, writes lines of its own
  assert "Traceback" not in err
  assert line.startswith("error: ")
  assert name in line
  assert len(line) <= 1000
  assert not [*tmp_path.glob("runs/**/config.json")]  # nothing has begun


SWITCHES = {
  "with jit": {
    "JAX_DEBUG_NANS": "1",
    "JAX_DEBUG_INFS": "1",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_CHECK_TRACER_LEAKS": "1",
  },
  "without jit": {"JAX_DISABLE_JIT": "1"},
}


@pytest.mark.slow
@pytest.mark.parametrize("switches", SWITCHES)
def test_debug_switches_change_no_result(switches, tmp_path):
  """The same losses as without it, of a method that drops what is not finite on purpose."""
  method = "data_parallel(sgd(0.1), error_feedback(sum_mean(random_k(0.5))))"
  flags = (*SMALL, f"--method={method}", "--log_every=1", "--compilation_cache=off")
  fast = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_NUM_CPU_DEVICES": "1"}
  plain = start("run", (*flags, "--out=plain"), tmp_path, **fast)
  with_it = start("run", (*flags, "--out=with"), tmp_path, **fast, **SWITCHES[switches])
  for process in (plain, with_it):
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
  losses = lambda name: [
    float(row.partition('"loss": ')[2].partition(",")[0])
    for row in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
  ]
  assert losses("with") == pytest.approx(losses("plain"), rel=1e-6)


@pytest.fixture
def strict():
  """What is traced promotes no ranks, and no constant of it is an error as NaN."""
  with jax.numpy_rank_promotion("raise"), jax.debug_nans(True), jax.debug_infs(True):
    yield


@pytest.mark.parametrize("name", FLAT | PLAIN)
def test_an_aggregator_is_traced_with_the_switches_on(name, strict):
  aggregator = registry.build("aggregator", (FLAT | PLAIN)[name])
  shapes = {"w": (8, 4, 6), "b": (8, 3)}
  tree = {leaf: jax.ShapeDtypeStruct(shape, jnp.float32) for leaf, shape in shapes.items()}

  def aggregate(tree):
    return aggregator.aggregate(tree, aggregator.init(tree), jax.random.key(0)).value

  value = jax.eval_shape(jax.vmap(aggregate, axis_name="data"), tree)
  assert {leaf: x.shape for leaf, x in value.items()} == shapes


VARIANTS: dict[str, dict[str, Any]] = {
  "plain": {},
  "population": {},
  "sampled": {"sampling_rate": 0.4},
  "lossy": {"dropout": 0.2},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["momentum", "accumulation"])
def test_a_round_is_traced_with_the_switches_on(name, variant, strict):
  owners = 8 if variant in ("population", "sampled") else 4
  task, sizes = mean_estimation(16, 5), np.full(owners, 2)
  executor = simulate(Job(METHODS[name], task, {"data": 4}, sizes, 1, **VARIANTS[variant]))
  key = jax.eval_shape(lambda: jax.random.key(0))
  state = jax.eval_shape(executor.init, key)
  rows = lambda x: jax.ShapeDtypeStruct((owners, 2, *x.shape[1:]), x.dtype)
  data = Data(jax.tree.map(rows, task.train), jax.ShapeDtypeStruct((owners,), jnp.int32), key)
  after, metrics = executor.run.trace(state, data, rounds=2).out_info
  assert metrics["loss"].shape == (2 * METHODS[name].local_steps,)
  assert jax.tree.structure(after) == jax.tree.structure(state)


@pytest.mark.slow
def test_without_jit_samples_are_the_same_and_results_lie_where_they_are_to():
  draw = lambda: sampling.epoch_sample(jnp.int32(10), jnp.int32(7), jax.random.key(3), batch_size=4)
  mesh = device_mesh({"data": 4})
  rows, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
  want = draw()
  with jax.disable_jit():
    found = draw()
    double = sharded.jit(lambda x, n: (n * x, x.sum()), (rows, everywhere), static_argnames="n")
    doubled, total = double(jnp.arange(8.0), n=2)
  np.testing.assert_array_equal(found, want)
  np.testing.assert_array_equal(doubled, 2 * np.arange(8))
  assert doubled.sharding == rows
  assert total.sharding == everywhere
