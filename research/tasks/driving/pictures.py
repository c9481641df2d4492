"""Draws pictures of driving scenes with the simulator."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from research.tasks import files
from research.tasks.driving import episodes, scenarios
from research.tasks.driving.scene import Driver

MOMENT = 3.0  # seconds after the start
SEED = 4


def draw(names: Sequence[str], driver: Driver, target: Path) -> None:
  """Draws one moment of an episode in each scenario and writes a picture that contains them all.

  The ego vehicle is green.

  Args:
    names: the scenarios.
    driver: the driver of the ego.
    target: the path of the picture, ending in .png.
  """
  from matplotlib.figure import Figure

  rows = -(-len(names) // 2)
  figure = Figure(figsize=(10, 2.8 * rows), layout="constrained")
  for axis, name in zip(figure.subplots(rows, 2).flat, names, strict=False):
    axis.imshow(_moment(name, driver))
    axis.set_title(name)
  for axis in figure.axes:
    axis.axis("off")
  with files.whole(target) as path:
    figure.savefig(path, dpi=110, format="png")


def _moment(name: str, driver: Driver) -> np.ndarray:
  """Renders a scenario at MOMENT."""
  os.environ.setdefault("SDL_VIDEODRIVER", "offscreen")  # no display is needed
  os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
  environment, frames = scenarios.make(name, picture=True), []

  def watch(environment: Any) -> None:
    if environment.time >= MOMENT and not frames:
      frames.append(np.array(environment.render()))

  episodes.drive(environment, name, SEED, driver, watch=watch)
  environment.close()
  return frames[0]
