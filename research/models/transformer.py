"""A decoder language model, of the Llama family, as large as its preset says.

RMSNorm before each part, rotary positions, grouped-query attention, SwiGLU or a mixture of experts,
and a head that shares the embedding or has its own matrix. Parameters are float32; products are in
`dtype`; norms, softmaxes, routers and logits are in float32.
"""

import difflib
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.base import Array
from research.models import activations
from research.models.attention import ATTENTION, Attend, Rotation, rotated, rotation
from research.models.experts import DEVIATION, Mixture, SwiGLU

# Which mesh axis each dimension of a parameter lies along, by the first pattern that is found in
# its path; a leaf with one dimension more has the layers' first. Columns of a layer's first matrix
# and rows of its second, so that each part of a layer needs one sum over `model`. Shoeybi et al.
# 2019, arXiv 1909.08053, section 3.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
  (r"^(embedding|head)$", ("model?", None)),
  (r"/attention/(query|key|value)/kernel$", (None, "model", None)),
  (r"/attention/out/kernel$", ("model", None, None)),
  (r"/feed_forward/(gate|up)/kernel$", (None, "model")),
  (r"/feed_forward/down/kernel$", ("model", None)),
  (r"/experts/(gate|up)/kernel$", ("expert", None, "model")),
  (r"/experts/down/kernel$", ("expert", "model", None)),
  (r"/router/kernel$", (None, None)),
  (r"norm/scale$", (None,)),
)


class Shape(NamedTuple):
  """The sizes of a model."""

  layers: int
  width: int
  heads: int  # of queries
  kv_heads: int  # of keys and values
  hidden: int  # of the feed-forward part
  tied: bool  # logits are products with the embedding
  rotary_base: float
  scan: bool  # one compiled layer; on CPUs a loop is faster


# Named by their parameters with 32,000 outputs (150m), 128,256 (1b, 8b); tiny has 812k with 65.
PRESETS = {
  "tiny": Shape(4, 128, 4, 4, 352, True, 1e4, False),
  "150m": Shape(12, 1024, 8, 4, 2048, True, 1e4, True),
  "1b": Shape(16, 2048, 16, 8, 8192, True, 5e5, True),
  "8b": Shape(32, 4096, 32, 8, 14336, False, 5e5, True),
}
DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}
# What a layer keeps for its backward pass: everything, its input alone, or products with weights.
REMAT = {
  False: None,
  True: jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def transformer(
  preset: str = "tiny",
  *,
  layers: int | None = None,
  width: int | None = None,
  heads: int | None = None,
  kv_heads: int | None = None,
  hidden: int | None = None,
  tied: bool | None = None,
  experts: int = 0,
  experts_per_token: int = 2,
  balance: float = 0.01,
  dtype: str = "bfloat16",
  remat: bool | str = False,
  scan: bool | None = None,
  attention: str = "auto",
) -> Callable[[int], "Transformer"]:
  """A decoder language model: tokens [batch, length] to logits [batch, length, outputs], float32.

  The logits at a position are for the token after it, and depend on no later one. Sizes that are
  not given are the preset's.

  Args:
    preset: tiny, 150m, 1b or 8b.
    layers: how many.
    width: of the residual stream.
    heads: of queries, each of width / heads.
    kv_heads: of keys and values.
    hidden: of the feed-forward part, or of each expert.
    tied: the head is the embedding.
    experts: in each layer, in place of its feed-forward part; 0 for none.
    experts_per_token: of which a token's output is made.
    balance: weight of the loss that keeps experts equally busy, see `experts.Mixture`.
    dtype: of products and activations, bfloat16 or float32.
    remat: True computes a layer again in its backward pass, "dots" all but products with weights.
    scan: one compiled layer and stacked parameters layers/... [layers, ...], or layer after layer
      with parameters layers_0/..., layers_1/...
    attention: auto, plain, dot_product (cuDNN's on a GPU) or splash (TPUs).

  Raises:
    ValueError: a name is unknown, or sizes do not fit together.

  Reference: Touvron et al. 2023, arXiv 2302.13971, section 2.2; Ainslie et al. 2023, arXiv
    2305.13245 (grouped queries). Sizes of 8b: Grattafiori et al. 2024, arXiv 2407.21783, table 3.
  """
  given = {
    "layers": layers,
    "width": width,
    "heads": heads,
    "kv_heads": kv_heads,
    "hidden": hidden,
    "tied": tied,
    "scan": scan,
  }
  shape = _legal("preset", preset, PRESETS)
  shape = shape._replace(**{name: size for name, size in given.items() if size is not None})
  _check(shape, experts, experts_per_token, balance)
  attend = _legal("attention", attention, ATTENTION)
  mixture = (experts, experts_per_token, balance) if experts else None
  _legal("remat", remat, REMAT)
  products = _legal("dtype", dtype, DTYPES)
  return lambda outputs: Transformer(outputs, shape, mixture, products, remat, attend)


class Norm(nn.Module):
  """x / sqrt(mean x^2 + 1e-5) * scale. Reference: Zhang and Sennrich 2019, arXiv 1910.07467."""

  @nn.compact
  def __call__(self, x: Array) -> Array:
    scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],))
    wide = x.astype(jnp.float32)
    size = jnp.mean(wide**2, axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(size + 1e-5) * scale[None, None]).astype(x.dtype)


class Attention(nn.Module):
  """Projections around an attention function; kernels are cut by heads."""

  shape: Shape
  dtype: Any
  attend: Attend
  deviation: float  # of out's weights, as they start

  @nn.compact
  def __call__(self, x: Array, positions: Rotation) -> Array:
    _, width, heads, kv_heads, *_ = self.shape
    head_dim = width // heads
    normal = nn.initializers.normal
    into = lambda count, name: nn.DenseGeneral(
      (count, head_dim),
      dtype=self.dtype,
      kernel_init=normal(DEVIATION),
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
  """x + attention(norm(x)), then x + feed_forward(norm(x))."""

  shape: Shape
  mixture: tuple[int, int, float] | None
  dtype: Any
  attend: Attend

  @nn.compact
  def __call__(self, x: Array, positions: Rotation) -> tuple[Array, None]:
    # 2 layers terms add up in the residual stream; Radford et al. 2019 (GPT-2), section 2.3
    deviation = DEVIATION * (2 * self.shape.layers) ** -0.5
    attention = Attention(self.shape, self.dtype, self.attend, deviation, name="attention")
    options = (self.shape.hidden, self.dtype, deviation)
    feed_forward = (
      SwiGLU(*options, name="feed_forward")
      if self.mixture is None
      else Mixture(*self.mixture, *options, name="feed_forward")
    )
    whole = lambda x: activations.along(x, "fsdp", "seq", None)
    x = whole(x + attention(Norm(name="attention_norm")(x), positions))
    x = whole(x + feed_forward(Norm(name="feed_forward_norm")(x)))
    return x, None


class Transformer(nn.Module):
  """Embedding, layers, norm, head. `attend` may be replaced: by one that goes round a ring, say."""

  rules = RULES  # without a type it is no field

  outputs: int
  shape: Shape
  mixture: tuple[int, int, float] | None
  dtype: Any
  remat: bool | str
  attend: Attend

  @nn.compact
  def __call__(self, tokens: Array) -> Array:
    _check_tokens(tokens)
    _, width, heads, *_ = self.shape
    matrix = lambda name: self.param(name, nn.initializers.normal(DEVIATION), (self.outputs, width))
    embedding = matrix("embedding")
    x = activations.along(activations.rows(embedding, tokens), "fsdp", "seq", None)
    positions = rotation(tokens.shape[1], width // heads, self.shape.rotary_base)
    x = Norm(name="norm")(self.through_layers(x.astype(self.dtype), positions))
    head = embedding if self.shape.tied else matrix("head")
    logits = jnp.einsum(
      "btw,vw->btv", x, head.astype(self.dtype), preferred_element_type=jnp.float32
    )
    return activations.along(logits, "fsdp", "seq", "model")

  def through_layers(self, x: Array, positions: Rotation) -> Array:
    layers, scan = self.shape.layers, self.shape.scan
    options = (self.shape, self.mixture, self.dtype, self.attend)
    layer = Layer
    if self.remat:
      layer = nn.remat(Layer, prevent_cse=not scan, policy=REMAT[self.remat])
    if not scan:
      for i in range(layers):
        x, _ = layer(*options, name=f"layers_{i}")(x, positions)
      return x
    stacked = nn.scan(
      layer,
      variable_axes={"params": 0, "losses": 0},
      split_rngs={"params": True},
      in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
      length=layers,
    )
    return stacked(*options, name="layers")(x, positions)[0]


def _check(shape: Shape, experts: int, experts_per_token: int, balance: float) -> None:
  for name in ("layers", "width", "heads", "kv_heads", "hidden"):
    size = getattr(shape, name)
    if type(size) is not int or size < 1:
      raise ValueError(f"{name}={size!r} is not a positive integer")
  for name in ("tied", "scan"):
    if not isinstance(getattr(shape, name), bool):
      raise ValueError(f"{name}={getattr(shape, name)!r} is neither True nor False")
  if shape.width % shape.heads:
    raise ValueError(f"width={shape.width} is not divisible by heads={shape.heads}")
  if shape.heads % shape.kv_heads:
    raise ValueError(f"heads={shape.heads} is not divisible by kv_heads={shape.kv_heads}")
  if shape.width // shape.heads % 2:
    raise ValueError(
      f"width={shape.width} over heads={shape.heads} is {shape.width // shape.heads}, an odd size "
      "of a head; rotary positions need an even one"
    )
  if type(experts) is not int or experts < 0:
    raise ValueError(f"experts={experts!r} is not 0 or a positive integer")
  if experts and not (type(experts_per_token) is int and 1 <= experts_per_token <= experts):
    raise ValueError(f"experts_per_token={experts_per_token!r} is not in [1, experts={experts}]")
  if not balance >= 0:
    raise ValueError(f"balance={balance!r} is not in [0, inf)")


def _legal(kind: str, name: Any, table: dict[Any, Any]) -> Any:
  if isinstance(name, str | bool) and name in table:
    return table[name]
  near = difflib.get_close_matches(str(name), map(str, table), 1, 0.0)[0]
  raise ValueError(
    f"unknown {kind} {name!r}; did you mean {near!r}? legal: {', '.join(map(str, table))}"
  )


def _check_tokens(tokens: Array) -> None:
  if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
    raise ValueError(
      f"transformer needs whole numbers [batch, length], got {tokens.dtype} {list(tokens.shape)}"
    )
