"""Implements the feed-forward part of a transformer layer: SwiGLU or a mixture of experts."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.core.base import Array


class SwiGLU(nn.Module):
  """Computes down(silu(gate(x)) * up(x)).

  Reference: Shazeer 2020, arXiv 2002.05202, equation 6, without biases.
  """

  hidden: int
  dtype: Any
  deviation: float  # standard deviation of down's initial weights
  others: float  # standard deviation of the other initial weights

  @nn.compact
  def __call__(self, x: Array) -> Array:
    dense = lambda features, name, deviation=self.others: nn.Dense(
      features,
      use_bias=False,
      dtype=self.dtype,
      kernel_init=nn.initializers.normal(deviation),
      name=name,
    )
    gated = nn.silu(dense(self.hidden, "gate")(x)) * dense(self.hidden, "up")(x)
    return dense(x.shape[-1], "down", self.deviation)(gated)


class Experts(nn.Module):
  """Computes sum_e weight_e SwiGLU_e(x), for weights [batch, length, experts].

  Kernels have a leading dimension [experts]. The weights multiply the hidden units, so that one
  product sums over both hidden units and experts. If either dimension is sharded, a single sum as
  large as the output combines the results of the devices.
  """

  hidden: int
  dtype: Any
  deviation: float  # see SwiGLU
  others: float

  @nn.compact
  def __call__(self, x: Array, weights: Array) -> Array:
    width, experts = x.shape[-1], weights.shape[-1]
    product = lambda shape, equation, name, deviation=self.others: nn.Einsum(
      (experts, *shape),
      equation,
      use_bias=False,
      dtype=self.dtype,
      kernel_init=nn.initializers.normal(deviation),
      name=name,
    )
    into = ((width, self.hidden), "btw,ewh->bteh")
    gated = nn.silu(product(*into, "gate")(x)) * product(*into, "up")(x)
    weighed = gated * weights.astype(gated.dtype)[..., None]
    return product((self.hidden, width), "bteh,ehw->btw", "down", self.deviation)(weighed)


class Mixture(nn.Module):
  """Computes sum_e weight_e(x) expert_e(x) over the k experts that the router ranks highest.

      p = softmax(router(x));   weight_e = p_e / (sum of the chosen p) for chosen e, else 0

  With k = 1, the weight is p_e itself; otherwise the router would not learn. Every expert computes
  every token, and zero weights remove the outputs of experts that are not chosen. The result is
  exact, without capacities or dropped tokens, but costs experts / k times as much as computing only
  the chosen experts.

  The module also returns an array [2, experts] with each expert's share of the choices and its mean
  p; `balance` computes a loss from this array.

  Reference: Shazeer et al. 2017, arXiv 1701.06538; Fedus et al. 2021, arXiv 2101.03961 (k = 1);
    Jiang et al. 2024, arXiv 2401.04088, section 2.1 (k > 1).
  """

  experts: int
  per_token: int  # k
  hidden: int
  dtype: Any
  deviation: float  # see SwiGLU
  others: float

  @nn.compact
  def __call__(self, x: Array) -> tuple[Array, Array]:
    router = nn.Dense(
      self.experts,
      use_bias=False,
      dtype=jnp.float32,
      kernel_init=nn.initializers.normal(self.others),
      name="router",
    )
    p = jax.nn.softmax(router(x.astype(jnp.float32)))
    chosen = largest(p, self.per_token).astype(p.dtype)
    weights = p * chosen
    if self.per_token > 1:
      weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    busy = jnp.stack([jnp.mean(chosen, (0, 1)) / self.per_token, jnp.mean(p, (0, 1))])
    options = (self.hidden, self.dtype, self.deviation, self.others)
    return Experts(*options, name="experts")(x, weights), busy


def balance(busy: Array) -> Array:
  """Computes the load-balancing loss of the experts, summed over layers.

      experts * sum_e (share of the choices that fell on e) (mean of p_e)

  The means are over all tokens, even if the tokens are sharded.

  Args:
    busy: an array [..., 2, experts] with each expert's share of the choices and its mean p.

  Reference: Fedus et al. 2021, equation 4.
  """
  return busy.shape[-1] * jnp.sum(busy[..., 0, :] * busy[..., 1, :])


def largest(p: Array, k: int) -> Array:
  """Returns a mask of the k largest entries along the last dimension; ties go to the first ones.

  The function compares all pairs of entries: for a sort, the compiler would move tokens between
  devices.

  Args:
    p: the values [..., n].
    k: the number of entries to mark, at most n.
  """
  mine, other = p[..., :, None], p[..., None, :]
  before = jnp.tril(jnp.ones((p.shape[-1],) * 2, bool), -1)
  ahead = (other > mine) | ((other == mine) & before[None, None])
  return jnp.sum(ahead, axis=-1) < k
