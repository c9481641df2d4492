"""Medicine: hospitals together do as well as their patients pooled, and better than any alone."""

import jax
import numpy as np
import pytest
from problems import Running
from sklearn.metrics import roc_auc_score

from research.core import registry
from research.tasks.medicine import medicine

METHOD = "fed_avg(sgd(0.1), {}, period=5)"


def trained(task, hospitals: int, aggregator: str = "mean()", rounds: int = 300):
  """Metrics after some rounds of hospitals whose patients are sorted by what they differ in."""
  order = np.argsort(task.by, kind="stable")
  task = task._replace(train={name: leaf[order] for name, leaf in task.train.items()})
  sizes = [len(part) for part in np.array_split(order, hospitals)]
  method = registry.build("method", METHOD.format(aggregator))
  run = Running(method, "simulate", {"data": hospitals}, sizes, None, task=task)
  params = run.rounds(rounds).params()
  found = jax.jit(lambda: task.measure(params) | task.evaluate(params, task.test))()
  return {name: float(value) for name, value in found.items()}


def test_auc_counts_pairs_and_ties():
  rng = np.random.default_rng(0)
  scores, positive = rng.integers(0, 6, 50).astype(np.float32), rng.integers(0, 2, 50)
  found = jax.jit(medicine.auc)(scores, positive)
  assert found == pytest.approx(roc_auc_score(positive, scores), abs=1e-6)


@pytest.mark.slow
def test_hospitals_together_are_as_good_as_pooled():
  """By the diagnosis; alone, none decides as well, though its scores may order patients well."""
  logistic = registry.build("model", "logistic()")
  task = medicine.breast_cancer("label", model=logistic)
  pooled, together = trained(task, 1), trained(task, 5)
  assert pooled["auc"] > 0.98
  assert together["auc"] > pooled["auc"] - 0.01
  assert trained(task, 5, "noisy(mean(), clip=1.0, noise=0.05)")["auc"] > 0.95
  alone = [
    trained(medicine.breast_cancer("label", hospitals=5, only=n, model=logistic), 1)
    for n in range(1, 6)
  ]
  assert max(found["accuracy"] for found in alone) < together["accuracy"]


def test_diabetes():
  linear = registry.build("model", "linear(bias=True)")
  task = medicine.diabetes("features", model=linear)
  pooled, together = trained(task, 1)["rmse"], trained(task, 5)["rmse"]
  assert 50 < pooled < 60
  assert together < pooled + 1
  with pytest.raises(ValueError, match="none of the hospitals 1 to 5"):
    medicine.diabetes(hospitals=5, only=6, model=linear)
