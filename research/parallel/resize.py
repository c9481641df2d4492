"""A state saved on one mesh, put on another: other workers, or other devices inside a worker.

Leaves that the mesh only places keep their shape and need nothing. Others have a row for each
owner, a chunk for each worker, or, in `Blocks`, a block for each device of a worker; they are taken
apart and put together by what a checkpoint says of each leaf.
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
  """How a leaf of a state lies on a mesh. B blocks lie in the order of the axes."""

  name: str  # the same on every mesh
  shape: tuple[int, ...]  # as it is stored: owners or workers first, then blocks
  kind: str  # see `layout.kinds`
  inside: str = ""  # the name of the `Blocks` that it is in
  axes: tuple[tuple[str, int], ...] | None = None  # names and sizes, where it has blocks
  whole: tuple[int, ...] | None = None  # in Blocks: of the leaf that it is about, if it is of one
  places: tuple[int | None, ...] = ()  # dimensions of `whole` that the axes cut

  @property
  def owners(self) -> int:
    """Of its rows or chunks."""
    return 1 if self.kind == "shared" else self.shape[0]

  @property
  def part(self) -> tuple[int, ...]:
    """The shape of one block of one owner."""
    return self.shape[(self.kind != "shared") + (self.axes is not None) :]

  @property
  def cut(self) -> Cut:
    return Cut(self.axes or (), lambda shape: self.places)

  def parts(self, whole: tuple[int, ...]) -> tuple[int, ...]:
    """Into how many parts each dimension of its leaf is cut."""
    sizes = {d: size for d, (_, size) in zip(self.places, self.axes or (), strict=True)}
    return tuple(sizes.get(d, 1) for d in range(len(whole)))

  def shard(self, whole: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a part of its leaf."""
    return tuple(n // count for n, count in zip(whole, self.parts(whole), strict=True))


class Placed(NamedTuple):
  """Where the leaves of a state lie, by the names that they have in it."""

  mesh: str
  leaves: Mapping[str, Leaf]

  @property
  def axes(self) -> set[Any]:
    """Those of its blocks."""
    return {leaf.axes for leaf in self.leaves.values() if leaf.axes is not None}


def names(tree: Tree, is_leaf: Callable[[Any], bool] | None = None) -> list[str]:
  """Paths of the leaves, such as 'method.params.w'."""
  paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree, is_leaf)]
  return [jax.tree_util.keystr(path, simple=True, separator=".") for path in paths]


def placed(job: Job, private: Tree, state: TrainState) -> Placed:
  """How every leaf of a state lies.

  Args:
    job: whose state it is.
    private: which leaves of the method's state have rows, as `layout.infer` says.
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
  """What `from_json` reads."""
  leaves = {name: leaf._asdict() for name, leaf in state.leaves.items()}
  return {"mesh": state.mesh, "leaves": leaves}


def from_json(found: Any) -> Placed:
  """What `as_json` wrote, with lists for its tuples.

  Raises:
    TypeError: if it did not.
  """

  def tuples(x: Any) -> Any:
    return tuple(map(tuples, x)) if isinstance(x, list) else x

  leaf = lambda fields: Leaf(**{name: tuples(value) for name, value in fields.items()})
  return Placed(found["mesh"], {name: leaf(of) for name, of in found["leaves"].items()})


def _stored(leaf: Any) -> tuple[int, ...]:
  """The shape of what a file holds: of keys, their numbers."""
  is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
  return jax.eval_shape(jax.random.key_data, leaf).shape if is_key else leaf.shape


class _Given(Aggregator):
  """An aggregator whose state is what it was given."""

  inner: Aggregator

  def init(self, params):
    return Blocks(params)


def _wholes(job: Job) -> list[Tree]:
  """What each of a method's aggregators is given, whole: shapes, in the order of the state."""
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
  """The leaves of a `Blocks`, which has a state for each group of the leaves that it was given."""
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
  """Whether a key of a path says which of a shard's leaves it is, see `blockwise.pieces`."""
  return isinstance(key, jax.tree_util.DictKey) and isinstance(key.key, int)


def stranger(saved: Placed, here: Placed) -> str | None:
  """A leaf that only one of two states has, if they are not of one method and model.

  In `Blocks` of other axes, what belongs to no leaf need not be in both.
  """
  both = [some.leaves.values() for some in (saved, here)]
  inside = {f"{leaf.inside}." for leaves in both for leaf in leaves if leaf.inside}
  free = tuple(inside) if saved.axes != here.axes else ()
  must = lambda leaf: leaf.whole is not None or not leaf.name.startswith(free)
  had, has = ({leaf.name for leaf in leaves} for leaves in both)
  needs, needed = ({leaf.name for leaf in leaves if must(leaf)} for leaves in both)
  return min((needs - has) | (needed - had), default=None)


def origins(saved: Placed, here: Placed) -> dict[str, str]:
  """For each leaf the saved one that it is made of, but for leaves that nothing saved fits."""
  stored = {leaf.name: name for name, leaf in saved.leaves.items()}
  known = {name: stored.get(leaf.name, "") for name, leaf in here.leaves.items()}
  return {
    name: was for name, was in known.items() if was and fits(saved.leaves[was], here.leaves[name])
  }


def fits(saved: Leaf, leaf: Leaf) -> bool:
  """Whether `moved` can make one of the other."""
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
  """Whether there is nothing to move."""
  return saved.shape == leaf.shape and saved.kind == leaf.kind and cut_alike(saved, leaf)


def cut_alike(saved: Leaf, leaf: Leaf) -> bool:
  """Whether their blocks are the same parts of the same leaf."""
  sizes = lambda x: None if x.axes is None else [size for _, size in x.axes]
  if saved.whole is None and leaf.whole is None:
    return saved.axes == leaf.axes
  return sizes(saved) == sizes(leaf) and saved.places == leaf.places


def _of_all_workers(leaf: Leaf, whole: tuple[int, ...]) -> bool:
  """Whether its chunks together are a shard, and up to one element each that fills them up."""
  spare = leaf.owners * math.prod(leaf.part) - math.prod(leaf.shard(whole))
  return 0 <= spare < leaf.owners


def moved(x: Array, saved: Leaf, leaf: Leaf) -> Array:
  """A saved leaf as it lies on another mesh.

  Owners keep their rows where there are as many as before, else each gets the mean of all. Chunks
  of a shard are joined, shards are joined to the leaf, and that is cut anew. What belongs to a
  shard without being a part of it goes where the same shard is.
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
  """A private leaf [P, ...] for another number of owners: each gets the mean of all rows.

  The mean over owners is kept exactly, so residuals and drifting parameters lose nothing that their
  average carried. Integers and the like are taken from the first row.
  """
  is_float = jnp.issubdtype(rows.dtype, jnp.floating)
  wide = jnp.promote_types(rows.dtype, jnp.float32) if is_float else rows.dtype
  mean = jnp.mean(rows, 0, dtype=wide).astype(rows.dtype) if is_float else rows[0]
  return jnp.broadcast_to(mean, (owners, *rows.shape[1:]))


def recut_chunks(rows: Array, shape: tuple[int, ...]) -> Array:
  """Chunks [P, ...] of one whole as chunks of another shape [P', ...]; what pads them is zero."""
  whole, size = rows.reshape(-1), math.prod(shape)
  return jnp.pad(whole, (0, max(0, size - whole.size)))[:size].reshape(shape)
