"""Partitions the training set over workers or clients.

A partition maps (labels [N], workers, seed) to one array of indices per worker. The arrays are
disjoint and not empty, and together they cover range(N).
"""

from collections.abc import Callable

import jax
import numpy as np

from research.core import checks
from research.core.task import Batch

Partition = Callable[[np.ndarray, int, int], list[np.ndarray]]


def iid() -> Partition:
  """Permutes the examples at random and cuts them into parts whose sizes differ by at most one."""

  def partition(labels: np.ndarray, workers: int, seed: int) -> list[np.ndarray]:
    _check_workers(labels, workers)
    return np.array_split(np.random.default_rng(seed).permutation(len(labels)), workers)

  return partition


def in_order() -> Partition:
  """Cuts the examples, in their original order, into parts whose sizes differ by at most one.

  The seed is unused.
  """

  def partition(labels: np.ndarray, workers: int, seed: int) -> list[np.ndarray]:
    del seed
    _check_workers(labels, workers)
    return np.array_split(np.arange(len(labels)), workers)

  return partition


def sorted_() -> Partition:
  """Sorts the examples by label and cuts them into parts whose sizes differ by at most one.

  This is the most heterogeneous partition. Examples with equal labels keep their original order.
  The seed is unused.
  """

  def partition(labels: np.ndarray, workers: int, seed: int) -> list[np.ndarray]:
    del seed
    _check_workers(labels, workers)
    return np.array_split(_by_label(labels), workers)

  return partition


def shards(per_worker: int = 2) -> Partition:
  """Sorts the examples by label, cuts them into shards, and deals the shards out at random.

  With two shards per worker, most workers get two classes. Shard sizes differ by at most one.

  Args:
    per_worker: the number of shards per worker.

  Raises:
    ValueError: if per_worker is not a positive integer, or, when the partition is called, if there
      are fewer examples than shards.

  Reference:
    McMahan et al., 2016, arXiv:1602.05629, section 3 ("pathological non-IID").
  """
  checks.positive_integer("per_worker", per_worker)

  def partition(labels: np.ndarray, workers: int, seed: int) -> list[np.ndarray]:
    _check_workers(labels, workers)
    count = workers * per_worker
    if count > len(labels):
      raise ValueError(f"{workers} workers with {per_worker} shards each, {len(labels)} examples")
    pieces = np.array_split(_by_label(labels), count)
    deal = np.random.default_rng(seed).permutation(count).reshape(workers, per_worker)
    return [np.concatenate([pieces[i] for i in hand]) for hand in deal]

  return partition


def dirichlet(alpha: float) -> Partition:
  """Distributes each class over the workers in proportions drawn from Dirichlet(alpha).

  A small alpha gives each worker few classes and makes the sizes unequal; with a large alpha, all
  shares are almost equal. As in Yurochkin et al., the proportions of each class are drawn over
  workers; Hsu et al. (2019, arXiv:1909.06335) draw the proportions of each worker over classes,
  with equal sizes. Li et al. redraw until every worker has ten examples, which practically never
  happens with many workers. Here, a worker without examples takes one from the largest part
  instead.

  Args:
    alpha: the concentration of the Dirichlet distribution, > 0.

  Raises:
    ValueError: if alpha is not positive, or, when the partition is called, if the labels are not
      classes.

  Reference:
    Yurochkin et al., 2019, arXiv:1905.12022, section 4; Li et al., 2021, arXiv:2102.02079.
  """
  if not 0 < alpha < np.inf:
    raise ValueError(f"alpha={alpha} is not a positive number")

  def partition(labels: np.ndarray, workers: int, seed: int) -> list[np.ndarray]:
    _check_workers(labels, workers)
    if labels.dtype.kind not in "iub" or labels.ndim != 1:
      raise ValueError(f"dirichlet needs one integer class per example, got {_kind(labels)}")
    rng = np.random.default_rng(seed)
    parts = [[] for _ in range(workers)]
    for label in np.unique(labels):
      members = rng.permutation(np.flatnonzero(labels == label))
      ends = np.cumsum(rng.dirichlet(np.full(workers, alpha)))[:-1] * len(members)
      for part, share in zip(parts, np.split(members, ends.round().astype(int)), strict=True):
        part.append(share)
    return _none_empty([np.concatenate(part) for part in parts])

  return partition


def by_owner() -> Partition:
  """Makes one part per distinct label, in ascending order: each worker owns its examples.

  This partition is for tasks whose examples have owners, such as the fleets of `driving`. The seed
  is unused.

  Raises:
    ValueError: when the partition is called, if the labels are not numbers, or the number of
      workers differs from the number of distinct labels.
  """

  def partition(labels: np.ndarray, workers: int, seed: int) -> list[np.ndarray]:
    del seed
    _check_workers(labels, workers)
    order = _by_label(labels)
    owners, first = np.unique(labels[order], return_index=True)
    if len(owners) != workers:
      raise ValueError(f"by_owner: {len(owners)} owners of the examples for {workers} workers")
    return np.split(order, first[1:])

  return partition


def by_scaffold() -> Partition:
  """Keeps examples with equal labels together, and assigns the largest groups first.

  Each group goes to the part that is smallest so far. For `molecules`, the groups are Bemis-Murcko
  scaffolds and the parts are laboratories, so no two laboratories share a scaffold. The seed is
  unused.

  Raises:
    ValueError: when the partition is called, if there are fewer groups than workers, or the labels
      are not classes.
  """

  def partition(labels: np.ndarray, workers: int, seed: int) -> list[np.ndarray]:
    del seed
    _check_workers(labels, workers)
    if labels.dtype.kind not in "iub" or labels.ndim != 1:
      raise ValueError(f"by_scaffold needs one integer group per example, got {_kind(labels)}")
    groups = np.split(_by_label(labels), np.cumsum(np.unique(labels, return_counts=True)[1])[:-1])
    if len(groups) < workers:
      raise ValueError(f"{workers} workers for {len(groups)} groups: each needs at least one")
    parts: list[list[np.ndarray]] = [[] for _ in range(workers)]
    sizes = np.zeros(workers, int)
    for group in sorted(groups, key=len, reverse=True):
      smallest = sizes.argmin()
      parts[smallest].append(group)
      sizes[smallest] += len(group)
    return [np.concatenate(part) for part in parts]

  return partition


def stack(examples: Batch, parts: list[np.ndarray]) -> tuple[Batch, np.ndarray]:
  """Stacks the examples of each client, padded with zeros to the size of the largest part.

  Args:
    examples: the examples, numpy arrays [N, ...].
    parts: the indices of the examples of each of the P clients.

  Returns:
    The arrays [P, size of the largest part, ...] with the same dtypes, and the sizes of the parts,
    int32 [P].
  """
  sizes = np.array([len(part) for part in parts], np.int32)

  def rows(leaf: np.ndarray) -> np.ndarray:
    stacked = np.zeros((len(parts), sizes.max(), *leaf.shape[1:]), leaf.dtype)
    for row, part in zip(stacked, parts, strict=True):
      row[: len(part)] = leaf[part]
    return stacked

  return jax.tree.map(rows, examples), sizes


def _none_empty(parts: list[np.ndarray]) -> list[np.ndarray]:
  """Moves one example from the part that is currently largest to each empty part."""
  sizes = np.array([len(part) for part in parts])
  for i in np.flatnonzero(sizes == 0):
    largest = sizes.argmax()
    parts[i], parts[largest] = parts[largest][-1:], parts[largest][:-1]
    sizes[i], sizes[largest] = 1, sizes[largest] - 1
  return parts


def _by_label(labels: np.ndarray) -> np.ndarray:
  if labels.ndim != 1:
    raise ValueError(f"sorting needs one label per example, got {_kind(labels)}")
  return np.argsort(labels, kind="stable")


def _kind(labels: np.ndarray) -> str:
  return f"{labels.dtype} labels of shape {list(labels.shape)}"


def _check_workers(labels: np.ndarray, workers: int) -> None:
  if not 1 <= workers <= len(labels):
    raise ValueError(f"{workers} workers for {len(labels)} examples: each needs at least one")
