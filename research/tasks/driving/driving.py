"""Trains a policy to imitate expert drivers; several fleets drive on different kinds of road."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from research.core import checks
from research.core.base import Array, Params
from research.core.registry import Default
from research.core.task import Batch, Task
from research.tasks.driving import recorded
from research.tasks.driving.experts import ACTIONS
from research.tasks.driving.scenarios import SCENARIOS
from research.tasks.supervised import supervised

TESTED = 10  # every tenth episode is for testing


def driving(
  path: str = "driving",
  rounds: int = 0,
  only: str = "",
  l2: float = 0.0,
  *,
  model: Callable[[int], nn.Module] = Default("model", "ego_attention()"),
) -> Task:
  """Predicts which of five actions an expert takes in the scenes of recorded driving.

  `python experiments/drive.py --do=record` records the scenes. An example is a scene: the ego
  vehicle and its eight nearest neighbours, each described by ten numbers (`scene.features`). The
  five actions are: change to the left lane, do nothing, change to the right lane, speed up, slow
  down. Without DAgger (`rounds=0`), the expert itself drove through the scenes. Each round of
  DAgger adds scenes that an imitating policy reached, labelled with the expert's actions (Ross et
  al. 2011).

  There is one fleet per scenario: highway, merge, roundabout and intersection, in this order.
  `--partition="by_owner()"` makes each fleet a worker. Every tenth episode of round 0 is held out
  for testing. The metrics are "loss", "accuracy", and the accuracy in each scenario.

  Args:
    path: the folder of the recording; $RESEARCH_DATA_DIR and the user's cache are also searched.
    rounds: the number of DAgger rounds to train on, at most as many as were recorded.
    only: the scenario of the only fleet that trains; "" means that all fleets train.
    l2: the weight of the penalty l2/2 ||params||^2.
    model: a function that makes the module for 5 outputs; the module takes scenes [b, 9, 10].

  Raises:
    ValueError: if the recording, scenario or round does not exist, or a file has changed since it
      was recorded.

  Reference: Ross, Gordon, Bagnell, 2011, A reduction of imitation learning and structured
    prediction to no-regret online learning, arXiv:1011.0686 (DAgger); highway-env, Leurent, 2018.
  """
  if only:
    checks.one_of("only", only, SCENARIOS)
  checks.at_least("rounds", rounds, 0)
  parts = [*recorded.blocks(recorded.found(path))]
  there = max(number for number, _, _ in parts)
  if rounds > there:
    raise ValueError(f"rounds={rounds}: {path} has {there} rounds of DAgger")
  names = [name for name in SCENARIOS if any(name == other for _, other, _ in parts)]
  if only and only not in names:
    raise ValueError(f"only={only!r}: {path} has only {', '.join(names)}")
  train = _examples([p for p in parts if p[0] <= rounds and only in ("", p[1])], tested=False)
  test = _examples([p for p in parts if p[0] == 0], tested=True)
  by, of_test = train.pop("fleet"), test.pop("fleet")
  module = model(ACTIONS)
  task = supervised(module, train, test, loss="softmax", l2=l2)
  measure = _by_scenario(module, test, of_test, names)
  return task._replace(by=by, measure=measure, measured_on="test")


def _examples(parts: list[tuple[int, str, Batch]], tested: bool) -> Batch:
  """Returns the examples of the given blocks, with each example's fleet number."""
  fleets, numbers = [*SCENARIOS], []
  rows: list[Batch] = []
  for number, name, arrays in parts:
    held_out = (arrays["episode"] % TESTED == TESTED - 1) & (number == 0)
    kept = held_out if tested else ~held_out
    rows.append({"x": arrays["x"][kept], "y": arrays["y"][kept].astype(np.int32)})
    numbers.append(np.full(int(kept.sum()), fleets.index(name), np.int32))
  joined = {key: np.concatenate([row[key] for row in rows]) for key in ("x", "y")}
  return joined | {"fleet": np.concatenate(numbers)}


def _by_scenario(
  module: nn.Module, test: Batch, fleet: np.ndarray, names: list[str]
) -> Callable[[Params], dict[str, Array]]:
  """Returns a function that computes the accuracy on the test scenes of each scenario."""
  fleets = [*SCENARIOS]

  def measure(params: Params) -> dict[str, Array]:
    logits = module.apply({"params": params}, jnp.asarray(test["x"]))
    right = (jnp.argmax(jax.tree.leaves(logits)[0], 1) == test["y"]).astype(jnp.float32)
    return {f"accuracy {name}": jnp.mean(right[fleet == fleets.index(name)]) for name in names}

  return measure
