"""Trains language models to predict each next token of a text."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from research.core import checks
from research.core.base import Array, Key, Params, Tree
from research.core.task import Batch, Task
from research.tasks import sampling

LOGITS = 2**26  # maximum number of logits per device in evaluation
TOKENS = 2**13  # maximum per device in evaluation; more would exceed a CPU's caches (1.7x slower)
PLACES = 100  # number of equal pieces of a text; partitions sort examples by piece


class Text(NamedTuple):
  """Contains the tokens of a text or of a part of it."""

  tokens: np.ndarray  # [N], integers in [0, V)
  bytes: int  # number of bytes in UTF-8


def next_token(module: nn.Module, size: int, train: Text, held_out: Text, *, context: int) -> Task:
  """Returns the task of predicting each next token from up to `context` previous tokens.

  The training tokens t_0, ..., t_{N-1}, without the last N mod T, form a ring, so that the ends of
  the text are treated like the rest. Example i is t_{iT}, ..., t_{iT+2T-1}. It contains T windows
  of T + 1 tokens, each with T tokens to predict. An epoch draws one window from each example, all
  at the same offset. The windows therefore tile the ring: every token is predicted once, whichever
  worker has the example. The offset changes from epoch to epoch; over T epochs, every token is
  predicted once at every position of a window. If no window is drawn from an example, its first
  window is used.

  The objective is the mean loss over tokens, in nats, plus the values that the module sows into the
  collection "losses" (as a mixture of experts does); the metric "loss" is only the mean loss. Each
  held-out token is predicted once, in windows that do not overlap; the first window starts with the
  last training token. A window's weight is its number of tokens divided by the mean number of
  tokens per window. The mean over windows is therefore the mean over tokens, even though the last
  window is shorter. "bits_per_byte" is the loss in bits per byte of the text, independent of the
  tokenizer. The perplexity, exp(loss), is not a mean, so it is not among the metrics.

  Partitions sort the examples by the hundredth of the text that contains them: `sorted()` and
  `shards()` give each worker contiguous stretches, and `dirichlet(alpha)` gives it an uneven share
  of each hundredth.

  Args:
    module: a module that maps tokens int32 [b, T] to logits [b, T, size]; its sharding `rules` and
      its `dimensions`, if any, become those of the task.
    size: V, the number of different tokens.
    train: the training text, at least T tokens.
    held_out: the held-out text, at least one token.
    context: T, the number of tokens that a window predicts, at least 1.

  Raises:
    ValueError: if there are too few tokens, or the module or the context is not suitable.
  """
  _check(module, size, train, held_out, context)
  test = _windows(train.tokens[-1], held_out.tokens, context)
  bits = [len(part.tokens) / part.bytes / math.log(2) for part in (train, held_out)]
  init, loss, evaluate = objective(module, size, context, float(np.mean(test["length"])), bits)

  def sample(size: Array | int, step: Array | int, key: Key, *, batch_size: int) -> Tree:
    row = sampling.epoch_sample(size, step, key, batch_size=batch_size)
    epoch = jnp.asarray(step, jnp.int32) // jnp.maximum(1, jnp.asarray(size) // batch_size)
    of_all = sampling.permute(epoch % context, jnp.int32(context), jnp.uint32(0), jnp.uint32(0))
    return {"row": row, "offset": jnp.full_like(row, of_all)}

  def batch(examples: Batch, index: Tree) -> Batch:
    window = lambda *start: lax.dynamic_slice(examples["x"], start, (1, context + 1))[0]
    return {"x": jax.vmap(window)(index["row"], index["offset"])}

  examples = _ring(train.tokens, context)
  task = Task(init, loss, evaluate, sample, batch, examples, test)
  return task._replace(**of_model(module), chunk=evaluated_at_once(size, context))


def of_model(module: nn.Module) -> dict[str, Any]:
  """Returns a model's sharding rules, dimensions and pipeline schedule, as fields of a Task.

  Args:
    module: the model.
  """
  found = {name: getattr(module, name, ()) for name in ("rules", "dimensions")}
  return {**found, "schedule": getattr(module, "schedule", None)}


class Objective(NamedTuple):
  """Contains the functions of a language model, as fields of a Task."""

  init: Callable[[Key], Params]
  loss: Callable[[Params, Batch, Key], Array]
  evaluate: Callable[[Params, Batch], dict[str, Array]]


def objective(
  module: nn.Module, size: int, context: int, mean_length: float, bits: Sequence[float] | None
) -> Objective:
  """Returns the functions that compute the mean loss per predicted token, in nats.

  See `next_token`.

  A batch contains windows "x" [b, T + 1 or more], of which the first T + 1 tokens are used. It may
  also contain "length" [b], the number of predicted tokens per window, which is T by default.

  Args:
    module: a module that maps tokens int32 [b, T] to logits [b, T, size].
    size: V, the number of different tokens.
    context: T, the number of tokens that a window predicts.
    mean_length: the mean of "length" over all windows that have one.
    bits: the factors that convert nats per token to bits per byte, for windows without and with
      "length"; None if they are unknown, which omits the metric "bits_per_byte".
  """

  def init(key: Key) -> Params:
    return module.init(key, jnp.zeros((1, context), jnp.int32))["params"]

  def mean(params: Params, batch: Batch) -> tuple[Array, Tree]:
    window = batch["x"][:, : context + 1].astype(jnp.int32)
    logits, sown = module.apply({"params": params}, window[:, :-1], mutable=["losses"])
    logits = jnp.asarray(logits, jnp.float32)
    # no gather: XLA's partitioner aborts on a gather if the mesh shards the vocabulary
    chosen = window[:, 1:, None] == jnp.arange(size, dtype=jnp.int32)[None, None]
    each = jax.nn.logsumexp(logits, -1) - jnp.sum(jnp.where(chosen, logits, 0.0), -1)
    if "length" in batch:
      counted = jnp.arange(context)[None] < batch["length"][:, None]
      of_windows = jnp.sum(jnp.where(counted, each, 0.0), 1) / mean_length
    else:
      of_windows = jnp.mean(each, 1)
    mask = batch.get("mask", jnp.ones_like(of_windows))
    return jnp.sum(mask * of_windows) / jnp.maximum(jnp.sum(mask), 1), sown

  def loss(params: Params, batch: Batch, key: Key) -> Array:
    del key
    nats, sown = mean(params, batch)
    return nats + sum(jnp.sum(of_layers) for of_layers in jax.tree.leaves(sown))

  def evaluate(params: Params, batch: Batch) -> dict[str, Array]:
    nats, _ = mean(params, batch)
    return {"loss": nats} | ({"bits_per_byte": nats * bits["length" in batch]} if bits else {})

  return Objective(init, loss, evaluate)


def evaluated_at_once(size: int, context: int) -> int:
  """Returns the number of windows to evaluate at once, so that their logits fit on a device.

  Args:
    size: V, the number of different tokens.
    context: T, the number of tokens per window.
  """
  return max(1, min(TOKENS // context, LOGITS // (context * size)))


def _ring(found: np.ndarray, context: int) -> Batch:
  """Returns the training examples [N // T, 2T], each with T tokens and the T tokens after them."""
  count = len(found) // context
  first = found[: count * context].reshape(count, context)
  return {"x": np.hstack([first, np.roll(first, -1, 0)]), "y": _places(count)}


def _windows(before: int, found: np.ndarray, context: int) -> Batch:
  """Returns windows [ceil(M / T), T + 1] that predict M tokens, and their token counts."""
  count = -(-len(found) // context)
  padded = np.zeros(count * context + 1, found.dtype)
  padded[0], padded[1 : len(found) + 1] = before, found
  x = np.lib.stride_tricks.sliding_window_view(padded, context + 1)[::context]
  length = np.minimum(context, len(found) - context * np.arange(count)).astype(np.int32)
  return {"x": x.copy(), "y": _places(count), "length": length}


def _places(count: int) -> np.ndarray:
  return (np.arange(count) * PLACES // count).astype(np.uint8)


def _check(module: nn.Module, size: int, train: Text, held_out: Text, context: int) -> None:
  checks.positive_integer("context", context)
  if len(train.tokens) < context or not len(held_out.tokens):
    raise ValueError(
      f"context={context} needs as many tokens to train on and one that is held out; the text has "
      f"{len(train.tokens)} and {len(held_out.tokens)}"
    )
  check_model(module, size, context)


def check_model(module: nn.Module, size: int, context: int) -> None:
  """Rejects a module that does not return logits.

  Args:
    module: the model.
    size: V, the number of different tokens.
    context: T, the number of tokens per window.

  Raises:
    ValueError: if the module returns an array of another shape; the message contains the shape.
  """
  first = jnp.zeros((1, context), jnp.int32)
  found = jax.eval_shape(lambda key: module.init_with_output(key, first), jax.random.key(0))[0]
  shape = getattr(found, "shape", ())
  if shape != (1, context, size):
    raise ValueError(
      f"the model makes {list(shape)} of tokens [1, {context}], not logits [1, {context}, {size}]"
    )
