"""Which dimensions of a parameter are stacked layers, inputs and outputs."""

import jax
import jax.numpy as jnp
import pytest

from research.core.dimensions import MATRIX, OTHER, Kinds, checked, kinds_of
from research.models.transformer import DIMENSIONS, transformer

DECLARED = checked(
  [
    [r"query$", ["in", "out", "out"]],
    [r"expert$", ["stack", "in", "out"]],
    [r"torch$", ["out", "in"]],
    [r"scale$", ["out"]],
  ]
)


def test_leading_dimensions_are_stacked_layers():
  shapes = {"query": (4, 6, 2, 3), "expert": (4, 5, 6, 7), "torch": (8, 6), "scale": (4, 6)}
  tree = {"layers": {name: jnp.zeros(shape) for name, shape in shapes.items()}, "head": jnp.eye(2)}
  assert kinds_of(tree, DECLARED) == {
    "head": OTHER,
    "layers/expert": Kinds(2, 1, 1),
    "layers/query": Kinds(1, 1, 2),
    "layers/scale": Kinds(1, 1, 0, into=False),
    "layers/torch": Kinds(0, 1, 1, into=False),
  }


def test_views_and_fans():
  query, torch = Kinds(1, 1, 2), Kinds(0, 1, 1, into=False)
  assert query.view(jnp.zeros((4, 6, 2, 3))).shape == (4, 6, 6)
  assert query.fans((4, 6, 2, 5)) == (6, 10)
  assert torch.fans((8, 6)) == (6, 8)


def test_leaves_of_two_dimensions_are_matrices_without_a_declaration():
  tree = {"a": jnp.zeros((2, 3)), "b": jnp.zeros(3), "c": jnp.zeros((2, 3, 4))}
  assert kinds_of(tree, ()) == kinds_of(tree, DECLARED) == {"a": MATRIX, "b": OTHER, "c": OTHER}


@pytest.mark.parametrize(
  ("wrong", "message"),
  [
    ([["(", ["in", "out"]]], "not a regular expression"),
    ([["x", ["in", "stack"]]], "not any number of 'stack'"),
    ([["x", ["in", "out", "in"]]], "not any number of 'stack'"),
    ([["x", ["rows"]]], "'rows' is not any number"),
  ],
)
def test_wrong_declarations_are_rejected(wrong, message):
  with pytest.raises(ValueError, match=message):
    checked(wrong)


def test_a_parameter_with_too_few_dimensions_is_named():
  with pytest.raises(ValueError, match="query has 2 dimensions, not in, out, out"):
    kinds_of({"query": jnp.zeros((2, 3))}, DECLARED)


@pytest.mark.parametrize("experts", [0, 4])
@pytest.mark.parametrize("scan", [True, False])
def test_the_transformer_declares_each_parameter_of_its_layers(scan, experts):
  module = transformer("tiny", layers=2, scan=scan, experts=experts)(7)
  tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
  params = jax.eval_shape(module.init, jax.random.key(0), tokens)["params"]
  kinds = kinds_of(params, DIMENSIONS)
  for name, found in kinds.items():
    in_layer = name.startswith("layers")
    assert found.is_matrix == name.endswith("/kernel"), name
    assert found.stack == (in_layer and scan) + ("/experts/" in name), name
