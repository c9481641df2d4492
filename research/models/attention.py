"""Computes causal attention with rotary positions; each platform has its own implementation.

An attention function takes a query [batch, length, heads, head_dim], and a key and a value [batch,
length, kv_heads, head_dim]. It returns an array [batch, length, heads, head_dim]:

    out_t = sum_{s <= t} softmax_s(query_t . key_s / sqrt(head_dim)) value_s

Each key head is shared by heads / kv_heads query heads. Products are computed in the dtype of the
arguments, and the softmax is computed in float32.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from research.core.base import Array, platform
from research.models import activations

Attend = Callable[[Array, Array, Array], Array]
Rotation = tuple[Array, Array]  # cosines and sines [length, head_dim / 2]


def plain(query: Array, key: Array, value: Array) -> Array:
  """Computes attention directly from its equation, with all scores in memory.

  Args:
    query: the query [batch, length, heads, head_dim].
    key: the key [batch, length, kv_heads, head_dim].
    value: the value, of the shape of `key`.
  """
  length, head_dim = query.shape[1], query.shape[3]
  shared = query.shape[2] // key.shape[2]  # repeated, since an extra dimension is slow on CPUs
  key, value = (jnp.repeat(x, shared, axis=2) for x in (key, value))
  scores = jnp.einsum("bthd,bshd->bhts", query, key, preferred_element_type=jnp.float32)
  earlier = jnp.tril(jnp.ones((length, length), bool))
  scores = jnp.where(earlier[None, None], scores * head_dim**-0.5, -jnp.inf)
  shares = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
  return jnp.einsum("bhts,bshd->bthd", shares, value)


def dot_product(query: Array, key: Array, value: Array) -> Array:
  """Calls cuDNN's flash attention, which stores no scores, if cuDNN supports it; else `plain`.

  Args:
    query: the query [batch, length, heads, head_dim].
    key: the key [batch, length, kv_heads, head_dim].
    value: the value, of the shape of `key`.
  """
  head_dim = query.shape[-1]
  suits = query.dtype == jnp.bfloat16 and head_dim % 8 == 0 and head_dim <= 128
  if platform() != "gpu" or not suits or _capability() < 8.0:
    return plain(query, key, value)
  attend = jax.nn.dot_product_attention
  return attend(query, key, value, is_causal=True, implementation="cudnn")


def splash(query: Array, key: Array, value: Array) -> Array:
  """Calls JAX's splash attention, a TPU kernel that skips future positions and stores no scores.

  Args:
    query: the query [batch, length, heads, head_dim].
    key: the key [batch, length, kv_heads, head_dim].
    value: the value, of the shape of `key`.

  Raises:
    ValueError: if the program is not for a TPU, or the length is not a multiple of 128.
  """
  if platform() != "tpu":
    raise ValueError(
      f"attention='splash' is for TPUs, but this program is for a {platform()}; "
      "'auto' selects what suits the platform"
    )
  if query.shape[1] % 128:
    raise ValueError(f"attention='splash' needs a length that 128 divides, not {query.shape[1]}")
  return splash_kernel(query, key, value)


def splash_kernel(query: Array, key: Array, value: Array, interpret: bool = False) -> Array:
  """Runs `splash` on the heads and examples of each device, since a compiler cannot split kernels.

  Args:
    query, key, value: the arguments of an attention function, with a length that is a multiple of
      128.
    interpret: whether to emulate the kernel without a TPU, which is slow.
  """
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  length = query.shape[1]
  block = max(size for size in (128, 256, 512) if length % size == 0)
  sizes = kernels.BlockSizes(
    block_q=block,
    block_kv=block,
    block_kv_compute=block,
    block_q_dkv=block,
    block_kv_dkv=block,
    block_kv_dkv_compute=block,
    block_q_dq=block,
    block_kv_dq=block,
  )

  def attend(query: Array, key: Array, value: Array) -> Array:
    mask = masks.MultiHeadMask([masks.CausalMask((length, length))] * query.shape[2])
    kernel = kernels.make_splash_mha(
      mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
    )
    by_head = [jnp.swapaxes(x, 1, 2) for x in (query * query.shape[-1] ** -0.5, key, value)]
    return jnp.swapaxes(jnp.asarray(jax.vmap(kernel)(*by_head)), 1, 2)

  axes = activations.inner_axes()
  if not axes:
    return attend(query, key, value)
  heads = activations.spec(key.shape, "fsdp", None, "model", None)  # divides query heads too
  cut = jax.shard_map(
    attend, in_specs=(heads,) * 3, out_specs=heads, axis_names=set(axes), check_vma=False
  )
  return cut(query, key, value)


def automatic(query: Array, key: Array, value: Array) -> Array:
  """Calls `splash` on TPUs if the length allows it, `plain` on CPUs, else `dot_product`.

  Args:
    query: the query [batch, length, heads, head_dim].
    key: the key [batch, length, kv_heads, head_dim].
    value: the value, of the shape of `key`.
  """
  target = platform()
  if target == "tpu" and query.shape[1] % 128 == 0:
    return splash(query, key, value)
  return (plain if target == "cpu" else dot_product)(query, key, value)


ATTENTION: dict[str, Attend] = {
  "auto": automatic,
  "plain": plain,
  "dot_product": dot_product,
  "splash": splash,
}


def rotation(length: int, head_dim: int, base: float) -> Rotation:
  """Computes the cosines and sines of t base^(-2i / head_dim), for positions t and pairs i.

  Args:
    length: the number of positions.
    head_dim: the size of a head, an even number.
    base: the base of the frequencies.

  Reference: Su et al. 2021, arXiv 2104.09864, section 3.2.2.
  """
  frequencies = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
  angles = jnp.arange(length, dtype=jnp.float32)[:, None] * frequencies[None]
  return jnp.cos(angles), jnp.sin(angles)


def rotated(x: Array, by: Rotation) -> Array:
  """Rotates each pair (x_i, x_{i + head_dim / 2}) of a head by the angle of its position.

  The product of two rotated vectors then depends only on the distance between their positions.

  Args:
    x: a query or key [batch, length, heads, head_dim].
    by: the cosines and sines of the angles, from `rotation`.
  """
  cosines, sines = (table[None, :, None] for table in by)
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = (first * cosines - second * sines, second * cosines + first * sines)
  return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def _capability() -> float:
  """Returns CUDA's compute capability, or 0 without CUDA."""
  name = getattr(jax.local_devices()[0], "compute_capability", "")
  return float(name) if name.replace(".", "").isdecimal() else 0.0
