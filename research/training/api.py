"""`research.train`: trains a model from a Python program."""

import math
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from research.comm import join
from research.core import checks, registry
from research.core.method import Method
from research.core.spec import parse
from research.core.task import Task
from research.core.text import quoted
from research.sim.clock import Speeds
from research.sim.network import Network
from research.tasks.partition import Partition
from research.training.assemble import EXECUTORS, Given
from research.training.config import OF_SERVER, Config, UsageError
from research.training.hooks.hook import Event, FunctionHook, Hook
from research.training.label import label
from research.training.loop import trained
from research.training.result import Interrupted, Result
from research.training.run import BaseRun

# Fields of Config that are named arguments of `train`, or do not apply to `train`.
_NAMED = ("task", "model", "method", "executor", "mesh", "batch_size", "steps", "seed", "out")
_COMMANDS = ("partition", "clock", "network", "restarts", "ray_address", "node_ip", *OF_SERVER)
OPTIONS = tuple(name for name in Config.names() if name not in (*_NAMED, *_COMMANDS))


def train(
  task: Task | Callable[..., Task] | str,
  method: Method | str,
  *,
  model: Any = None,
  mesh: str | Mapping[str, int] = "data:8",
  executor: str = "simulate",
  batch_size: int | str,
  steps: int = 0,
  seed: int = 0,
  partition: Partition | str = "iid()",
  clock: Speeds | str = "",
  network: Network | str = "",
  hooks: Sequence[Hook | Callable[[BaseRun, Event], str | None]] = (),
  out: str | Path | None = None,
  progress: bool = True,
  **options: Any,
) -> Result:
  """Trains a model with a method on a task, like `experiments/run.py`, but with Python objects.

      task = supervised(Net(), {"x": images, "y": labels}, test)
      method = local_sgd(optax.sgd(0.1), error_feedback(two_phase(int8())), period=8)
      result = train(task, method, mesh="data:4", batch_size=64, steps=400)
      result.plot().savefig("loss.png")

  With `out`, the same call resumes the run from its newest checkpoint, or loads a complete run. A
  folder is rejected if its run had other arguments, other examples, or different code for the task,
  the model or the method.

  Ctrl-C and SIGTERM end the run after the current dispatch, with an evaluation and, with `out`, a
  checkpoint. The signal then takes its usual effect on the program, as if it had come afterwards.

  Args:
    task: a task, such as `supervised(model, train)`; a function that returns a task for `model=`,
      such as `digits`; or the spec of a registered task.
    method: the algorithm, as an object or a spec.
    model: the model, if `task` is a function or a spec; None for the task's default model.
    mesh: sizes by axis, "data:4,fsdp:2" or {"data": 4, "fsdp": 2}. The axes `data` and `slice`
      count workers; the other axes divide a worker.
    executor: "simulate" (workers are an axis of arrays), "spmd" or "pmap" (one device per worker),
      or "overlapped" (spmd, with exchanges on further CPU devices while the workers compute).
    batch_size: examples per step over all workers, or "all".
    steps: number of local steps; alternatively, pass `rounds`, `epochs` or `virtual_seconds`.
    seed: seeds the initial model, the order of examples, and the method's randomness.
    partition: the assignment of examples to workers or clients, such as `dirichlet(0.3)`.
    clock: the workers' speeds on a virtual clock, such as `exponential(1.0)`; "" for none.
    network: the network between the workers of the clock, such as `internet()`; "" for none.
    hooks: functions that are called with (run, event) for every event of the run, before the
      built-in hooks. A function stops the run by returning a reason; a `Hook` may also split
      dispatches.
    out: the run's folder; None writes no files.
    progress: whether to print one line per evaluation on stderr, or a progress bar on a terminal.
      Notes and warnings are always printed.
    **options: further fields of `Config`, such as eval_every=50 (steps), log_every=10 (steps),
      checkpoint_every=100 (steps), tolerance=1e-6 (norm of the full gradient), clip_norm=1.0.

  Returns:
    The trained model, its metrics and the summary.

  Raises:
    UsageError: a ValueError, if an argument is invalid; one line names the argument and the legal
      values.
    NonFinite: if a loss, the state or an evaluation is not finite.
    ReplicasDiffer: if the copies of the state on different devices differ.
    CheckpointError: if the run has checkpoints, but none is intact.
    Interrupted: a KeyboardInterrupt, after Ctrl-C; the attribute `result` is the result so far.
    SystemExit: with code 143, after SIGTERM, unless the program has a handler of its own.
  """
  batch_size, steps, seed = map(_plain, (batch_size, steps, seed))
  options = {name: _plain(value) for name, value in options.items()}
  try:
    _check(task, method, model, mesh, executor, batch_size, steps, options, out)
    _check_rest(seed, hooks, progress)
    given = Given(
      _task(task, model),
      None if isinstance(method, str) else method,
      None if isinstance(partition, str) else partition,
      None if isinstance(clock, str) else clock,
      None if isinstance(network, str) else network,
    )
    config = Config(
      task=label(task),
      model="" if model is None or (given.task and not callable(task)) else label(model),
      method=label(method),
      executor=executor,
      mesh=mesh if isinstance(mesh, str) else ",".join(f"{k}:{n}" for k, n in mesh.items()),
      partition=label(partition),
      clock=label(clock),
      network=label(network),
      batch_size=batch_size,
      steps=steps or Config().steps,
      seed=seed,
      out=str(out or ""),
      **options,
    )
    own = [hook if isinstance(hook, Hook) else FunctionHook(hook) for hook in hooks]
    result = trained(config, given, own, writes=out is not None, shown=progress)
  except UsageError as error:
    raise UsageError(_in_python(str(error))) from error
  _deliver(result)
  return result


def _deliver(result: Result) -> None:
  """Delivers the signal that stopped a run to the program, which would otherwise carry on."""
  if not result.stopped_by:
    return
  number = {"interrupted": signal.SIGINT, "terminated": signal.SIGTERM}[result.stopped_by]
  handler = signal.getsignal(number)
  if handler is signal.default_int_handler:
    raise Interrupted(result)
  if handler in (signal.SIG_DFL, None):
    join.end_together()
    sys.exit(128 + number)
  signal.raise_signal(number)


def _in_python(line: str) -> str:
  """Rewrites a message about flags in terms of arguments."""
  return re.sub(rf"--(?=(?:{'|'.join(Config.names())})\b)", "", line)


def _task(task: Task | Callable[..., Task] | str, model: Any) -> Task | None:
  """Returns the task as an object, built for the model if needed; None if it is a spec."""
  if isinstance(task, str):
    if model is None or isinstance(model, str):
      return None
    return registry.build("task", parse(task), model=model, data_dir="")
  if isinstance(task, Task):
    return task
  if isinstance(model, str):
    model = registry.build("model", model)
  made = task() if model is None else task(model=model)
  if not isinstance(made, Task):
    raise UsageError(f"task={label(task)}: returns a {type(made).__name__}, not a Task")
  return made


def _check(task, method, model, mesh, executor, batch_size, steps, options, out) -> None:
  """Rejects arguments of wrong types and unknown options."""
  if not (isinstance(task, Task | str) or callable(task)):
    raise UsageError(f"task={quoted(task)}: not a Task, a function that makes one, or its text")
  if not isinstance(method, Method | str):
    is_optax = hasattr(method, "init") and hasattr(method, "update")
    hint = "; wrap it: data_parallel(optimizer, mean())" if is_optax else ""
    hint = "; call it with its arguments" if isinstance(method, type) else hint
    shown = label(method) if hint else quoted(method)
    raise UsageError(f"method={shown}: not a Method or the text of one{hint}")
  if model is not None and isinstance(task, Task):
    raise UsageError("model: the task already has a model; leave this out")
  if not isinstance(mesh, str | Mapping):
    raise UsageError(f"mesh={quoted(mesh)}: not a text such as 'data:8' or a dictionary of sizes")
  if executor == "server":
    raise UsageError(f"executor='server': is only for the command; legal: {', '.join(EXECUTORS)}")
  for name in options:
    if name not in OPTIONS:
      near = checks.nearest(name, OPTIONS)
      hint = f"did you mean {near}?" if near else f"legal: {', '.join(OPTIONS)}"
      raise UsageError(f"{name}: unknown option; {hint}")
    _check_type(name, options[name])
  if batch_size != "all" and not _is_count(batch_size):
    raise UsageError(f"batch_size={quoted(batch_size)}: neither a whole number above 0 nor 'all'")
  others = [name for name in ("rounds", "epochs", "virtual_seconds") if options.get(name)]
  if steps == 0 and not others:
    raise UsageError("steps: give steps, rounds, epochs or virtual_seconds")
  if steps and others:
    raise UsageError(f"steps={steps}: cannot be combined with {others[0]}")
  if steps and not _is_count(steps):
    raise UsageError(f"steps={quoted(steps)}: not a whole number above 0")
  if out is None and (idle := [n for n in ("tensorboard", "profile") if options.get(n)]):
    raise UsageError(f"{idle[0]}: is written into the folder out=; name one")


def _check_rest(seed: Any, hooks: Any, progress: Any) -> None:
  """Rejects a seed, hooks or a switch of the wrong type."""
  if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**31:
    raise UsageError(f"seed={quoted(seed)}: not a whole number in [0, 2^31)")
  if not isinstance(hooks, Sequence) or not all(isinstance(h, Hook) or callable(h) for h in hooks):
    raise UsageError("hooks: not a list of hooks or functions of (run, event)")
  if not isinstance(progress, bool):
    raise UsageError(f"progress={quoted(progress)}: not a bool")


def _plain(value: Any) -> Any:
  """Converts a numpy scalar to a Python number."""
  return value.item() if isinstance(value, np.generic) else value


def _is_count(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def _check_type(name: str, value: Any) -> None:
  default = Config.defaults()[name]
  if isinstance(default, bool | str):
    fits, wanted = isinstance(value, type(default)), type(default).__name__
  else:
    kinds = int if isinstance(default, int) else int | float
    fits = isinstance(value, kinds) and not isinstance(value, bool) and 0 <= value < math.inf
    wanted = f"{'whole ' if isinstance(default, int) else ''}number of at least 0"
  if not fits:
    raise UsageError(f"{name}={quoted(value)}: not a {wanted}")
