"""A compiled program's traffic equals the traced one's, and hand-made programs have known bytes."""

import importlib.util
import re
from collections import Counter
from types import SimpleNamespace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue import METHODS
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from problems import Running
from subset import slow_except

from research.analysis import compiled, hlo, wire
from research.comm import collectives, sending
from research.comm import mesh as meshes
from research.core import registry
from research.parallel import traffic

X = jax.ShapeDtypeStruct((1024,), jnp.float32)
ORDER = [3, 1, 2, 0, 4, 5, 7, 6]  # of the devices in the mesh: a program's own count differs
TWO = ("data", "fsdp")


def mesh_of(shape=(4, 2), names=TWO, order=ORDER):
  return Mesh(np.array(jax.devices())[order].reshape(shape), names)


def compile_on(mesh, program, *args):
  body = jax.shard_map(program, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
  return jax.jit(body).lower(*args).compile()


def counted(transfers):
  """How often each transfer happens, whatever their order."""
  totals = Counter()
  for transfer in transfers:
    totals[transfer._replace(times=1)] += transfer.times
  return totals


def scan(length, body, x):
  return lax.scan(lambda c, _: (body(c), None), x, None, length)[0]


def loops(x):
  inner = lambda x: scan(5, lambda x: lax.psum(x, "data") * 0.5, x)
  x = scan(3, lambda x: inner(x) + lax.pmean(x, "fsdp"), x)
  return lax.fori_loop(7, 2 * 7, lambda i, x: lax.ppermute(x, "data", [(0, 1), (2, 0)]) + i, x)


def branches(x):
  return lax.cond(x[0] < 1, lambda x: lax.psum(x, "data"), lambda x: lax.psum(-x, "data"), x)


PROGRAMS = {
  "sums": lambda x: (lax.psum(x, "data"), lax.pmax(x * x, "fsdp"), lax.pmin(x + 1, TWO)),
  "sums of a tree": lambda x: lax.psum({"a": x, "b": x[:24].astype(jnp.int32)}, "data"),
  "one after the other": lambda x: lax.psum(jnp.sin(lax.psum(x, "data")), "data"),
  "gathers": lambda x: (lax.all_gather(x, "data"), lax.all_gather(x > 0, TWO, tiled=True)),
  "exchange of bytes": lambda x: lax.all_to_all(x.reshape(4, -1).astype(jnp.int8), "data", 0, 0),
  "exchange over both": lambda x: lax.all_to_all(x.reshape(8, -1), TWO, 0, 0),
  "ring": lambda x: lax.ppermute(x, "data", [(i, (i + 1) % 4) for i in range(4)]),
  "one pair": lambda x: lax.ppermute(x, "fsdp", [(0, 1)]),
  "scatter": lambda x: lax.psum_scatter(x, "data", tiled=True),
  "loops in loops": loops,
  "nested jit": lambda x: jax.jit(lambda x: jax.jit(lambda x: lax.psum(x, "fsdp"))(x) + 1)(x),
  "branches": branches,
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_compiled_equals_traced(name):
  """Operation, axes, type, payload, bytes on a ring and times; channel ids are all the same."""
  mesh, program = mesh_of(), PROGRAMS[name]
  found = compiled.traffic(compile_on(mesh, program, X), mesh)
  assert counted(found) == counted(wire.traffic(program, X, axes=dict(mesh.shape)))


AGGREGATORS = (
  "two_phase(int8())",
  "two_phase(bf16())",
  "gather_mean(bf16())",
  "gather_mean(top_k(0.1))",
  "choco(bf16(), ring(), gamma=0.5)",
  "power_sgd(2)",
  "majority_vote()",
)


def aggregation(spec):
  aggregator = registry.build("aggregator", spec)
  tree = {"w": jax.ShapeDtypeStruct((96, 40), jnp.float32), "b": X}
  program = lambda tree, key: aggregator.aggregate(tree, aggregator.init(tree), key).value
  return program, tree


@pytest.mark.parametrize("spec", slow_except(AGGREGATORS[:2], AGGREGATORS))
def test_aggregators_send_what_they_were_traced_to(spec):
  mesh = mesh_of((8,), ("data",))
  program, tree = aggregation(spec)
  key = jax.random.key(0)
  found = wire.by_axis(compiled.traffic(compile_on(mesh, program, tree, key), mesh))
  traced = wire.by_axis(wire.traffic(program, tree, key, axes={"data": 8}))
  assert found == pytest.approx(traced)
  assert found["data"] > 0


def test_a_dispatch_of_rounds_sends_its_rounds_and_its_metrics():
  run = Running(METHODS["adam"], "spmd", {"data": 8})
  program = run.executor.run.lower(run.state, run.data, rounds=3).compile()
  found = wire.by_axis(compiled.traffic(program, meshes.device_mesh(run.job.axes)))
  rounds = wire.by_axis(traffic.of_method(run.job, run.layout, 1).transfers)["data"]
  metrics = wire.by_axis(traffic.of_metrics(run.job, 3))["data"]
  assert found == {"data": pytest.approx(3 * rounds + metrics)}


def test_a_cpu_sums_half_precision_as_single():
  mesh, half = mesh_of(), lambda x: lax.psum(x.astype(jnp.bfloat16), "data")
  (found,) = compiled.traffic(compile_on(mesh, half, X), mesh)
  (traced,) = wire.traffic(half, X, axes=dict(mesh.shape))
  assert (traced.dtype, traced.payload) == ("bfloat16", 2048)
  assert (found.dtype, found.payload) == ("float32", 4096)


def test_what_is_no_fact_is_refused():
  mesh = mesh_of()
  loop = lambda x: lax.while_loop(lambda x: x[0] < 1, lambda x: lax.psum(x, "data"), x)
  with pytest.raises(ValueError, match="loop 'jit"):
    compiled.traffic(compile_on(mesh, loop, X), mesh)
  branch = lambda x: lax.cond(x[0] < 1, lambda x: lax.psum(x, "data"), lambda x: x * 2, x)
  with pytest.raises(ValueError, match="branches"):
    compiled.traffic(compile_on(mesh, branch, X), mesh)
  with pytest.raises(ValueError, match="the mesh has"):
    compiled.traffic(compile_on(mesh, lambda x: x, X), mesh_of((2, 2), TWO, [0, 1, 2, 3]))
  groups = lambda x: lax.all_gather(x, "data", axis_index_groups=[[0, 1], [2, 3]])
  with pytest.raises(ValueError, match="not axes of the mesh"):
    compiled.traffic(compile_on(mesh, groups, X), mesh)


def test_one_device_sends_nothing():
  mesh = mesh_of((1,), ("data",), [0])
  assert compiled.traffic(compile_on(mesh, lambda x: lax.psum(x, "data"), X), mesh) == []


def test_loops_are_counted_without_the_compilers_help():
  mesh = mesh_of()
  module = hlo.module_of(compile_on(mesh, loops, X))
  helped = compiled.transfers(module, mesh)
  for computation in module.computations:
    for instruction in computation.instructions:
      instruction.ClearField("backend_config")
  assert compiled.transfers(module, mesh) == helped
  assert sorted(t.times for t in helped) == [3, 7, 15]


class Written:
  """A program written by hand, an instruction at a time; floats are of 1024 elements."""

  FLOATS: ClassVar[dict[str, Any]] = {"element_type": 11, "dimensions": [1024]}
  NUMBER: ClassVar[dict[str, Any]] = {"element_type": 4}

  def __init__(self, devices=range(8)):
    lists = [{"replica_device_ids": [i]} for i in devices]
    assignment = {
      "replica_count": 1,
      "computation_count": len(lists),
      "computation_devices": lists,
    }
    self.module = hlo.module_class()(device_assignment=assignment, entry_computation_id=1)
    self.computation = self.module.computations.add(id=1, name="main")
    self.entry = self.computation

  def function(self):
    """Opens a new computation, which is written into until `main` is called."""
    self.computation = self.module.computations.add(id=len(self.module.computations) + 1)
    return self.computation.id

  def main(self):
    self.computation = self.entry

  def add(self, opcode, *operands, shape=None, **fields):
    """Writes one instruction, the last of a computation being its root; returns its id."""
    number = 1 + sum(len(c.instructions) for c in self.module.computations)
    fields = {"name": f"{opcode}.{number}", "shape": shape or self.FLOATS, **fields}
    self.computation.instructions.add(id=number, opcode=opcode, operand_ids=operands, **fields)
    self.computation.root_id = number
    return number

  def traffic(self, mesh=None):
    return compiled.transfers(self.module, mesh or mesh_of(order=range(8)))


ALONG_DATA = {"collective_device_list": {"replica_groups": [
  {"replica_ids": [0, 2, 4, 6]}, {"replica_ids": [1, 3, 5, 7]},
]}}  # fmt: skip
SUM_OVER_DATA = wire.Transfer("all-reduce", ("data",), "float32", 4096, 6144, 1)


def test_asynchronous_pairs_count_once():
  program = Written()
  inner = program.function()
  program.add("reduce-scatter", program.add("parameter"), channel_id=1, **ALONG_DATA)
  program.main()
  x = program.add("parameter")
  pair = program.add("all-reduce-start", x, x, channel_id=1, **ALONG_DATA)
  program.add("all-reduce-done", pair)
  wrapped = program.add("async-start", x, called_computation_ids=[inner])
  program.add("async-done", program.add("async-update", wrapped), called_computation_ids=[inner])
  pairs = [{"source": i, "target": i ^ 1} for i in range(8)]
  program.add("collective-permute-done", program.add(
    "collective-permute-start", x, channel_id=1, source_target_pairs=pairs
  ))  # fmt: skip
  assert program.traffic() == [
    SUM_OVER_DATA,
    SUM_OVER_DATA,
    wire.Transfer("reduce-scatter", ("data",), "float32", 4096, 3072, 1),
    wire.Transfer("permute", ("fsdp",), "float32", 4096, 4096, 1),
  ]


def test_a_fused_sum_of_which_a_part_is_kept_is_a_scatter():
  """XLA:TPU writes a reduce-scatter so; a sum that is cut outside of a fusion is sent whole."""
  program = Written()
  part = {"element_type": 11, "dimensions": [256]}
  inner = program.function()
  program.add("dynamic-slice", program.add("all-reduce", program.add("parameter"), **ALONG_DATA),
              shape=part)  # fmt: skip
  program.main()
  x = program.add("parameter")
  program.add("fusion", x, shape=part, called_computation_ids=[inner])
  program.add("dynamic-slice", program.add("all-reduce", x, **ALONG_DATA), shape=part)
  assert program.traffic() == [
    wire.Transfer("reduce-scatter", ("data",), "float32", 4096, 3072, 1),
    SUM_OVER_DATA,
  ]


def test_a_collective_that_runs_beside_fusions_counts_once():
  """XLA:TPU repeats it in each of the fusions, with the chain that they form."""
  program = Written()
  chain = {"frontend_attributes": {"map": [{"key": "chain_id", "value": "0"}]}}
  steps = []
  for target in ("AsyncCollectiveStart", "", "AsyncCollectiveDone"):
    steps.append(program.function())
    x = program.add("all-reduce", program.add("parameter"), **ALONG_DATA, **chain)
    program.add("custom-call" if target else "tuple", x, custom_call_target=target)
  program.main()
  x = program.add("parameter")
  for step in steps:
    x = program.add("fusion", x, called_computation_ids=[step])
  assert program.traffic() == [SUM_OVER_DATA]


IOTA = {"num_replica_groups": 2, "num_devices_per_group": 4}
LINES = {"mesh": {"axes": [{"name": "a", "size": 2}, {"name": "b", "size": 4}]}}
PERMUTED = LINES["mesh"] | {"device_ids": [1, 3, 5, 7, 6, 4, 2, 0]}
TRANSFORMED = LINES["mesh"] | {"iota_transform": {"reshape_dims": [4, 2], "transpose_perm": [1, 0]}}
# the form of the groups -> the axes that they lie along, of data:4,fsdp:2
GROUPS = {
  "all": ({}, TWO),
  "listed": ({"replica_groups": ALONG_DATA["collective_device_list"]["replica_groups"]}, ("data",)),
  "counted": ({"iota_collective_device_list": {
    "num_replica_groups": 4, "num_devices_per_group": 2, "iota_reshape_dims": [8],
  }}, ("fsdp",)),
  "transposed": ({"iota_collective_device_list": IOTA | {
    "iota_reshape_dims": [4, 2], "iota_transpose_perm": [1, 0],
  }}, ("data",)),
  "a mesh": ({"mesh_axes_replica_group_list": {
    "mesh": {"axes": [{"size": 4}, {"size": 2}]}, "axes": [{"mesh_axis_index": 1}],
  }}, ("fsdp",)),
  "a mesh of listed devices": ({"mesh_axes_replica_group_list": {
    "mesh": PERMUTED, "axes": [{"mesh_axis_index": 1}],
  }}, ("data",)),
  "a transposed mesh": ({"mesh_axes_replica_group_list": {
    "mesh": TRANSFORMED, "axes": [{"mesh_axis_index": 1}],
  }}, ("data",)),
  "no axes": ({"iota_collective_device_list": IOTA | {"iota_reshape_dims": [8]}}, None),
  "not all devices": ({"replica_groups": [{"replica_ids": [0, 1]}]}, None),
  "part of an axis": ({"mesh_axes_replica_group_list": LINES | {
    "axes": [{"mesh_axis_index": 1, "sub_axis_info": {"pre_size": 1, "size": 2}}],
  }}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", GROUPS)
def test_groups_in_every_form(name):
  fields, axes = GROUPS[name]
  program = Written()
  program.add("all-gather", program.add("parameter"), **fields)
  if axes is None:
    with pytest.raises(ValueError, match=r"axes of the mesh|parts of a mesh axis"):
      program.traffic()
  else:
    workers = {TWO: 8, ("data",): 4, ("fsdp",): 2}[axes]
    sent = 4096 * (workers - 1)
    assert program.traffic() == [wire.Transfer("all-gather", axes, "float32", 4096, sent, 1)]


# first value, change per trip, comparison with the bound, bound -> trips
COUNTERS = [(0, 1, "LT", 5, 5), (0, 2, "LE", 5, 3), (9, -3, "GT", 0, 3), (1, 1, "NE", 4, 3),
            (4, 1, "LT", 4, 0), (7, 0, "LT", 9, None), (None, 1, "LT", 9, None)]  # fmt: skip


@pytest.mark.parametrize(("first", "change", "comparison", "bound", "trips"), COUNTERS)
def test_a_loops_condition_is_run_on_its_counter(first, change, comparison, bound, trips):
  """As XLA:TPU leaves loops: no known_trip_count, the change itself carried through the loop."""
  program = Written()
  number = lambda value: program.add("constant", shape=program.NUMBER, literal={"s32s": [value]})
  read = lambda state, place: program.add("get-tuple-element", state, tuple_index=place)
  body = program.function()
  state = program.add("parameter")
  total = program.add("all-reduce", read(state, 1), **ALONG_DATA)
  program.add("tuple", program.add("add", read(state, 0), read(state, 2)), total, read(state, 2))
  condition = program.function()
  counter = read(program.add("parameter"), 0)
  program.add("compare", counter, number(bound), comparison_direction=comparison)
  program.main()
  x = program.add("parameter")
  start = x if first is None else program.add("copy", number(first))
  state = program.add("tuple", start, x, number(change))
  program.add("while", state, called_computation_ids=[body, condition])
  if trips is None:
    with pytest.raises(ValueError, match="is not known"):
      program.traffic()
  else:
    assert program.traffic() == [SUM_OVER_DATA._replace(times=trips)] * (trips > 0)


@pytest.mark.parametrize(
  ("kind", "target", "operation", "axes", "sent"),
  [
    ("ALL_REDUCE", "{1,2}x{0:3}", "all-reduce", ("slice",), 4096),
    ("ALL_GATHER", "{{100000,200000},{100001,200001},{100002,200002},{100003,200003}}",
     "all-gather", ("slice",), 4096),
    ("ONE_TO_ONE", "{{100000->200001},{200000->100001}}", "permute", ("slice", "data"), 1024),
    ("BROADCAST", "{1,2}x{0:3}", None, (), 0),
  ],
)  # fmt: skip
def test_what_crosses_slices_leaves_by_the_hosts(kind, target, operation, axes, sent):
  """A program for two slices is that of one, and what it sends to the other is no collective."""
  noted = {
    "_xla_host_transfer_handler_name": "xla_megascale_runtime",
    "_xla_megascale_transfer_type": kind,
    "_xla_megascale_target": target,
  }
  noted = {"map": [{"key": key, "value": value} for key, value in noted.items()]}
  program = Written(range(4))
  x, order = program.add("parameter"), program.add("after-all", shape={"element_type": 17})
  program.add("all-reduce", x)
  send = {"is_host_transfer": True, "frontend_attributes": noted}
  program.add("send-done", program.add("send", x, order, **send), **send)
  program.add("send", x, order, is_host_transfer=True)  # to the host itself
  ids = np.array([100_000 + i for i in range(4)] + [200_000 + i for i in range(4)])
  devices = np.vectorize(lambda i: SimpleNamespace(id=i))(ids.reshape(2, 4))
  mesh: Any = SimpleNamespace(devices=devices, shape={"slice": 2, "data": 4})
  if operation is None:
    with pytest.raises(ValueError, match="as BROADCAST is not known"):
      program.traffic(mesh)
  else:
    crossing = wire.Transfer(operation, axes, "float32", 4096, sent, 1)
    assert program.traffic(mesh) == [SUM_OVER_DATA, crossing]


def test_other_ways_to_talk_are_refused():
  program = Written()
  program.add("collective-broadcast", program.add("parameter"), **ALONG_DATA)
  with pytest.raises(ValueError, match=r"'collective-broadcast\.2' sends is not known"):
    program.traffic()
  program = Written()
  config = b'{"custom_call_config": {"has_communication": true}}'
  program.add("custom-call", program.add("parameter"), backend_config=config)
  with pytest.raises(ValueError, match=r"'custom-call\.2' sends is not known"):
    program.traffic()


def permuted(x, key):
  del key
  return collectives.permute(x["w"].astype(jnp.bfloat16), [(i, (i + 1) % 8) for i in range(8)])


# What sends half precision: the program, and with which collectives it does.
HALF = {
  "gather_mean(bf16())": {"all_gather"},
  "two_phase(bf16())": {"all_to_all", "all_gather"},
  "permute": {"collective_permute"},
}


def half(name):
  program, tree = aggregation("mean()" if name == "permute" else name)
  return permuted if name == "permute" else program, tree


def lowered_for(platform, program, *args):
  """The collectives of a program over 'data:8', operation and lengths x type, without a device."""
  device = jax.sharding.AbstractDevice(device_kind="", num_cores=1, platform=platform)
  kinds = (jax.sharding.AxisType.Auto,)
  mesh = jax.sharding.AbstractMesh((8,), ("data",), axis_types=kinds, abstract_device=device)
  body = jax.shard_map(program, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
  text = jax.jit(body).trace(*args).lower(lowering_platforms=(platform,)).as_text()
  return re.findall(r'"stablehlo\.(all_\w+|collective_\w+)".*-> tensor<(\w+)>', text)


@pytest.mark.parametrize(("platform", "sent"), [("cpu", "ui16"), ("tpu", "bf16"), ("cuda", "bf16")])
@pytest.mark.parametrize("name", HALF)
def test_the_target_decides_how_half_precision_travels(name, platform, sent):
  """And not the backend of the machine that traces."""
  program, tree = half(name)
  found = lowered_for(platform, program, tree, jax.random.key(0))
  assert {operation for operation, _ in found} == HALF[name]
  assert {array.rpartition("x")[2] for _, array in found} == {sent}


@pytest.mark.parametrize(("platform", "bytes_"), [("cpu", 2**16), ("tpu", 2**20), ("cuda", 2**20)])
def test_only_messages_between_cpus_are_cut_for_gloo(platform, bytes_, monkeypatch):
  monkeypatch.setattr(sending, "PIECE", 2**16)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  x = jnp.zeros((2**20,), jnp.int8)
  found = lowered_for(platform, lambda x: collectives.permute(x, [(0, 1)]), x)
  assert set(found) == {("collective_permute", f"{bytes_}xi8")}


@pytest.fixture
def tpus(monkeypatch):
  """Eight TPU chips that are not there."""
  monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
  monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  from jax.experimental import topologies

  return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices


needs_compiler = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason='compiling for a TPU ahead of time needs: pip install -e ".[tpu]"',
)


@needs_compiler
@pytest.mark.parametrize("name", HALF)
def test_a_tpu_sends_half_precision_as_it_is(name, tpus):
  mesh = Mesh(np.array(tpus), ("data",))
  program, tree = half(name)
  key = jax.eval_shape(lambda: jax.random.key(0))
  place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P()))
  args = jax.tree.map(place, (tree, key))
  found = compiled.traffic(compile_on(mesh, program, *args), mesh)
  assert {transfer.dtype for transfer in found} == {"bfloat16"}


@needs_compiler
def test_compiled_for_a_tpu(tpus):
  """Without a TPU: int8 stays int8, half precision half, and loops have no known trip count."""
  mesh = Mesh(np.array(tpus)[ORDER].reshape(4, 2), TWO)

  aggregate, _ = aggregation("two_phase(int8())")

  def program(x, key):
    inner = lambda x: lax.all_gather(lax.psum_scatter(x, "fsdp", tiled=True), "fsdp", tiled=True)
    x = scan(3, lambda x: scan(5, inner, x) + lax.pmean(x.astype(jnp.bfloat16), TWO), x)
    sent = lax.all_to_all(x.reshape(4, -1, 128).astype(jnp.int8), "data", 0, 0)
    return sent, aggregate({"x": x}, key)

  place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P()))
  key = jax.eval_shape(lambda: jax.random.key(0))
  args = (jax.ShapeDtypeStruct((2048, 512), jnp.float32), key)
  found = compiled.traffic(compile_on(mesh, program, *map(place, args)), mesh)
  assert counted(found) == counted(wire.traffic(program, *args, axes=dict(mesh.shape)))
