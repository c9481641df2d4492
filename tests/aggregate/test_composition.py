"""The contracts of aggregators and their compositions in every execution, over the whole table."""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from aggregators import AGGREGATORS, FLAT, NUMBERED, PLAIN, SLICED, SPECS, names_in, refusal
from problems import Running, distance, split
from side_by_side import Recorded, job_of, layout_of, running
from subset import slow_except
from test_compiled import counted

from research.aggregate.feedback import ErrorFeedbackState
from research.analysis import compiled
from research.comm import mesh as meshes
from research.core.base import Chunk, Trait
from research.core.builtin import TABLE
from research.core.task import TrainState
from research.parallel import layout as layouts
from research.parallel import resize, traffic
from research.training.checkpoint import checkpoint
from research.training.hooks.replicas import replica_check

ROUNDS, HALF = 6, 3
WHOLE = "fsdp"
MESHES = {"flat": {"data": 8}, "sliced": {"slice": 2, "data": 4}}
CUT = {"flat": {"data": 4, "fsdp": 2}, "sliced": {"slice": 2, "data": 2, "fsdp": 2}}
FEWER = {"flat": {"data": 4}, "sliced": {"slice": 2, "data": 2}}
NAMES = {"flat": tuple(FLAT), "sliced": tuple(SLICED)}
OF = {name: kind for kind, names in NAMES.items() for name in names}
CUTTING = {k: tuple(n for n in names if not refusal(WHOLE, n)) for k, names in NAMES.items()}
# The compiled program's reader refuses conditions that send differently; the traced one follows.
CONDITIONAL = ("warm_up",)


class Course(NamedTuple):
  """What a run of all entries side by side went through, round by round."""

  run: Running
  states: list[Any]  # of the method, numpy
  params: list[Any]
  compilations: int  # after the first round


def course(run: Running, advance=lambda run: run.rounds(1)) -> Course:
  states, params, compilations = [], [], []

  def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
      compilations.append(duration_secs)

  for number in range(ROUNDS):
    advance(run)
    states.append(jax.device_get(run.state.method))
    params.append(run.params())
    if number == 0:
      jax.monitoring.register_event_duration_secs_listener(listen)
  jax.monitoring.unregister_event_duration_listener(listen)
  return Course(run, states, params, len(compilations))


@functools.cache
def whole(kind: str, executor: str) -> Course:
  return course(running(NAMES[kind], executor, MESHES[kind], record=True))


@functools.cache
def simulated_cut(kind: str) -> Course:
  return course(running(CUTTING[kind], "simulate", CUT[kind]))


@functools.cache
def compiled_cut(kind: str, names: tuple[str, ...]) -> tuple[Course, Any]:
  """On devices, and the program that ran there."""
  run = running(names, "spmd", CUT[kind])
  program = run.executor.run.lower(run.state, run.data, rounds=1).compile()

  def advance(run):
    run.state, run.metrics = program(run.state, run.data)

  return course(run, advance), program


def spread_cut(name: str) -> Course:
  return compiled_cut(OF[name], group_of(name))[0]


def group_of(name: str) -> tuple[str, ...]:
  together = tuple(n for n in CUTTING[OF[name]] if n not in CONDITIONAL)
  return (name,) if name in CONDITIONAL else together


def test_the_table_is_whole():
  called = set().union(*map(names_in, (SPECS | PLAIN).values()))
  assert called == set(TABLE["aggregator"])


@pytest.mark.parametrize("name", SPECS)
def test_executions_agree(name):
  """After each of six rounds. No value here lies so near a tie that an encoder jumps."""
  want = whole(OF[name], "simulate").params
  for got, one in zip(whole(OF[name], "spmd").params, want, strict=True):
    assert distance(got[name], one[name]) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
def test_executions_agree_where_a_mesh_cuts_a_worker(name):
  why = refusal(WHOLE, name)
  if why:
    for executor in ("simulate", "spmd"):
      with pytest.raises(ValueError, match=why):
        running((name,), executor, CUT[OF[name]])
    return
  for got, one in zip(spread_cut(name).params, simulated_cut(OF[name]).params, strict=True):
    assert distance(got[name], one[name]) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", MESHES)
def test_compression_adds_nothing_inside_a_worker(kind):
  """Between workers the compiled program sends what was traced, half from each of two devices.

  Within a worker it sends what plain averaging does, and no more than four numbers besides.
  """
  names = group_of(CUTTING[kind][0])
  run, program = compiled_cut(kind, names)[0].run, compiled_cut(kind, names)[1]
  found = compiled.traffic(program, meshes.device_mesh(CUT[kind]))
  between = [t for t in found if "fsdp" not in t.axes]
  half = lambda t: t._replace(payload=t.payload // 2, sent=t.sent / 2)
  traced = [half(t) for t in traffic.of_method(run.job, run.layout, 1).transfers]
  traced += traffic.of_metrics(run.job, 1)
  assert counted(between) == counted(traced)
  mean = compiled_cut("flat", ("mean",))[1]
  dense = compiled.traffic(mean, meshes.device_mesh(CUT["flat"]))
  inside = lambda transfers: sum(t.total for t in transfers if "fsdp" in t.axes)
  assert 0 < inside(found) <= len(names) * (inside(dense) + 16)


@pytest.mark.parametrize("kind", MESHES)
def test_all_workers_receive_the_same(kind):
  """Found by tracing, and on the devices bit for bit; what each had and sent is its own."""
  simulated, spread = whole(kind, "simulate").run, whole(kind, "spmd").run
  for name in NAMES[kind]:
    link = simulated.layout.state[name].link
    assert not any(jax.tree.leaves(link.value)), name
    assert all(jax.tree.leaves(link.given)), name
    assert all(jax.tree.leaves(link.sent)), name
  assert replica_check(spread.state)(spread.state) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", MESHES)
def test_all_workers_receive_the_same_where_a_mesh_cuts_a_worker(kind):
  state = spread_cut(CUTTING[kind][0]).run.state
  assert replica_check(state)(state) == []


PRIVATE = {
  "mean": set(),
  "feedback_two_phase": {"memory.b", "memory.w", "inner.b.part", "inner.w.part"},
  "feedback_power_sgd": {"memory.b", "memory.w"},
  "ef21": {"local.b", "local.w"},
  "diana": {"shift.b", "shift.w"},
  "momentum": {"momentum.b", "momentum.w", "memory.b", "memory.w"},
  "worker_momentum": {"momentum.b", "momentum.w"},
  "centered_clip": set(),
  "warm_up": {"memory.b", "memory.w", "inner.stages.2.b.part", "inner.stages.2.w.part"},
  "hierarchical": {"memory.b", "memory.w", "inner.b.part", "inner.w.part"},
  "hierarchical_ef21": {"local.b", "local.w"},
}


@pytest.mark.parametrize("name", PRIVATE)
def test_what_is_private(name):
  link = whole(OF[name], "simulate").run.layout.state[name].link.inner
  leaves = jax.tree_util.tree_leaves_with_path(link)
  path = lambda p: jax.tree_util.keystr(p, simple=True, separator=".")
  assert {path(p) for p, is_private in leaves if is_private} == PRIVATE[name]


@pytest.mark.parametrize("executor", ["simulate", "spmd"])
@pytest.mark.parametrize("kind", MESHES)
def test_state_is_stable_and_nothing_is_compiled_twice(kind, executor):
  done = whole(kind, executor)
  kinds = lambda state: jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), state)
  assert kinds(done.run.executor.init(jax.random.key(0))) == kinds(done.run.state)
  assert done.compilations == 0


@functools.cache
def permuted(kind: str) -> Any:
  """Parameters after all rounds where the workers hold each other's examples."""
  run = whole(kind, "simulate").run
  random = np.random.default_rng(3)
  order = random.permutation(8)
  if kind == "sliced":  # slices with slices, workers with workers of their slice
    order = np.concatenate([random.permutation(4) + 4, random.permutation(4)])
  examples, sizes = split(run.job.task, run.job.sizes.tolist())
  moved = jax.tree.map(lambda x: x[order], examples)
  data = run.executor.place(moved, sizes, jax.random.key(1))
  state = run.executor.init(jax.random.key(0))
  for _ in range(ROUNDS):
    state, _ = run.executor.run(state, data, rounds=1)
  return jax.device_get(run.executor.params(state))


@pytest.mark.parametrize("name", [name for name in SPECS if name not in NUMBERED])
def test_permuting_the_workers_changes_nothing(name):
  want = whole(OF[name], "simulate").params[-1][name]
  assert distance(permuted(OF[name])[name], want) <= 1e-5


def flat(tree: Any, lead: int = 0) -> np.ndarray:
  leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]
  return np.concatenate([x.reshape(*x.shape[:lead], -1) for x in leaves], -1)


def owed(state: Any, value: Any) -> np.ndarray:
  """What the workers' chunks of two_phase hold, as one vector; without chunks zero."""
  is_chunk = lambda node: isinstance(node, Chunk)
  chunks = [x.part for x in jax.tree.leaves(state, is_leaf=is_chunk) if is_chunk(x)]
  sizes = [x.size for x in jax.tree.leaves(value)]
  sizes = sizes if len(chunks) == len(sizes) else [sum(sizes)]  # a bucket
  parts = [x.reshape(-1)[:size] for x, size in zip(chunks, sizes, strict=bool(chunks))]
  return np.concatenate(parts) if parts else np.zeros(1)


NO_MEAN = Trait.VOTE | Trait.SELECTS | Trait.PARTIAL | Trait.SENDERS
MEANS = [n for n in SPECS if not AGGREGATORS[n].traits & NO_MEAN]


@pytest.mark.parametrize("name", MEANS)
def test_what_is_received_is_the_mean_of_what_was_sent(name):
  """In all, up to what two_phase's chunks still hold."""
  links = [state[name].link for state in whole(OF[name], "simulate").states]
  received = sum(flat(link.value) for link in links) + owed(links[-1].inner, links[-1].value)
  sent = sum(flat(link.sent, 1).mean(0) for link in links)
  np.testing.assert_allclose(received, sent, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in MEANS if SPECS[n].startswith("error_feedback")])
def test_error_feedback_telescopes(name):
  """What a worker sent in all, and what it holds, is what it had: hence so is what all received."""
  links = [state[name].link for state in whole(OF[name], "simulate").states]
  held = links[-1].inner
  assert isinstance(held, ErrorFeedbackState)
  total = lambda parts, lead: np.sum([flat(part, lead) for part in parts], 0)
  had, memory = total([link.given for link in links], 1), flat(held.memory, 1)
  np.testing.assert_allclose(total([x.sent for x in links], 1) + memory, had, atol=1e-5)
  received = total([link.value for link in links], 0) + owed(held, links[-1].value)
  np.testing.assert_allclose(received + memory.mean(0), had.mean(0), atol=1e-5)


def placed(names: tuple[str, ...], axes: dict[str, int], state: TrainState) -> resize.Placed:
  layout = layout_of(names, tuple(axes.items()))
  return resize.placed(job_of(names, axes), layout.state, state)


def save(folder, state: TrainState, lies: resize.Placed) -> None:
  store = checkpoint.Checkpoints(folder, state, lies)
  store.save(HALF, state, 0.0)
  store.wait()
  store.close()


def restored(folder, like: TrainState, lies: resize.Placed, warn=pytest.fail) -> TrainState:
  store = checkpoint.Checkpoints(folder, like, lies)
  try:
    found = store.restore(like, warn)
    assert found
    return found[1]
  finally:
    store.close()


STATEFUL = {
  "flat": ("feedback_two_phase", "feedback_power_sgd", "ef21", "diana", "momentum", "bucketed",
           "worker_momentum", "warm_up", "centered_clip", "sign_flip"),
  "sliced": ("hierarchical", "hierarchical_ef21", "two_axes"),
}  # fmt: skip


@functools.cache
def stateful(kind: str) -> Course:
  return course(running(STATEFUL[kind], "simulate", MESHES[kind]))


@pytest.mark.parametrize("kind", slow_except(["sliced"], MESHES))
def test_a_resumed_run_is_an_unbroken_one(kind, tmp_path):
  done = whole(kind, "simulate") if kind == "sliced" else stateful(kind)
  go = lambda state: done.run.executor.run(state, done.run.data, rounds=1)[0]
  state = done.run.executor.init(jax.random.key(0))
  for _ in range(HALF):
    state = go(state)
  lies = resize.placed(done.run.job, done.run.layout.state, state)
  save(tmp_path, state, lies)
  state = restored(tmp_path, done.run.executor.init(jax.random.key(5)), lies)
  for _ in range(ROUNDS - HALF):
    state = go(state)
  for name, got in jax.device_get(state.method).items():
    equal = jax.tree.map(np.array_equal, got, done.states[-1][name])
    assert all(jax.tree.leaves(equal)), name


def check_resized(before: TrainState, after: TrainState, private: Any, blocks: int = 0) -> None:
  """Each leaf by its rule; chunks are those of so many blocks, or of whole leaves."""
  kinds = jax.tree.leaves(layouts.kinds(private))
  assert set(kinds) == {"shared", "rows", "chunks"}
  leaves = jax.tree_util.tree_leaves_with_path(after.method)
  for old, (path, new), kind in zip(jax.tree.leaves(before.method), leaves, kinds, strict=True):
    old, new, within = np.asarray(old), np.asarray(new), 0.0
    if kind == "rows" and np.issubdtype(old.dtype, np.floating):
      # in whichever order n rows are added up, by (n - 1) roundings, and divided, by one more
      within = len(old) * np.finfo(old.dtype).eps * np.mean(np.abs(old), 0, dtype=np.float64)
      old = np.mean(old, 0, dtype=np.float64)
    elif kind == "rows":
      old = old[0]
    elif kind == "chunks":
      old, new = (wholes(x, blocks) for x in (old, new))
      size = min(old.shape[1], new.shape[1])
      assert not old[:, size:].any(), path
      assert not new[:, size:].any(), path
      old, new = old[:, :size], new[:, :size]
    assert (np.abs(np.subtract(new, old, dtype=np.float64)) <= within).all(), path


def wholes(chunks: np.ndarray, blocks: int) -> np.ndarray:
  """Of chunks [W, ...], or for each of B blocks [W, B, ...], the wholes [1 or B, n]."""
  by_block = chunks.swapaxes(0, 1) if blocks else chunks[None]
  return by_block.reshape(max(blocks, 1), -1)


def bare(state: TrainState, names: tuple[str, ...]) -> TrainState:
  """The state of some entries, without what was recorded."""
  inner = lambda link: link.inner if isinstance(link, Recorded) else link
  parts = {name: state.method[name] for name in names}
  return state._replace(method={n: s._replace(link=inner(s.link)) for n, s in parts.items()})


@pytest.mark.slow
@pytest.mark.parametrize("kind", MESHES)
def test_another_number_of_workers_resizes_by_rule(kind, tmp_path):
  """Shared leaves stay, rows become their mean, chunks are cut anew."""
  state = stateful(kind).run.state
  save(tmp_path, state, placed(STATEFUL[kind], MESHES[kind], state))
  fewer = running(STATEFUL[kind], "simulate", FEWER[kind])
  lies = placed(STATEFUL[kind], FEWER[kind], fewer.state)
  found = restored(tmp_path, fewer.state, lies, lambda line: None)
  check_resized(state, found, fewer.layout.state)


@pytest.mark.slow
def test_chunks_of_blocks_are_cut_anew_block_by_block(tmp_path):
  names = ("feedback_two_phase",)
  state = bare(spread_cut(*names).run.state, names)
  save(tmp_path, state, placed(names, CUT["flat"], state))
  axes = {"data": 2, "fsdp": 2}
  fewer = running(names, "spmd", axes)
  lies = placed(names, axes, fewer.state)
  fewer.state = restored(tmp_path, fewer.state, lies, lambda line: None)
  check_resized(state, fewer.state, fewer.layout.state, blocks=2)
  assert bool(fewer.rounds(1).metrics["finite"])
