"""Parses compiled programs: the part of XLA's protobuf schema that traffic analysis needs.

The schema is built at run time, since XLA ships none for Python, and a program's text form is not
stable. Field numbers are those of `xla/service/hlo.proto` and `xla/xla_data.proto` in OpenXLA; the
parser skips fields that are not listed here.
"""

import functools
import json
import math
from typing import Any, NamedTuple

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

# message -> field -> (number, type); a star marks repeated fields
_SCHEMA: dict[str, dict[str, tuple[int, str]]] = {
  "Shape": {
    "element_type": (2, "int32"),
    "dimensions": (3, "int64*"),
    "tuple_shapes": (4, "Shape*"),
  },
  "Literal": {
    "preds": (2, "bool*"),
    "s32s": (4, "int32*"),
    "s64s": (5, "int64*"),
    "u32s": (6, "uint32*"),
    "u64s": (7, "uint64*"),
  },
  "Metadata": {"op_name": (2, "string")},
  "Attributes": {"map": (1, "Attribute*")},
  "Attribute": {"key": (1, "string"), "value": (2, "string")},
  "Group": {"replica_ids": (1, "int64*")},
  "Pair": {"source": (1, "int64"), "target": (2, "int64")},
  "GroupList": {"replica_groups": (1, "Group*")},
  "IotaGroups": {
    "num_replica_groups": (1, "int64"),
    "num_devices_per_group": (2, "int64"),
    "iota_reshape_dims": (3, "int64*"),
    "iota_transpose_perm": (4, "int32*"),
  },
  "Transform": {"reshape_dims": (1, "int64*"), "transpose_perm": (2, "int64*")},
  "MeshAxis": {"name": (1, "string"), "size": (2, "int64")},
  "Mesh": {
    "axes": (1, "MeshAxis*"),
    "device_ids": (2, "int64*"),
    "iota_transform": (3, "Transform"),
  },
  "SubAxis": {"pre_size": (1, "int64"), "size": (2, "int64")},
  "AxisOfMesh": {"mesh_axis_index": (1, "int64"), "sub_axis_info": (2, "SubAxis")},
  "MeshGroups": {"mesh": (1, "Mesh"), "axes": (2, "AxisOfMesh*")},
  "Instruction": {
    "name": (1, "string"),
    "opcode": (2, "string"),
    "shape": (3, "Shape"),
    "metadata": (7, "Metadata"),
    "literal": (8, "Literal"),
    "parameter_number": (9, "int64"),
    "tuple_index": (13, "int64"),
    "channel_id": (26, "int64"),
    "custom_call_target": (28, "string"),
    "id": (35, "int64"),
    "operand_ids": (36, "int64*"),
    "called_computation_ids": (38, "int64*"),
    "backend_config": (43, "bytes"),
    "is_host_transfer": (47, "bool"),
    "replica_groups": (49, "Group*"),
    "source_target_pairs": (52, "Pair*"),
    "comparison_direction": (63, "string"),
    "frontend_attributes": (68, "Attributes"),
    "collective_device_list": (87, "GroupList"),
    "iota_collective_device_list": (92, "IotaGroups"),
    "mesh_axes_replica_group_list": (93, "MeshGroups"),
  },
  "Computation": {
    "name": (1, "string"),
    "instructions": (2, "Instruction*"),
    "id": (5, "int64"),
    "root_id": (6, "int64"),
  },
  "Devices": {"replica_device_ids": (1, "int64*")},
  "Assignment": {
    "replica_count": (1, "int32"),
    "computation_count": (2, "int32"),
    "computation_devices": (3, "Devices*"),
  },
  "Order": {"instruction_ids": (1, "int64*")},
  "OrderOfOne": {"key": (1, "int64"), "value": (2, "Order")},
  "Schedule": {"sequences": (1, "OrderOfOne*")},
  "Module": {
    "name": (1, "string"),
    "computations": (3, "Computation*"),
    "entry_computation_id": (6, "int64"),
    "schedule": (7, "Schedule"),
    "device_assignment": (15, "Assignment"),
  },
}

# xla.PrimitiveType -> NumPy's name; sub-byte types are missing: only some targets pack them
_DTYPES = {
  1: "bool", 2: "int8", 3: "int16", 4: "int32", 5: "int64",
  6: "uint8", 7: "uint16", 8: "uint32", 9: "uint64",
  10: "float16", 11: "float32", 12: "float64", 15: "complex64", 16: "bfloat16", 18: "complex128",
  19: "float8_e5m2", 20: "float8_e4m3fn", 23: "float8_e4m3b11fnuz", 24: "float8_e5m2fnuz",
  25: "float8_e4m3fnuz", 28: "float8_e4m3", 29: "float8_e3m4", 33: "float8_e8m0fnu",
}  # fmt: skip
_TOKEN = 17


class Computation(NamedTuple):
  """One function of a program."""

  instructions: dict[int, Any]  # by id; operands precede their users
  root: int  # id of the instruction whose value is returned
  id: int = 0


@functools.cache
def module_class() -> Any:
  """Returns the protobuf message class of a program."""
  field = descriptor_pb2.FieldDescriptorProto
  package = "research.hlo"
  file = descriptor_pb2.FileDescriptorProto(name="hlo.proto", package=package, syntax="proto3")
  for message, fields in _SCHEMA.items():
    described = file.message_type.add(name=message)
    for name, (number, kind) in fields.items():
      label = field.LABEL_REPEATED if kind.endswith("*") else field.LABEL_OPTIONAL
      kind = kind.removesuffix("*")
      if kind in _SCHEMA:
        found = {"type": field.TYPE_MESSAGE, "type_name": f".{package}.{kind}"}
      else:
        found = {"type": getattr(field, f"TYPE_{kind.upper()}")}
      described.field.add(name=name, number=number, label=label, **found)
  pool = descriptor_pool.DescriptorPool()
  pool.Add(file)
  return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.Module"))


def module_of(compiled: Any) -> Any:
  """Returns the optimized program that a compilation produced for its target.

  Args:
    compiled: a `jax.stages.Compiled`.
  """
  (module,) = compiled.runtime_executable().hlo_modules()
  return module_class().FromString(module.as_serialized_hlo_module_proto())


def computations_of(module: Any) -> dict[int, Computation]:
  """Returns a program's computations by id.

  Args:
    module: the program.
  """
  by_id = lambda computation: {i.id: i for i in computation.instructions}
  return {c.id: Computation(by_id(c), c.root_id, c.id) for c in module.computations}


def schedule_of(module: Any) -> dict[int, list[int]]:
  """Returns the ids of the instructions of each computation in the order in which they start.

  Computations that are not scheduled, such as fusions, are missing.

  Args:
    module: the program.
  """
  return {one.key: list(one.value.instruction_ids) for one in module.schedule.sequences}


def attributes_of(instruction: Any) -> dict[str, str]:
  """Returns the attributes that the frontend or a compiler pass attached to an instruction.

  Args:
    instruction: the instruction.
  """
  return {pair.key: pair.value for pair in instruction.frontend_attributes.map}


def config_of(instruction: Any) -> dict[str, Any]:
  """Returns the backend config of an instruction if it is JSON, else an empty dictionary.

  Args:
    instruction: the instruction.
  """
  config = instruction.backend_config
  return json.loads(config) if config.startswith(b"{") else {}


def is_token(shape: Any) -> bool:
  """Returns whether a value is a token, which orders instructions and has no data.

  Args:
    shape: an XLA shape.
  """
  return shape.element_type == _TOKEN


def dtype_of(shape: Any) -> str:
  """Returns NumPy's name of an array's dtype.

  Args:
    shape: an XLA shape.

  Raises:
    ValueError: if the shape is not an array with a dtype of full bytes.
  """
  if shape.element_type not in _DTYPES:
    raise ValueError(f"the bytes of XLA's element type {shape.element_type} are not known")
  return _DTYPES[shape.element_type]


def bytes_of(shape: Any) -> int:
  """Returns the size of an array in bytes.

  Args:
    shape: an XLA shape.
  """
  return math.prod(shape.dimensions) * np.dtype(dtype_of(shape)).itemsize


def groups_of(instruction: Any) -> list[list[int]]:
  """Returns a collective's device groups; an empty list means that all devices are one group.

  Args:
    instruction: the collective.

  Raises:
    ValueError: for groups over a part of an axis of XLA's own mesh.
  """
  if instruction.HasField("mesh_axes_replica_group_list"):
    return _mesh_groups(instruction.mesh_axes_replica_group_list)
  if instruction.HasField("iota_collective_device_list"):
    iota = instruction.iota_collective_device_list
    places = _iota(iota.iota_reshape_dims, iota.iota_transpose_perm)
    return places.reshape(iota.num_replica_groups, iota.num_devices_per_group).tolist()
  listed = instruction.collective_device_list.replica_groups or instruction.replica_groups
  return [list(group.replica_ids) for group in listed]


def _mesh_groups(listed: Any) -> list[list[int]]:
  if any(axis.HasField("sub_axis_info") for axis in listed.axes):
    raise ValueError("collectives among parts of a mesh axis are not counted; use two axes")
  sizes = [axis.size for axis in listed.mesh.axes]
  if listed.mesh.HasField("iota_transform"):
    transform = listed.mesh.iota_transform
    places = _iota(transform.reshape_dims, transform.transpose_perm)
  else:
    places = np.array(listed.mesh.device_ids or range(math.prod(sizes)))
  joined = [axis.mesh_axis_index for axis in listed.axes]
  apart = [n for n in range(len(sizes)) if n not in joined]
  width = math.prod(sizes[n] for n in joined)
  return places.reshape(sizes).transpose(apart + joined).reshape(-1, width).tolist()


def _iota(dimensions: Any, permutation: Any) -> np.ndarray:
  """Returns 0, 1, 2, ... in the shape `dimensions`, transposed if there is a permutation."""
  places = np.arange(math.prod(dimensions)).reshape(dimensions)
  return places.transpose(permutation) if permutation else places
