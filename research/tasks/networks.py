"""Converts Flax linen, Flax NNX and Equinox models to pairs of pure functions.

NNX and Equinox models are recognized only if the program has imported these libraries already.
"""

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from research.core.base import Array, Key, Params

# Keyword arguments with which models of these libraries select training or evaluation.
_TRAINING, _EVALUATING = ("train", "training"), ("deterministic", "inference")


class Network(NamedTuple):
  """Contains a model's functions, without its parameters."""

  name: str  # name of the model's class

  init: Callable[[Key, Any], Params]  # (key, x [1, ...]) -> parameters
  # (params, x [batch, ...], key) -> outputs [batch, ...]; key=None turns dropout off
  apply: Callable[[Params, Any, Key | None], Array]
  # params -> a model of the user's class with these parameters and dropout off
  bound: Callable[[Params], Any]


def network(model: Any) -> Network:
  """Converts a model to pure functions.

  A linen module draws its parameters from the key of `init`. An NNX or Equinox module already has
  parameters, which are the initial parameters for every key; a function that makes such a module
  from a key draws new ones. Random state, such as that of Dropout, is not a parameter: it is drawn
  from the key of the loss.

  Args:
    model: a linen or NNX module of x [batch, ...]; an Equinox module of a single example; or a
      function that makes an NNX or Equinox module from a typed key.

  Raises:
    ValueError: if the model is of another kind, or contains batch statistics.
  """
  if isinstance(model, nn.Module):
    return _linen(model)
  if _is_module(model, "flax.nnx"):
    copy = sys.modules["flax.nnx"].clone(model)  # the user may go on to train the model
    return _nnx(lambda key: copy, copy)
  if _is_module(model, "equinox"):
    return _equinox(lambda key: model, model)
  if callable(model) and not isinstance(model, type):
    return _made(model)
  kind = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
  raise ValueError(
    f"model: {kind} is neither a module of Flax linen, Flax NNX or Equinox nor a function of a "
    "key that makes one"
  )


def _is_module(model: Any, library: str) -> bool:
  loaded = sys.modules.get(library)
  return loaded is not None and isinstance(model, loaded.Module)


def _made(make: Callable[[Key], Any]) -> Network:
  """Converts a function that makes a model from a key."""
  model = make(jax.random.key(0))
  if _is_module(model, "flax.nnx"):
    return _nnx(make, model)
  if _is_module(model, "equinox"):
    return _equinox(make, model)
  raise ValueError(
    f"model: the function of a key returned a {type(model).__name__}, not an NNX or Equinox module"
  )


def _words(call: Callable[..., Any], training: bool) -> dict[str, bool]:
  """Returns the keyword arguments of `call` that select training or evaluation."""
  names = inspect.signature(call).parameters
  words = {name: training for name in _TRAINING if name in names}
  return words | {name: not training for name in _EVALUATING if name in names}


def _linen(module: nn.Module) -> Network:
  call = type(module).__call__

  def init(key: Key, x: Any) -> Params:
    words: dict[str, Any] = _words(call, False)
    found = module.init(key, x, **words)
    if others := sorted(set(found) - {"params"}):
      raise ValueError(_statistics(", ".join(others)))
    return found["params"]

  def apply(params: Params, x: Any, key: Key | None) -> Array:
    rngs = None if key is None else {"dropout": key}
    words: dict[str, Any] = _words(call, key is not None)
    return module.apply({"params": params}, x, rngs=rngs, **words)  # pyright: ignore[reportReturnType]

  bound = lambda params: module.bind({"params": params})
  return Network(type(module).__name__, init, apply, bound)


def _nnx(make: Callable[[Key], Any], model: Any) -> Network:
  from flax import nnx

  def split(mode: str, model: Any) -> tuple[Any, ...]:
    model = nnx.clone(model)
    getattr(model, mode)()  # Dropout is static: a training model has another graph
    graph, params, keys, counts, rest = nnx.split(model, nnx.Param, nnx.RngKey, nnx.RngCount, ...)
    if others := sorted({type(x).__name__ for x in jax.tree.leaves(rest, is_leaf=_is_variable)}):
      raise ValueError(_statistics(", ".join(others)))
    return graph, *map(nnx.to_pure_dict, (params, keys, counts))

  call = type(model).__call__
  graphs = {mode: split(mode, model)[0] for mode in ("train", "eval")}
  keys, counts = split("train", model)[2:]

  def init(key: Key, x: Any) -> Params:
    del x
    return split("eval", make(key))[1]

  def apply(params: Params, x: Any, key: Key | None) -> Array:
    drawn = keys
    if key is not None:
      leaves, tree = jax.tree.flatten(keys)
      fold = lambda number, shape: jax.random.split(jax.random.fold_in(key, number), shape)
      drawn = tree.unflatten([fold(number, leaf.shape) for number, leaf in enumerate(leaves)])
    graph = graphs["eval" if key is None else "train"]
    return nnx.merge(graph, params, drawn, counts)(x, **_words(call, key is not None))

  bound = lambda params: nnx.merge(graphs["eval"], params, keys, counts)
  return Network(type(model).__name__, init, apply, bound)


def _is_variable(x: Any) -> bool:
  return isinstance(x, sys.modules["flax.nnx"].Variable)


def _equinox(make: Callable[[Key], Any], model: Any) -> Network:
  import equinox as eqx  # pyright: ignore[reportMissingImports]

  if any(isinstance(x, eqx.nn.StateIndex) for x in jax.tree.leaves(model, is_leaf=_is_index)):
    raise ValueError(_statistics("StateIndex"))
  rest = eqx.partition(model, eqx.is_inexact_array)[1]
  call = type(model).__call__
  takes_key = "key" in inspect.signature(call).parameters

  def init(key: Key, x: Any) -> Params:
    del x
    return eqx.filter(make(key), eqx.is_inexact_array)

  def apply(params: Params, x: Any, key: Key | None) -> Array:
    whole = eqx.nn.inference_mode(eqx.combine(params, rest), value=key is None)
    one = functools.partial(whole, **_words(call, key is not None))
    if not takes_key:
      return jax.vmap(one)(x)
    if key is None:
      return jax.vmap(lambda x: one(x, key=None))(x)
    keys = jax.random.split(key, len(jax.tree.leaves(x)[0]))
    return jax.vmap(lambda x, key: one(x, key=key))(x, keys)

  bound = lambda params: eqx.nn.inference_mode(eqx.combine(params, rest))
  return Network(type(model).__name__, init, apply, bound)


def _is_index(x: Any) -> bool:
  return isinstance(x, sys.modules["equinox"].nn.StateIndex)


def _statistics(names: str) -> str:
  return (
    f"the model has variables that are not parameters ({names}), such as BatchNorm's statistics; "
    "they would differ between workers: use a layer without them, such as GroupNorm or LayerNorm"
  )
