"""Implements a decoder layer: residual attention and feed-forward parts, each after a norm."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.core.base import Array
from research.models import activations
from research.models.attention import Attend, Rotation, rotated
from research.models.experts import Mixture, SwiGLU


class Shape(NamedTuple):
  """The sizes of a model."""

  layers: int
  width: int
  heads: int  # number of query heads
  kv_heads: int  # number of key and value heads
  hidden: int  # width of the feed-forward part
  tied: bool  # whether the head shares the embedding's matrix
  rotary_base: float
  scan: bool  # whether to compile one layer for all; on CPUs, a loop is faster
  deviation: float = 0.02  # standard deviation of the initial weights


class Norm(nn.Module):
  """Computes x / sqrt(mean x^2 + 1e-5) * scale (Zhang and Sennrich 2019, arXiv 1910.07467)."""

  @nn.compact
  def __call__(self, x: Array) -> Array:
    scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],))
    wide = x.astype(jnp.float32)
    size = jnp.mean(wide**2, axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(size + 1e-5) * scale[None, None]).astype(x.dtype)


class Attention(nn.Module):
  """Projects before and after an attention function; kernels are sharded by heads."""

  shape: Shape
  dtype: Any
  attend: Attend
  deviation: float  # standard deviation of the initial weights of `out`

  @nn.compact
  def __call__(self, x: Array, positions: Rotation) -> Array:
    _, width, heads, kv_heads, *_ = self.shape
    head_dim = width // heads
    normal = nn.initializers.normal
    into = lambda count, name: nn.DenseGeneral(
      (count, head_dim),
      dtype=self.dtype,
      kernel_init=normal(self.shape.deviation),
      use_bias=False,
      name=name,
    )
    out = nn.DenseGeneral(
      width,
      (-2, -1),  # pyright: ignore[reportArgumentType]
      dtype=self.dtype,
      kernel_init=normal(self.deviation),
      use_bias=False,
      name="out",
    )
    query = rotated(into(heads, "query")(x), positions)
    key = rotated(into(kv_heads, "key")(x), positions)
    return out(self.attend(query, key, into(kv_heads, "value")(x)))


class Layer(nn.Module):
  """Computes x + attention(norm(x)), then x + feed_forward(norm(x)).

  The layer also returns the load of the experts [2, E].
  """

  shape: Shape
  mixture: tuple[int, int] | None
  dtype: Any
  attend: Attend

  @nn.compact
  def __call__(self, x: Array, positions: Rotation) -> tuple[Array, Array]:
    # the residual stream is a sum of 2 * layers terms; see Radford et al. 2019 (GPT-2), section 2.3
    deviation = self.shape.deviation * (2 * self.shape.layers) ** -0.5
    attention = Attention(self.shape, self.dtype, self.attend, deviation, name="attention")
    options = (self.shape.hidden, self.dtype, deviation, self.shape.deviation)
    whole = lambda x: activations.along(x, "fsdp", "seq", None)
    x = whole(x + attention(Norm(name="attention_norm")(x), positions))
    fed = Norm(name="feed_forward_norm")(x)
    if self.mixture is None:
      return whole(x + SwiGLU(*options, name="feed_forward")(fed)), jnp.zeros((2, 0))
    out, busy = Mixture(*self.mixture, *options, name="feed_forward")(fed)
    return whole(x + out), busy
