"""Mesh strings, device meshes, and which launcher makes one job of several processes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from research.comm import mesh
from research.core import base


@pytest.mark.parametrize(
  ("spec", "axes"),
  [
    ("data:8", {"data": 8}),
    ("fsdp:2,data:4,slice:3", {"slice": 3, "data": 4, "fsdp": 2}),
    (" slice : 2 , data:1", {"slice": 2, "data": 1}),
    ("slice:2", {"slice": 2, "data": 1}),
    ("fsdp:4", {"data": 1, "fsdp": 4}),
  ],
)
def test_a_mesh_string_is_read_slow_links_first(spec, axes):
  assert list(mesh.parse_mesh(spec).items()) == list(axes.items())


@pytest.mark.parametrize(
  ("spec", "message"),
  [
    ("dat:8", "unknown axis 'dat'; did you mean 'data'\\? legal: slice, data, stage, fsdp, exp"),
    ("data:4,data:2", "axis 'data' is named twice"),
    ("data:4,fsdp", "'fsdp' is not AXIS:SIZE with a positive integer size"),
    ("data:0", "'data:0' is not AXIS:SIZE"),
    ("data:-2", "'data:-2' is not AXIS:SIZE"),
    ("data:2.0", "'data:2.0' is not AXIS:SIZE"),
    ("data:4,", "'' is not AXIS:SIZE"),
    ("", "'' is not AXIS:SIZE"),
    ("8", "'8' is not AXIS:SIZE"),
  ],
)
def test_a_malformed_mesh_string_is_refused(spec, message):
  with pytest.raises(ValueError, match=message):
    mesh.parse_mesh(spec)


def test_workers_are_the_places_on_worker_axes():
  axes = mesh.parse_mesh("slice:2,data:4,fsdp:3")
  assert mesh.worker_axes(axes) == {"slice": 2, "data": 4}
  assert mesh.count(axes) == 24
  assert mesh.count(mesh.worker_axes(axes)) == 8


def test_places_of_an_absurd_mesh_are_counted_right():
  assert mesh.count({"slice": 8, "data": 2**62}) == 2**65


def test_a_device_mesh_lies_on_the_first_devices_in_auto_mode():
  found = mesh.device_mesh({"slice": 2, "data": 2})
  assert found.axis_names == ("slice", "data")
  assert found.devices.shape == (2, 2)
  assert set(found.axis_types) == {AxisType.Auto}
  assert {d.id for d in found.devices.flat} == {d.id for d in jax.devices()[:4]}


def test_too_few_devices_are_counted_and_a_way_out_is_named():
  with pytest.raises(ValueError, match=r"needs 16 devices and there are 8 \(cpu\)") as caught:
    mesh.device_mesh({"slice": 2, "data": 8})
  assert "'slice:2,data:8'" in str(caught.value)
  assert "--executor=simulate" in str(caught.value)
  assert "JAX_NUM_CPU_DEVICES=16" in str(caught.value)
  with pytest.raises(ValueError, match=r"needs 2 devices and there is 1 \(cpu\)"):
    mesh.device_mesh({"data": 2}, jax.devices()[:1])


@pytest.mark.parametrize("size", [4, 16])
def test_several_processes_need_just_as_many_devices_as_places(size, monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(ValueError, match="all devices of all processes take part") as caught:
    mesh.device_mesh({"data": size})
  assert f"needs {size} devices and there are 8" in str(caught.value)
  assert mesh.device_mesh({"data": 8}).size == 8


@pytest.mark.parametrize(
  ("workers", "devices", "size"),
  [(8, 8, 8), (16, 8, 8), (4, 8, 4), (6, 4, 3), (7, 4, 1), (1, 8, 1), (9, 8, 3)],
)
def test_simulated_workers_spread_evenly(workers, devices, size):
  found = mesh.simulation_mesh(workers, jax.devices()[:devices])
  assert dict(found.shape) == {"data": size}


@dataclasses.dataclass(frozen=True)
class FakeDevice:
  id: int
  slice_index: int
  process_index: int = 0
  platform: str = "cpu"
  device_kind: str = "fake"


@pytest.mark.parametrize(
  "axes",
  [
    {"slice": 2, "data": 4},
    {"data": 8},
    {"data": 4, "fsdp": 2},
    {"slice": 2, "data": 1, "stage": 2, "model": 2},
  ],
)
def test_the_outermost_axis_crosses_the_slices(axes):
  """Whatever the order in which the devices of two slices come."""
  devices = [FakeDevice(i, i % 2) for i in range(8)]
  found = mesh.device_mesh(axes, devices).devices.reshape(2, 4)
  assert [{d.slice_index for d in half} for half in found] == [{0}, {1}]


def test_what_lies_inside_a_worker_never_crosses_slices():
  devices = [FakeDevice(i, i % 2) for i in range(8)]
  with pytest.raises(ValueError, match="'data' does not divide among the 2 slices"):
    mesh.device_mesh({"data": 1, "fsdp": 8}, devices)


@pytest.mark.parametrize(("name", "platform"), [("cpu", "cpu"), ("tpu", "tpu"), ("cuda", "gpu")])
def test_the_devices_decide_what_a_program_is_for(name, platform):
  device = FakeDevice(0, 0, platform=name)
  options = mesh.options_for_sums(Mesh(np.array([device]), ("data",)), 2**20)
  assert bool(options) == (platform == "cpu" and jax.__version_info__ < (0, 12))
  once = mesh.options_to_run_once(Mesh(np.array([device]), ("data",)))
  assert once is None  # the tests compile with fewer optimizations still
  with jax.sharding.use_abstract_mesh(mesh.like(device)):
    traced = jax.vmap(lambda x: x + (base.platform() == platform))
    assert traced(jnp.zeros(2)).tolist() == [1, 1]
  assert base.platform() == jax.default_backend() == "cpu"


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_only_cpus_compile_with_fewer_optimizations_what_runs_once(platform):
  devices = Mesh(np.array([FakeDevice(0, 0, platform=platform)]), ("data",))
  jax.config.update("jax_disable_most_optimizations", False)
  try:
    assert bool(mesh.options_to_run_once(devices)) == (platform == "cpu")
  finally:
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(128, 10), (5, 7), (3, 3, 2, 4)])
def test_a_program_that_runs_once_has_the_result_of_one_that_is_optimized_further(shape):
  def draw(key):
    of = jax.random.split(key, 3)
    he, xavier = jax.nn.initializers.he_normal(), jax.nn.initializers.xavier_uniform()
    return he(of[0], shape), xavier(of[1], shape), jax.random.normal(of[2], shape)

  lowered, key = jax.jit(draw).lower(jax.random.key(0)), jax.random.key(1)
  options: list[dict[str, Any]] = [{"xla_backend_optimization_level": level} for level in (1, 3)]
  found, want = (lowered.compile(compiler_options=one)(key) for one in options)
  for got, one in zip(found, want, strict=True):
    np.testing.assert_array_equal(got, one)
