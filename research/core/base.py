"""Interfaces: what an algorithm, a task and an execution are to one another."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

Array = jax.Array
Key = jax.Array  # a typed PRNG key, jax.random.key
Tree = Any  # a pytree of arrays
Params = Tree
State = Tree
Local = Any  # a pytree with an attribute `params`
Batch = dict[str, Any]  # arrays [examples, ...]; "mask" [examples], where present, is 1 or 0

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


class Compressor(NamedTuple):
  """A lossy encoding of one array: local, stateless, the paper's C(.).

  Both keys are typed keys: `shared` is equal on all workers, `own` is this worker's. What is drawn
  from `shared` (the support of random-k, a rotation, a hash) is drawn again by `decode` and needs
  no place on the wire. The payload is a tree of arrays whose shapes depend on the input's shape and
  dtype alone; their dtypes and shapes ARE the wire format.
  """

  encode: Callable[[Array, Key, Key], Tree]  # (x, shared, own) -> payload
  decode: Callable[[Tree, jax.ShapeDtypeStruct, Key], Array]  # (payload, like, shared) -> x_hat
  linear: bool = False  # payloads of several workers may be summed before decoding
  contractive: bool = True  # E ||C(x) - x||^2 < ||x||^2 whatever x is: a memory stays bounded
  sparse: bool = False  # C(x) is zero but at few positions


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


class Link(NamedTuple):
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


class Aggregator(NamedTuple):
  """The only place where workers talk. Runs per worker, under named worker axes.

  The value is the mean 1/W sum_i weight_i x_i of what the workers have, exactly or nearly, or a
  rule over the values of those present, times their mean weight. Nothing that an absent worker has
  reaches the others, and the memory that it keeps for itself stays as it was.

  `traits` say to a wrapper what it must know of what it wraps; `aggregate/composition.py` has their
  list, and the pairs that are refused. `link` is the same encoding on the way to a server, where
  the workers do not meet; what is an exchange among them has none. `privacy` is for the accountant,
  a `Noise` or a `Sum` of `aggregate/hiding.py`; without it nothing is known of what is seen.
  """

  init: Callable[[Params], State]
  aggregate: Callable[..., Aggregate]  # (tree, state, key, presence=EVERYONE)
  traits: frozenset[str] = frozenset()
  link: Link | None = None
  privacy: Any = None


class Served(NamedTuple):
  """A method between a server and its workers, none of whom waits for the others.

  A worker goes with a model that it pulled through `begin`, steps and `end` to a message, which the
  server's optimizer takes for a gradient. What is a mean over workers in a round is here what the
  server makes of one message, or of the mean of several.
  """

  own: Callable[[Params], State]  # what a worker keeps from one piece of work to the next
  begin: Callable[[Params, State], Local]
  step: Callable[..., Local]  # (grads, local, state, *, key, grad_fn=None), whatever the state
  end: Callable[[Local, Params], tuple[Tree, State]]  # (Local, model pulled) -> message, own
  server: Any  # an optax transformation: (message, state, params, *, staleness, moved)
  link: Link


class Method(NamedTuple):
  """An algorithm as one worker sees it. Only `sync` communicates.

  A round is `begin`, then `period` times `step`, then `sync`. `weight` is this worker's share of
  the objective (its number of examples over the mean number); over the workers of a round it
  averages to one, and an inactive worker's weight is zero: its round is lost, what it computed in
  it reaches nobody, and the state that it keeps for itself stays as it was. `grad_fn(params)` is
  the gradient of the same mini-batch at other parameters. `over(wrap)` is the same method with each
  of its aggregators wrapped, which is how a mesh that cuts a worker's leaves has them aggregated
  shard by shard; a method without aggregators has none.

  `of_rounds(period, participation)` is the same method in rounds of so many steps, in which that
  share of all owners takes part; a method has it if its period may change or it has to know the
  share. `later` are the changes of its period: (first round, period), rising. With `epochs` > 0 a
  round is so many passes of each owner over its own examples, and the executors find the period:
  that of the owner with the most steps. An owner with fewer stops where it is done. `one_by_one`
  says that a round is that of a single worker, whose turn it is on a virtual clock.

  `onto(project)` is the same method with its models kept in a convex set; a method that cannot has
  none, and is refused for a task with constraints. `served` is the method where a server and its
  workers are processes of their own, if it can be.
  """

  init: Callable[[Params], State]  # lives from round to round
  begin: Callable[[State], Local]  # what a worker carries through one round
  step: Callable[..., Local]  # (grads, local, state, *, key, grad_fn=None)
  sync: Callable[..., State]  # (local, state, *, key, weight=1.0, active=True)
  params: Callable[[State], Params]  # the model one would deploy
  period: int = 1  # local steps per round: static, so traffic per round is a fact
  over: Callable[[Callable[[Aggregator], Aggregator]], "Method"] | None = None
  of_rounds: Callable[[int, float], "Method"] | None = None
  later: tuple[tuple[int, int], ...] = ()
  epochs: int = 0
  one_by_one: bool = False
  onto: Callable[[Callable[[Params], Params]], "Method"] | None = None
  served: Served | None = None


class Feed(NamedTuple):
  """Training examples that are read from disk as they are needed, in an endless order.

  Step t takes the examples t B, ..., (t + 1) B - 1 of the order, B being the batch of all workers.
  """

  examples: int  # in an epoch
  read: Callable[[int, int, int], Batch]  # (seed, first, count) -> numpy [count, ...], pure


class Task(NamedTuple):
  """A model, its data and its objective: the mean of `loss` over all examples in `train`.

  `sample` is a pure function of (step, key) and of the number of examples that a worker has, cheap
  and free of the data itself, so that an executor draws the samples of many steps at once; `batch`
  fetches them. Both see one worker's examples, arrays [examples, ...].

  A task that seeks a fixed point x = T(x), not a minimum, gives `grads`: x - T(x) in place of the
  gradient, so that `sgd(1.0)` iterates T, and beside it a value, which `loss` is too; neither is
  differentiated. A mean over examples like a gradient, it is aggregated, compressed and delayed as
  one. Its L1 norm over all examples is the metric "residual".

  With a `feed` the objective is the mean over what that reads, and `train` a sample of it, by which
  it is measured; `sample` is then `sampling.in_order`.
  """

  init: Callable[[Key], Params]
  loss: Callable[[Params, Batch, Key], Array]  # mean over the batch, by its mask if it has one
  evaluate: Callable[[Params, Batch], dict[str, Array]]  # metrics, each such a mean
  sample: Callable[..., Tree]  # (size, step, key, *, batch_size) -> index [batch_size]
  batch: Callable[[Batch, Tree], Batch]  # (examples of one worker, index) -> batch
  train: Batch  # numpy arrays [examples, ...]; "y" is what partitions sort by
  test: Batch | None = None
  optimum: Params | None = None  # the exact minimiser, where it is known
  rules: tuple[tuple[str, tuple[str | None, ...]], ...] = ()  # see `parallel/rules.py`
  chunk: int = 1024  # examples that a device evaluates at once
  # (stages, examples, fsdp) -> how a pipeline takes a worker's batch through layers: a NamedTuple
  # with a `bubble`, the share of time in which a stage is idle
  schedule: Callable[[int, int, int], Any] | None = None
  feed: Feed | None = None  # where the training examples fit no memory
  grads: Callable[[Params, Batch, Key], tuple[Array, Tree]] | None = None  # (value, x - T(x))
  project: Callable[[Params], Params] | None = None  # onto the convex set of models that may be
  # metrics of a whole model that are no means over examples: AUC, RMSE, recall@10
  measure: Callable[[Params], dict[str, Array]] = lambda params: {}
  by: Any = None  # numpy [examples] that partitions sort by, in place of "y"


def value_and_grad(task: Task) -> Callable[[Params, Batch, Key], tuple[Array, Tree]]:
  """(params, batch, key) -> loss and gradient, or what stands for one: the only way to either."""
  return task.grads or jax.value_and_grad(task.loss)


class Data(NamedTuple):
  """The training examples by owner, on the devices. P = workers, or clients of a population.

  Like TrainState a tree: of arrays, of their shardings, of axes of `vmap`.
  """

  examples: Tree  # arrays [P, most examples of any, ...], zero where an owner has fewer
  sizes: Tree  # [P] int32, examples that each has
  key: Tree  # a typed key, of the order in which they are drawn


class TrainState(NamedTuple):
  """All that a run needs to go on: what a checkpoint holds."""

  round: Tree  # int32, rounds done; the position in the data is a function of it
  key: Tree  # a typed key; what a round draws is a function of (key, round, worker)
  method: State  # shared leaves once, private leaves with one row per worker or client


class Executor(NamedTuple):
  """How N workers are executed; all that the training loop sees."""

  init: Callable[[Key], TrainState]  # straight into its shardings
  place: Callable[..., Data]  # (examples [P, ...], sizes [P], key), numpy to devices
  run: Callable[..., tuple[TrainState, dict[str, Array]]]  # (state, data, rounds): one dispatch
  params: Callable[[TrainState], Params]
  layout: Any  # what of the state is private, a `parallel.layout.Layout`
