"""Several axes inside a worker: rules say what is cut, blocks come back whole, executions agree."""

import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import Running, distance, regression
from side_by_side import regressions, side_by_side

from research.aggregate.blockwise import Cut, join, split
from research.comm import collectives
from research.core import registry
from research.core.base import EVERYONE
from research.core.task import Task
from research.methods.data_parallel import DataParallel, DataParallelState
from research.parallel import rules, sharded, traffic

RULES = (("up$", (None, "model")), ("down$", ("model", None)))
MESHES = [
  {"data": 2, "fsdp": 2, "model": 2},
  {"slice": 2, "data": 2, "model": 2},
]
EXACT = {
  "momentum": "data_parallel(sgd(0.1, momentum=0.9), mean())",
  "diloco": "diloco(adam(0.01), sgd(0.7, momentum=0.9), mean(), period=1)",
}
BY_BLOCK = {
  "two_phase": "data_parallel(adam(0.01), error_feedback(two_phase(int8())))",
  "power_sgd": "data_parallel(sgd(0.1), error_feedback(power_sgd(1)))",
}


def perceptron(**changes) -> Task:
  """Tokens 6 -> 8 -> 4, and a scale that is cut by no rule."""
  task = regression(240)
  x, y = task.train["x"], np.tile(task.train["y"], (1, 2))[:, :4]

  def init(key):
    up, down = jax.random.split(key)
    shapes = {"up": (up, (6, 8)), "down": (down, (8, 4))}
    return {n: 0.5 * jax.random.normal(*of) for n, of in shapes.items()} | {"scale": jnp.ones(4)}

  def loss(params, batch, key):
    del key
    found = jnp.tanh(batch["x"] @ params["up"]) @ params["down"] * params["scale"]
    return jnp.mean((found - batch["y"]) ** 2)

  examples = {"x": x, "y": y}
  return task._replace(init=init, loss=loss, train=examples, test=None, rules=RULES, **changes)


@pytest.mark.parametrize(
  "sizes", [(2,), *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in ((2, 3), (3, 2, 2)))]
)
def test_what_is_split_comes_back(sizes):
  """Leaves cut by every set of axes, in every order of dimensions."""
  axes = tuple(zip("abc", sizes, strict=False))
  shapes = {}
  for dimensions in itertools.product((None, 0, 1, 2), repeat=len(sizes)):
    used = [d for d in dimensions if d is not None]
    if len(set(used)) == len(used):
      shapes[(12, 24, 36 + 12 * len(shapes))] = dimensions
  cut = Cut(axes, lambda shape: shapes[shape])
  random = np.random.default_rng(0)
  tree = {str(i): jnp.asarray(random.normal(size=shape)) for i, shape in enumerate(shapes)}
  parts = jax.jit(lambda whole: split(whole, cut))(tree)
  assert all(leaf.shape[0] == cut.size for leaf in jax.tree.leaves(parts))
  back = jax.jit(lambda parts: join(parts, tree, cut))(parts)
  assert all(bool((a == b).all()) for a, b in zip(*map(jax.tree.leaves, (tree, back)), strict=True))
  one = split({"x": tree["0"]}, Cut(axes[:1], lambda shape: (1,)))[0][0]
  np.testing.assert_array_equal(one[1], tree["0"][:, 24 // sizes[0] : 48 // sizes[0]])


def run(specs: dict[str, str], executor: str, axes: dict[str, int]) -> Running:
  method = side_by_side({name: registry.build("method", spec) for name, spec in specs.items()})
  count = axes["data"] * axes.get("slice", 1)
  task = regressions(tuple(specs), perceptron())
  return Running(method, executor, axes, (240 // count,) * count, 12, task=task).rounds(5)


@pytest.mark.slow
@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_executions_agree(axes):
  """Exact methods with the workers alone; others with the same blocks, simulated."""
  got = run(EXACT | BY_BLOCK, "spmd", axes)
  alone = {"data": axes["data"] * axes.get("slice", 1)}
  want = run(EXACT, "simulate", alone).params() | run(BY_BLOCK, "simulate", axes).params()
  for name, params in got.params().items():
    assert distance(params, want[name]) <= 1e-5, name
  weights = got.state.method["momentum"].params
  lies = {name: leaf.sharding.spec for name, leaf in weights.items()}
  assert lies["up"][1] == lies["down"][0] == "model"
  assert "model" not in lies["scale"]


@pytest.mark.parametrize(
  ("axes", "changes", "words"),
  [
    ({"model": 3}, {}, "'model:3' does not divide the 8 of down [8, 4]"),
    ({"model": 2}, {"rules": ()}, "'model' shards nothing"),
  ],
)
def test_what_does_not_divide_is_refused(axes, changes, words):
  with pytest.raises(ValueError, match=re.escape(words)):
    sharded.cut_of(axes, perceptron()._replace(**changes))


def test_shapes_that_are_alike_are_cut_alike():
  task = perceptron()
  init = lambda key: {"up": jnp.ones((4, 4)), "down": jnp.ones((4, 4))}
  with pytest.raises(ValueError, match="must be sharded differently"):
    rules.by_shape({"model": 2}, task._replace(init=init))


class Gathering(DataParallel):
  """A method that gathers by itself, without an aggregator."""

  aggregator: Any = None

  def init(self, params):
    return DataParallelState(params, self.inner.init(params), ())

  def sync(self, local, state, *, key, presence=EVERYONE):
    tree, state = self.message(local, state, key=key)
    value = jax.tree.map(lambda x: jnp.mean(collectives.gather(x), 0), tree)
    return self.receive(value, tree, state, key=key)


def test_what_gathers_without_an_aggregator_is_refused_on_shards():
  """The compiler would have to exchange inside a worker, too; on whole leaves it runs."""
  method = Gathering(optax.sgd(0.1))
  Running(method, "spmd", {"data": 4}, (60,) * 4).rounds(1)
  with pytest.raises(ValueError, match="inside a worker only what is summed may be cut"):
    Running(method, "spmd", {"data": 2, "fsdp": 2}, (120,) * 2, task=perceptron())


def test_rows_of_a_parameter_are_sharded_like_it():
  """Of stacked layers [6, 8, 4] and of an embedding [12, 4]; `stage` moves where it must."""
  cut = rules.RuleCut
  named = {(6, 8, 4): cut({"stage": 0, "model": 1}, 1), (12, 4): cut({"model": 0}, 0)}
  sizes = {"stage": 2, "model": 2}
  rows = lambda *shape: rules.of_rows(shape, named, sizes)
  assert rows(4, 8, 4) == cut({"stage": 0, "model": 1}, 1)
  assert rows(3, 8, 4) == cut({"stage": 2, "model": 1}, 1)
  assert rows(6, 4) == cut({"model": 0}, 0)
  assert rows(5, 4) == cut({"model": 1}, 0)
  assert rows(7, 7) == rows(7) == cut({}, 0)


@pytest.mark.slow
@pytest.mark.parametrize("inner", ["fsdp", "model"])
def test_fragments_send_what_the_model_sends(inner):
  """Over P rounds and all devices of a worker: no part of a sharded layer is sent twice."""

  def sent(spec: str, rounds: int) -> float:
    method = registry.build("method", spec)
    running = Running(method, "spmd", {"data": 2, inner: 2}, (120,) * 2, task=stacked())
    found = traffic.of_method(running.job, running.layout, rounds).transfers
    got = running.rounds(4).params()
    want = Running(method, "simulate", {"data": 2}, (120,) * 2, task=stacked()).rounds(4).params()
    assert distance(got, want) <= 1e-5
    return sum(t.total for t in found)

  whole = "diloco(sgd(0.1), sgd(0.7), mean(), period=2)"
  assert sent(f"late({whole}, 1, fragments=2)", 2) == sent(whole, 1)


def stacked() -> Task:
  """Two layers 6 -> 8 -> 6, stacked, and a matrix 6 -> 4."""
  task = perceptron()

  def init(key):
    keys = jax.random.split(key, 3)
    shapes = {"up": (keys[0], (2, 6, 8)), "down": (keys[1], (2, 8, 6))}
    layers = {n: 0.5 * jax.random.normal(*of) for n, of in shapes.items()}
    return {"layers": layers, "out": 0.5 * jax.random.normal(keys[2], (6, 4))}

  def loss(params, batch, key):
    del key
    layer = lambda x, of: (x + jnp.tanh(x @ of["up"]) @ of["down"], None)
    found = jax.lax.scan(layer, batch["x"], params["layers"])[0] @ params["out"]
    return jnp.mean((found - batch["y"]) ** 2)

  return task._replace(init=init, loss=loss)
