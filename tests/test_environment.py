"""JAX's environment variables: those it cannot use end in one line, its debug switches work."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMALL = ("--task=mean_estimation(8, 4)", "--mesh=data:2", "--batch_size=2", "--steps=2")
COMMANDS = {
  "run": SMALL,
  "compare": (*SMALL, "--methods=data_parallel(sgd(0.1), mean())"),
  "sweep": SMALL,
  "reproduce": ("--claim=ef21", "--scale=quick"),
  "bench": ("--cases=memory",),
  "applications": ("--cases=medicine",),
}
WRONG = {
  "JAX_PLATFORMS": ("garbage", "cuda", "tpu"),
  "JAX_NUM_CPU_DEVICES": ("abc", "0", "100000", "9" * 5000),
  "JAX_ENABLE_X64": ("maybe",),
  "JAX_DEFAULT_MATMUL_PRECISION": ("foo",),
  "JAX_PROCESS_ID": ("x",),
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


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
  """Exit code and stderr of all cases, which start at once."""
  folder = tmp_path_factory.mktemp("wrong")
  started = {
    (command, name, value): start(command, COMMANDS[command], folder, **{name: value})
    for command, name, value in CASES
  }
  found = {}
  for case, process in started.items():
    _, err = process.communicate(timeout=300)
    found[case] = process.returncode, err
  return found, folder


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case)[:60])
def test_a_variable_that_jax_cannot_use_is_one_line(case, ended):
  found, folder = ended
  code, err = found[case]
  assert code == 2, err
  (line,) = err.splitlines()
  assert line.startswith("error: ")
  assert case[1] in line
  assert len(line) <= 1000
  assert not [*folder.glob("runs/**/config.json")]  # nothing has begun


SWITCHES = {
  "JAX_DEBUG_NANS": "1",
  "JAX_DEBUG_INFS": "1",
  "JAX_DISABLE_JIT": "1",
  "JAX_NUMPY_RANK_PROMOTION": "raise",
  "JAX_NUMPY_DTYPE_PROMOTION": "strict",
  "JAX_CHECK_TRACER_LEAKS": "1",
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_debug_switch_changes_no_result(switch, tmp_path):
  """The same losses as without it, of a method that drops what is not finite on purpose."""
  method = "data_parallel(sgd(0.1), error_feedback(sum_mean(random_k(0.5))))"
  flags = (*SMALL, f"--method={method}", "--log_every=1", "--compilation_cache=off")
  plain = start("run", (*flags, "--out=plain"), tmp_path)
  with_it = start("run", (*flags, "--out=with"), tmp_path, **{switch: SWITCHES[switch]})
  for process in (plain, with_it):
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
  losses = lambda name: [
    float(row.partition('"loss": ')[2].partition(",")[0])
    for row in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
  ]
  assert losses("with") == pytest.approx(losses("plain"), rel=1e-6)
