"""Generates synthetic problems with known solutions or constants."""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from research.core.base import Array, Key, Params
from research.core.registry import Default
from research.core.task import Batch, Task
from research.tasks import sampling
from research.tasks.language import language, tokens
from research.tasks.supervised import supervised


def least_squares(
  samples: int = 1000,
  features: int = 10,
  noise: float = 0.0,
  condition: float = 10.0,
  seed: int = 0,
  *,
  model: Callable[[int], nn.Module] = Default("model", "linear()"),
) -> Task:
  """Minimizes a least-squares objective with a given condition number.

  The objective is f(w) = 1/(2N) ||X w - y||^2.

  The data are X = sqrt(N) U S V' with random orthonormal U and V, so that the Hessian X'X/N has the
  eigenvalues S^2, which decrease geometrically from 1 to 1/condition. For a linear model without
  bias, the smoothness is L = 1 and the strong convexity is mu = 1/condition. Gradient descent is
  fastest with the step size 2/(L + mu) = 2/(1 + 1/condition), which contracts the error by
  (condition - 1)/(condition + 1). The targets are y = X w* + noise, where w* is standard normal.

  For `linear`, with or without bias, the optimum of the float32 data is computed in float64. For
  other models, the optimum is None.

  Args:
    samples: N, the number of examples, at least `features`.
    features: the length of w; if it is 1, the only eigenvalue is 1.
    noise: the standard deviation of the noise in y.
    condition: the condition number L / mu, at least 1.
    seed: the seed of the data.
    model: a function that makes the module for one output.

  Raises:
    ValueError: if a number is out of range.
  """
  if not samples >= features >= 1:
    raise ValueError(f"samples={samples}, features={features}: need samples >= features >= 1")
  if not (noise >= 0 and 1 <= condition < np.inf):
    raise ValueError(f"noise={noise}, condition={condition}: need noise >= 0 and condition >= 1")
  rng = np.random.default_rng(seed)
  left = np.linalg.qr(rng.standard_normal((samples, features)))[0]
  right = np.linalg.qr(rng.standard_normal((features, features)))[0]
  x = np.sqrt(samples * np.geomspace(1, 1 / condition, features)) * left @ right.T
  y = x @ rng.standard_normal(features) + noise * rng.standard_normal(samples)
  train = {"x": x.astype(np.float32), "y": y.astype(np.float32)}
  module = model(1)
  return supervised(module, train, loss="squares", optimum=_optimum(module, **train))


def _optimum(module: nn.Module, x: np.ndarray, y: np.ndarray) -> Params | None:
  """Returns the exact parameters of a module that has one kernel and at most one bias."""
  shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), x[:1])["params"])
  if not set(shapes) <= {"kernel", "bias"}:
    return None
  columns = [x, np.ones((len(x), 1))] if "bias" in shapes else [x]
  w = np.linalg.lstsq(np.hstack(columns).astype(np.float64), y.astype(np.float64))[0]
  optimum = {"kernel": w[: x.shape[1], None], "bias": w[x.shape[1] :]}
  return {name: optimum[name].astype(np.float32) for name in shapes}


def mean_estimation(vectors: int = 25, features: int = 2000, seed: int = 0) -> Task:
  """Estimates the mean of vectors b_i ~ N(0, I) by minimizing a mean of squares.

      f_i(x) = 1/2 ||x - b_i||^2

  Each vector is one example. From x = 0, one gradient step of size one moves a worker that has a
  single vector exactly to that vector. Averaging with neighbours without further gradient steps is
  then a consensus problem.

  Args:
    vectors: the number of vectors, at least 1.
    features: the length of a vector, at least 1.
    seed: the seed of the vectors.

  Raises:
    ValueError: if a number is below 1.

  Reference: Suresh, Yu, Kumar, McMahan 2017, Distributed mean estimation, arXiv 1611.00429.
  """
  if not (vectors >= 1 and features >= 1):
    raise ValueError(f"vectors={vectors}, features={features}: need at least 1 of each")
  rows = np.random.default_rng(seed).standard_normal((vectors, features)).astype(np.float32)

  def init(key: Key) -> Params:
    del key
    return {"x": jnp.zeros(features)}

  def loss(params: Params, batch: Batch, key: Key) -> Array:
    del key
    return sampling.mean(jnp.sum((params["x"][None] - batch["x"]) ** 2, 1) / 2, batch)

  def evaluate(params: Params, batch: Batch) -> dict[str, Array]:
    return {"loss": loss(params, batch, jax.random.key(0))}

  train = {"x": rows, "y": np.arange(vectors, dtype=np.int32)}
  optimum = {"x": rows.mean(0, dtype=np.float64).astype(np.float32)}
  task = Task(init, loss, evaluate, sampling.epoch_sample, sampling.take, train)
  return task._replace(optimum=optimum)


def random_tokens(
  vocabulary: int = 128_256,
  context: int = 4096,
  length: int = 2**22,
  *,
  model: Callable[[int], nn.Module] = Default("model", "transformer('tiny')"),
  seed: int = 0,
) -> Task:
  """Generates uniformly random tokens to train on, for measuring speed, memory and traffic.

  There is nothing to learn: the best loss is log V. A token counts as log2 V bits, so the best
  "bits_per_byte" is 8.

  Args:
    vocabulary: V, the number of different tokens, at least 2; the default is that of the models 1b
      and 8b.
    context: T, the maximum number of tokens that a prediction is made from.
    length: the number of training tokens; a tenth as many are held out.
    model: a function that makes the module for V outputs; the module maps tokens [b, T] to logits
      [b, T, V].
    seed: the seed of the tokens.

  Raises:
    ValueError: if vocabulary is below 2, or model, context and length do not fit together.
  """
  if vocabulary < 2:
    raise ValueError(f"vocabulary={vocabulary}: at least 2 tokens are needed")
  generator, kind = np.random.default_rng(seed), tokens.smallest(vocabulary)
  draw = lambda count: generator.integers(vocabulary, size=count, dtype=kind)
  part = lambda found: language.Text(found, max(1, round(len(found) * math.log2(vocabulary) / 8)))
  parts = part(draw(length)), part(draw(length // 10))
  return language.next_token(model(vocabulary), vocabulary, *parts, context=context)
