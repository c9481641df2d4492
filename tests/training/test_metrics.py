"""Evaluation is the mean over all data; copies that differ are found; rows that are kept."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue import METHODS
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from problems import Running, regression

from research.comm import mesh as meshes
from research.training import metrics
from research.training.hooks.replicas import replica_check
from research.training.reports import report


@pytest.mark.parametrize(
  ("executor", "axes", "sizes"),
  [
    ("simulate", {"data": 8}, (30,) * 8),
    ("simulate", {"data": 3}, (1, 2, 237)),
    ("spmd", {"data": 8}, (1, 2, 3, 4, 50, 60, 70, 50)),
    ("spmd", {"slice": 2, "data": 2, "fsdp": 2}, (10, 100, 70, 60)),
    ("simulate", {"data": 4}, (20,) * 12),
  ],
)
def test_evaluation_is_the_mean_over_all_examples(executor, axes, sizes):
  task = regression()._replace(chunk=7)
  run = Running(METHODS["sgd"], executor, axes, sizes)
  evaluate = metrics.evaluator(task, run.data.sizes.sharding.mesh)
  params = run.executor.params(run.state)
  found = evaluate(params, run.data, gradient=True)
  loss, gradient = jax.jit(jax.value_and_grad(task.loss))(run.params(), task.train, None)
  np.testing.assert_allclose(found["loss"], loss, rtol=1e-5)
  norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(gradient)))
  np.testing.assert_allclose(found["gradient_norm"], norm, rtol=1e-5)
  assert "gradient_norm" not in evaluate(params, run.data)


def replicated(mesh, copies):
  """An array that claims to be the same on all devices and need not be."""
  sharding = NamedSharding(mesh, P())
  arrays = [jax.device_put(c, d) for c, d in zip(copies, mesh.devices.flat, strict=True)]
  return jax.make_array_from_single_device_arrays(copies[0].shape, sharding, arrays)


@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.uint8, np.bool_, jnp.bfloat16])
def test_a_flipped_bit_on_one_device_is_found_and_named(dtype):
  mesh = meshes.device_mesh({"data": 8})
  good = np.arange(24).reshape(4, 6).astype(dtype)
  bad = good.copy()
  bad[1, 2] = 0
  whole = {"a": replicated(mesh, [good] * 8), "b": replicated(mesh, [good] * 8)}
  broken = {"a": whole["a"], "b": replicated(mesh, [*[good] * 5, bad, good, good])}
  differing = replica_check(whole)
  assert differing(whole) == []
  assert differing(broken) == ["['b']"]


def test_private_rows_and_cut_leaves_are_compared_only_with_their_copies():
  run = Running(METHODS["residual"], "spmd", {"data": 4, "fsdp": 2}, (60,) * 4)

  def unlike(x):
    """Rows that differ, as they lie."""
    rows = np.arange(len(x), dtype=x.dtype).reshape(-1, *[1] * (x.ndim - 1))
    return jax.device_put(np.asarray(x) + rows, x.sharding)

  link = jax.tree.map(unlike, run.state.method.link)
  run.state = run.state._replace(method=run.state.method._replace(link=link))
  differing = replica_check(run.state)
  assert differing(run.state) == []
  b = run.state.method.params["b"]  # [3], not cut: eight copies
  copies = [np.asarray(b) + (i == 6) for i in range(8)]
  wrong = replicated(b.sharding.mesh, copies)
  state = run.state.method._replace(params={**run.state.method.params, "b": wrong})
  assert differing(run.state._replace(method=state)) == [".method.params['b']"]


def test_an_earlier_part_is_kept_up_to_where_it_goes_on(tmp_path):
  rows = [{"step": step, "loss": 1.0, "seconds": step / 10} for step in range(1, 9)]
  path = tmp_path / "metrics.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9, "lo')
  log = report.Metrics(tmp_path, 5, False)
  assert log.last == rows[4]
  log.write(rows[6:7])
  log.close()
  assert report.read_rows(path) == [*rows[:5], rows[6]]
  anew = report.Metrics(tmp_path, 0, False)
  anew.close()
  assert anew.last is None
  assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 100, 1000])
def test_rows_of_a_plot_are_few_and_evenly_spaced(count):
  found = [row["step"] for row in report.thinned(({"step": n} for n in range(count)), 8)]
  assert len(found) <= 9
  assert len(found) >= min(count, 4)
  assert found[-1:] == [*range(count)][-1:]
  assert found[:1] == [*range(count)][:1]
  assert len(set(np.diff(found[:-1]))) <= 1
