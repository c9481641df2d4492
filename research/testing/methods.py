"""Checks the contracts of methods; one program can check several methods."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.core.base import Chunk, Trait
from research.core.method import Method
from research.parallel import layout, workers
from research.parallel.job import Job, traits
from research.testing.absence import (
  ABSENT,
  AXES,
  WEIGHTS,
  W,
  drawn,
  folded,
  in_two_rounds,
  same,
  unknown,
)
from research.testing.contract import require
from research.testing.problem import Running, distance, regression
from research.testing.side_by_side import regressions, side_by_side

Named = Mapping[str, Method]
ROUNDS = 4
SIZES = (30, 20, 40, 30, 10, 50, 30, 30)  # number of examples of each of eight workers


def check_method(method: Method, *, axes: Mapping[str, int] | None = None) -> None:
  """Checks the contracts of a method.

  The contracts are: The dtypes and shardings of the state do not change, and the second call
  compiles nothing. Eight rounds give bitwise the same result as four rounds and four more from a
  copy of the state. `simulate` and `spmd` agree on the available CPU devices. A worker's lost round
  does not affect the other workers. A round without participants changes nothing.

  Args:
    method: the method to check.
    axes: the axes of eight workers; None means {"data": 8}. Pass {"slice": 2, "data": 4} if the
      method needs slices.

  Raises:
    ContractError: if a contract is broken; the error describes the first broken contract.
  """
  named, axes = {repr(method): method}, dict(axes or AXES)
  types(method, axes)
  agree(named, sliced="slice" in axes)
  if can_miss(method, axes):
    lost(named, axes)
    if "slice" not in axes:
      empty(named)


def types(method: Method, axes: Mapping[str, int]) -> None:
  """Checks that a round does not change the structure, shapes and dtypes of the state.

  Args:
    method: the method.
    axes: the worker axes.
  """

  def one_round(grads):
    first = method.init(grads)
    elsewhere = lambda params: grads
    local, key = method.begin(first), jax.random.key(0)
    for _ in range(method.local_steps):
      local = method.step(grads, local, first, key=key, grad_fn=elsewhere)
    return first, method.sync(local, first, key=key)

  program = layout.over_workers(one_round, axes, 0, 0)
  before, after = jax.eval_shape(program, drawn(0, *axes.values()))
  says = "The state has the structure, shapes and types that init gave it."
  require(before == after, method, says, f"{after} where init made {before}")


def can_miss(method: Method, axes: Mapping[str, int] | None = None) -> bool:
  """Returns whether workers may be absent; if they may not, tracing an absence raises ValueError.

  Args:
    method: the method.
    axes: the worker axes.
  """
  if Trait.EVERYONE in traits(method):
    return False
  axes = axes or AXES
  rows = [jnp.ones((*axes.values(), *x.shape[1:]), x.dtype) for x in (WEIGHTS, ~ABSENT)]
  program = layout.over_workers(_two_rounds({"": method}), axes, 0, 0)
  try:
    jax.eval_shape(program, drawn(4, *axes.values()), drawn(5, *axes.values()), *rows)
  except ValueError:
    return False
  return True


def agree(named: Named, *, sliced: bool = False) -> None:
  """Checks that state and programs are stable, runs resume exactly, and executors agree.

  The runs use mini-batches, and the workers have different numbers of examples.

  Args:
    named: the methods by name.
    sliced: whether the methods need slices.
  """
  task = regressions(tuple(named))
  devices = max(k for k in (1, 2, 4, 8) if k <= len(jax.devices()))
  in_slices = {"slice": 2, "data": 4}
  runs = [_running(named, "simulate", in_slices if sliced else AXES, task)]
  if devices == W:
    runs.append(_running(named, "spmd", in_slices, task))
  for run in runs:
    _resumed(run, named)
  losses = [float(np.asarray(run.metrics["loss"])[-1]) for run in runs]
  require(all(map(np.isfinite, losses)), _subject(named), "Losses are finite.", f"{losses}")
  for name, method in named.items():
    params = [run.params()[name] for run in runs]
    away = distance(params[-1], params[0])
    says = "simulate and spmd agree within 1e-5 of the largest parameter."
    require(away <= 1e-5, method, says, f"a difference of {away:.3g}")


def _running(named: Named, executor: str, axes: Mapping[str, int], task: Any) -> Running:
  return Running(side_by_side(named), executor, axes, SIZES, 8, task=task)


def _subject(named: Named) -> Any:
  return next(iter(named.values())) if len(named) == 1 else [*named]


def _resumed(run: Running, named: Named) -> None:
  kinds = lambda: jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), run.state)
  before, subject = kinds(), _subject(named)
  run.rounds(ROUNDS)
  saved = _copy(run)
  places = jax.tree.map(lambda x: x.sharding, run.state)
  says = "Shapes, types and shardings of the state do not change from round to round."
  require(before == kinds(), subject, says, "a change")
  with _compilations() as compiled:
    run.rounds(ROUNDS)
  says = "The second call compiles nothing."
  require(not compiled, subject, says, f"{len(compiled)} compilations")
  whole, state = _copy(run), saved._replace(key=jax.random.wrap_key_data(saved.key))
  run.state = jax.tree.map(jax.device_put, state, places)
  again = _copy(run.rounds(ROUNDS))
  equal = jax.tree.map(np.array_equal, whole, again)
  says = "Eight rounds equal four and four from a copy of the state, bit for bit."
  require(all(jax.tree.leaves(equal)), subject, says, "a difference")


def _copy(run: Running) -> Any:
  return jax.device_get(run.state._replace(key=jax.random.key_data(run.state.key)))


@contextlib.contextmanager
def _compilations() -> Iterator[list[float]]:
  found: list[float] = []

  def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
      found.append(duration_secs)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield found
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


def lost(named: Named, axes: Mapping[str, int] = AXES) -> None:
  """Checks that a lost round affects no bit of another worker, even if its gradients are NaN.

  After the lost round, each leaf of the worker's own state either is unchanged or equals what the
  present workers received.

  Args:
    named: the methods by name.
    axes: the worker axes.
  """
  program = folded(_two_rounds(named), axes)
  first, second = drawn(4, W), drawn(5, W)
  want = program(first, second, WEIGHTS, ~ABSENT)
  got = program(first, unknown(second), WEIGHTS, ~ABSENT)
  for name, method in named.items():
    says = "A lost round does not affect any worker."
    require(same(got[name], want[name]), method, says, "another state if its gradients are NaN")
    before, after, is_chunk = *got[name], _chunks(method)
    leaves = jax.tree_util.tree_leaves_with_path
    for (path, old), (_, new), chunk in zip(leaves(before), leaves(after), is_chunk, strict=True):
      old, new = np.asarray(old), np.asarray(new)
      if chunk or not np.issubdtype(new.dtype, np.floating):
        continue  # round counters, and delays that were drawn in advance
      for worker in np.flatnonzero(ABSENT):
        kept = (old[worker] == new[worker]).all()
        received = any((new[worker] == new[i]).all() for i in np.flatnonzero(~ABSENT))
        says = "After a lost round, a worker's state is unchanged, or what the others received."
        seen = f"a change of state{jax.tree_util.keystr(path)}"
        require(kept or received, method, says, seen)


def _chunks(method: Method) -> list[bool]:
  """Returns, for each leaf of the state, whether it is a worker's chunk of a partitioned array."""
  init = jax.vmap(method.init, axis_name="data")
  state = jax.eval_shape(init, drawn(4, W))
  is_chunk = lambda node: isinstance(node, Chunk)
  marked = jax.tree.map(
    lambda node: jax.tree.map(lambda _: is_chunk(node), node), state, is_leaf=is_chunk
  )
  return jax.tree.leaves(marked)


def _two_rounds(named: Named) -> Callable[..., Any]:
  """Returns a function that runs two rounds of each method, the second with absent workers."""

  def worker(first, second, weight, active):
    rounds = (jnp.arange(2), *in_two_rounds((first, second), weight, active))

    def one(method: Method):
      def step(state, of_round):
        number, grads, presence = of_round
        elsewhere = lambda params: jax.tree.map(lambda g, p: g + 0.1 * p, grads, params)
        local, key = method.begin(state), jax.random.key(3)
        for _ in range(method.local_steps):
          local = method.step(elsewhere(local.params), local, state, key=key, grad_fn=elsewhere)
        state = method.sync(local, state, key=jax.random.key(number), presence=presence)
        return state, state

      start = method.init(jax.tree.map(jnp.ones_like, first))
      states = jax.lax.scan(step, start, rounds)[1]
      return tuple(jax.tree.map(lambda x, i=i: x[i], states) for i in range(2))

    return {name: one(method) for name, method in named.items()}

  return worker


def empty(named: Named) -> None:
  """Checks that rounds without participants change nothing.

  Args:
    named: the methods by name.
  """
  grads = drawn(7, W)
  sizes = np.full(W, 30)
  jobs = {n: Job(m, regression(), AXES, sizes, 8, dropout=0.5) for n, m in named.items()}
  attended = np.asarray([True, True, True, False, True, False, False, True])

  keys = jax.random.split(jax.random.key(0), int(attended.sum()))
  counted = keys[np.cumsum(attended) - 1], attended, len(attended)
  alone = keys[np.arange(len(attended)) % len(keys)], np.ones_like(attended), len(keys)

  def rounds(job, grads, keys, there, count):
    def one(number, state):
      local, gradient = job.method.begin(state), lambda params: grads
      for _ in range(job.method.local_steps):
        local = job.method.step(grads, local, state, key=keys[number], grad_fn=gradient)
      weight = jnp.where(there[number], 1.0, 0.0)
      return workers.sync(job, local, state, weight, keys[number], there[number])

    first = job.method.init(jax.tree.map(jnp.ones_like, grads))
    return jax.lax.fori_loop(0, count, one, first)

  every = lambda grads, *of: {n: rounds(job, grads, *of) for n, job in jobs.items()}
  program = jax.jit(jax.vmap(every, (0, None, None, None), axis_name="data"))
  found, wanted = program(grads, *counted), program(grads, *alone)
  for name in named:
    with_empty, without = found[name], wanted[name]
    pairs = zip(jax.tree.leaves(with_empty), jax.tree.leaves(without), strict=True)
    near = all(np.allclose(a, b, rtol=1e-5, atol=2e-6) for a, b in pairs)
    says = "A round without participants changes nothing."
    require(near, named[name], says, "another state than without that round")
