"""Splits a method into a worker's half, which computes pushes, and a server's half.

The split is inferred. To find dependencies, a round is traced from `begin` to `message`, and from
`receive` to the end. State that changes before the exchange is private and stays with the worker;
other state is shared and stays with the server. A method can be served if
- its round is `message`, one exchange and `receive`, and its aggregator's encoding has an uplink;
- the worker's half needs no shared state except the model, which the worker pulls;
- the server's half needs nothing from a worker except the message, and updates the server's model.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from research.comm import collectives
from research.core.base import Aggregator, Array, Key, Params, State, Tree, Uplink
from research.core.method import Method
from research.core.part import defined_at
from research.parallel import layout as layouts

_AXIS = {"push": 2}  # for tracing; not a worker axis, so an exchange among workers fails


class _Bare(Aggregator):
  """Replaces an aggregator by a stateless aggregator, so that the exchange becomes a push."""

  inner: Aggregator

  @property
  def uplink(self):
    return self.inner.uplink


class ServerState(NamedTuple):
  """Server state other than the model."""

  shared: list[Array]  # leaves of the method's state
  memory: State  # state of the staleness correction


class Halves(NamedTuple):
  """A method that is split between workers and server. All functions are pure."""

  method: Method
  correction: Any  # a `methods.stale.Correction`, or None
  link: Uplink
  private: list[bool]  # whether each leaf of the state is private
  model: list[bool]  # whether each leaf of the state is part of the model

  def own(self, params: Params) -> list[Array]:
    """Returns a worker's initial private state."""
    return _chosen(self.method.init(params), self.private)

  def state(self, params: Params, own: Sequence[Array]) -> State:
    """Returns the state at the start of a worker's round."""
    return _put(self.method.init(params), self.private, own)

  def message(
    self, local: Any, params: Params, own: Sequence[Array], key: Key
  ) -> tuple[Tree, list[Array]]:
    """Returns the message of a round that started from `params`, and the new private state."""
    tree, after = self.method.message(local, self.state(params, own), key=key)
    return tree, _chosen(after, self.private)

  def init(self, params: Params) -> ServerState:
    """Returns the server's initial state."""
    memory = self.correction.init(params) if self.correction else ()
    return ServerState(_chosen(self.method.init(params), self._kept), memory)

  def receive(
    self, message: Tree, params: Params, held: ServerState, staleness: Array, moved: Tree
  ) -> tuple[Params, ServerState]:
    """Applies a message, or the mean of several messages, to the model.

    Args:
      message: the message as the server decodes it, in the structure of the model.
      params: the current model.
      held: the server's state.
      staleness: int32, number of updates since the model from which the worker started.
      moved: `params` minus the model from which the worker started.

    Returns:
      The new model and the new server state.
    """
    memory = held.memory
    if self.correction:
      tau = jax.tree.broadcast(staleness, message)
      message, memory = self.correction.correct(message, tau, moved, memory)
    state = _put(self.method.init(params), self._kept, held.shared)
    after = self.method.receive(message, message, state, key=jax.random.key(0))
    return self.method.params(after), ServerState(_chosen(after, self._kept), memory)

  @property
  def _kept(self) -> list[bool]:
    return [not (own or model) for own, model in zip(self.private, self.model, strict=True)]


def halves(method: Method, params: Params) -> Halves:
  """Traces a method and splits it.

  Args:
    method: any method.
    params: the model's arrays or their shapes.

  Raises:
    ValueError: if the method cannot be served; the message gives the reason.
  """
  method, correction = method.on_server()
  if not method.splits:
    raise ValueError(f"{_name(method)} exchanges more than one message per round")
  try:
    return _traced(method, correction, params)
  except (collectives.NoAxis, NameError) as error:
    if isinstance(error, NameError) and "axis" not in str(error):
      raise
    name = _name(method)
    raise ValueError(f"{name} communicates with other workers outside its exchange") from error


def _traced(method: Method, correction: Any, params: Params) -> Halves:
  link = method.exchange.uplink
  if link is None:
    raise ValueError(
      f"{_name(method.exchange)} is an exchange among workers; use mean(), gather_mean(C), "
      "sum_mean(C) or error_feedback of these"
    )
  exchange = type(method.exchange)
  if defined_at(exchange, "uplink") > defined_at(exchange, "aggregate"):
    raise ValueError(f"{_name(method.exchange)} does not aggregate what its uplink encodes")
  bare = method.over(_Bare)
  if not isinstance(bare.exchange, _Bare):
    raise ValueError(f"the aggregator of {_name(method)} is not one of its fields")
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
  state = jax.eval_shape(bare.init, shapes)
  model = _model_of(bare, state, shapes)
  private = _own(bare, state, shapes)
  if any(own and is_model for own, is_model in zip(private, model, strict=True)):
    raise ValueError(f"the workers of {_name(method)} keep models of their own")
  found = Halves(bare, correction, link, private, model)
  _check_worker(found, state, shapes, _name(method))
  _check_server(found, state, shapes, _name(method))
  return found


def _name(part: Any) -> str:
  return part.spec_name or type(part).__name__


def _model_of(method: Method, state: State, shapes: Params) -> list[bool]:
  """Finds the state leaves that form the model: the leaves that `params` returns unchanged.

  Raises:
    ValueError: if the model is not among the state leaves.
  """
  program = jax.make_jaxpr(method.params)(state).jaxpr
  given = {id(variable): place for place, variable in enumerate(program.invars)}
  places = [given.get(id(variable)) for variable in program.outvars]
  model = [place in places for place in range(len(program.invars))]
  begun = jax.make_jaxpr(method.init)(shapes).jaxpr
  first = [begun.outvars[place] in begun.invars for place, is_model in enumerate(model) if is_model]
  if None in places or len(set(places)) < len(jax.tree.leaves(shapes)) or not all(first):
    raise ValueError(f"the model of {_name(method)} is computed from its state")
  return model


def _round(method: Method, grads: Tree, state: State, key: Key) -> tuple[Tree, State]:
  """Runs a round up to its message, with the same gradient at every step and for all parameters."""
  local = method.begin(state)
  elsewhere = lambda params: jax.tree.map(lambda g, x: g + 0 * x, grads, params)
  local = method.step(grads, local, state, key=key, grad_fn=elsewhere)
  return method.message(local, state, key=key)


def _own(method: Method, state: State, shapes: Params) -> list[bool]:
  """Finds the state leaves that a round changes before its exchange: the worker's private state."""
  run = lambda grads, state, key: jax.tree.leaves(_round(method, grads, state, key)[1])
  program = jax.make_jaxpr(run)(shapes, state, _key()).jaxpr
  given = program.invars[len(jax.tree.leaves(shapes)) :]
  return [after is not before for after, before in zip(program.outvars, given, strict=False)]


def _check_worker(found: Halves, state: State, shapes: Params, name: str) -> None:
  """Rejects a worker's half that needs server state, or sends leaves other than the model's.

  Raises:
    ValueError: if the half is rejected; the message gives the reason.
  """
  sent, after = jax.eval_shape(lambda *args: _round(found.method, *args), shapes, state, _key())
  alike = lambda tree: (jax.tree.structure(tree), [x.shape for x in jax.tree.leaves(tree)])
  if alike(sent) != alike(shapes):
    raise ValueError(f"{name} does not send one array for each array of the model")

  def run(grads, state, key):
    sent, after = _round(found.method, grads, state, key)
    return [*jax.tree.leaves(sent), *_chosen(after, found.private)]

  for place in (place for place, kept in enumerate(found._kept) if kept):
    one = [place == other for other in range(len(found._kept))]
    if any(_reached(run, (False, shapes), (one, state), (False, _key()))):
      raise ValueError(f"a worker of {name} needs the server's {_names(after, one)}")


def _check_server(found: Halves, state: State, shapes: Params, name: str) -> None:
  """Rejects a server's half that needs or changes a worker's private state, or replaces the model.

  Raises:
    ValueError: if the half is rejected; the message gives the reason.
  """

  def run(value, sent, state, key):
    return jax.tree.leaves(found.method.receive(value, sent, state, key=key))

  shared, none = [not own for own in found.private], [False] * len(found.private)
  drawn = _reached(run, (False, shapes), (False, shapes), (none, state), (True, _key()))
  if any(drawn):
    raise ValueError(f"{name} draws random numbers in receive, but a server has no rounds")
  own = _reached(run, (False, shapes), (True, shapes), (found.private, state), (False, _key()))
  if any(_both(own, shared)):
    leaves = _names(state, _both(own, shared))
    raise ValueError(f"shared state of {name} depends on a worker's private state: {leaves}")
  received = _reached(run, (True, shapes), (True, shapes), (shared, state), (False, _key()))
  if any(_both(received, found.private)):
    leaves = _names(state, _both(received, found.private))
    raise ValueError(f"private state of {name} depends on the result of its message: {leaves}")
  program = jax.make_jaxpr(run)(shapes, shapes, state, _key()).jaxpr
  given = program.invars[2 * len(jax.tree.leaves(shapes)) :]
  changed = [a is not b for a, b in zip(program.outvars, given, strict=False)]
  if any(_both(changed, found.private)):
    leaves = _names(state, _both(changed, found.private))
    raise ValueError(f"{name} changes a worker's private state after its exchange: {leaves}")
  kept = _reached(run, (False, shapes), (False, shapes), (found.model, state), (False, _key()))
  if not all(after for after, model in zip(kept, found.model, strict=True) if model):
    raise ValueError(f"{name} replaces the model by the workers', which a server must not do")


def _reached(run: Callable[..., list[Any]], *args: tuple[bool | list[bool], Tree]) -> list[bool]:
  """Finds which leaves of a result depend on the marked leaves of its arguments.

  Args:
    run: the function to trace; returns a list of leaves.
    *args: (marks, shapes) per argument; marks is a bool for all leaves, or one bool per leaf.
  """
  axes, given = [], []
  for marks, tree in args:
    leaves, treedef = jax.tree.flatten(tree)
    marks = [marks] * len(leaves) if isinstance(marks, bool) else marks
    axes.append(treedef.unflatten([0 if mark else None for mark in marks]))
    spread = lambda x, mark: jax.ShapeDtypeStruct((2, *x.shape), x.dtype) if mark else x
    given.append(treedef.unflatten(map(spread, leaves, marks)))
  return layouts.private_outputs(run, _AXIS, tuple(axes), *given)


def _key() -> Any:
  return jax.eval_shape(lambda: jax.random.key(0))


def _both(a: Sequence[bool], b: Sequence[bool]) -> list[bool]:
  return [x and y for x, y in zip(a, b, strict=True)]


def _names(state: State, marks: Sequence[bool]) -> str:
  paths = jax.tree_util.tree_leaves_with_path(state)
  found = [jax.tree_util.keystr(path) for (path, _), mark in zip(paths, marks, strict=True) if mark]
  return ", ".join(found[:3])


def _chosen(tree: Tree, marks: Sequence[bool]) -> list[Array]:
  return [jnp.asarray(x) for x, mark in zip(jax.tree.leaves(tree), marks, strict=True) if mark]


def _put(tree: Tree, marks: Sequence[bool], values: Sequence[Array]) -> Tree:
  """Returns the tree with its marked leaves replaced, in order."""
  leaves, treedef = jax.tree.flatten(tree)
  rest = iter(values)
  found = [next(rest) if mark else x for x, mark in zip(leaves, marks, strict=True)]
  return treedef.unflatten(found)
