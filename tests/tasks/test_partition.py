"""Partitions: disjoint, complete, none empty; and what each is known for."""

import numpy as np
import pytest

from research.tasks import partition

PARTITIONS = {
  "iid": partition.iid(),
  "sorted": partition.sorted_(),
  "shards": partition.shards(),
  "shards(3)": partition.shards(per_worker=3),
  "dirichlet(0.01)": partition.dirichlet(0.01),
  "dirichlet(0.5)": partition.dirichlet(0.5),
  "dirichlet(1000)": partition.dirichlet(1000),
}
RANDOM = [name for name in PARTITIONS if name != "sorted"]


def labels(n, classes=10, seed=0):
  return np.random.default_rng(seed).integers(0, classes, n).astype(np.int32)


def classes_per_worker(y, parts):
  return np.array([len(np.unique(y[part])) for part in parts])


@pytest.mark.parametrize("name", PARTITIONS)
@pytest.mark.parametrize(("n", "workers"), [(3, 1), (100, 1), (60, 20), (1003, 8), (2000, 300)])
def test_disjoint_complete_and_none_empty(name, n, workers):
  parts = PARTITIONS[name](labels(n), workers, 0)
  assert len(parts) == workers
  assert all(len(part) > 0 for part in parts)
  np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(n))


@pytest.mark.parametrize("name", PARTITIONS)
def test_function_of_the_seed(name):
  y = labels(500)
  first, again, other = (PARTITIONS[name](y, 7, seed) for seed in (0, 0, 1))
  assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
  same = all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))
  assert same == (name not in RANDOM)


@pytest.mark.parametrize("name", PARTITIONS)
@pytest.mark.parametrize("workers", [0, 11])
def test_more_workers_than_examples_are_refused(name, workers):
  with pytest.raises(ValueError, match=f"{workers} workers for 10 examples"):
    PARTITIONS[name](labels(10), workers, 0)


@pytest.mark.parametrize("name", ["iid", "sorted"])
def test_sizes_differ_by_at_most_one(name):
  sizes = [len(part) for part in PARTITIONS[name](labels(1003), 8, 0)]
  assert sorted(set(sizes)) == [125, 126]


def test_sorted_sorts():
  y = np.random.default_rng(0).standard_normal(100)
  parts = partition.sorted_()(y, 3, 0)
  assert np.all(np.diff(y[np.concatenate(parts)]) >= 0)


def test_shards_hold_few_classes_and_equal_counts():
  y = np.repeat(np.arange(10), 60).astype(np.int32)
  parts = partition.shards(2)(y, 30, 0)  # shards of 10, so that none straddles two classes
  assert {len(part) for part in parts} == {20}
  assert classes_per_worker(y, parts).max() == 2


def test_dirichlet_goes_from_one_owner_to_equal_shares():
  y = labels(20000)
  few, some, even = (
    classes_per_worker(y, partition.dirichlet(alpha)(y, 20, 0)).mean() for alpha in (0.01, 0.5, 1e4)
  )
  assert few < 2 < 5 < some < even == 10
  sizes = np.array([len(part) for part in partition.dirichlet(1e4)(y, 20, 0)])
  assert abs(sizes - 1000).max() < 50


def test_by_scaffold_keeps_groups_whole_and_parts_even():
  y = np.repeat(np.arange(40), np.arange(1, 41)).astype(np.int32)
  parts = partition.by_scaffold()(np.random.default_rng(0).permutation(y), 6, 0)
  np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(len(y)))
  y = np.random.default_rng(0).permutation(y)
  owners = [set(y[part]) for part in parts]
  assert sum(map(len, owners)) == 40
  sizes = [len(part) for part in parts]
  assert max(sizes) - min(sizes) <= 5


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: partition.by_scaffold()(labels(50, 3), 4, 0), "4 workers for 3 groups"),
    (
      lambda: partition.by_scaffold()(np.zeros(9), 2, 0),
      "by_scaffold needs one integer group per example, got float64 labels",
    ),
    (lambda: partition.dirichlet(0.0), "alpha=0.0 is not a positive number"),
    (lambda: partition.shards(0), "per_worker=0 is not a positive integer"),
    (
      lambda: partition.dirichlet(1.0)(np.zeros(9), 2, 0),
      "dirichlet needs one integer class per example, got float64 labels",
    ),
    (
      lambda: partition.sorted_()(np.zeros((9, 2)), 2, 0),
      r"sorting needs one label per example, got float64 labels of shape \[9, 2\]",
    ),
    (lambda: partition.shards(5)(labels(9), 2, 0), "2 workers with 5 shards each, 9 examples"),
  ],
)
def test_refusals(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_stack_pads_with_zeros_and_keeps_dtypes():
  examples = {
    "x": {"index": np.arange(10, dtype=np.int32).reshape(5, 2) + 1, "value": np.ones((5, 2))},
    "y": np.arange(1, 6, dtype=np.uint8),
  }
  parts = [np.array([4]), np.array([2, 0, 1]), np.array([3])]
  stacked, sizes = partition.stack(examples, parts)
  np.testing.assert_array_equal(sizes, [1, 3, 1])
  np.testing.assert_array_equal(stacked["y"], [[5, 0, 0], [3, 1, 2], [4, 0, 0]])
  np.testing.assert_array_equal(stacked["x"]["index"][0], [[9, 10], [0, 0], [0, 0]])
  assert (sizes.dtype, stacked["y"].dtype) == (np.int32, np.uint8)
  assert stacked["x"]["value"].dtype == np.float64
