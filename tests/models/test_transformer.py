"""The language model: against numpy, its properties, the same however it is computed."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from research.comm import mesh as meshes
from research.models import attention, experts, pipeline
from research.models.transformer import RULES, transformer
from research.parallel import sharded
from research.tasks.language.language import Text, next_token

OUTPUTS = 12
SIZES = {"layers": 2, "width": 16, "heads": 4, "kv_heads": 2, "hidden": 24, "dtype": "float32"}
MODELS = {
  "dense": {},
  "untied": {"tied": False},
  "mixture": {"experts": 4},
  "one of three": {"experts": 3, "experts_per_token": 1},
}


@pytest.fixture(autouse=True)
def strict():
  with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
    yield


def built(**options):
  return transformer("tiny", **(SIZES | options))(OUTPUTS)


def tokens(batch=3, length=7, seed=0):
  return np.random.default_rng(seed).integers(0, OUTPUTS, (batch, length)).astype(np.int32)


def drawn(module, seed=0):
  """Parameters of the right shapes, drawn by numpy: every leaf matters."""
  shapes = jax.eval_shape(module.init, jax.random.key(0), tokens())["params"]
  rng = np.random.default_rng(seed)
  draw = lambda s: rng.normal(0, 0.5, s.shape).astype(np.float32)
  return jax.tree.map(draw, shapes)


def paths(params):
  return {
    "/".join(key.key for key in path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }


def logits(module, params, x):
  return jax.jit(module.apply)({"params": params}, x)


def loss(module, params, x):
  """Cross-entropy of each next token, and what the module adds to it."""
  y, extra = module.apply({"params": params}, x[:, :-1], mutable=["losses"])
  chosen = jnp.sum(y * jax.nn.one_hot(x[:, 1:], OUTPUTS, dtype=y.dtype), axis=-1)
  added = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(extra))
  return jnp.mean(jax.nn.logsumexp(y, axis=-1) - chosen) + added


def loss_and_gradients(module, params, x):
  return jax.jit(jax.value_and_grad(lambda p: loss(module, p, x)))(params)


def close(a, b, tolerance=1e-5):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for path, leaf in jax.tree_util.tree_leaves_with_path(a):
    other = paths_any(b)[jax.tree_util.keystr(path)]
    scale = np.max(np.abs(other)) + 1e-12
    assert np.max(np.abs(np.asarray(leaf) - other)) / scale < tolerance, path


def paths_any(tree):
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def unstacked(params):
  """What a loop over layers has, from what a scan has."""
  rest = {name: leaf for name, leaf in params.items() if name != "layers"}
  layers = SIZES["layers"]
  each = {f"layers_{i}": jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(layers)}
  return rest | each


# ---- a transcription of the equations, in float64


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def norm(x, scale):
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale


def turned(x):
  """Each pair (x_i, x_{i + d/2}) as a complex number, times exp(i t base^(-2i/d))."""
  half = x.shape[-1] // 2
  angles = np.arange(x.shape[1])[:, None] * 1e4 ** (-np.arange(half) / half)
  z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[None, :, None]
  return np.concatenate([z.real, z.imag], -1)


def attended(x, p):
  query, key = (turned(np.einsum("btw,whd->bthd", x, p[n]["kernel"])) for n in ("query", "key"))
  value = np.einsum("btw,whd->bthd", x, p["value"]["kernel"])
  out = np.zeros_like(query)
  for h in range(query.shape[2]):
    g = h * key.shape[2] // query.shape[2]
    for t in range(x.shape[1]):
      scores = np.einsum("bd,bsd->bs", query[:, t, h], key[:, : t + 1, g]) / query.shape[3] ** 0.5
      out[:, t, h] = np.einsum("bs,bsd->bd", softmax(scores), value[:, : t + 1, g])
  return np.einsum("bthd,hdw->btw", out, p["out"]["kernel"])


def swiglu(x, gate, up, down):
  a = x @ gate
  return (a / (1 + np.exp(-a)) * (x @ up)) @ down


def fed_forward(x, p, per_token):
  """The output, and experts * sum_e (share of choices) (mean probability)."""
  if "router" not in p:
    return swiglu(x, *(p[n]["kernel"] for n in ("gate", "up", "down"))), 0.0
  probabilities = softmax(x @ p["router"]["kernel"])
  count = probabilities.shape[-1]
  out, shares = np.zeros_like(x), np.zeros(count)
  for place in np.ndindex(x.shape[:-1]):
    chosen = np.argsort(-probabilities[place])[:per_token]
    whole = probabilities[place][chosen].sum() if per_token > 1 else 1.0
    for e in chosen:
      kernels = (p["experts"][n]["kernel"][e] for n in ("gate", "up", "down"))
      out[place] += probabilities[place][e] / whole * swiglu(x[place], *kernels)
      shares[e] += 1
  shares /= shares.sum()
  return out, count * (shares * probabilities.reshape(-1, count).mean(0)).sum()


def transcribed(params, x, per_token=2):
  params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
  h, busy = params["embedding"][x], 0.0
  for i in range(SIZES["layers"]):
    p = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
    h = h + attended(norm(h, p["attention_norm"]["scale"]), p["attention"])
    out, of_layer = fed_forward(
      norm(h, p["feed_forward_norm"]["scale"]), p["feed_forward"], per_token
    )
    h, busy = h + out, busy + of_layer
  return norm(h, params["norm"]["scale"]) @ params.get("head", params["embedding"]).T, busy


@pytest.mark.parametrize("name", MODELS)
def test_is_its_transcription(name):
  module, x = built(scan=True, balance=0.5, **MODELS[name]), tokens()
  params = drawn(module)
  y, extra = jax.jit(lambda p, x: module.apply({"params": p}, x, mutable=["losses"]))(params, x)
  expected, busy = transcribed(params, x, MODELS[name].get("experts_per_token", 2))
  assert y.dtype == jnp.float32
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
  added = sum(np.sum(leaf) for leaf in jax.tree.leaves(extra))
  np.testing.assert_allclose(added, 0.5 * busy, rtol=1e-5)


# ---- what it is known for


def test_no_logit_sees_a_later_token():
  module, x = built(experts=2, experts_per_token=1), tokens(1)
  params = drawn(module)
  apply = jax.jit(module.apply)
  y = apply({"params": params}, x)
  for t in range(x.shape[1]):
    changed = x.copy()
    changed[:, t] = (x[:, t] + 1) % OUTPUTS
    z = apply({"params": params}, changed)
    np.testing.assert_array_equal(z[:, :t], y[:, :t])
    assert np.all(np.max(np.abs(z[:, t:] - y[:, t:]), axis=-1) > 0)


def test_rotary_scores_depend_on_the_distance_alone():
  rng, length = np.random.default_rng(0), 9
  query, key = rng.normal(size=(2, 1, 1, 3, 8)).astype(np.float32)
  everywhere = lambda x: jnp.broadcast_to(x, (1, length, 3, 8))
  table = attention.rotation(length, 8, 1e4)
  scores = np.einsum(
    "bthd,bshd->hts",
    attention.rotated(everywhere(query), table),
    attention.rotated(everywhere(key), table),
  )
  for distance in range(-length + 1, length):
    diagonal = np.diagonal(scores, distance, 1, 2)
    np.testing.assert_allclose(
      diagonal, np.repeat(diagonal[:, :1], diagonal.shape[1], 1), atol=1e-5
    )
  assert np.ptp(scores[0, 0]) > 0.1


def qkv(heads, kv_heads, length=6):
  rng = np.random.default_rng(0)
  draw = lambda n: jnp.asarray(rng.normal(size=(2, length, n, 8)).astype(np.float32))
  return [draw(n) for n in (heads, kv_heads, kv_heads)]


def test_grouped_queries_are_heads_that_share_keys():
  query, key, value = qkv(4, 2)
  grouped = attention.plain(query, key, value)
  repeated = attention.plain(query, *(jnp.repeat(x, 2, axis=2) for x in (key, value)))
  np.testing.assert_allclose(grouped, repeated, atol=1e-6)
  one_by_one = [
    attention.plain(query[:, :, h : h + 1], key[:, :, h // 2, None], value[:, :, h // 2, None])
    for h in range(4)
  ]
  np.testing.assert_allclose(grouped, np.concatenate(one_by_one, axis=2), atol=1e-6)


def in_bfloat16(query, key, value):
  narrow = (x.astype(jnp.bfloat16) for x in (query, key, value))
  return attention.dot_product(*narrow).astype(jnp.float32)


@pytest.mark.parametrize(
  ("function", "length", "tolerance"),
  [
    (partial(jax.nn.dot_product_attention, is_causal=True), 6, 1e-5),
    (in_bfloat16, 6, 0.05),
    (attention.automatic, 6, 1e-5),
    (lambda q, k, v: attention.splash_kernel(q, k, v, interpret=True), 128, 1e-4),
  ],
  ids=["JAX's own", "bfloat16", "auto", "splash"],
)
def test_attention_functions_agree(function, length, tolerance):
  arguments = qkv(4, 2, length)
  through = lambda attend: jax.jit(
    jax.value_and_grad(lambda *qkv: jnp.sum(jnp.sin(attend(*qkv))), (0, 1, 2))
  )
  close(through(function)(*arguments), through(attention.plain)(*arguments), tolerance)


@pytest.mark.parametrize("axes", [{}, {"fsdp": 2, "model": 2}])
def test_programs_for_tpus_take_the_kernel(axes):
  """`auto` asks the mesh, so that a machine without a TPU compiles what the TPU will run."""
  tpu = jax.sharding.AbstractDevice(device_kind="TPU v5", num_cores=1, platform="tpu")
  kinds = (jax.sharding.AxisType.Auto,) * len(axes)
  mesh = jax.sharding.AbstractMesh(
    tuple(axes.values()), tuple(axes), axis_types=kinds, abstract_device=tpu
  )
  program = lambda attend, length: str(jax.make_jaxpr(attend)(*qkv(4, 2, length)))
  with jax.sharding.use_abstract_mesh(mesh):
    assert "pallas_call" in program(attention.automatic, 128)
    assert ("shard_map" in program(attention.automatic, 128)) == bool(axes)
    assert "pallas_call" not in program(attention.automatic, 96)
    with pytest.raises(ValueError, match="'splash' needs a length that 128 divides, not 96"):
      program(attention.splash, 96)
  assert "pallas_call" not in program(attention.automatic, 128)


@pytest.mark.parametrize(
  ("platform", "capability", "dtype", "head_dim", "fused"),
  [
    ("gpu", 9.0, jnp.bfloat16, 64, True),
    ("gpu", 7.5, jnp.bfloat16, 64, False),
    ("gpu", 9.0, jnp.float32, 64, False),
    ("gpu", 9.0, jnp.bfloat16, 136, False),
    ("gpu", 9.0, jnp.bfloat16, 20, False),
    ("cpu", 9.0, jnp.bfloat16, 64, False),
  ],
)
def test_cudnn_is_asked_where_it_can(platform, capability, dtype, head_dim, fused, monkeypatch):
  asked = []

  def of_jax(query, key, value, **options):
    asked.append(options)
    return attention.plain(query, key, value)

  monkeypatch.setattr(jax.nn, "dot_product_attention", of_jax)
  monkeypatch.setattr(attention, "_capability", lambda: capability)
  monkeypatch.setattr(attention, "platform", lambda: platform)
  x = jnp.zeros((1, 6, 2, head_dim), dtype)
  attention.automatic(x, x, x)
  assert asked == ([{"is_causal": True, "implementation": "cudnn"}] if fused else [])


def test_tied_head_has_no_parameter():
  tied, untied = (paths(drawn(built(tied=tied))) for tied in (True, False))
  assert set(untied) - set(tied) == {"head"}
  assert untied["head"].shape == untied["embedding"].shape == (OUTPUTS, SIZES["width"])


@pytest.mark.parametrize(
  ("preset", "outputs", "count"),
  [
    ("tiny", 65, 0.812e6),
    ("150m", 32_000, 146e6),
    ("1b", 128_256, 1.27e9),
    ("8b", 128_256, 8.03e9),
  ],
)
def test_presets_have_the_parameters_of_their_names(preset, outputs, count):
  module = transformer(preset)(outputs)
  shapes = jax.eval_shape(module.init, jax.random.key(0), tokens())["params"]
  found = sum(leaf.size for leaf in jax.tree.leaves(shapes))
  assert abs(found / count - 1) < 0.01
  assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {np.dtype("float32")}


@pytest.mark.slow
def test_starts_near_the_uniform_distribution_whatever_the_dtype():
  x = tokens(4, 16)
  for dtype in ("float32", "bfloat16"):
    module = built(dtype=dtype)
    start = jax.jit(lambda key, module=module: loss(module, module.init(key, x)["params"], x))
    assert abs(start(jax.random.key(0)) - np.log(OUTPUTS)) < 0.1


def test_bfloat16_is_close_to_float32():
  x, params = tokens(), drawn(built())
  exact, rounded = (logits(built(dtype=dtype), params, x) for dtype in ("float32", "bfloat16"))
  assert rounded.dtype == jnp.float32
  assert 0 < np.max(np.abs(exact - rounded)) < 0.1 * np.max(np.abs(exact))


# ---- one function, however it is computed


@pytest.mark.slow
@pytest.mark.parametrize("count", [0, 2])
def test_scan_and_remat_change_nothing(count):
  x, scanned = tokens(), built(scan=True, experts=count)
  params = drawn(scanned)
  value, gradients = loss_and_gradients(scanned, params, x)
  for scan, remat in [(True, True), (True, "dots"), (False, False), (False, True)]:
    module = built(scan=scan, remat=remat, experts=count)
    form = (lambda tree: tree) if scan else unstacked
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    expected = jax.tree.map(lambda p: p.shape, form(params))
    assert jax.tree.map(lambda s: s.shape, shapes) == expected
    close(loss_and_gradients(module, form(params), x), (value, form(gradients)))


def test_one_expert_is_the_dense_model():
  dense, single = built(scan=True), built(scan=True, experts=1, experts_per_token=1, balance=0.0)
  params, x = drawn(single), tokens()
  layers = dict(params["layers"])
  layers["feed_forward"] = jax.tree.map(lambda k: k[:, 0], layers["feed_forward"]["experts"])
  plain = params | {"layers": layers}
  np.testing.assert_allclose(
    logits(single, params, x), logits(dense, plain, x), rtol=1e-5, atol=1e-5
  )


def test_ties_between_experts_go_to_the_first():
  p = jnp.asarray([[[0.25, 0.25, 0.4, 0.1], [0.25] * 4]])
  expected = [[[True, False, True, False], [True, True, False, False]]]
  np.testing.assert_array_equal(experts.largest(p, 2), expected)


@pytest.mark.slow
@pytest.mark.parametrize("per_token", [1, 2])
def test_routers_learn(per_token):
  module = built(scan=True, experts=3, experts_per_token=per_token, balance=0.0)
  _, gradients = loss_and_gradients(module, drawn(module), tokens())
  router = gradients["layers"]["feed_forward"]["router"]["kernel"]
  assert np.all(np.max(np.abs(router), axis=(1, 2)) > 1e-4)


# ---- cut over devices


CUTS = {
  "ring": ({"fsdp": 2, "seq": 2, "model": 2}, {"over_seq": "ring", "tied": False}),
  "stages": ({"stage": 2, "fsdp": 2, "expert": 2}, {"layers": 4, "experts": 2}),
  "circular": (
    {"stage": 2, "seq": 2, "model": 2},
    {"layers": 4, "repeats": 2, "kv_heads": 4, "over_seq": "by_heads", "remat": True},
  ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CUTS)
def test_a_cut_model_is_the_whole_one(name):
  """Loss and gradients, in float32."""
  inner, options = CUTS[name]
  sizes = {"data": 1, **inner}
  mesh = meshes.device_mesh(sizes)
  module, x = built(scan=True, **options), tokens(8, 9)
  params = drawn(module)
  task = next_token(module, OUTPUTS, Text(x.ravel(), 72), Text(x.ravel(), 72), context=8)
  cut = sharded.cut_of(sizes, task)
  of_params = jax.tree.map(lambda p: P(*sharded.spec_of(cut, p.shape)), params)
  placed = jax.tree.map(lambda p, s: jax.device_put(p, NamedSharding(mesh, s)), params, of_params)
  inside = jax.shard_map(
    lambda p, x: jax.value_and_grad(lambda p: loss(module, p, x))(p),
    mesh=mesh,
    in_specs=(P(), P("data")),
    out_specs=P(),
    axis_names={"data"},
    check_vma=False,
  )
  shardings = jax.tree.map(lambda s: NamedSharding(mesh, s), of_params)
  run = jax.jit(inside, out_shardings=(NamedSharding(mesh, P()), shardings))
  found = run(placed, jax.device_put(x, NamedSharding(mesh, P("data"))))
  close(found, loss_and_gradients(module, params, x))
  down = found[1]["layers"]["feed_forward"]
  down = (down["experts"] if "experts" in options else down)["down"]["kernel"]
  cutting = math.prod(inner[axis] for axis in set(inner) - {"seq", "expert"})
  cutting *= inner.get("expert", 1) if "experts" in options else 1
  assert down.addressable_shards[0].data.size * cutting == down.size


def test_a_schedule_has_its_bubble():
  """Every item at every stage in its turn; what GPipe and a circular order leave idle."""
  for stages, microbatches, repeats in [(4, 8, 1), (4, 4, 2), (3, 5, 4), (1, 3, 1)]:
    plan = pipeline.schedule(stages, 40 * microbatches, microbatches, repeats)
    busy = np.zeros((plan.ticks, stages), bool)
    for stage in range(stages):
      for item in range(repeats * microbatches):
        busy[item + stage, stage] = True
    assert plan.bubble == pytest.approx(1 - busy.mean())
  assert pipeline.schedule(4, 32, 8, 1).bubble == 3 / 11
  assert pipeline.schedule(4, 32, 8, 2).bubble == 3 / 19
  assert pipeline.schedule(4, 24, 0, 1, cut=2) == (
    4,
    12,
    1,
  )  # of 16, 12, 8, ... the first to divide
  for arguments, words in [
    ((4, 10, 3, 1), "microbatches=3 does not divide the batch of 10 examples"),
    ((4, 8, 2, 2), "microbatches=2 is less than the 4 stages that repeats=2 needs"),
    ((4, 3, 0, 2), "none of up to 16 divides the batch of 3"),
  ]:
    with pytest.raises(ValueError, match=words):
      pipeline.schedule(*arguments)


def test_every_parameter_has_one_rule():
  for options in MODELS.values():
    for scan in (True, False):
      for path in paths(drawn(built(scan=scan, **options))):
        assert sum(bool(re.search(pattern, path)) for pattern, _ in RULES) == 1, path


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_weights_start_as_spread_as_asked(name):
  """By the same draws: those into the residual stream too, whatever else they are divided by."""
  start = lambda **of: built(**MODELS[name], **of).init(jax.random.key(0), tokens())["params"]
  plain, wide = paths(start()), paths(start(deviation=0.1))
  for path, leaf in plain.items():
    expected = leaf if path.endswith("norm/scale") else 5 * leaf
    np.testing.assert_allclose(wide[path], expected, rtol=1e-5, err_msg=path)


# ---- refusals


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"preset": "7b"}, r"unknown preset '7b'; did you mean '[18]b'\? legal: tiny, 150m, 1b, 8b"),
    ({"width": 130}, "width=130 is not divisible by heads=4"),
    ({"heads": 8, "kv_heads": 3}, "heads=8 is not divisible by kv_heads=3"),
    ({"width": 12, "heads": 4}, "width=12 over heads=4 is 3, an odd size"),
    ({"dtype": "bf16"}, "unknown dtype 'bf16'; did you mean 'bfloat16'"),
    ({"attention": "flash"}, "unknown attention 'flash'; did you mean 'splash'"),
    ({"remat": "dot"}, "unknown remat 'dot'; did you mean 'dots'"),
    ({"experts": 2, "experts_per_token": 3}, r"experts_per_token=3 is not in \[1, experts=2\]"),
    ({"experts": 1}, r"experts_per_token=2 is not in \[1, experts=1\]"),
    ({"experts": -1}, "experts=-1 is not 0 or a positive integer"),
    ({"layers": 0}, "layers=0 is not a positive integer"),
    ({"hidden": True}, "hidden=True is not a positive integer"),
    ({"tied": 1}, "tied=1 is neither True nor False"),
    ({"scan": "no"}, "scan='no' is neither True nor False"),
    ({"balance": -1.0}, "balance=-1.0 is not in"),
    ({"deviation": 0.0}, r"deviation=0.0 is not in \(0, inf\)"),
    ({"over_seq": "rings"}, "unknown over_seq 'rings'; did you mean 'ring'"),
    ({"microbatches": -1}, "microbatches=-1 is not 0 or a positive integer"),
    ({"repeats": 3, "scan": True}, "layers=4 is not divisible by repeats=3"),
    ({"repeats": 2}, "repeats=2 is of stacked layers: scan=True"),
  ],
)
def test_hyper_parameters_are_checked(options, message):
  with pytest.raises(ValueError, match=message) as caught:
    transformer(**options)
  assert "\n" not in str(caught.value)


def test_inputs_are_checked():
  with pytest.raises(
    ValueError, match=r"needs whole numbers \[batch, length\], got float32 \[2, 3\]"
  ):
    built().init(jax.random.key(0), np.zeros((2, 3), np.float32))
  with pytest.raises(ValueError, match="'splash' is for TPUs, but this program is for a cpu"):
    logits(built(attention="splash"), drawn(built()), tokens())
