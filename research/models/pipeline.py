"""Implements pipeline parallelism: devices apply consecutive layers to micro-batches.

A pipeline of S stages passes M micro-batches through R S k layers in R rounds: in round r, stage s
applies the layers (r S + s) k, ..., (r S + s + 1) k - 1. At tick t, stage s computes item
i = t - s, which is micro-batch i mod M in round i div M, and sends the result to the next stage.
The last stage sends its result to the first:

    ticks = R M + S - 1,   bubble = (S - 1) / ticks

The bubble is the fraction of ticks in which a stage is idle. R = 1 gives GPipe. R > 1 gives a
circular pipeline: the bubble is nearly R times smaller, but there are R times as many transfers.
JAX derives the backward pass, which runs the same ticks in reverse order.

Reference: Huang et al. 2018, arXiv 1811.06965 (GPipe); Narayanan et al. 2021, arXiv 2104.04473,
  section 2.2 (several groups of layers on each device).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from research.core.base import Array, Params, platform
from research.models import activations

# (parameters [k, ...], x [b, T, width], further arguments) -> x and statistics [k, ...]
Layers = Callable[[Params, Array, Any], tuple[Array, Array]]

_WEIGHTS = "weights of a stage"


class Schedule(NamedTuple):
  """The order in which stages compute micro-batches."""

  stages: int
  microbatches: int
  repeats: int  # number of rounds per micro-batch

  @property
  def ticks(self) -> int:
    return self.repeats * self.microbatches + self.stages - 1

  @property
  def bubble(self) -> float:
    """Returns the fraction of ticks in which a stage is idle."""
    return (self.stages - 1) / self.ticks


def schedule(stages: int, examples: int, microbatches: int, repeats: int, cut: int = 1) -> Schedule:
  """Returns a pipeline's schedule, and chooses the number of micro-batches if it is not given.

  Args:
    stages: S, the number of stages.
    examples: the number of examples in one pass.
    microbatches: M, or 0 for the largest number up to 4 S that divides the number of examples.
    repeats: R, the number of rounds.
    cut: the number of devices over which each micro-batch should be sharded. If microbatches is 0,
      a number that allows this is preferred.

  Raises:
    ValueError: if M does not divide the number of examples, or if R > 1 and M < S, since the first
      stage would then need a micro-batch before the last stage has computed it.
  """
  least = stages if repeats > 1 else 1
  if not microbatches:
    legal = [m for m in range(least, 4 * stages + 1) if examples % m == 0]
    even = [m for m in legal if examples // m % cut == 0]
    if not legal:
      raise ValueError(
        f"'stage:{stages}' with repeats={repeats} needs {least} micro-batches or more, and none of "
        f"up to {4 * stages} divides the batch of {examples} examples of a worker"
      )
    microbatches = max(even or legal)
  if examples % microbatches:
    raise ValueError(
      f"microbatches={microbatches} does not divide the batch of {examples} examples of a worker"
    )
  if microbatches < least:
    raise ValueError(
      f"microbatches={microbatches} is less than the {stages} stages that repeats={repeats} needs"
    )
  return Schedule(stages, microbatches, repeats)


def pipelined(
  layers: Layers, params: Params, x: Array, rest: Any, plan: Schedule
) -> tuple[Array, Array]:
  """Applies layers whose parameters are sharded along the mesh axis `stage`.

  Args:
    layers: a function that applies consecutive layers.
    params: the parameters, with leaves [R, S k, ...] whose second dimension is sharded along
      `stage`.
    x: the input [B, T, width].
    rest: the further arguments, which are the same for all layers.
    plan: the schedule; its M must divide B.

  Returns:
    The output [B, T, width], whose dimension T is sharded along `stage` if S divides T, and the
    statistics of all layers [R, S k, ...], averaged over the micro-batches.
  """
  stages, count, repeats = plan
  whole = x.shape[1] % stages != 0
  of_layers = P(None, "stage")

  def apply(params: Params, number: Array, x: Array, rest: Any) -> tuple[Array, Array]:
    of_round = lambda leaf: leaf[0] if repeats == 1 else leaf[number]
    return layers(jax.tree.map(lambda p: checkpoint_name(of_round(p), _WEIGHTS), params), x, rest)

  # the backward pass has the weights anyway: do not save them again for every tick
  policy = jax.checkpoint_policies.save_anything_except_these_names(_WEIGHTS)
  apply = jax.checkpoint(apply, policy=policy, prevent_cse=False)

  # dtype of sums over stages: XLA:CPU (jaxlib 0.10) aborts on a bfloat16 sum
  summed = jnp.float32 if platform() == "cpu" else x.dtype

  def stage(params: Params, waiting: Array, rest: Any) -> tuple[Array, Array]:
    """Runs one stage; `waiting` [M, b, T, width] contains the next inputs of the first stage."""
    here, last, waiting = lax.axis_index("stage"), plan.ticks, waiting.astype(x.dtype)
    onward = partial(
      lax.ppermute, axis_name="stage", perm=[(s, (s + 1) % stages) for s in range(stages)]
    )
    put = lambda waiting, arrived, tick: lax.dynamic_update_index_in_dim(
      waiting, arrived, (tick - stages) % count, 0
    )

    def one_tick(held, tick):
      waiting, arrived, statistics = held
      waiting = jnp.where(tick >= stages, put(waiting, arrived, tick), waiting)
      item = tick - here
      number, busy = (
        jnp.clip(item // count, 0, repeats - 1),
        (item >= 0) & (item < last - stages + 1),
      )
      first = lax.dynamic_index_in_dim(waiting, item % count, 0, keepdims=False)
      out, found = apply(params, number, jnp.where(here == 0, first, arrived), rest)
      found = jnp.where(busy, found, 0) / count
      return (waiting, onward(out), statistics.at[number].add(found)), None

    shapes = jax.eval_shape(apply, params, jnp.int32(0), waiting[0], rest)[1]
    statistics = jnp.zeros((repeats, *shapes.shape), shapes.dtype)
    held = waiting, jnp.zeros_like(waiting[0]), statistics
    (waiting, arrived, statistics), _ = lax.scan(one_tick, held, jnp.arange(last))
    out = jnp.where(here == 0, put(waiting, arrived, last), 0).astype(summed)
    if whole:
      return lax.psum(out, "stage"), statistics
    return lax.psum_scatter(out, "stage", scatter_dimension=2, tiled=True), statistics

  cut = jax.shard_map(
    stage,
    in_specs=(of_layers, P(), P()),
    out_specs=(P() if whole else P(None, None, "stage"), of_layers),
    axis_names={"stage"},
    check_vma=False,
  )
  # example i belongs to micro-batch i mod M, so that each device has a part of every micro-batch
  rows = x.reshape(x.shape[0] // count, count, *x.shape[1:])
  along = lambda x: activations.along(x, None, "fsdp", "seq", None)
  out, statistics = cut(params, along(jnp.moveaxis(rows, 1, 0)).astype(summed), rest)
  return jnp.moveaxis(out, 0, 1).reshape(x.shape).astype(x.dtype), statistics
