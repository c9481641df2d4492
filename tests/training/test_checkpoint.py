"""Checkpoints hold the whole state, notice damage, and fit other numbers of workers."""

import functools
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue import EXACT, METHODS
from jax.experimental import multihost_utils
from problems import EXECUTORS, Running, regression
from subset import slow_except
from test_rules import perceptron

from research.aggregate.blockwise import Cut, split_leaf
from research.aggregate.chunks import cut as cut_chunks
from research.comm import mesh as meshes
from research.core import registry
from research.core.task import TrainState
from research.parallel import inference, resize, sharded, workers
from research.parallel import layout as layouts
from research.parallel.job import Job
from research.training.checkpoint import checkpoint, integrity, manager

KEY = jax.random.key(0)


def store_of(run: Any, folder) -> checkpoint.Checkpoints:
  placed = resize.placed(run.job, run.layout.state, run.state)
  return checkpoint.Checkpoints(folder, run.state, placed)


def saved(run: Any, folder, *steps: int) -> None:
  """Two rounds before each, of what can run."""
  store = store_of(run, folder)
  for step in steps:
    if isinstance(run, Running):
      run.rounds(2)
    store.save(step, run.state, 0.0)
  store.wait()
  store.close()


def restored(run: Any, folder, warn=pytest.fail) -> Any:
  store = store_of(run, folder)
  try:
    return store.restore(run.state, warn)
  finally:
    store.close()


@functools.cache
def made(name: str, executor: str) -> Running:
  return Running(METHODS[name], executor, {"data": 8}, batch_size=None)


def running(name: str, executor: str = "simulate") -> Running:
  """Eight workers at their start; what they compile is kept for the next test."""
  return made(name, executor).again()


def equal(a, b) -> bool:
  return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), a, b)))


def test_a_save_leaves_the_preemption_service_to_the_loop(tmp_path, monkeypatch):
  """Who asks it with a step makes it wait for as many dispatches."""
  asked = []
  point = "reached_preemption_sync_point"
  monkeypatch.setattr(multihost_utils, point, lambda number: bool(asked.append(number)))
  saved(running("drifting", "spmd"), tmp_path, 2, 4)
  assert asked == []


STATES = [(n, e) for n in ("adam", "residual", "drifting") for e in ("simulate", "spmd")]


@pytest.mark.parametrize(
  ("name", "executor"), slow_except([("residual", "simulate"), ("drifting", "spmd")], STATES)
)
def test_a_state_comes_back_bit_for_bit_in_its_shardings(name, executor, tmp_path):
  run, fresh = running(name, executor), running(name, executor)
  saved(run, tmp_path, 2)
  step, state = restored(fresh, tmp_path)
  assert step == 2
  assert equal(state, run.state)
  shardings = lambda tree: jax.tree.map(lambda x: x.sharding, tree)
  assert shardings(state) == shardings(fresh.state)
  fresh.state = state
  assert equal(fresh.rounds(2).state, run.rounds(2).state)


@pytest.mark.slow
@pytest.mark.parametrize("owners", [2, 4])
@pytest.mark.parametrize("name", ["adam", "residual", "drifting"])
def test_another_number_of_workers_keeps_shared_leaves_and_the_mean_of_rows(name, owners, tmp_path):
  run = running(name, "spmd")
  saved(run, tmp_path, 2)
  fresh = Running(METHODS[name], "spmd", {"data": owners}, (240 // owners,) * owners, None)
  told: list[str] = []
  _, state = restored(fresh, tmp_path, told.append)
  assert told == [f"checkpoint 2, saved on data:8, is put on data:{owners}"]
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


@pytest.mark.slow
def test_clients_keep_their_rows_when_the_cohort_changes(tmp_path):
  """Twelve clients served by four workers, then by six: rows go by client."""
  sizes = (20,) * 12
  run = Running(METHODS["residual"], "simulate", {"data": 4}, sizes)
  saved(run, tmp_path, 2)
  fresh = Running(METHODS["residual"], "simulate", {"data": 6}, sizes)
  _, state = restored(fresh, tmp_path, lambda line: None)
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
@pytest.mark.parametrize("how", slow_except(["bits"], ["bits", "cut", "gone"]))
def test_damage_falls_back_to_the_checkpoint_before(how, tmp_path):
  run = running("adam")
  saved(run, tmp_path, 2, 4)
  damage(tmp_path / "4", how)
  told: list[str] = []
  fresh = running("adam")
  step, state = restored(fresh, tmp_path, told.append)
  assert step == 2
  assert len(told) == 1
  assert "checkpoint 4 is damaged" in told[0]
  assert (tmp_path / "4.damaged").is_dir()
  fresh.state = state
  assert equal(fresh.rounds(2).state, run.state)


def test_no_whole_checkpoint_is_an_error_and_none_at_all_is_not(tmp_path):
  run = running("adam")
  assert restored(run, tmp_path / "new") is None
  saved(run, tmp_path / "old", 2)
  damage(tmp_path / "old" / "2", "cut")
  with pytest.raises(checkpoint.CheckpointError, match="none of the checkpoints"):
    restored(run, tmp_path / "old", lambda line: None)


def test_another_method_is_no_match_and_no_damage(tmp_path):
  saved(running("adam"), tmp_path, 2)
  other = running("sgd")
  with pytest.raises(checkpoint.CheckpointError, match="of another model or method"):
    restored(other, tmp_path)
  assert (tmp_path / "2").is_dir()


# Its state has all there is: shared leaves, rows, chunks, a factor for each shard, and a counter.
ANYWHERE = (
  "diloco(sgd(0.1, momentum=0.9), sgd(0.7), ef21(warm_up(two_phase(int8()), steps=1, "
  "stages=[power_sgd(1)])), period=1)"
)
PARAMETERS = {"up": (6, 8), "down": (8, 4), "scale": (4,)}
PLACES = {
  "data:4": ("spmd", {"data": 4}),
  "fsdp": ("spmd", {"data": 4, "fsdp": 2}),
  "model": ("simulate", {"data": 4, "model": 2}),
  "both": ("spmd", {"data": 2, "fsdp": 2, "model": 2}),
}


class Held(NamedTuple):
  """A state without anything that could run it."""

  state: TrainState
  layout: layouts.Layout
  job: Job


@functools.cache
def held(place: str) -> Held:
  """One state, the same on any mesh, as it lies on this one."""
  executor, axes = PLACES[place]
  task, count = perceptron(), axes["data"]
  job = Job(registry.build("method", ANYWHERE), task, axes, np.full(count, 240 // count), 12)
  layout = inference.layout_of(job)
  state = jax.eval_shape(functools.partial(workers.initial, job, layout), jax.random.key(0))
  cut = sharded.cut_of(axes, task)
  if executor == "simulate":
    lies = sharded.of_state(layout.state, meshes.simulation_mesh(count), ("data",))
  else:
    mesh = meshes.device_mesh(axes)
    lies = sharded.of_state(layout.state, mesh, ("data",), layout.state_shapes, cut)
  leaves = resize.placed(job, layout.state, state).leaves.values()
  flat, tree = jax.tree.flatten(state)
  fill = lambda: [filled(*args, cut, count) for args in zip(leaves, flat, strict=True)]
  arrays = jax.jit(fill, out_shardings=jax.tree.leaves(lies))()
  return Held(tree.unflatten(arrays), layout, job)


def filled(leaf: resize.Leaf, like: Any, cut: Cut | None, count: int) -> Any:
  """Numbers that depend on the leaf's name alone, as they lie here; -1 where `init` decides."""
  if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
    return jax.random.key(3)
  shape = next((PARAMETERS[key] for key in leaf.name.split(".") if key in PARAMETERS), None)
  if shape is None:
    return jnp.full(like.shape, 3, like.dtype)
  if ".stages.0." in leaf.name:  # a factor, which says of which shard it is
    count = like.shape[0] if leaf.inside else 1
    of_shard = np.broadcast_to(np.arange(count), (*like.shape[:0:-1], count)).T
    return jnp.asarray(of_shard if leaf.inside else np.zeros(like.shape), like.dtype)
  random = np.random.default_rng(zlib.crc32(leaf.name.encode()))
  draw = lambda *shape: random.normal(size=shape).astype(np.float32)
  blocks = lambda x: split_leaf(jnp.asarray(x), cut) if cut and leaf.inside else jnp.asarray(x)
  if leaf.kind == "rows":
    rows = draw(4, *shape)
    mean = np.broadcast_to(np.mean(rows, 0), (count, *shape))
    return jax.vmap(blocks)(rows if count == 4 else mean)
  whole = blocks(draw(*shape))
  if leaf.kind == "chunks":
    chunks = lambda x: cut_chunks(x, count)
    return jax.vmap(chunks, 0, 1)(whole) if leaf.inside else chunks(whole)
  return whole


# From, to, and whether shards are the same.
PAIRS = [
  ("data:4", "fsdp", False),
  ("fsdp", "model", True),
  ("model", "both", False),
  ("both", "data:4", False),
]


@pytest.mark.slow
@pytest.mark.parametrize(("source", "goal", "same"), PAIRS)
def test_a_state_goes_from_one_mesh_to_another(source, goal, same, tmp_path):
  """Bit for bit where the number of workers stays: as if it had always been there."""
  was, want = held(source), held(goal)
  saved(was, tmp_path, 2)
  blank = jax.jit(
    lambda: jax.tree.map(lambda x: jnp.full(x.shape, -1, x.dtype), want.state.method),
    out_shardings=jax.tree.map(lambda x: x.sharding, want.state.method),
  )()
  told: list[str] = []
  like = want._replace(state=want.state._replace(method=blank))
  found = restored(like, tmp_path, told.append)[1]
  assert len(told) == 1 + (not same)
  exact = was.job.workers == want.job.workers
  leaves = zip(*(jax.tree.leaves(tree.method) for tree in (found, want.state)), strict=True)
  lies = resize.placed(want.job, want.layout.state, want.state).leaves.values()
  for (got, wanted), leaf in zip(leaves, [*lies][2:], strict=True):
    assert got.sharding == wanted.sharding, leaf
    if leaf.kind == "rows" and not exact:
      wanted = np.broadcast_to(np.mean(wanted, 0), wanted.shape)
    if ".stages.0." in leaf.name and not same:
      wanted = np.full(wanted.shape, -1.0)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=0 if exact else 1e-6, err_msg=str(leaf))


def test_a_process_whose_save_has_failed_does_not_wait_for_the_others():
  met = []
  barrier = lambda *, key, timeout_ms: met.append((key, timeout_ms))
  manager._meet(barrier, key="all is well", timeout_ms=7)

  def fails():
    try:
      raise OSError("full")
    finally:
      manager._meet(barrier, key="after a failure", timeout_ms=7)

  with pytest.raises(OSError, match="full"):
    fails()
  assert met == [("all is well", 7)]


@pytest.mark.parametrize("name", EXACT)
def test_shared_state_does_not_grow_with_the_workers(name):
  def shapes(workers):
    sizes = np.full(workers, 240 // workers)
    job = Job(METHODS[name], regression(), {"data": workers}, sizes, None)
    state = jax.eval_shape(EXECUTORS["simulate"](job).init, KEY)
    return [leaf.shape for leaf in jax.tree.leaves(state)]

  assert shapes(2) == shapes(16)


def test_the_checksum_sees_any_one_element():
  x = np.arange(30, dtype=np.float32).reshape(2, 5, 3)
  base = integrity.checksum(jnp.asarray(x))
  for index in np.ndindex(x.shape):
    changed = x.copy()
    changed[index] = np.nextafter(changed[index], np.float32(99))
    assert integrity.checksum(jnp.asarray(changed)) != base
  swapped = x[:, ::-1]
  assert integrity.checksum(jnp.asarray(swapped)) != base
