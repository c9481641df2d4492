"""A language model on every mesh: each axis inside a worker alone and in pairs."""

import functools
import itertools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import Running
from side_by_side import side_by_side

from research.analysis import compiled
from research.core import registry
from research.core.base import WORKER_AXES
from research.core.task import Task
from research.models.transformer import transformer
from research.parallel import inference, traffic, workers
from research.tasks.language.language import Text, next_token

OUTPUTS, CONTEXT, BATCH = 12, 8, 8
MODEL = {"layers": 2, "width": 16, "heads": 4, "kv_heads": 2, "hidden": 24, "dtype": "float32"}
EXACT = {
  "mean": "data_parallel(sgd(0.1, momentum=0.9), mean(), period=2)",
  "diloco": "diloco(sgd(0.3), sgd(0.7, momentum=0.9, nesterov=True), mean(), period=2)",
}
BY_BLOCK = {
  "two_phase": "data_parallel(sgd(0.3), error_feedback(two_phase(int8())), period=2)",
  "power_sgd": "data_parallel(sgd(0.3), error_feedback(power_sgd(4)), period=2)",
}
INNER = ("fsdp", "model", "seq", "expert", "stage")


@functools.cache
def task(experts: int = 0) -> Task:
  """Twelve kinds of tokens that follow one another with some regularity."""
  steps = np.random.default_rng(0).integers(0, 3, 800)
  text = np.cumsum(steps).astype(np.uint8) % OUTPUTS
  model = transformer("tiny", **MODEL, scan=True, experts=experts)(OUTPUTS)
  return next_token(model, OUTPUTS, Text(text[:640], 640), Text(text[640:], 160), context=CONTEXT)


@functools.cache
def several(names: tuple[str, ...], experts: int):
  specs = EXACT | BY_BLOCK
  methods = {name: registry.build("method", specs[name]) for name in names}
  return side_by_side(methods), _together(names, task(experts))


def _together(names: tuple[str, ...], one: Task) -> Task:
  """The same task for each name, their models in one program."""
  stack = lambda *leaves: jnp.stack(leaves)

  def loss(params, batch, key):
    models = jax.tree.map(stack, *(params[name] for name in names))
    return jnp.sum(jax.vmap(lambda params: one.loss(params, batch, key))(models))

  return one._replace(init=lambda key: dict.fromkeys(names, one.init(key)), loss=loss)


@functools.cache
def layout(names, experts, axes):
  """It is the same for every executor, and takes time."""
  return inference.layout_of(job(names, experts, axes))


def job(names, experts, axes) -> workers.Job:
  method, of_task = several(names, experts)
  count = dict(axes)["data"]
  return workers.Job(method, of_task, dict(axes), np.full(count, 80 // count), BATCH)


@functools.cache
def losses(names, executor, axes, experts) -> dict[str, float]:
  """After ten steps, on what is held out."""
  method, of_task = several(names, experts)
  found = layout(names, experts, axes)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(inference, "layout_of", lambda job: found)
    count = dict(axes)["data"]
    running = Running(method, executor, dict(axes), (80 // count,) * count, BATCH, task=of_task)
  held_out = task(experts).test or {}
  loss = jax.jit(lambda params: task(experts).evaluate(params, held_out)["loss"])
  return {name: float(loss(params)) for name, params in running.rounds(5).params().items()}


def agree(inner: tuple[str, ...]) -> None:
  """Exact methods with the workers alone, others with the same blocks, simulated."""
  axes = (("data", 2), *((name, 2) for name in inner))
  names, experts = (*EXACT, *BY_BLOCK), 4 if "expert" in inner else 0
  got, want = (losses(names, executor, axes, experts) for executor in ("spmd", "simulate"))
  alone = losses(names, "simulate", axes[:1], experts)
  for name, loss in got.items():
    expected = alone[name] if name in EXACT else want[name]
    assert abs(loss - expected) <= 1e-4 * expected, name
    assert loss < np.log(OUTPUTS) - 0.3, name


MESHES = [(axis,) for axis in INNER] + [*itertools.combinations(INNER, 2)]


@pytest.mark.slow
@pytest.mark.parametrize("inner", MESHES, ids="-".join)
def test_executions_agree(inner):
  agree(inner)


@pytest.fixture(scope="module")
def unsharded():
  method = registry.build("method", "data_parallel(adam(0.01), mean())")
  return Running(method, "simulate", {"data": 2}, (40, 40), BATCH, task=task()).rounds(3).metrics


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2])
def test_stages_of_zero_cut_what_they_say(zero, unsharded):
  """And nothing else: the losses are those without `fsdp`."""
  method = registry.build("method", "data_parallel(adam(0.01), mean())")
  axes = {"data": 2, "fsdp": 4}
  running = Running(method, "spmd", axes, (40, 40), BATCH, task=task(), zero=zero)
  np.testing.assert_allclose(running.rounds(3).metrics["loss"], unsharded["loss"], rtol=1e-5)
  cut = lambda tree: {
    jax.tree_util.keystr(path): leaf.addressable_shards[0].data.size * 4 == leaf.size
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    if leaf.size > 1
  }
  state = running.state.method
  assert not any(cut(state.params).values())
  assert all(cut(state.inner).values())


@pytest.mark.slow
@pytest.mark.parametrize("inner", [("fsdp", "model"), ("seq", "stage")], ids="-".join)
def test_compression_leaves_the_inside_of_a_worker_alone(inner):
  """Compiled: over `data` go the encoded bytes and no more, within a worker what went before."""
  axes = {"data": 2} | dict.fromkeys(inner, 2)

  def transfers(spec):
    method = registry.build("method", f"data_parallel(sgd(0.3), {spec})")
    running = Running(method, "spmd", axes, (40, 40), BATCH, task=task())
    program = running.executor.run.lower(running.state, running.data, rounds=1).compile()
    found = compiled.traffic(program, running.state.round.sharding.mesh)
    across = [t for t in found if set(t.axes) & set(WORKER_AXES)]
    # a byte for each leaf of the state, whether it is finite, is not of the aggregation
    rest = [t for t in found if t not in across and t.dtype != "bool"]
    within = Counter((t.operation, t.axes, t.dtype, t.payload) for t in rest)
    encoded = traffic.of_method(running.job, running.layout, 1).transfers  # by all four devices
    asked = sum(t.total for t in encoded) / 4
    return across, within, asked + sum(t.total for t in traffic.of_metrics(running.job, 1))

  across, within, asked = transfers("error_feedback(two_phase(int8()))")
  _, before, dense = transfers("mean()")
  assert all(t.axes == ("data",) for t in across)
  assert sum(t.total for t in across) == pytest.approx(asked)
  assert asked < 0.35 * dense
  assert not within - before
