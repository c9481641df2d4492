"""Converts a state that was saved on one mesh to the layout of another mesh.

Leaves whose global shape does not depend on the mesh are copied. Other leaves have a row per
client, a chunk per worker or, in `Blocks`, a block per device of a worker. These rows, chunks and
blocks are reassembled and cut again according to the `Leaf` records of a checkpoint.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from research.aggregate.blockwise import Cut, is_counter, join_leaf, split_leaf
from research.comm import mesh as meshes
from research.core.base import Aggregator, Array, Blocks, Tree
from research.core.task import TrainState
from research.parallel import layout as layouts
from research.parallel import sharded
from research.parallel.job import Job, resolved


class Leaf(NamedTuple):
  """The layout of one state leaf on a mesh. The leaf's B blocks are ordered by the mesh axes."""

  name: str  # the same on every mesh
  shape: tuple[int, ...]  # the stored shape: clients or workers first, then blocks
  kind: str  # see `layout.kinds`
  inside: str = ""  # the name of the `Blocks` that contains the leaf, if any
  axes: tuple[tuple[str, int], ...] | None = None  # names and sizes of the axes of the blocks
  whole: tuple[int, ...] | None = None  # in Blocks: full shape of the parameter, if any
  places: tuple[int | None, ...] = ()  # dimensions of `whole` that the axes cut

  @property
  def owners(self) -> int:
    """The number of rows or chunks."""
    return 1 if self.kind == "shared" else self.shape[0]

  @property
  def part(self) -> tuple[int, ...]:
    """The shape of one block of one row."""
    return self.shape[(self.kind != "shared") + (self.axes is not None) :]

  @property
  def cut(self) -> Cut:
    return Cut(self.axes or (), lambda shape: self.places)

  def parts(self, whole: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the number of shards along each dimension of the full parameter."""
    sizes = {d: size for d, (_, size) in zip(self.places, self.axes or (), strict=True)}
    return tuple(sizes.get(d, 1) for d in range(len(whole)))

  def shard(self, whole: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of one shard of the full parameter."""
    return tuple(n // count for n, count in zip(whole, self.parts(whole), strict=True))


class Placed(NamedTuple):
  """The layouts of all leaves of a state, by name."""

  mesh: str
  leaves: Mapping[str, Leaf]

  @property
  def axes(self) -> set[Any]:
    """The axes of the blocks of all leaves."""
    return {leaf.axes for leaf in self.leaves.values() if leaf.axes is not None}


def names(tree: Tree, is_leaf: Callable[[Any], bool] | None = None) -> list[str]:
  """Returns the paths of the leaves, such as 'method.params.w'.

  Args:
    tree: a tree.
    is_leaf: as for `jax.tree.flatten`.
  """
  paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree, is_leaf)]
  return [jax.tree_util.keystr(path, simple=True, separator=".") for path in paths]


def placed(job: Job, private: Tree, state: TrainState) -> Placed:
  """Records the layout of every leaf of a state.

  Args:
    job: the job of that state.
    private: tree of bool from `layout.infer`, whether a leaf of the method's state has rows.
    state: arrays or their shapes.
  """
  kinds = layouts.kinds(TrainState(False, False, private))
  flat, tree = jax.tree.flatten(kinds, is_leaf=_is_blocks)
  found: dict[str, Leaf] = {}
  whole = iter(_wholes(job))
  for path, kind, node in zip(
    names(kinds, _is_blocks), flat, tree.flatten_up_to(state), strict=True
  ):
    if _is_blocks(kind):
      found |= _of_blocks(path, kind.part, node.part, next(whole), job)
    else:
      found[path] = Leaf(path, _stored(node), kind)
  return Placed(",".join(f"{name}:{size}" for name, size in job.axes.items()), found)


def as_json(state: Placed) -> dict[str, Any]:
  """Converts a layout to the JSON that `from_json` reads.

  Args:
    state: the layout.
  """
  leaves = {name: leaf._asdict() for name, leaf in state.leaves.items()}
  return {"mesh": state.mesh, "leaves": leaves}


def from_json(found: Any) -> Placed:
  """Reads a layout that `as_json` wrote; converts JSON's lists back to tuples.

  Args:
    found: the parsed JSON.

  Raises:
    TypeError: if the JSON does not have the fields of a layout.
  """

  def tuples(x: Any) -> Any:
    return tuple(map(tuples, x)) if isinstance(x, list) else x

  leaf = lambda fields: Leaf(**{name: tuples(value) for name, value in fields.items()})
  return Placed(found["mesh"], {name: leaf(of) for name, of in found["leaves"].items()})


def _stored(leaf: Any) -> tuple[int, ...]:
  """Returns the stored shape of a leaf; for typed keys, the shape of the key data."""
  is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
  return jax.eval_shape(jax.random.key_data, leaf).shape if is_key else leaf.shape


class _Given(Aggregator):
  """An aggregator whose state is a copy of the tree that it aggregates."""

  inner: Aggregator

  def init(self, params):
    return Blocks(params)


def _wholes(job: Job) -> list[Tree]:
  """Returns the full shapes of all trees that a method aggregates, in the order of the state."""
  given = job.method.over(_Given)
  axes = meshes.worker_axes(job.axes)
  params = jax.eval_shape(job.task.init, jax.random.key(0))
  state = layouts.shapes_of_one(
    resolved(job._replace(method=given)).method.init, axes, None, params
  )
  return [x.part for x in jax.tree.leaves(state, is_leaf=_is_blocks) if _is_blocks(x)]


def _is_blocks(node: Any) -> bool:
  return isinstance(node, Blocks)


def _of_blocks(inside: str, kinds: Tree, state: Tree, given: Tree, job: Job) -> dict[str, Leaf]:
  """Returns the leaves of a `Blocks`, which has one state per group of aggregated leaves."""
  cut = sharded.cut_of(job.axes, job.task)
  assert cut is not None
  of_leaf = list(zip(names(given), jax.tree.leaves(given), strict=True))
  found: dict[str, Leaf] = {}
  paths = jax.tree_util.tree_leaves_with_path(state)
  for ((_, *path), leaf), name, kind in zip(
    paths, names(state), jax.tree.leaves(kinds), strict=True
  ):
    stored = f"{inside}.part.{name}"
    place = next((i for i, key in enumerate(path) if _is_number(key)), None)
    keys = [jax.tree_util.keystr((key,), simple=True) for key in path]
    counts = is_counter(jax.ShapeDtypeStruct(leaf.shape[kind != "shared" :], leaf.dtype))
    one = Leaf(stored, leaf.shape, kind, inside, None if counts else cut.axes)
    if place is not None:
      keys[place], of = of_leaf[path[place].key]
      one = one._replace(whole=of.shape, places=() if counts else cut.places(of.shape))
    if counts or place is not None:
      one = one._replace(name=".".join(filter(None, (inside, *keys))))
    found[stored] = one
  return found


def _is_number(key: Any) -> bool:
  """Returns whether a path entry is the index of a shard's leaf; see `blockwise.pieces`."""
  return isinstance(key, jax.tree_util.DictKey) and isinstance(key.key, int)


def stranger(saved: Placed, here: Placed) -> str | None:
  """Finds a leaf that only one of two states has, because the methods or the models differ.

  If the `Blocks` of the two states have different axes, leaves that belong to no parameter may be
  missing from one state.

  Args:
    saved: the saved state.
    here: the state to restore.

  Returns:
    The leaf's name, or None if the states match.
  """
  both = [some.leaves.values() for some in (saved, here)]
  inside = {f"{leaf.inside}." for leaves in both for leaf in leaves if leaf.inside}
  free = tuple(inside) if saved.axes != here.axes else ()
  must = lambda leaf: leaf.whole is not None or not leaf.name.startswith(free)
  had, has = ({leaf.name for leaf in leaves} for leaves in both)
  needs, needed = ({leaf.name for leaf in leaves if must(leaf)} for leaves in both)
  return min((needs - has) | (needed - had), default=None)


def origins(saved: Placed, here: Placed) -> dict[str, str]:
  """Maps the name of a leaf to the name of the saved leaf that can fill it, if there is one.

  Args:
    saved: the saved state.
    here: the state to restore.
  """
  stored = {leaf.name: name for name, leaf in saved.leaves.items()}
  known = {name: stored.get(leaf.name, "") for name, leaf in here.leaves.items()}
  return {
    name: was for name, was in known.items() if was and fits(saved.leaves[was], here.leaves[name])
  }


def fits(saved: Leaf, leaf: Leaf) -> bool:
  """Returns whether `moved` can convert one leaf into the other.

  Args:
    saved: the leaf in the checkpoint.
    leaf: the leaf of the state.
  """
  if saved.kind != leaf.kind:
    return False
  if cut_alike(saved, leaf):
    return leaf.kind == "chunks" or saved.part == leaf.part
  whole = saved.whole or leaf.whole
  if whole is None or (saved.whole and leaf.whole and saved.whole != leaf.whole):
    return False
  if leaf.kind == "chunks":
    return all(_of_all_workers(x, whole) for x in (saved, leaf))
  if all(x.part == x.shard(whole) for x in (saved, leaf)):
    return True
  return saved.part == leaf.part and saved.parts(whole) == leaf.parts(whole)


def lie_alike(saved: Leaf, leaf: Leaf) -> bool:
  """Returns whether two leaves have the same layout, so that no conversion is needed.

  Args:
    saved: the leaf in the checkpoint.
    leaf: the leaf of the state.
  """
  return saved.shape == leaf.shape and saved.kind == leaf.kind and cut_alike(saved, leaf)


def cut_alike(saved: Leaf, leaf: Leaf) -> bool:
  """Returns whether the blocks of two leaves are the same parts of the same parameter.

  Args:
    saved: the leaf in the checkpoint.
    leaf: the leaf of the state.
  """
  sizes = lambda x: None if x.axes is None else [size for _, size in x.axes]
  if saved.whole is None and leaf.whole is None:
    return saved.axes == leaf.axes
  return sizes(saved) == sizes(leaf) and saved.places == leaf.places


def _of_all_workers(leaf: Leaf, whole: tuple[int, ...]) -> bool:
  """Returns whether a leaf's chunks form one shard, padded by less than one element per chunk."""
  spare = leaf.owners * math.prod(leaf.part) - math.prod(leaf.shard(whole))
  return 0 <= spare < leaf.owners


def moved(x: Array, saved: Leaf, leaf: Leaf) -> Array:
  """Converts a saved leaf to its layout on another mesh.

  If the number of clients is unchanged, each client keeps its row; otherwise each client gets the
  mean of all rows. Chunks are joined into shards and shards into the full parameter, which is then
  cut for the new mesh. State that belongs to a shard but is not a slice of a parameter moves with
  the shard.

  Args:
    x: the saved leaf.
    saved: the layout of the saved leaf.
    leaf: the layout to convert it to.
  """
  if leaf.kind == "chunks":
    return _moved_chunks(x, saved, leaf)
  one = partial(_moved_blocks, saved=saved, leaf=leaf)
  if leaf.kind == "shared":
    return one(x)
  if saved.owners == leaf.owners:
    return jax.vmap(one)(x)
  return resize_rows(jax.vmap(one)(resize_rows(x, 1)), leaf.owners)


def _moved_blocks(x: Array, saved: Leaf, leaf: Leaf) -> Array:
  if cut_alike(saved, leaf):
    return x
  whole = saved.whole or leaf.whole
  assert whole is not None
  blocks = x if saved.axes is not None else x[None]
  if saved.part == saved.shard(whole):
    found = split_leaf(join_leaf(blocks, whole, saved.cut), leaf.cut)
  else:
    numbers = jnp.arange(len(blocks)).reshape(-1, *[1] * len(whole))
    places = join_leaf(numbers, saved.parts(whole), saved.cut)
    found = blocks[split_leaf(places, leaf.cut).reshape(-1)]
  return found if leaf.axes is not None else found[0]


def _moved_chunks(x: Array, saved: Leaf, leaf: Leaf) -> Array:
  blocks = jnp.moveaxis(x, 1, 0) if saved.axes is not None else x[None]  # [B, W, chunk]
  if not cut_alike(saved, leaf):
    whole = saved.whole or leaf.whole
    assert whole is not None
    blocks = jax.vmap(partial(recut_chunks, shape=saved.shard(whole)))(blocks)
    blocks = split_leaf(join_leaf(blocks, whole, saved.cut), leaf.cut)
  found = jax.vmap(partial(recut_chunks, shape=(leaf.owners, *leaf.part)))(blocks)
  return jnp.moveaxis(found, 0, 1) if leaf.axes is not None else found[0]


def resize_rows(rows: Array, owners: int) -> Array:
  """Resizes a private leaf to another number of clients; each client gets the mean of all rows.

  The mean over clients is unchanged, so residuals and diverging models keep their average.
  Non-float leaves are copied from the first row.

  Args:
    rows: [P, ...].
    owners: the new number of clients.
  """
  is_float = jnp.issubdtype(rows.dtype, jnp.floating)
  wide = jnp.promote_types(rows.dtype, jnp.float32) if is_float else rows.dtype
  mean = jnp.mean(rows, 0, dtype=wide).astype(rows.dtype) if is_float else rows[0]
  return jnp.broadcast_to(mean, (owners, *rows.shape[1:]))


def recut_chunks(rows: Array, shape: tuple[int, ...]) -> Array:
  """Cuts chunks [P, ...] of one array into chunks of another shape [P', ...]; padding is zero.

  Args:
    rows: [P, ...].
    shape: [P', ...].
  """
  whole, size = rows.reshape(-1), math.prod(shape)
  return jnp.pad(whole, (0, max(0, size - whole.size)))[:size].reshape(shape)
