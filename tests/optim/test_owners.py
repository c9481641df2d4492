"""Matrices of sharded workers: dealt to the devices, computed once, and returned."""

import functools
from collections import Counter

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from problems import Running, distance

from research.aggregate.blockwise import Cut
from research.analysis import compiled
from research.comm import mesh as meshes
from research.core import registry
from research.core.dimensions import kinds_of
from research.core.task import Task
from research.models.transformer import transformer
from research.optim import fitting
from research.optim.muon import orthogonalized
from research.optim.owners import on_owners, place
from research.parallel import sharded
from research.tasks.language.language import Text, next_token

OUTPUTS, CONTEXT, BATCH = 12, 8, 8
SIZES = {"layers": 2, "width": 16, "heads": 4, "kv_heads": 2, "hidden": 24, "dtype": "float32"}


@functools.cache
def task(experts: int = 0, scan: bool = True) -> Task:
  text = np.cumsum(np.random.default_rng(0).integers(0, 3, 800)).astype(np.uint8) % OUTPUTS
  model = transformer("tiny", **SIZES, scan=scan, experts=experts)(OUTPUTS)
  return next_token(model, OUTPUTS, Text(text[:640], 640), Text(text[640:], 160), context=CONTEXT)


def matrices(of: Task, call=lambda function, *args: function(*args)):
  """The hidden matrices of a task's initial model, and the kinds of their dimensions."""
  params = call(of.init, jax.random.key(0))
  kinds = kinds_of(params, of.dimensions)
  leaves = dict(zip(kinds, jax.tree.leaves(params), strict=True))
  return {name: x for name, x in leaves.items() if kinds[name].is_matrix}, kinds


def test_equal_matrices_are_in_one_group_whichever_side_is_the_input():
  of = task()
  leaves, kinds = matrices(of, jax.eval_shape)
  cut = sharded.cut_of({"data": 1, "fsdp": 4}, of)
  assert cut
  found = {name: place(kinds[name], x.shape, cut) for name, x in leaves.items()}
  groups = Counter((one.cut, one.sides) for one in found.values())
  fsdp = (("fsdp", 0),)
  assert groups == {(fsdp, (16, 16)): 2, (fsdp, (16, 8)): 2, (fsdp, (24, 16)): 3}
  out, query = (found[f"layers/attention/{name}/kernel"] for name in ("out", "query"))
  assert out.turned != query.turned


MESHES = [
  ({"data": 1, "fsdp": 8}, 0),  # fewer matrices of a shape than devices: sent one by one
  ({"data": 2, "fsdp": 2, "model": 2}, 12),
  ({"data": 2, "fsdp": 2, "stage": 2}, 6),
  ({"data": 2, "fsdp": 2, "expert": 2}, 8),
  ({"data": 2, "fsdp": 2, "seq": 2}, 6),
]


@pytest.mark.slow
@pytest.mark.parametrize(("axes", "exchanges"), MESHES, ids=lambda value: str(value))
def test_owners_compute_what_one_device_computes(axes, exchanges):
  """Two exchanges for each group and axis, and no other collective."""
  of = task(4 * ("expert" in axes))
  leaves, kinds = matrices(of)
  mesh, cut = meshes.device_mesh(axes), sharded.cut_of(axes, of)
  assert cut
  shardings = {
    name: NamedSharding(mesh, P(*sharded.spec_of(cut, x.shape))) for name, x in leaves.items()
  }
  function = lambda x: orthogonalized(x, 5)
  body = lambda tree: on_owners(function, tree, kinds, cut)
  over_data = jax.shard_map(
    body, mesh=mesh, in_specs=P(), out_specs=P(), axis_names={"data"}, check_vma=False
  )
  placed = {name: jax.device_put(x, shardings[name]) for name, x in leaves.items()}
  program = jax.jit(over_data, out_shardings=shardings).lower(placed).compile()
  one = lambda name, x: function(kinds[name].view(x)).reshape(x.shape)
  want = {name: one(name, x) for name, x in leaves.items()}
  assert distance(program(placed), want) < 1e-5
  found = Counter(t.operation for t in compiled.traffic(program, mesh))
  assert set(found) <= {"all-to-all", "permute"}
  assert found["all-to-all"] == exchanges


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["muon(0.02)", "muon_bp(0.02, 0.01, period=2)"])
def test_a_sharded_worker_takes_the_steps_of_a_simulated_one(optimizer):
  spec = f"data_parallel(chain(clip_by_global_norm(1.0), {optimizer}), mean())"
  method, axes = registry.build("method", spec), {"data": 2, "fsdp": 4}
  got, want = (
    Running(method, executor, axes, (40, 40), BATCH, task=task()).rounds(3).params()
    for executor in ("spmd", "simulate")
  )
  assert distance(got, want) < 1e-5


def test_sharded_updates_are_the_simulated_ones_and_blocks_are_alone_between_whole_steps():
  """With a period of two, the first step is Muon's and the second is not."""
  declared = ((r"", ("in", "out")),)
  draw = np.random.default_rng(0)
  params, *grads = ({"up": draw.normal(size=(2, 4, 8)).astype(np.float32)} for _ in range(3))
  cut = Cut((("fsdp", 4),), lambda shape: (len(shape) - 1 if shape else None,))
  mesh, muon = meshes.device_mesh({"data": 1, "fsdp": 4}), optimizer("muon(0.1, ns_steps=1)")

  def steps(tx):
    state, found = tx.init(params), []
    for of_step in grads:
      updates, state = tx.update(of_step, state, params)
      found.append(updates["up"])
    return found

  def on_devices(tx):
    body = lambda _: steps(tx)
    options = {"mesh": mesh, "in_specs": P(), "out_specs": P()}
    over = jax.shard_map(body, **options, axis_names={"data"}, check_vma=False)
    return jax.jit(over)(0)

  blocks = optimizer("muon_bp(0.1, period=2, ns_steps=1)")
  fit = lambda tx, **more: fitting.fitted(tx, fitting.Model(declared, cut, **more))
  want = jax.jit(lambda: steps(fit(muon, simulated=True)))()
  simulated = jax.jit(lambda: steps(fit(blocks, simulated=True)))()
  assert distance(on_devices(fit(blocks)), simulated) < 1e-5
  assert distance(on_devices(fit(muon)), want) < 1e-5
  assert distance(simulated[0], want[0]) < 1e-6
  assert distance(simulated[1], want[1]) > 1e-2


def optimizer(spec: str):
  return registry.build("optimizer", spec)
