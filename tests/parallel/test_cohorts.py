"""Whom the workers serve: Poisson sampling of a population, and DP-SGD on it against numpy."""

from pathlib import Path

import jax
import numpy as np
import pytest
from problems import Running, distance, regression

from research.core import registry
from research.parallel.cohorts import at_rate, cohorts
from research.training.assemble import check
from research.training.config import Config, UsageError
from research.training.reports import report

CLIENTS, PLACES, RATE = 240, 60, 0.1


def private_sgd(aggregator: str) -> Running:
  """One example per client, each client in a round with probability 0.1, at most 60 of them."""
  method = registry.build("method", f"data_parallel(sgd(0.5), {aggregator})")
  return Running(
    method, "simulate", {"data": PLACES}, (1,) * CLIENTS, batch_size=1, sampling_rate=RATE
  )


def test_every_client_takes_part_by_itself():
  """Binomial numbers, all clients and pairs of clients equally often, nobody twice in a round."""
  job = private_sgd("mean()").job
  rounds = 20_000
  owners, served = map(
    np.asarray,
    jax.jit(lambda key, numbers: cohorts(job, key, numbers))(jax.random.key(3), np.arange(rounds)),
  )
  counts = served.sum(1)
  assert all(len(set(row[:count])) == count for row, count in zip(owners, counts, strict=True))
  variance = CLIENTS * RATE * (1 - RATE)
  assert abs(counts.mean() - CLIENTS * RATE) < 4 * np.sqrt(variance / rounds)
  assert abs(counts.var() - variance) < 4 * variance * np.sqrt(2 / rounds)
  taking_part = np.zeros((rounds, CLIENTS), np.float32)
  np.add.at(taking_part, (np.arange(rounds)[:, None], owners), served)
  together = taking_part.T @ taking_part / rounds
  alone, pairs = np.diag(together), together[np.triu_indices(CLIENTS, 1)]
  assert np.abs(alone - RATE).max() < 5 * np.sqrt(RATE * (1 - RATE) / rounds)
  assert np.abs(pairs - RATE**2).max() < 5.5 * np.sqrt(RATE**2 * (1 - RATE**2) / rounds)


@pytest.mark.parametrize("rate", [2.0**-64, 1e-12, 1e-10, 2.0**-32, 1e-9, 0.3, 1.0])
def test_a_rate_is_drawn_as_it_is_accounted(rate, monkeypatch):
  """Of 64 bits exactly those below floor(rate 2^64), of 32 where there is such a number."""
  whole = int(rate * 2**64) if rate < 2.0**-32 else int(rate * 2**32) << 32
  numbers = [n for n in (0, whole - 1, whole, 2**32, 2**63, 2**64 - 1) if n < 2**64]
  words = [np.array([n >> shift & 2**32 - 1 for n in numbers], np.uint32) for shift in (32, 0)]
  monkeypatch.setattr(jax.random, "bits", lambda key, shape: words.pop(0))
  taken = at_rate(rate, jax.random.key(0), len(numbers))
  assert taken.tolist() == [n < whole for n in numbers]


@pytest.mark.slow
def test_dp_sgd_equals_numpy():
  """Per-example gradients, clipped, summed over those who take part, divided by the places."""
  clip = 0.7
  run = private_sgd(f"noisy(mean(), clip={clip}, noise=0.0)")
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), run.params())
  task = regression()
  x, y = (np.asarray(task.train[name], np.float64) for name in "xy")
  owners, served = map(
    np.asarray, cohorts(run.job, run.state.key, jax.numpy.arange(3, dtype=np.int32))
  )
  for round_ in range(3):
    total = jax.tree.map(np.zeros_like, params)
    for owner in owners[round_][served[round_]]:
      error = x[owner] @ params["w"] + params["b"] - y[owner]
      grads = {"b": error, "w": np.outer(x[owner], error)}
      norm = np.sqrt(sum(np.sum(g**2) for g in grads.values()))
      total = {k: total[k] + min(1, clip / norm) * grads[k] for k in total}
    params = {k: params[k] - 0.5 * total[k] / PLACES for k in params}
  assert distance(run.rounds(3).params(), params) <= 1e-5


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"sampling_rate": 0.1}, "needs --population and --executor=simulate"),
    ({"sampling_rate": 1.5}, r"not in \[0, 1\]"),
    ({"sampling_rate": 0.1, "population": 160, "mesh": "data:16"}, "rarely up to 45"),
  ],
)
def test_what_cannot_be_sampled_is_refused(changes, words):
  with pytest.raises(UsageError, match=words):
    check(Config(**changes))


def test_private_state_is_refused():
  with pytest.raises(ValueError, match="stores state per client"):
    private_sgd("error_feedback(gather_mean(top_k(0.1)))")


@pytest.mark.parametrize(
  ("spec", "words"),
  [
    ("d_psgd(sgd(0.1), gossip(ring()))", "neighbours are workers"),
    ("data_parallel(sgd(0.1), two_phase(int8()))", "stores a memory per worker"),
  ],
)
def test_what_belongs_to_workers_is_refused_for_clients(spec, words):
  with pytest.raises(ValueError, match=words):
    Running(registry.build("method", spec), "simulate", {"data": 4}, (20,) * 12)


@pytest.mark.parametrize(("dense", "shown"), [(0.0, False), (100.0, True)])
def test_the_closing_table_compares_only_with_what_a_mean_sends(dense, shown):
  """A single worker sends nothing, with any method."""
  wire = {
    "bytes_per_step_per_worker": {"data": dense / 4},
    "dense_bytes_per_step_per_worker": dense,
  }
  summary = {
    "stopped_because": "steps", "steps": 1, "train_loss": 1.0, "evaluated_on": "test", "eval": {},
    "steps_per_second": 1.0, "seconds": 1.0, "compile_seconds": 1.0, "aggregated": "whole leaves",
    "wire": wire,
  }  # fmt: skip
  table = report.closing_table(summary, Path("runs"))
  rows = [" ".join(line.split()) for line in table.splitlines()]
  assert ("of what the exact mean sends 25.00%" in rows) == shown
