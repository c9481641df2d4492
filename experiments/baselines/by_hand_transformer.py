"""Trains a hand-written transformer in plain JAX, as a baseline of bench.py.

The model has the architecture of `transformer('tiny')`: RMSNorm, rotary positions, SwiGLU, and an
output layer that shares the embedding. Matrix products are computed in bfloat16, and norms,
softmaxes and logits in float32. Windows are drawn with replacement, as in `by_hand.py`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.baselines.by_hand import advancing, load

LAYERS, WIDTH, HEADS, HIDDEN, VOCABULARY, CONTEXT = 4, 128, 4, 352, 65, 128


def transformer(config: dict[str, Any]) -> Callable[[int], None]:
  """Trains one worker with AdamW on windows of a text."""
  rows, batch = jnp.asarray(load(config)["x"][0]), int(config["batch_size"])  # [N / T, 2T]
  schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, 100, 5000, 1.5e-4)
  adamw = optax.adamw(schedule, b2=0.99, weight_decay=0.1)
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), adamw)

  def step(rows, state, index):
    params, memory = state
    window = lambda row, offset: jax.lax.dynamic_slice(rows, (row, offset), (1, CONTEXT + 1))[0]
    value, grads = jax.value_and_grad(loss)(params, jax.vmap(window)(*index).astype(jnp.int32))
    updates, memory = optimizer.update(grads, memory, params)
    return (optax.apply_updates(params, updates), memory), value

  def run(state, rows, key, length):
    row_key, offset_key = jax.random.split(key)
    row = jax.random.randint(row_key, (length, batch), 0, rows.shape[0])
    offset = jax.random.randint(offset_key, (length, batch), 0, CONTEXT)
    return jax.lax.scan(lambda state, index: step(rows, state, index), state, (row, offset))

  run = jax.jit(run, static_argnames="length", donate_argnums=0)
  params = init(jax.random.key(0))
  state = params, optimizer.init(params)
  return advancing(config, state, lambda state, i, n: run(state, rows, jax.random.key(i), n))


def init(key: jax.Array) -> dict[str, Any]:
  """Returns float32 parameters, with one entry per layer."""
  keys = iter(jax.random.split(key, 1 + 7 * LAYERS))
  normal = lambda *shape: 0.02 * jax.random.normal(next(keys), shape)
  small = lambda *shape: normal(*shape) / (2 * LAYERS) ** 0.5
  layer = lambda: {
    "attention_norm": jnp.ones(WIDTH),
    **{name: normal(WIDTH, WIDTH) for name in ("query", "key", "value")},
    "out": small(WIDTH, WIDTH),
    "feed_forward_norm": jnp.ones(WIDTH),
    "gate": normal(WIDTH, HIDDEN),
    "up": normal(WIDTH, HIDDEN),
    "down": small(HIDDEN, WIDTH),
  }
  layers = [layer() for _ in range(LAYERS)]
  return {"embedding": normal(VOCABULARY, WIDTH), "layers": layers, "norm": jnp.ones(WIDTH)}


def loss(params: dict[str, Any], window: jax.Array) -> jax.Array:
  """Computes the loss in nats per token on windows [b, T + 1]."""
  embedding = params["embedding"]
  x = embedding[window[:, :-1]].astype(jnp.bfloat16)
  for layer in params["layers"]:
    x = x + attention(layer, norm(x, layer["attention_norm"]))
    x = x + feed_forward(layer, norm(x, layer["feed_forward_norm"]))
  x, head = norm(x, params["norm"]), embedding.T.astype(x.dtype)
  logits = jnp.dot(x, head, preferred_element_type=jnp.float32)
  return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, window[:, 1:]))


def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
  wide = x.astype(jnp.float32)
  size = jnp.mean(wide**2, -1, keepdims=True)
  return (wide * jax.lax.rsqrt(size + 1e-5) * scale).astype(x.dtype)


def product(x: jax.Array, matrix: jax.Array) -> jax.Array:
  return x @ matrix.astype(x.dtype)


def attention(layer: dict[str, jax.Array], x: jax.Array) -> jax.Array:
  split = lambda x: x.reshape(*x.shape[:2], HEADS, WIDTH // HEADS)
  query, key, value = (split(product(x, layer[name])) for name in ("query", "key", "value"))
  scores = jnp.einsum(
    "bthd,bshd->bhts", rotated(query), rotated(key), preferred_element_type=jnp.float32
  )
  earlier = jnp.tril(jnp.ones((CONTEXT, CONTEXT), bool))
  scores = jnp.where(earlier, scores * (WIDTH // HEADS) ** -0.5, -jnp.inf)
  shares = jax.nn.softmax(scores).astype(x.dtype)
  return product(jnp.einsum("bhts,bshd->bthd", shares, value).reshape(x.shape), layer["out"])


def rotated(x: jax.Array) -> jax.Array:
  half = x.shape[-1] // 2
  frequencies = 1e4 ** (-jnp.arange(half) / half)
  angles = jnp.arange(CONTEXT)[:, None, None] * frequencies
  first, second = jnp.split(x.astype(jnp.float32), 2, -1)
  cosine, sine = jnp.cos(angles), jnp.sin(angles)
  turned = first * cosine - second * sine, second * cosine + first * sine
  return jnp.concatenate(turned, -1).astype(x.dtype)


def feed_forward(layer: dict[str, jax.Array], x: jax.Array) -> jax.Array:
  gated = jax.nn.silu(product(x, layer["gate"])) * product(x, layer["up"])
  return product(gated, layer["down"])
