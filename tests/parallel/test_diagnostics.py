"""Diagnostics of rounds: exact against numpy, the same in all executions, nothing when off."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from catalogue import METHODS, by_period
from problems import Running, distance, regression, split
from side_by_side import regressions, side_by_side
from subset import slow_except

from research.aggregate.feedback import error_feedback
from research.aggregate.gather_mean import gather_mean
from research.aggregate.mean import mean
from research.compress.sparsify import top_k
from research.core import registry
from research.methods.data_parallel import data_parallel
from research.methods.local import local_sgd
from research.parallel import diagnostics
from research.parallel.job import Job, resolved
from research.parallel.simulate import simulate

RATE, W, STEPS = 0.05, 4, 3
AXES = {"data": W}


def gradients(params, examples):
  """Of each worker at its own model, float64: {"w": [W, 6, 3], "b": [W, 3]}."""
  x, y = (np.asarray(examples[name], np.float64) for name in ("x", "y"))
  error = np.einsum("wni,wio->wno", x, params["w"]) + params["b"][:, None] - y
  n = x.shape[1]
  return {"w": np.einsum("wni,wno->wio", x, error) / n, "b": error.sum(1) / n}


def largest(x, fraction):
  """Each worker's entries of the largest modulus, as many as the fraction of a leaf."""
  flat = x.reshape(W, -1)
  count = round(fraction * flat.shape[1])
  kept = np.argsort(-np.abs(flat), 1, kind="stable")[:, :count]
  found = np.zeros_like(flat)
  np.put_along_axis(found, kept, np.take_along_axis(flat, kept, 1), 1)
  return found.reshape(x.shape)


def square(tree):
  """The squared norm of each worker [W]."""
  return np.sum([np.sum(x.reshape(W, -1) ** 2, 1) for x in tree.values()], 0)


def minus(a, b):
  return {name: a[name] - b[name] for name in a}


def start(running):
  one = jax.device_get(running.executor.params(running.state))
  return {name: np.repeat(np.asarray(x, np.float64)[None], W, 0) for name, x in one.items()}


def check(found, want):
  assert set(want) == set(found)
  for name, values in want.items():
    np.testing.assert_allclose(found[name], values, rtol=2e-5, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("rule", slow_except(["mean()"], ["mean()", "median()"]))
def test_an_exchange_that_loses_nothing_has_no_error(rule):
  """Also where workers weigh by their numbers of examples, and where each counts once."""
  method = data_parallel(optax.sgd(RATE), registry.build("aggregator", rule))
  sizes = (30, 60, 90, 60) if W == 4 else (30, 90) * (W // 2)
  norms = Running(method, "simulate", AXES, sizes, None, diagnostics=1).rounds(2).metrics["norms"]
  assert max(norms["missed"]) <= 1e-12 * min(norms["asked"])
  assert min(norms["asked"]) > 0


@pytest.mark.parametrize("executor", slow_except(["simulate"], ["simulate", "spmd", "pmap"]))
def test_compressed_gradients_are_measured_as_numpy_does(executor):
  method = data_parallel(optax.sgd(RATE), error_feedback(gather_mean(top_k(0.5))))
  run = Running(method, executor, AXES, (60,) * W, None, diagnostics=1)
  examples, _ = split(regression(), (60,) * W)
  params = start(run)
  memory = {name: np.zeros_like(x) for name, x in params.items()}
  want = {name: [] for name in (*diagnostics.NAMES, diagnostics.GRADIENT)}
  for _ in range(STEPS):
    grads = gradients(params, examples)
    corrected = {name: grads[name] + memory[name] for name in grads}
    sent = {name: largest(x, 0.5) for name, x in corrected.items()}
    memory = minus(corrected, sent)
    change = {name: np.broadcast_to(RATE * x.mean(0), x.shape) for name, x in sent.items()}
    params = minus(params, change)
    values = (minus(grads, sent), grads, memory, None, change, grads)
    for name, tree in zip(want, values, strict=True):
      want[name].append(0.0 if tree is None else square(tree).mean())
  check(run.rounds(STEPS).metrics["norms"], want)


@pytest.mark.parametrize("executor", ["simulate", "spmd"])
def test_the_spread_of_local_models_is_that_of_numpy(executor):
  run = Running(
    local_sgd(optax.sgd(RATE), mean(), period=2), executor, AXES, (60,) * W, None, diagnostics=1
  )
  examples, _ = split(regression(), (60,) * W)
  params, spread, update = start(run), [], []
  for _ in range(STEPS):
    before = params
    for _ in range(2):
      grads = gradients(params, examples)
      params = {name: params[name] - RATE * grads[name] for name in grads}
    common = {name: np.broadcast_to(x.mean(0), x.shape) for name, x in params.items()}
    spread.append(square(minus(params, common)).mean())
    params = common
    update.append(square(minus(params, before)).mean())
  found = run.rounds(STEPS).metrics["norms"]
  np.testing.assert_allclose(found["spread"], spread, rtol=2e-5)
  np.testing.assert_allclose(found["update"], update, rtol=2e-5)
  assert np.all(np.asarray(found["missed"]) == 0)
  assert found[diagnostics.GRADIENT].shape == (2 * STEPS,)


def by_exchange() -> list[str]:
  """One method per way to exchange: those that split share one `sync` and differ in aggregators."""
  found = {}
  for name, method in METHODS.items():
    kind = type(method.exchange) if method.splits else type(method)
    found.setdefault(kind, name)
  return [*found.values()]


TOGETHER = {0: ("sgd",)} | by_period([name for name in by_exchange() if name != "sgd"])


@pytest.mark.parametrize("row", slow_except([0], TOGETHER))
def test_a_run_is_the_same_with_diagnostics(row):
  """Whatever a method exchanges, in whichever branch, it is recorded and changes nothing."""
  names = TOGETHER[row]
  arguments = (
    side_by_side({name: METHODS[name] for name in names}),
    *("simulate", {"slice": 2, "data": 4}),
  )
  plain = Running(*arguments, task=regressions(names)).rounds(3)
  seen = Running(*arguments, task=regressions(names), diagnostics=1).rounds(3)
  assert jax.tree.structure(plain.state) == jax.tree.structure(seen.state)
  got, want = seen.params(), plain.params()
  for name in names:
    assert distance(got[name], want[name]) <= 1e-6, name
  for values in jax.tree.leaves(seen.metrics["norms"]):
    assert np.isfinite(values).all()
  assert set(plain.metrics) == {"loss", "finite"}


@pytest.mark.slow
def test_every_other_method_is_traced_with_diagnostics():
  examples, sizes = split(regression(), (30,) * 8)
  for name in METHODS.keys() - by_exchange():
    job = Job(METHODS[name], regression(), {"slice": 2, "data": 4}, sizes, 8, diagnostics=1)
    executor = simulate(resolved(job))
    begin = jax.eval_shape(executor.init, jax.random.key(0))
    data = executor.place(examples, sizes, jax.random.key(1))
    state, metrics = jax.eval_shape(partial(executor.run, rounds=3), begin, data)
    assert jax.tree.structure(state) == jax.tree.structure(begin), name
    assert {*diagnostics.NAMES} <= {*metrics["norms"]}, name


def test_only_rounds_with_a_row_are_measured():
  method = local_sgd(optax.sgd(RATE), mean(), period=2)
  run = Running(method, "simulate", AXES, (60,) * W, None, diagnostics=6).rounds(8)
  measured = np.asarray(run.metrics["norms"]["update"]) > 0
  assert measured.tolist() == [False, False, True, False, False, True, False, True]


def test_due_rounds_are_counted_from_the_run_s_first_step():
  job = Job(local_sgd(optax.sgd(RATE), mean(), period=4), regression(), AXES, np.full(W, 60), 8)
  job = job._replace(first_round=10, first_step=30, diagnostics=10)
  # their steps: 31-34, 35-38, 39-42, 43-46, 47-50, 51-54
  due = diagnostics.due(job, jnp.arange(10, 16))
  assert due.tolist() == [False, False, True, False, True, True]


def test_off_is_the_same_program():
  lowered = []
  for every in (0, 5):
    run = Running(METHODS["sgd"], "simulate", AXES, (60,) * W, diagnostics=every)
    lowered.append(run.executor.run.lower(run.state, run.data, rounds=2).as_text())
  plain = Running(METHODS["sgd"], "simulate", AXES, (60,) * W)
  assert lowered[0] == plain.executor.run.lower(plain.state, plain.data, rounds=2).as_text()
  assert lowered[0] != lowered[1]
