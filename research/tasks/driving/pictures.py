"""Pictures of driving scenes, rendered by the simulator."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from research.tasks import files
from research.tasks.driving import episodes, scenarios

MOMENT = 3.0  # seconds after the start
SEED = 4


def draw(names: Sequence[str], driver: episodes.Driver, target: Path) -> None:
  """Draws a moment of an episode of each scenario, and writes a picture.

  The ego is green.

  Args:
    names: the scenarios.
    driver: drives the ego.
    target: the picture's path, ending in .png.
  """
  from matplotlib.figure import Figure

  images = [*map(_of(driver), names)]
  ratios = [image.shape[1] / image.shape[0] for image in images]
  figure = Figure(figsize=(10, 10 / max(sum(ratios), 1)), layout="constrained")
  grid = figure.subplots(1, len(names), squeeze=False, width_ratios=ratios)[0]
  for axis, name, image in zip(grid, names, images, strict=True):
    axis.imshow(image)
    axis.set_title(name)
    axis.axis("off")
  with files.whole(target) as path:
    figure.savefig(path, dpi=110, format="png")


def _of(driver: episodes.Driver) -> Any:
  def image(name: str) -> np.ndarray:
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # no display is needed
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    environment, frames = scenarios.make(name, picture=True), []

    def watch(environment: Any) -> None:
      if environment.time >= MOMENT and not frames:
        frames.append(np.array(environment.render()))

    episodes.drive(environment, name, SEED, driver, watch=watch)
    environment.close()
    return frames[0]

  return image
