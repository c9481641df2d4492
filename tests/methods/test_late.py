"""Late exchanges: fragments of models, refusals, and the stability of outer steps that are late."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import Running
from subset import slow_except

from research.core import registry
from research.methods.fragments import BALANCED, fragments_of
from research.models.transformer import transformer

OUTPUTS = {"tiny": 65, "150m": 32_000, "1b": 128_256, "8b": 128_256}


def shapes(preset: str, scan: bool):
  model = transformer(preset, scan=scan)(OUTPUTS[preset])
  init = lambda key: model.init(key, jnp.zeros((1, 8), jnp.int32))["params"]
  return jax.eval_shape(init, jax.random.key(0))


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("preset", slow_except(["tiny", "1b"], OUTPUTS))
def test_fragments_of_a_transformer_are_balanced(preset, scan):
  """At most 1.15 of the mean for 2, 4 and 8; and they are all of the model, once."""
  model = shapes(preset, scan)
  elements = sum(leaf.size for leaf in jax.tree.leaves(model))
  for count in (2, 4, 8):
    found = fragments_of(model, count)
    assert max(found.sizes) * count / sum(found.sizes) <= BALANCED
    assert sum(found.sizes) == 4 * elements
    parts = [jax.eval_shape(lambda t, p=p, cut=found: cut.take(t, p), model) for p in range(count)]
    assert [sum(4 * x.size for x in part) for part in parts] == list(found.sizes)


def test_layers_are_kept_whole_and_dealt_in_turn():
  """Twelve layers and an embedding of two layers in four fragments; layer 10 is not before 2."""
  layer = {"kernel": np.zeros((10, 8)), "bias": np.zeros(20)}
  model = {f"layers_{i}": layer for i in range(12)} | {"embedding": np.zeros((40, 5))}
  found = fragments_of(model, 4)
  names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(model)]
  layers = [
    sorted({int(re.findall(r"\d+", names[i])[0]) for i, _ in part if "layers" in names[i]})
    for part in found.parts
  ]
  assert layers == [[6, 10], [0, 3, 7, 11], [1, 4, 8], [2, 5, 9]]
  assert names[found.parts[0][0][0]] == "['embedding']"
  for part in found.parts:  # both leaves of each layer
    assert sum("layers" in names[i] for i, _ in part) % 2 == 0


@pytest.mark.parametrize("scan", slow_except([True], [True, False]))
def test_a_model_is_put_together_from_its_fragments(scan):
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape), shapes("tiny", scan))
  leaves, tree = jax.tree.flatten(zeros)
  model = tree.unflatten([jnp.arange(x.size, dtype=jnp.float32).reshape(x.shape) for x in leaves])
  for count in (1, 3, 8):
    found, copy = fragments_of(model, count), zeros
    for p in range(count):
      copy = found.put(copy, p, found.take(model, p))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), copy, model))


def common_mode(spec: str, workers: int) -> float:
  """The spectral radius of a round in which every worker's local steps reach the optimum, zero.

  All workers are alike: the modes in which they differ are left out.
  """
  method = registry.build("method", spec)
  start = {"w": jnp.zeros(())}
  state = jax.vmap(lambda _: method.init(start), axis_name="data", axis_size=workers)(
    jnp.arange(workers)
  )
  leaves, tree = jax.tree.flatten(state)
  floats = [i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.floating)]

  sizes = [leaves[i][0].size for i in floats]

  def round_(vector):
    filled = list(leaves)
    for i, value in zip(floats, jnp.split(vector, np.cumsum(sizes)[:-1]), strict=True):
      filled[i] = jnp.broadcast_to(value.reshape(leaves[i].shape[1:]), leaves[i].shape)

    def one(state):
      local = method.begin(state)
      for h in range(method.local_steps):
        local = method.step(local.params, local, state, key=jax.random.key(h))
      return method.sync(local, state, key=jax.random.key(0))

    after = jax.tree.leaves(jax.vmap(one, axis_name="data")(tree.unflatten(filled)))
    return jnp.concatenate([after[i][0].ravel() for i in floats])

  # as if many rounds had passed, so that there is something to receive
  leaves[:] = [x if i in floats else x + 10 for i, x in enumerate(leaves)]
  found = np.linalg.eigvals(jax.jacobian(round_)(jnp.zeros(sum(sizes))))
  return float(np.abs(found).max())


OUTER = "sgd({rate}, momentum=0.9, nesterov=True)"


@pytest.mark.parametrize(
  ("workers", "rate", "radius"),
  [(2, 0.7, 0.975), (4, 0.4, 0.9935), (4, 0.7, 1.1415), (8, 0.2, 0.9607), (8, 0.4, 1.0382)],
)
def test_limits_of_eager_outer_steps(workers, rate, radius):
  """Unit curvature over a round; outer Nesterov momentum of 0.9."""
  spec = f"eager_diloco(sgd(1.0), {OUTER.format(rate=rate)}, mean(), period=1)"
  assert common_mode(spec, workers) == pytest.approx(radius, abs=5e-4)


def test_late_steps_that_are_kept_are_stable():
  """0.877: what is in the air is not asked for again, d_t = theta_t - d_{t-1}."""
  spec = f"late(diloco(sgd(1.0), {OUTER.format(rate=0.7)}, mean(), period=1), 1)"
  assert common_mode(spec, 2) == pytest.approx(0.877, abs=5e-4)


def test_outer_steps_on_old_changes_diverge():
  """They grow by 1.285 per round, where eager steps shrink by 0.975."""
  spec = f"delayed(diloco(sgd(1.0), {OUTER.format(rate=0.7)}, mean(), period=1), constant(1))"
  method, sizes = registry.build("method", spec), []
  state = jax.vmap(lambda _: method.init({"w": jnp.ones(())}))(jnp.arange(2))

  def one(state):
    local = method.begin(state)
    local = method.step(local.params, local, state, key=jax.random.key(0))
    return method.sync(local, state, key=jax.random.key(0))

  round_ = jax.jit(jax.vmap(one, axis_name="data"))
  for _ in range(200):
    state = round_(state)
    sizes.append(float(np.abs(jax.vmap(method.params)(state)["w"]).max()))
  growth = (max(sizes[190:200]) / max(sizes[90:100])) ** (1 / 100)
  assert growth == pytest.approx(1.285, abs=5e-3)


@pytest.mark.parametrize(
  ("spec", "words"),
  [
    ("late(scaffold(0.1, mean()), 1)", "scaffold does not have one exchange per round"),
    ("late(eager_diloco(sgd(0.1), sgd(0.1), mean()), 1)", "overlaps without late"),
    ("late(local_sgd(sgd(0.1), mean()), -1)", "delay=-1 is not at least 0"),
    ("late(local_sgd(sgd(0.1), mean()), 8, mixing=0.5)", r"delay=8 is not in \[0, 8\)"),
    (
      "late(local_sgd(sgd(0.1), mean()), 1, fragments=3)",
      "period=8 is not a multiple of fragments=3",
    ),
    (
      "late(fed_avg(sgd(0.1), mean(), period=4), 1, fragments=2)",
      "whose workers keep an optimizer",
    ),
    ("late(local_sgd(sgd(0.1), mean(), period=[[0, 2], [4, 8]]), 1)", "needs a constant period"),
    ("overlap_local_sgd(sgd(0.1), mean(), alpha=0.0)", r"alpha=0.0 is not in \(0, 1\]"),
  ],
)
def test_what_cannot_be_late_is_refused(spec, words):
  with pytest.raises(ValueError, match=words):
    registry.build("method", spec)


def test_a_method_that_needs_more_than_the_value_is_refused():
  method = registry.build("method", "late(demo(0.01, gather_mean(dct_top_k(2, 2))), 1)")
  with pytest.raises(ValueError, match="late cannot be combined with demo"):
    Running(method, "simulate", {"data": 8})
