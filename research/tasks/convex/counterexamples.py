"""Defines small counterexamples from the literature, on which particular algorithms fail."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from research.core import checks
from research.core.base import Array, Key, Params
from research.core.task import Batch, Task
from research.tasks import sampling


def client_drift(dissimilarity: float = 1.0, start: float = 10.0) -> Task:
  """Minimizes the mean of two clients' objectives; local steps drift away from its minimum.

      f_1(x) = x^2 + G x,   f_2(x) = -G x,   f(x) = x^2 / 2

  Example i belongs to client i: use `--partition="in_order()"` and two workers.

  Args:
    dissimilarity: G, the absolute value of each client's gradient at the minimum, 0.
    start: the initial x.

  Raises:
    ValueError: if start is 0, the minimum.

  Reference: Karimireddy, Kale, Mohri, Reddi, Stich, Suresh 2020, arXiv 1910.06378, theorem II and
    the simulations of section 7.
  """
  if start == 0:
    raise ValueError("start=0.0 is the minimum")
  client = {
    "curvature": np.asarray([2.0, 0.0], np.float32),
    "slope": np.asarray([dissimilarity, -dissimilarity], np.float32),
  }
  value = lambda x, e: e["curvature"] * x**2 / 2 + e["slope"] * x
  return _task(client, np.asarray(start), value)._replace(optimum={"x": np.zeros((), np.float32)})


def rare_large_gradient(start: float = 0.0) -> Task:
  """Minimizes x / 4 over [-1, 1]; the sign of the stochastic gradient points away from the minimum.

      g = 4 with probability 1/4, -1 with probability 3/4:   E g = 1/4,   E sign(g) = -1/2

  The minimum is at -1. Each step uses one of four examples, drawn with replacement.

  Args:
    start: the initial x, in [-1, 1].

  Raises:
    ValueError: if start is outside [-1, 1].

  Reference: Karimireddy, Rebjock, Stich, Jaggi 2019, arXiv 1901.09847, counterexample 1.
  """
  checks.in_range("start", start, "[-1, 1]")
  examples = {"gradient": np.asarray([4, -1, -1, -1], np.float32)}
  task = _task(examples, np.asarray(start), lambda x, e: e["gradient"] * x)
  return task._replace(
    sample=sampling.with_replacement,
    optimum={"x": -np.ones((), np.float32)},
    project=lambda params: {"x": jnp.clip(params["x"], -1, 1)},
  )


def narrow_valley(epsilon: float = 0.5) -> Task:
  """Minimizes a convex function of two variables whose subgradient signs span only one line.

      f(x) = epsilon |x_1 + x_2| + |x_1 - x_2|,   from x = (1, 1),   minimum at (0, 0)

  With sign(0) = +1, the signs of a subgradient are (1, -1) or (-1, 1) whenever x_1 + x_2 > 0. Sign
  steps therefore preserve x_1 + x_2 and never get below f(1, 1) = 2 epsilon.

  Args:
    epsilon: the slope along the valley, in (0, 1).

  Raises:
    ValueError: if epsilon is not in (0, 1).

  Reference: Karimireddy, Rebjock, Stich, Jaggi 2019, arXiv 1901.09847, counterexample 2.
  """
  checks.in_range("epsilon", epsilon, "(0, 1)")
  # the derivative of jnp.abs at 0 is 0, but the paper needs +1
  absolute = lambda a: jnp.where(a >= 0, a, -a)
  value = lambda x, e: e["scale"] * (epsilon * absolute(x[0] + x[1]) + absolute(x[0] - x[1]))
  task = _task({"scale": np.ones(1, np.float32)}, np.ones(2, np.float32), value)
  return task._replace(optimum={"x": np.zeros(2, np.float32)})


def rosenbrock(noise: float = 1.5, examples: int = 256) -> Task:
  """Minimizes a banana-shaped valley with noisy gradients: averaged models need averaged moments.

      f(x) = (1 - x_1)^2 + 100 (x_2 - x_1^2)^2,   from x = (-1, 1),   minimum at (1, 1)
      g = grad f(x) + noise z,   z standard normal

  Every worker draws new noise in every step; the noise is the same for all methods and does not
  depend on the examples. Each worker needs an example.

  Args:
    noise: the standard deviation of each element of the noise, at least 0.
    examples: the number of examples, at least 1.

  Raises:
    ValueError: if noise is negative or examples is below 1.

  Reference: Iacob et al. 2025, arXiv 2505.22549, figure 2 (the toy problem); Rosenbrock 1960, The
    Computer Journal 3(3).
  """
  checks.at_least("noise", noise, 0)
  checks.at_least("examples", examples)

  def value(x, e):
    f = (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2
    return f + noise * e["z"] @ x

  def sample(size: Array | int, step: Array | int, key: Key, *, batch_size: int) -> Array:
    del size
    return jax.random.normal(jax.random.fold_in(key, step), (batch_size, 2))

  none = {"z": np.zeros((examples, 2), np.float32)}
  task = _task(none, np.asarray([-1.0, 1.0], np.float32), value)
  optimum = {"x": np.ones(2, np.float32)}
  return task._replace(sample=sample, batch=lambda examples, z: {"z": z}, optimum=optimum)


def skewed_noise(deviation: float = 1.0, start: float = 0.01) -> Task:
  """Minimizes ||x||^2 / 2 in two variables; the gradient's largest element is biased by the noise.

      g = x + z,   z uniform on deviation sqrt(3/10) {(2, 0), (0, 1), (-2, -1)}:   E z = 0

  The noise has E ||z||^2 = deviation^2. Each step uses one of three examples, drawn with
  replacement. The minimum is at 0.

  Args:
    deviation: sigma, the root of the mean squared norm of the noise, above 0.
    start: the distance of the initial x from the minimum, along the second axis.

  Raises:
    ValueError: if deviation is not above 0.

  Reference: Fatkhullin, Tyurin, Richtarik 2023, arXiv 2305.15155, theorem 1.
  """
  checks.above("deviation", deviation)
  noise = deviation * np.sqrt(0.3) * np.asarray([[2, 0], [0, 1], [-2, -1]])
  value = lambda x, e: jnp.sum(x**2) / 2 + e["noise"] @ x
  task = _task({"noise": noise.astype(np.float32)}, np.asarray([0, -start], np.float32), value)
  optimum = {"x": np.zeros(2, np.float32)}
  return task._replace(sample=sampling.with_replacement, optimum=optimum)


def _task(examples: Batch, start: np.ndarray, value: Callable[[Array, Batch], Array]) -> Task:
  """Returns the task of minimizing the mean of value(x, example) over examples, from x = start."""

  def init(key: Key) -> Params:
    del key
    return {"x": jnp.asarray(start, float)}

  def loss(params: Params, batch: Batch, key: Key) -> Array:
    del key
    return sampling.mean(value(params["x"], batch), batch)

  def evaluate(params: Params, batch: Batch) -> dict[str, Array]:
    return {"loss": sampling.mean(value(params["x"], batch), batch)}

  count = len(next(iter(examples.values())))
  train = {**examples, "y": np.arange(count, dtype=np.int32)}
  return Task(init, loss, evaluate, sampling.epoch_sample, sampling.take, train)
