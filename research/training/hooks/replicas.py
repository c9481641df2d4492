"""Checks that replicated state is bitwise equal on all devices."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from research.core.base import Array, Tree
from research.training.checkpoint.integrity import checksum
from research.training.hooks.hook import COMPLETE, Event, Hook, Rounds, Stop

if TYPE_CHECKING:
  from research.training.run import BaseRun


class ReplicasDiffer(Exception):
  """Reports that copies of replicated state differ between devices."""


class Replicas(Hook):
  """Compares copies every `check_every` steps and at the end; ends the run if copies differ."""

  def __init__(self, run: "BaseRun"):
    self.every = run.config.check_every
    self._differing = replica_check(run.state)

  def on(self, run: "BaseRun", event: Event) -> Iterable[Event]:
    ends = isinstance(event, Stop) and event.reason in COMPLETE
    if ends or (isinstance(event, Rounds) and run.due(event, self.every)):
      with run.aside():
        names = self._differing(run.state)
      if names:
        raise ReplicasDiffer(
          f"at step {run.step} the devices have different copies of {', '.join(names)}"
        )
    return ()


def replica_check(tree: Tree) -> Callable[[Tree], list[str]]:
  """Returns `differing(tree)`: the names of leaves whose copies are not bitwise equal.

  Each device hashes its part of a leaf. The hashes are compared along the mesh axes over which the
  leaf is replicated. A leaf that is sharded over all axes has no copies and is never reported.

  Args:
    tree: arrays with the shardings of the arrays to check, on one mesh.
  """
  names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
  mesh = jax.tree.leaves(tree)[0].sharding.mesh
  specs = [leaf.sharding.spec for leaf in jax.tree.leaves(tree)]
  copied = [tuple(axis for axis in mesh.axis_names if axis not in _axes(spec)) for spec in specs]

  def differ(*leaves):
    def one(leaf, axes):
      own = checksum(leaf)
      return lax.pmax(own, axes) != lax.pmin(own, axes) if axes else jnp.zeros((), bool)

    found = jnp.stack([one(leaf, axes) for leaf, axes in zip(leaves, copied, strict=True)])
    return lax.pmax(found, mesh.axis_names)

  check = jax.jit(
    jax.shard_map(differ, mesh=mesh, in_specs=tuple(specs), out_specs=P(), check_vma=False)
  )

  def differing(tree: Tree) -> list[str]:
    leaves = [jax.random.key_data(x) if _is_key(x) else x for x in jax.tree.leaves(tree)]
    found = np.asarray(jax.device_get(check(*leaves)))
    return [name for name, wrong in zip(names, found, strict=True) if wrong]

  return differing


def _is_key(leaf: Array) -> bool:
  return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _axes(spec: P) -> set[str]:
  parts = [part if isinstance(part, tuple) else (part,) for part in spec if part is not None]
  return {name for part in parts for name in part}
