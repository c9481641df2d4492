"""The table of a state's shardings: those that the executors make, and no device is needed."""

import re

import jax
import pytest
from subset import slow_except

from research.training import assemble
from research.training.config import Config
from research.training.reports import explain

MEAN = "data_parallel(adam(1e-3), mean())"
METHOD = "data_parallel(sgd(0.1, momentum=0.9), error_feedback(two_phase(int8())))"


@pytest.mark.parametrize(
  ("executor", "mesh"),
  slow_except(
    [("spmd", "data:2,fsdp:2")],
    [("spmd", "data:2,fsdp:2"), ("simulate", "data:4"), ("pmap", "data:4")],
  ),
)
def test_it_says_what_lies_where(executor, mesh):
  config = Config(method=MEAN, executor=executor, mesh=mesh)
  problem = assemble.assemble(config, assemble.check(config))
  state = problem.executor.init(jax.random.key(0))
  held = [leaf.addressable_shards[0].data for leaf in jax.tree.leaves(state)]
  found = explain.rows(config)
  assert [row.bytes for row in found] == [x.size * x.dtype.itemsize for x in held]
  assert "method.params.output.kernel" in [row.name for row in found]


def test_it_fits_a_screen_and_adds_up():
  config = Config(method=METHOD, executor="spmd", mesh="data:2,fsdp:2,slice:2")
  lines = explain.explanation(config).splitlines()
  assert max(map(len, lines)) <= 100
  (row,) = (line for line in lines if line.endswith("16,384") and "'slice'" in line)
  assert row.split()[:5] == ["method.link.memory.hidden_0.kernel", "[4,", "2,", "64,", "64]"]
  bytes_of = lambda line: int(re.sub(r".* |,", "", line))
  parts = lines[lines.index("", 2) + 1 :]
  assert bytes_of(parts[-2]) == sum(map(bytes_of, parts[:-2]))
  assert bytes_of(parts[-1]) == 8 * bytes_of(parts[-2])


def test_a_name_too_long_has_a_line_of_its_own():
  lines = explain.table([("a" * 90, "x" * 20, "1"), ("b", "y", "22")])
  assert lines == ["a" * 90, " " * 3 + "x" * 20 + "   1", "b  y" + " " * 21 + "22"]
