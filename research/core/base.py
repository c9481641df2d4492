"""Defines the interfaces of compressors and aggregators, and their traits."""

import enum
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from research.core import blame
from research.core.part import Part, required
from research.core.text import listed

Array = jax.Array
Key = jax.Array  # a typed PRNG key, jax.random.key
Tree = Any  # a pytree of arrays
Params = Tree
State = Tree

# The mesh axes over which workers are distributed, slow links first. Workers of one `slice` (a TPU
# slice, a node) are connected by fast links, and slices by slow links. All other mesh axes are
# within a worker.
WORKER_AXES = ("slice", "data")


def platform() -> str:
  """Returns the target platform of the program being traced: 'cpu', 'gpu' or 'tpu'.

  The target is the platform of the mesh in scope. Its devices need not exist on this machine
  (ahead-of-time compilation). Without a mesh, the target is JAX's default backend.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  name = device.platform if device is not None else jax.default_backend()
  return "gpu" if name in ("cuda", "rocm") else name


class Trait(enum.Flag):
  """Properties of an aggregator that determine which wrappers and methods can use it."""

  MEMORY = enum.auto()  # stores leaves between rounds, such as the compression error
  VOTE = enum.auto()  # sends signs without a scale
  SELECTS = enum.auto()  # its value is not the mean of the workers' messages
  NOISE = enum.auto()  # adds noise for privacy
  SECRET = enum.auto()  # masks the workers' messages
  FORGED = enum.auto()  # replaces the values of faulty workers with forged ones
  WHOLE = enum.auto()  # needs all of a worker's leaves at once
  EXPANSIVE = enum.auto()  # its compressor is not contractive
  DENSE = enum.auto()  # its messages are not sparse
  APART = enum.auto()  # workers, or phases, may send different positions of a leaf
  LOCAL = enum.auto()  # its value differs between workers
  WEIGHTED = enum.auto()  # its value weights the workers by their position in the graph
  DIRECTED = enum.auto()  # the weight of worker j at worker i may differ from that of i at j
  VARYING = enum.auto()  # the set of averaged workers changes from round to round
  PARTIAL = enum.auto()  # its value is the mean of the workers that did not drop out
  SENDERS = enum.auto()  # its value is the mean of each element over the workers that sent it
  EVERYONE = enum.auto()  # its value depends on every worker's messages of earlier rounds

  def __str__(self) -> str:
    return listed([str(flag.name).lower() for flag in self])


class Compressor(Part):
  """A local, stateless, lossy encoding of one array; papers write C(.).

  The payload is a tree of arrays whose shapes depend only on the input's shape and dtype. The
  dtypes and shapes of these arrays are the wire format. What `encode` draws from the shared key
  (the support of random-k, a rotation, a hash) is not sent, because `decode` can draw it again.
  """

  linear = False  # payloads of several workers may be summed before decoding
  contractive = True  # E ||C(x) - x||^2 < ||x||^2 for every x, so a memory stays bounded
  sparse = False  # C(x) is zero at the majority of positions

  @required
  def encode(self, x: Array, shared: Key, own: Key) -> Tree:
    """Encodes an array into its payload.

    Args:
      x: the floating-point array, of any shape.
      shared: a typed key, equal on all workers.
      own: a typed key of this worker.
    """
    ...

  @required
  def decode(self, payload: Tree, like: jax.ShapeDtypeStruct, shared: Key) -> Array:
    """Decodes a payload into an approximation of the array.

    Args:
      payload: the result of `encode`.
      like: the shape and the dtype of the array.
      shared: the shared key that was passed to `encode`.
    """
    ...


class Chunk(NamedTuple):
  """A worker's part of an array that is partitioned over the workers in order.

  In a state, chunks are private. If the number of workers changes, the full array is partitioned
  again, whereas the rows of other private leaves are averaged.
  """

  part: Array


class Own(NamedTuple):
  """State that is private to each owner, even if all workers of a round write equal values.

  A client that is not sampled in a round keeps its value. An example is the model that a client has
  pulled last.
  """

  part: Tree


class Blocks(NamedTuple):
  """State of leaves that are sharded within a worker, [B, ...]: one row for each of B devices."""

  part: Tree


class Uplink(NamedTuple):
  """The encoding of a worker's messages to a server, which decodes each leaf separately.

  Each message has its own key, which the worker and the server share. A payload is a Compressor's
  encoding of a leaf; its shapes and dtypes are the wire format.
  """

  init: Callable[[Params], State]  # the worker's state, which persists from message to message
  encode: Callable[[Tree, State, Key], tuple[list[Tree], State]]  # payloads by leaf, and the state
  decode: Callable[[Tree, jax.ShapeDtypeStruct, Key, int], Array]  # (payload, like, key, leaf)


class Presence(NamedTuple):
  """A worker's participation in an exchange, and the weight of its contribution.

  If `active` is the Python value `True`, all workers are statically known to participate. In each
  round, the mean of the weights over all W workers is one, where absent workers count as zero.
  """

  weight: float | Array = 1.0
  active: bool | Array = True


EVERYONE = Presence()


class Aggregate(NamedTuple):
  """The result of an exchange for one worker."""

  value: Tree  # the aggregate that this worker receives
  sent: Tree  # the contribution as the others received it; tree - sent is the compression error
  state: State


class Wrapper(Part):
  """A Part that wraps aggregators and may reject some of them by their traits."""

  refuses: ClassVar[Mapping[Trait, str]] = {}  # rejected trait of a wrapped aggregator -> reason

  def __post_init__(self):
    super().__post_init__()
    for aggregator in self.aggregators():
      self.refuse(aggregator.traits)

  def aggregators(self) -> list["Aggregator"]:
    """The aggregators that this object wraps directly."""
    return [one for one in self.values() if isinstance(one, Aggregator)]

  def refuse(self, traits: Trait) -> None:
    """Rejects an aggregator that has one of the traits in `refuses`.

    Args:
      traits: the traits of the aggregator.

    Raises:
      ValueError: if the aggregator has such a trait; the message contains the reason.
    """
    for trait, reason in self.refuses.items():
      if trait in traits:
        raise ValueError(
          f"{self.title} cannot be combined with this aggregator ({trait}): {reason}"
        )


def _checked(aggregate: Callable[..., Aggregate]) -> Callable[..., Aggregate]:
  """Wraps a user's `aggregate`; raises an error that names it if it returns no Aggregate."""

  @functools.wraps(aggregate)
  def checked(*args: Any, **kwargs: Any) -> Aggregate:
    found = aggregate(*args, **kwargs)
    if not isinstance(found, Aggregate):
      kind = type(found).__name__
      what = f"{kind} of {len(found)}" if isinstance(found, tuple | list) else kind
      wanted = "not Aggregate(value, sent, state)"
      raise blame.WrongReturn(f"{blame.of_function(aggregate)} returns a {what}, {wanted}")
    return found

  return checked


class Aggregator(Wrapper):
  """An exchange between workers, from the point of view of one worker, under named worker axes.

  The value of the exchange is one of two things: the exact or approximate mean 1/W sum_i weight_i
  x_i of the workers' trees, or the result of a rule for the trees of the present workers,
  multiplied by their mean weight. The values of an absent worker do not reach the others, and its
  private memory does not change.

  The class attribute `adds` contains the aggregator's own traits; `traits` also includes those of
  the aggregators and compressors within it.
  """

  adds: ClassVar[Trait] = Trait(0)

  def __init_subclass__(cls, name: str = "", **kwargs: Any):
    super().__init_subclass__(name=name, **kwargs)
    if "aggregate" in vars(cls) and blame.is_users(cls.__module__):
      cls.aggregate = _checked(cls.aggregate)

  def __post_init__(self):
    super().__post_init__()
    for value in self.values():
      if isinstance(value, Compressor):
        _check_types(value)

  def init(self, params: Params) -> State:
    """Returns the initial state, which persists from round to round; empty by default.

    Args:
      params: a tree with the structure, shapes and dtypes of the trees to aggregate.
    """
    del params
    return ()

  @required
  def aggregate(
    self, tree: Tree, state: State, key: Key, presence: Presence = EVERYONE
  ) -> Aggregate:
    """Runs one exchange.

    Args:
      tree: this worker's contribution, a tree of arrays of any shapes.
      state: the result of `init` or of the previous exchange.
      key: a typed key, equal on all workers.
      presence: this worker's participation and weight.
    """
    ...

  @property
  def traits(self) -> Trait:
    """The aggregator's own traits, and those of the aggregators and compressors within it."""
    found = self.adds
    for value in self.values():
      if isinstance(value, Aggregator):
        found |= value.traits
      elif isinstance(value, Compressor):
        found |= traits_of(value)
    return found

  @property
  def uplink(self) -> Uplink | None:
    """The aggregator's encoding of messages to a server; None if there is no such encoding."""
    return None

  @property
  def privacy(self) -> Any:
    """Returns a `Noise` or `Sum` (`privacy/hiding.py`), which says what others see of a worker.

    None means that every message is visible.
    """
    return None


def _check_types(compressor: Compressor) -> None:
  """Checks the decoded shape and dtype, only once for each hashable compressor."""
  try:
    hash(compressor)
  except TypeError:
    _check_decoded(compressor)
  else:
    _check_once(compressor)


def _check_decoded(compressor: Compressor) -> None:
  """Checks the decoded shape and dtype by tracing the compressor with a small leaf.

  Raises:
    ValueError: if the decoded array does not have the shape and dtype of the leaf.
  """
  leaf = jax.ShapeDtypeStruct((4, 6), jnp.float32)
  there_and_back = lambda x, key: compressor.decode(compressor.encode(x, key, key), leaf, key)
  found = jax.eval_shape(there_and_back, leaf, jax.eval_shape(jax.random.key, 0))
  shown = [f"{x.dtype}{list(x.shape)}" for x in (found, leaf)]
  if shown[0] != shown[1]:
    raise ValueError(f"decode of {compressor!r} returns {shown[0]} for a leaf {shown[1]}")


_check_once = functools.cache(_check_decoded)


def traits_of(compressor: Compressor) -> Trait:
  """Returns the traits that an aggregator inherits from its compressor.

  Args:
    compressor: the compressor.
  """
  found = Trait(0) if compressor.contractive else Trait.EXPANSIVE
  if not compressor.sparse:
    return found | Trait.DENSE
  return found if compressor.linear else found | Trait.APART
