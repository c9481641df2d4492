"""Builds a Llama-style decoder language model, with presets of several sizes.

The model has RMSNorm before each part, rotary positions, grouped-query attention, SwiGLU or a
mixture of experts, and a head that shares the embedding's matrix or has its own. Parameters are
float32. Products are computed in `dtype`; norms, softmaxes, routers and logits are computed in
float32.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.core import checks
from research.core.base import Array, Key, Params
from research.core.dimensions import Dimensions
from research.models import activations, pipeline, sequence
from research.models.attention import ATTENTION, Attend, Rotation, plain, rotation
from research.models.decoder import Layer, Norm, Shape
from research.models.experts import balance

# Mesh axis of each dimension of a parameter, by the first pattern that matches its path; stacked
# layers have a leading dimension, sharded along `stage`. A layer's first matrix is sharded by
# columns and its second by rows, so that each part of a layer needs one sum over `model`. See
# Shoeybi et al. 2019, arXiv 1909.08053, section 3.
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

# The kinds of the last dimensions of each parameter, see `core/dimensions.py`.
DIMENSIONS: Dimensions = (
  (r"/attention/(query|key|value)/kernel$", ("in", "out", "out")),
  (r"/attention/out/kernel$", ("in", "in", "out")),
  (r"/(feed_forward/(gate|up|down)|router)/kernel$", ("in", "out")),
  (r"/experts/(gate|up|down)/kernel$", ("stack", "in", "out")),
  (r"norm/scale$", ("out",)),
)


# Presets are named by their number of parameters, for 32,000 outputs (150m) or 128,256 outputs (1b,
# 8b). With 65 outputs, tiny has 812k parameters.
PRESETS = {
  "tiny": Shape(4, 128, 4, 4, 352, True, 1e4, False),
  "150m": Shape(12, 1024, 8, 4, 2048, True, 1e4, True),
  "1b": Shape(16, 2048, 16, 8, 8192, True, 5e5, True),
  "8b": Shape(32, 4096, 32, 8, 14336, False, 5e5, True),
}
OVER_SEQ = {"auto": sequence.across, "by_heads": sequence.by_heads, "ring": sequence.ring}
DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}
# What a layer saves for its backward pass: everything, only its input, or products with weights.
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
  deviation: float | None = None,
  experts: int = 0,
  experts_per_token: int = 2,
  balance: float = 0.01,
  dtype: str = "bfloat16",
  remat: bool | str = False,
  scan: bool | None = None,
  attention: str = "auto",
  over_seq: str = "auto",
  microbatches: int = 0,
  repeats: int = 1,
) -> Callable[[int], "Transformer"]:
  """Builds a decoder language model.

  The model maps tokens [batch, length] to logits [batch, length, outputs].

  The logits at a position are float32, predict the next token, and depend on no later token. Sizes
  that are not given are those of the preset.

  Args:
    preset: the name of the preset: tiny, 150m, 1b or 8b.
    layers: the number of layers.
    width: the size of the residual stream.
    heads: the number of query heads, each of size width / heads.
    kv_heads: the number of key and value heads.
    hidden: the width of the feed-forward part, or of each expert.
    tied: whether the head shares the embedding's matrix.
    deviation: the standard deviation of the initial weights. It is divided by sqrt(2 layers) for
      weights whose output is added to the residual stream.
    experts: the number of experts that replace the feed-forward part of each layer; 0 for none.
    experts_per_token: the number of experts that compute a token's output.
    balance: the weight of the load-balancing loss; see `experts.balance`.
    dtype: the dtype of products and activations, bfloat16 or float32.
    remat: False saves a layer's activations for its backward pass; True recomputes them; "dots"
      recomputes everything except products with weights.
    scan: True compiles one layer for all, with stacked parameters layers/... [layers, ...]; False
      unrolls the layers, with parameters layers_0/..., layers_1/...
    attention: the attention function: auto, plain, dot_product (cuDNN's on GPUs) or splash (for
      TPUs).
    over_seq: how attention is computed along the mesh axis `seq`: auto, by_heads (two exchanges) or
      ring.
    microbatches: the number of micro-batches into which a worker's batch is split on a mesh with
      the axis `stage`; 0 lets `pipeline.schedule` choose the number.
    repeats: how many times a micro-batch passes through the stages, each time through
      layers / repeats layers. The stacked parameters are then [repeats, layers / repeats, ...].

  Returns:
    A function that makes the module for a given number of outputs, the size of the vocabulary.

  Raises:
    ValueError: if a name is unknown, or the sizes are inconsistent.

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
    "deviation": deviation,
    "scan": scan,
  }
  shape = _legal("preset", preset, PRESETS)
  shape = shape._replace(**{name: size for name, size in given.items() if size is not None})
  _check(shape, experts, experts_per_token, balance)
  _check_pipeline(shape, microbatches, repeats)
  local, across = _legal("attention", attention, ATTENTION), _legal("over_seq", over_seq, OVER_SEQ)
  attend = lambda *qkv: across(*qkv, local) if sequence.devices() > 1 else local(*qkv)
  mixture = (experts, experts_per_token) if experts else None
  _legal("remat", remat, REMAT)
  products = _legal("dtype", dtype, DTYPES)
  return lambda outputs: Transformer(
    outputs, shape, mixture, balance, products, remat, attend, microbatches, repeats
  )


class Transformer(nn.Module):
  """Applies embedding, layers, norm and head; see `transformer` for the arguments."""

  rules = RULES  # without annotation, so that this is not a dataclass field
  dimensions = DIMENSIONS

  outputs: int
  shape: Shape
  mixture: tuple[int, int] | None  # experts, experts per token
  balance: float
  dtype: Any
  remat: bool | str
  attend: Attend
  microbatches: int
  repeats: int

  @nn.compact
  def __call__(self, tokens: Array) -> Array:
    _check_tokens(tokens)
    sequence.check(tokens.shape[1])
    width, head_dim = self.shape.width, self.shape.width // self.shape.heads
    normal = nn.initializers.normal(self.shape.deviation)
    matrix = lambda name: self.param(name, normal, (self.outputs, width))
    embedding = matrix("embedding")
    x = activations.along(activations.rows(embedding, tokens), "fsdp", "seq", None)
    positions = rotation(tokens.shape[1], head_dim, self.shape.rotary_base)
    x, busy = self.through_layers(x.astype(self.dtype), positions)
    if self.mixture and not self.is_initializing():
      self.sow("losses", "balance", self.balance * balance(busy))
    # all stages compute the head, each for some of the tokens
    x = activations.along(Norm(name="norm")(x), "fsdp", ("stage", "seq"), None)
    head = embedding if self.shape.tied else matrix("head")
    logits = jnp.einsum(
      "btw,vw->btv", x, head.astype(self.dtype), preferred_element_type=jnp.float32
    )
    return activations.along(logits, "fsdp", ("stage", "seq"), "model")

  def through_layers(self, x: Array, positions: Rotation) -> tuple[Array, Array]:
    """Returns the output of all layers, and the load of the experts [..., 2, E]."""
    layer = Layer(self.shape, self.mixture, self.dtype, self.attend, parent=None)

    def init(key: Key) -> Params:
      one = jnp.zeros((1, 1, x.shape[2]), x.dtype), _first(positions)
      return layer.clone(attend=plain).init(key, *one)["params"]

    if self.shape.scan:
      params = self.param("layers", self.stacked(init))
    else:
      params = [self.param(f"layers_{i}", init) for i in range(self.shape.layers)]
    if self.is_initializing():
      return x, jnp.zeros((2, 0))  # only the parameters are needed

    def apply(x: Array, params: Params, positions: Rotation) -> tuple[Array, Array]:
      return layer.apply({"params": params}, x, positions)  # pyright: ignore[reportReturnType]

    if self.remat:
      apply = jax.checkpoint(apply, policy=REMAT[self.remat], prevent_cse=not self.shape.scan)
    if not self.shape.scan:
      busy = []
      for of_layer in params:
        x, found = apply(x, of_layer, positions)
        busy.append(found)
      return x, jnp.stack(busy)
    several = lambda params, x, positions: jax.lax.scan(
      lambda x, params: apply(x, params, positions), x, params
    )
    return self.through_stack(several, params, x, positions)

  def stacked(self, init: Callable[[Key], Params]) -> Callable[[Key], Params]:
    """Returns a function that initializes all layers: leaves [layers, ...] or [repeats, ...]."""
    for count in (self.shape.layers // self.repeats, self.repeats)[: 1 + (self.repeats > 1)]:
      init = _several(init, count)
    return init

  def through_stack(
    self, several: pipeline.Layers, params: Params, x: Array, positions: Rotation
  ) -> tuple[Array, Array]:
    stages = activations.inner_axes().get("stage", 1)
    if stages > 1:
      plan = self.schedule(stages, x.shape[0], activations.inner_axes().get("fsdp", 1))
      by_round = params if self.repeats > 1 else jax.tree.map(lambda p: p[None], params)
      return pipeline.pipelined(several, by_round, x, positions, plan)
    if self.repeats > 1:
      params = jax.tree.map(lambda p: p.reshape(-1, *p.shape[2:]), params)
    return several(params, x, positions)

  def schedule(self, stages: int, examples: int, cut: int = 1) -> pipeline.Schedule:
    """Returns the pipeline schedule of a worker's batch on a mesh with `stages` stages.

    Args:
      stages: the number of devices along `stage`.
      examples: the number of examples in a worker's batch.
      cut: the number of devices over which each micro-batch should be sharded.
    """
    return pipeline.schedule(stages, examples, self.microbatches, self.repeats, cut)


def _several(init: Callable[[Key], Params], count: int) -> Callable[[Key], Params]:
  return lambda key: jax.vmap(init)(jax.random.split(key, count))


def _first(positions: Rotation) -> Rotation:
  cosines, sines = positions
  return cosines[:1], sines[:1]


def _check(shape: Shape, experts: int, experts_per_token: int, balance: float) -> None:
  for name in ("layers", "width", "heads", "kv_heads", "hidden"):
    checks.positive_integer(name, getattr(shape, name))
  for name in ("tied", "scan"):
    if not isinstance(getattr(shape, name), bool):
      raise ValueError(f"{name}={getattr(shape, name)!r} is neither True nor False")
  if not shape.deviation > 0:
    raise ValueError(f"deviation={shape.deviation!r} is not in (0, inf)")
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


def _check_pipeline(shape: Shape, microbatches: int, repeats: int) -> None:
  if type(microbatches) is not int or microbatches < 0:
    raise ValueError(f"microbatches={microbatches!r} is not 0 or a positive integer")
  checks.positive_integer("repeats", repeats)
  if shape.layers % repeats:
    raise ValueError(f"layers={shape.layers} is not divisible by repeats={repeats}")
  if repeats > 1 and not shape.scan:
    raise ValueError(f"repeats={repeats} is of stacked layers: scan=True")


def _legal(kind: str, name: Any, table: dict[Any, Any]) -> Any:
  if isinstance(name, str | bool) and name in table:
    return table[name]
  hint = checks.hint(name, table, cutoff=0.0)
  raise ValueError(f"unknown {kind} {name!r}{hint} legal: {', '.join(map(str, table))}")


def _check_tokens(tokens: Array) -> None:
  if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
    raise ValueError(
      f"transformer needs whole numbers [batch, length], got {tokens.dtype} {list(tokens.shape)}"
    )
