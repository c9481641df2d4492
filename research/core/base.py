"""Interfaces of exchanges: compressors, aggregators, and what they say of themselves."""

import enum
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from research.core.part import Part
from research.core.text import listed

Array = jax.Array
Key = jax.Array  # a typed PRNG key, jax.random.key
Tree = Any  # a pytree of arrays
Params = Tree
State = Tree

# The mesh axes over which workers are spread, slow links first. Workers of one `slice` are joined
# by fast links (a TPU slice, a node), slices by slow ones. All other mesh axes lie inside a worker.
WORKER_AXES = ("slice", "data")


def platform() -> str:
  """'cpu', 'gpu' or 'tpu': what the program that is being traced will run on.

  The mesh in scope decides, whose devices may be ones to compile for that this machine does not
  have; without a mesh it is JAX's default backend.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  name = device.platform if device is not None else jax.default_backend()
  return "gpu" if name in ("cuda", "rocm") else name


class Trait(enum.Flag):
  """What a wrapper must know of the aggregator that it wraps."""

  MEMORY = enum.auto()  # keeps leaves from round to round, such as what a worker did not send
  VOTE = enum.auto()  # sends signs without a scale
  SELECTS = enum.auto()  # its value is not the mean of what the workers sent
  NOISE = enum.auto()  # adds noise that hides a worker
  SECRET = enum.auto()  # masks what a worker sends
  FORGED = enum.auto()  # replaces what faulty workers have
  WHOLE = enum.auto()  # looks at all of a worker's leaves at once
  EXPANSIVE = enum.auto()  # its compressor may miss more than all of a value
  DENSE = enum.auto()  # what it sends is not zero at most positions
  APART = enum.auto()  # two workers, or two phases, send different positions of a leaf
  LOCAL = enum.auto()  # its value differs from worker to worker
  WEIGHTED = enum.auto()  # its value weights the workers by their place in the graph
  DIRECTED = enum.auto()  # the weight of worker j at worker i is not that of i at j
  VARYING = enum.auto()  # the workers that it averages change from round to round
  PARTIAL = enum.auto()  # its value is the mean of the workers that did not drop out
  EVERYONE = enum.auto()  # its value needs what every worker sent in earlier rounds

  def __str__(self) -> str:
    return listed([str(flag.name).lower() for flag in self])


class Compressor(Part):
  """A lossy encoding of one array: local, stateless, the paper's C(.).

  The payload is a tree of arrays whose shapes depend on the input's shape and dtype alone; their
  dtypes and shapes ARE the wire format. What is drawn from the shared key (the support of random-k,
  a rotation, a hash) is drawn again by `decode` and needs no place on the wire.
  """

  linear = False  # payloads of several workers may be summed before decoding
  contractive = True  # E ||C(x) - x||^2 < ||x||^2 whatever x is: a memory stays bounded
  sparse = False  # C(x) is zero but at few positions

  def encode(self, x: Array, shared: Key, own: Key) -> Tree:
    """The payload of an array.

    Args:
      x: of any shape, floating-point.
      shared: a typed key, equal on all workers.
      own: a typed key of this worker.
    """
    raise NotImplementedError(f"{type(self).__name__} has no encode")

  def decode(self, payload: Tree, like: jax.ShapeDtypeStruct, shared: Key) -> Array:
    """What the payload says of the array.

    Args:
      payload: what `encode` made.
      like: shape and dtype of the array.
      shared: the key that `encode` had.
    """
    raise NotImplementedError(f"{type(self).__name__} has no decode")


class Chunk(NamedTuple):
  """A worker's part of a whole that the workers have cut among themselves, in their order.

  In a state it is private like any other leaf; its type says that for another number of workers
  the whole is cut anew, where other private rows are averaged.
  """

  part: Array


class Own(NamedTuple):
  """State that every owner keeps for itself, even where all workers of a round write the same.

  Where a worker serves several clients, those that a round leaves out keep what they had: the model
  that a client last pulled is one.
  """

  part: Tree


class Blocks(NamedTuple):
  """State of what a mesh cuts inside a worker: leaves [B, ...], a row for each of B devices."""

  part: Tree


class Uplink(NamedTuple):
  """How the trees of one worker get to a server, which decodes each leaf of each worker alone.

  The key is equal on both sides and belongs to one message. A payload is what a Compressor makes of
  a leaf: its shapes and dtypes are the wire format.
  """

  init: Callable[[Params], State]  # what the worker keeps from message to message
  encode: Callable[[Tree, State, Key], tuple[list[Tree], State]]  # payloads by leaf, and the state
  decode: Callable[[Tree, jax.ShapeDtypeStruct, Key, int], Array]  # (payload, like, key, leaf)


class Presence(NamedTuple):
  """Whether a worker takes part in an exchange, and what its contribution weighs.

  A Python `True` says that all workers take part, so that nobody has to ask. The weights of a
  round's workers average to one over all W of them; that of an absent worker counts as zero.
  """

  weight: float | Array = 1.0
  active: bool | Array = True


EVERYONE = Presence()


class Aggregate(NamedTuple):
  """What one exchange between workers gives to one of them."""

  value: Tree  # what this worker receives
  sent: Tree  # its contribution as the others saw it; tree - sent is the error
  state: State


class Wrapper(Part):
  """A Part around aggregators, which it may refuse by their traits."""

  refuses: ClassVar[Mapping[Trait, str]] = {}  # trait of what is wrapped -> why not

  def __post_init__(self):
    super().__post_init__()
    for aggregator in self.aggregators():
      self.refuse(aggregator.traits)

  def aggregators(self) -> list["Aggregator"]:
    """Those that it wraps itself."""
    return [one for one in self.values() if isinstance(one, Aggregator)]

  def refuse(self, traits: Trait) -> None:
    """Rejects an aggregator that has one of the traits in `refuses`.

    Raises:
      ValueError: with the trait and the reason.
    """
    for trait, reason in self.refuses.items():
      if trait in traits:
        raise ValueError(f"{self.title} does not go with what it wraps ({trait}): {reason}")


class Aggregator(Wrapper):
  """The only place where workers talk. Runs per worker, under named worker axes.

  The value is the mean 1/W sum_i weight_i x_i of what the workers have, exactly or nearly, or a
  rule over the values of those present, times their mean weight. Nothing that an absent worker has
  reaches the others, and the memory that it keeps for itself stays as it was.

  `adds` are its own traits; those of the aggregators and compressors in it are its traits too.
  """

  adds: ClassVar[Trait] = Trait(0)

  def __post_init__(self):
    super().__post_init__()
    for value in self.values():
      if isinstance(value, Compressor):
        _check_types(value)

  def init(self, params: Params) -> State:
    """What it keeps from round to round; nothing by default."""
    del params
    return ()

  def aggregate(
    self, tree: Tree, state: State, key: Key, presence: Presence = EVERYONE
  ) -> Aggregate:
    """One exchange.

    Args:
      tree: what this worker contributes, arrays of any shapes.
      state: what `init` or the last exchange returned.
      key: a typed key, equal on all workers.
      presence: whether this worker takes part, and what its contribution weighs.
    """
    raise NotImplementedError(f"{type(self).__name__} has no aggregate")

  @property
  def traits(self) -> Trait:
    """What a wrapper must know of it."""
    found = self.adds
    for value in self.values():
      if isinstance(value, Aggregator):
        found |= value.traits
      elif isinstance(value, Compressor):
        found |= traits_of(value)
    return found

  @property
  def uplink(self) -> Uplink | None:
    """The same encoding on the way to a server; None of an exchange among the workers."""
    return None

  @property
  def privacy(self) -> Any:
    """What the others see of a worker, a `Noise` or a `Sum` of `aggregate/privacy/hiding.py`.

    None: nothing is known, and the accountant assumes that each message is seen.
    """
    return None


@functools.cache
def _check_types(compressor: Compressor) -> None:
  """Traces a small leaf there and back.

  Raises:
    ValueError: if the compressor decodes another shape or dtype than it was given.
  """
  leaf = jax.ShapeDtypeStruct((4, 6), jnp.float32)
  there_and_back = lambda x, key: compressor.decode(compressor.encode(x, key, key), leaf, key)
  found = jax.eval_shape(there_and_back, leaf, jax.eval_shape(jax.random.key, 0))
  shown = [f"{x.dtype}{list(x.shape)}" for x in (found, leaf)]
  if shown[0] != shown[1]:
    raise ValueError(f"decode of {compressor!r} returns {shown[0]} for a leaf {shown[1]}")


def traits_of(compressor: Compressor) -> Trait:
  """The traits that an aggregator has from its compressor."""
  found = Trait(0) if compressor.contractive else Trait.EXPANSIVE
  if not compressor.sparse:
    return found | Trait.DENSE
  return found if compressor.linear else found | Trait.APART
