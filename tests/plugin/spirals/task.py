"""Two spirals, told apart by a Flax NNX network."""

import itertools

import jax.numpy as jnp
import numpy as np
from flax import nnx

import research as dx


class Net(nnx.Module):
  """Two hidden layers."""

  def __init__(self, width: int, outputs: int, rngs: nnx.Rngs):
    sizes = (2, width, width, outputs)
    self.layers = nnx.List(nnx.Linear(*pair, rngs=rngs) for pair in itertools.pairwise(sizes))

  def __call__(self, x):
    for layer in self.layers[:-1]:
      x = jnp.tanh(layer(x))
    return self.layers[-1](x)


@dx.register("model")
def spiral_net(width: int = 16):
  """outputs -> key -> the network."""
  return lambda outputs: lambda key: Net(width, outputs, nnx.Rngs(key))


@dx.register("task")
def spirals(points: int = 400, *, model=dx.Default("model", "spiral_net()")) -> dx.Task:
  """Points on two arms, with labels 0 and 1."""
  random = np.random.default_rng(0)
  angle, arm = 3 * np.sqrt(random.uniform(size=points)), np.arange(points) % 2
  turn = angle + np.pi * arm
  x = np.stack([angle * np.cos(turn), angle * np.sin(turn)], 1).astype(np.float32)
  return dx.supervised(model(2), {"x": x, "y": arm.astype(np.int32)})
