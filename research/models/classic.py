"""Builds small flax.linen models: linear, perceptron, convolutional and residual networks.

A factory takes the hyper-parameters and returns a function `outputs -> module`, since the number of
outputs depends on the task. Inputs are [batch, ...] floats; images are [batch, height, width] or
[batch, height, width, channels]. Parameters are float32, and every module is named.
"""

import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax.numpy as jnp

from research.core.base import Array
from research.core.task import Batch
from research.models.convolution import conv_general_dilated

Model = Callable[[int], nn.Module]


def linear(bias: bool = False, deviation: float = 0.0) -> Model:
  """Builds a linear model that computes x W (+ b) for dense or sparse rows; see `Linear`.

  Args:
    bias: whether to add b, which is initially zero.
    deviation: the standard deviation of the initial entries of W; 0 makes them zero.

  Returns:
    A function that makes the module for a given number of outputs.

  Raises:
    ValueError: if bias is not a bool, or deviation is negative.
  """
  _check_bool("bias", bias)
  if not deviation >= 0:
    raise ValueError(f"deviation={deviation} is negative")
  return lambda outputs: Linear(outputs, bias, deviation)


def logistic(bias: bool = True, deviation: float = 0.0) -> Model:
  """Builds a logistic or softmax regression with the logits x W (+ b); see `Linear`.

  Args:
    bias: whether to add b, which is initially zero.
    deviation: the standard deviation of the initial entries of W; 0 makes them zero.

  Returns:
    A function that makes the module for a given number of outputs.

  Raises:
    ValueError: if bias is not a bool, or deviation is negative.
  """
  return linear(bias, deviation)


def mlp(hidden: Sequence[int] = (128,)) -> Model:
  """Builds a multilayer perceptron with ReLU layers, which flattens its input.

  Args:
    hidden: the widths of the hidden layers, at least one.

  Returns:
    A function that makes the module for a given number of outputs.

  Raises:
    ValueError: if hidden is not a list of positive integers.
  """
  hidden = _widths("hidden", hidden)
  return lambda outputs: MLP(outputs, hidden)


def cnn(
  channels: Sequence[int] = (32, 64),
  hidden: int = 128,
  *,
  kernels: Sequence[int] | None = None,
  strides: Sequence[int] | None = None,
  padding: Sequence[str] | None = None,
  pool_stride: int = 2,
) -> Model:
  """Builds a network of convolutions, each with ReLU and 2x2 max pooling, and a hidden ReLU layer.

  Args:
    channels: the number of output channels of each convolution.
    hidden: the width of the hidden layer.
    kernels: the side length of each convolution's kernel in pixels; None means 3.
    strides: the stride of each convolution; None means 1.
    padding: the padding of each convolution, "SAME" or "VALID"; None means "SAME".
    pool_stride: the stride of the pooling. With a stride of 2, n convolutions of stride 1 need
      images of at least 2^n pixels per side.

  Returns:
    A function that makes the module for a given number of outputs.

  Raises:
    ValueError: if hidden, pool_stride, or an entry of channels, kernels or strides is not a
      positive integer; an entry of padding is neither "SAME" nor "VALID"; or the lists differ in
      length.
  """
  channels, hidden = _widths("channels", channels), _width("hidden", hidden)
  count = len(channels)
  kernels = _widths("kernels", [3] * count if kernels is None else kernels)
  strides = _widths("strides", [1] * count if strides is None else strides)
  padding = ["SAME"] * count if padding is None else padding
  for name, values in (("kernels", kernels), ("strides", strides), ("padding", padding)):
    if len(values) != count:
      raise ValueError(f"{name} has no entry for each of {count} convolutions: {list(values)}")
  for value in padding:
    if value not in ("SAME", "VALID"):
      raise ValueError(f"padding has {value!r} where 'SAME' or 'VALID' belongs")
  shapes = tuple(zip(channels, kernels, strides, padding, strict=True))
  pool_stride = _width("pool_stride", pool_stride)
  return lambda outputs: CNN(outputs, shapes, pool_stride, hidden)


def resnet(channels: Sequence[int] = (16, 32, 64), blocks: int = 1) -> Model:
  """Builds a residual network for small images; its GroupNorm keeps no per-worker statistics.

  Args:
    channels: the number of output channels of each stage; every stage except the first halves the
      height and the width.
    blocks: the number of residual blocks per stage. A block has two convolutions, so the depth is 2
      len(channels) blocks + 2.

  Returns:
    A function that makes the module for a given number of outputs.

  Raises:
    ValueError: if channels is not a list of positive integers, or blocks is not a positive integer.

  Reference:
    He et al., 2015, arXiv:1512.03385, section 4.2; Wu and He, 2018, arXiv:1803.08494 (GroupNorm).
    Shortcuts that change shape are 1x1 convolutions (option B).
  """
  channels, blocks = _widths("channels", channels), _width("blocks", blocks)
  return lambda outputs: ResNet(outputs, channels, blocks)


class Linear(nn.Module):
  """Computes x W (+ b) for dense x, or sparse rows {"index", "value"}, both [batch, longest row].

  The result for a sparse row is sum_k value_k W[index_k], so entries of value 0 are padding. Sparse
  rows do not determine the number of features: initialize the module with one dense row to set the
  shape of the kernel.
  """

  outputs: int
  bias: bool = False
  deviation: float = 0.0

  @nn.compact
  def __call__(self, x: Array | Batch) -> Array:
    zeros = nn.initializers.zeros_init()
    normal = nn.initializers.normal(self.deviation) if self.deviation else zeros
    if isinstance(x, dict):
      kernel = self.get_variable("params", "kernel")
      if kernel is None:
        raise ValueError("initialise with a dense row [1, features], then apply to sparse rows")
      y = jnp.einsum("bk,bko->bo", x["value"], kernel[x["index"]])
    else:
      x = x.reshape(len(x), -1)
      y = x @ self.param("kernel", normal, (x.shape[1], self.outputs))
    return y + self.param("bias", zeros, (self.outputs,))[None] if self.bias else y


class MLP(nn.Module):
  """Applies dense layers with ReLU between them."""

  outputs: int
  hidden: tuple[int, ...]

  @nn.compact
  def __call__(self, x: Array) -> Array:
    x = _dense("mlp", x)
    x = x.reshape(len(x), -1)
    for i, width in enumerate(self.hidden):
      x = nn.relu(nn.Dense(width, kernel_init=nn.initializers.he_normal(), name=f"hidden_{i}")(x))
    return nn.Dense(self.outputs, name="output")(x)


class CNN(nn.Module):
  """Applies blocks of convolution, ReLU and pooling, then two dense layers."""

  outputs: int
  convolutions: tuple[tuple[int, int, int, str], ...]  # channels, kernel, stride, padding
  pool_stride: int
  hidden: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    x, he = _image("cnn", x), nn.initializers.he_normal()
    height, width = x.shape[1:3]
    for i, (channels, kernel, stride, padding) in enumerate(self.convolutions):
      conv = nn.Conv(
        *(channels, (kernel, kernel), stride, padding),
        kernel_init=he,
        conv_general_dilated=conv_general_dilated,
        name=f"conv_{i}",
      )
      x = nn.relu(conv(x))
      if min(x.shape[1:3]) < 2:
        raise ValueError(
          f"images of {height} x {width} pixels are too small for cnn: its convolution {i} leaves "
          f"{x.shape[1]} x {x.shape[2]}, and pooling needs 2 x 2"
        )
      x = nn.max_pool(x, (2, 2), strides=(self.pool_stride, self.pool_stride))
    x = x.reshape(len(x), -1)
    x = nn.relu(nn.Dense(self.hidden, kernel_init=he, name="hidden")(x))
    return nn.Dense(self.outputs, name="output")(x)


class Block(nn.Module):
  """Computes relu(shortcut(x) + F(x)), where F has two 3x3 convolutions."""

  channels: int
  stride: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    y = _convolution(self.channels, 3, self.stride, "conv_0")(x)
    y = nn.relu(_norm(self.channels, "norm_0")(y))
    y = _norm(self.channels, "norm_1")(_convolution(self.channels, 3, 1, "conv_1")(y))
    if x.shape != y.shape:
      x = _convolution(self.channels, 1, self.stride, "shortcut")(x)
      x = _norm(self.channels, "shortcut_norm")(x)
    return nn.relu(x + y)


class ResNet(nn.Module):
  """Applies a convolution, stages of residual blocks, the mean over pixels, and a dense layer."""

  outputs: int
  channels: tuple[int, ...]
  blocks: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    x = _convolution(self.channels[0], 3, 1, "stem")(_image("resnet", x))
    x = nn.relu(_norm(self.channels[0], "stem_norm")(x))
    for i, channels in enumerate(self.channels):
      for j in range(self.blocks):
        x = Block(channels, 2 if i > 0 and j == 0 else 1, name=f"stage_{i}_block_{j}")(x)
    return nn.Dense(self.outputs, name="output")(x.mean(axis=(1, 2)))


def _convolution(channels: int, size: int, stride: int, name: str) -> nn.Conv:
  he = nn.initializers.he_normal()
  return nn.Conv(
    *(channels, (size, size), stride),
    use_bias=False,
    kernel_init=he,
    conv_general_dilated=conv_general_dilated,
    name=name,
  )


def _norm(channels: int, name: str) -> nn.GroupNorm:
  return nn.GroupNorm(math.gcd(channels, 8), name=name)


def _dense(model: str, x: Array) -> Array:
  if isinstance(x, dict):
    raise ValueError(f"{model} takes dense rows, got sparse ones; linear and logistic take both")
  return x


def _image(model: str, x: Array) -> Array:
  """Converts [batch, height, width(, channels)] to [batch, height, width, channels]."""
  if _dense(model, x).ndim not in (3, 4):
    raise ValueError(
      f"{model} needs images [batch, height, width] or [batch, height, width, channels], "
      f"got an input of shape {list(x.shape)}"
    )
  return x if x.ndim == 4 else x[..., None]


def _widths(name: str, values: Sequence[int]) -> tuple[int, ...]:
  if not isinstance(values, list | tuple) or not values:
    raise ValueError(f"{name}={values!r} is not a list of one or more positive integers")
  return tuple(_width(name, value) for value in values)


def _width(name: str, value: int) -> int:
  if type(value) is not int or value < 1:
    raise ValueError(f"{name} has {value!r} where a positive integer belongs")
  return value


def _check_bool(name: str, value: bool) -> None:
  if not isinstance(value, bool):
    raise ValueError(f"{name}={value!r} is neither True nor False")
