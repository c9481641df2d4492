"""Checkpoints hold the whole state, notice damage, and fit other numbers of workers."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import Running
from table import EXACT, METHODS

from research.train import checkpoint


def saved(run: Running, folder, *steps: int) -> None:
  store = checkpoint.Checkpoints(folder, run.state)
  for step in steps:
    run.rounds(2)
    store.save(step, run.state, 0.0)
  store.wait()
  store.close()


def restored(run: Running, folder, warn=warnings.warn) -> Any:
  store = checkpoint.Checkpoints(folder, run.state)
  try:
    return store.restore(run.state, run.layout.state, warn)
  finally:
    store.close()


def equal(a, b) -> bool:
  return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), a, b)))


@pytest.mark.parametrize("executor", ["simulate", "spmd"])
@pytest.mark.parametrize("name", ["adam", "residual", "drifting"])
def test_a_state_comes_back_bit_for_bit_in_its_shardings(name, executor, tmp_path):
  run = Running(METHODS[name], executor, {"data": 8}, batch_size=None)
  saved(run, tmp_path, 2)
  fresh = Running(METHODS[name], executor, {"data": 8}, batch_size=None)
  step, state = restored(fresh, tmp_path)
  assert step == 2
  assert equal(state, run.state)
  shardings = lambda tree: jax.tree.map(lambda x: x.sharding, tree)
  assert shardings(state) == shardings(fresh.state)
  fresh.state = state
  assert equal(fresh.rounds(3).state, run.rounds(3).state)


@pytest.mark.parametrize("owners", [2, 4])
@pytest.mark.parametrize("name", ["adam", "residual", "drifting"])
def test_another_number_of_workers_keeps_shared_leaves_and_the_mean_of_rows(name, owners, tmp_path):
  run = Running(METHODS[name], "spmd", {"data": 8}, batch_size=None)
  saved(run, tmp_path, 2)
  fresh = Running(METHODS[name], "spmd", {"data": owners}, (240 // owners,) * owners, None)
  _, state = restored(fresh, tmp_path)
  private = jax.tree.leaves(run.layout.state)
  leaves = (jax.tree.leaves(run.state.method), jax.tree.leaves(state.method))
  for before, after, is_private in zip(*leaves, private, strict=True):
    if is_private:
      assert after.shape[0] == owners
      np.testing.assert_allclose(np.mean(after, 0), np.mean(before, 0), rtol=1e-5, atol=1e-7)
    else:
      np.testing.assert_array_equal(after, before)
  fresh.state = state
  assert bool(fresh.rounds(1).metrics["finite"])


def test_clients_keep_their_rows_when_the_cohort_changes(tmp_path):
  """Twelve clients served by four workers, then by six: rows go by client."""
  sizes = (20,) * 12
  run = Running(METHODS["residual"], "simulate", {"data": 4}, sizes)
  saved(run, tmp_path, 2)
  fresh = Running(METHODS["residual"], "simulate", {"data": 6}, sizes)
  _, state = restored(fresh, tmp_path)
  np.testing.assert_array_equal(state.method.link["w"], run.state.method.link["w"])


def damage(folder, how: str) -> None:
  files = [f for f in folder.rglob("*") if f.is_file()]
  if how == "bits":
    largest = max((f for f in files if "d" in f.parent.name), key=lambda f: f.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 0xFF
    largest.write_bytes(bytes(content))
  for file in files:
    if how == "cut":
      file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif how == "gone" and file.parent.name == "d":
      file.unlink()


# TensorStore's threads report a missing file to an event loop that has already given up.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("how", ["bits", "cut", "gone"])
def test_damage_falls_back_to_the_checkpoint_before(how, tmp_path):
  run = Running(METHODS["adam"], "simulate", {"data": 8}, batch_size=None)
  saved(run, tmp_path, 2, 4)
  damage(tmp_path / "4", how)
  told: list[str] = []
  fresh = Running(METHODS["adam"], "simulate", {"data": 8}, batch_size=None)
  step, state = restored(fresh, tmp_path, told.append)
  assert step == 2
  assert len(told) == 1
  assert "checkpoint 4 is damaged" in told[0]
  assert (tmp_path / "4.damaged").is_dir()
  fresh.state = state
  assert equal(fresh.rounds(2).state, run.state)


def test_no_whole_checkpoint_is_an_error_and_none_at_all_is_not(tmp_path):
  run = Running(METHODS["adam"], "simulate", {"data": 8}, batch_size=None)
  assert restored(run, tmp_path / "new") is None
  saved(run, tmp_path / "old", 2)
  damage(tmp_path / "old" / "2", "cut")
  with pytest.raises(checkpoint.CheckpointError, match="none of the checkpoints"):
    restored(run, tmp_path / "old", lambda line: None)


def test_another_method_is_no_match_and_no_damage(tmp_path):
  saved(Running(METHODS["adam"], "simulate", {"data": 8}, batch_size=None), tmp_path, 2)
  other = Running(METHODS["sgd"], "simulate", {"data": 8}, batch_size=None)
  with pytest.raises(checkpoint.CheckpointError, match="of another model or method"):
    restored(other, tmp_path)
  assert (tmp_path / "2").is_dir()


@pytest.mark.parametrize("name", EXACT)
def test_shared_state_does_not_grow_with_the_workers(name):
  def shapes(workers):
    sizes = (240 // workers,) * workers
    run = Running(METHODS[name], "simulate", {"data": workers}, sizes, None)
    return [leaf.shape for leaf in jax.tree.leaves(run.state)]

  assert shapes(2) == shapes(16)


def test_the_checksum_sees_any_one_element():
  x = np.arange(30, dtype=np.float32).reshape(2, 5, 3)
  base = checkpoint.checksum(jnp.asarray(x))
  for index in np.ndindex(x.shape):
    changed = x.copy()
    changed[index] = np.nextafter(changed[index], np.float32(99))
    assert checkpoint.checksum(jnp.asarray(changed)) != base
  swapped = x[:, ::-1]
  assert checkpoint.checksum(jnp.asarray(swapped)) != base
