"""Peak rates of TPU chips, and roofline lower bounds on the time of a program."""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from research.core.text import QUOTED, one_line

_GIB = 2**30


class Chip(NamedTuple):
  """Specification of a chip; JAX presents one chip (both cores of a v4 or v5p) as one device.

  A chip has two ICI links along each dimension of its slice. Rates are for one direction.
  """

  flops: float  # FLOPs per second in bfloat16
  hbm: float  # bytes available to a program: as published, or fewer if XLA:TPU reserves some
  hbm_bandwidth: float  # bytes per second, reads plus writes
  link: float  # bytes per second of one ICI link
  dcn: float | None  # bytes per second of the chip's share of the host's network, if published
  dimensions: int  # number of dimensions of a slice
  largest: int  # number of chips of the largest slice
  example: str  # a legal slice
  source: str


# From the cited pages, per chip:
#   v4   link rate from the bisection bandwidth of a pod, 24 TB/s through 2 x 16 x 16 links
#   v5e  400 GB/s in both directions of four links; two NICs of 100 Gbit/s for eight chips
#   v5p  1200 GB/s in both directions of six links; 50 Gbit/s
#   v6e  800 GB/s in both directions of four links; four NICs of 200 Gbit/s for eight chips
CHIPS = {
  "v4": Chip(
    275e12, 30.75 * _GIB, 1200e9, 24e12 / 512, None, 3, 4096, "v4:4x4x4",
    "https://cloud.google.com/tpu/docs/v4",
  ),
  "v5e": Chip(
    197e12, 15.75 * _GIB, 819e9, 50e9, 200e9 / 8 / 8, 2, 256, "v5e:16x16",
    "https://cloud.google.com/tpu/docs/v5e",
  ),
  "v5p": Chip(
    459e12, 95 * _GIB, 2765e9, 100e9, 50e9 / 8, 3, 6144, "v5p:8x8x8",
    "https://cloud.google.com/tpu/docs/v5p",
  ),
  "v6e": Chip(
    918e12, 31.25 * _GIB, 1638e9, 100e9, 800e9 / 8 / 8, 2, 256, "v6e:16x16",
    "https://cloud.google.com/tpu/docs/v6e",
  ),
}  # fmt: skip


class Work(NamedTuple):
  """The work of one chip in a step."""

  flops: float
  hbm: float  # bytes read and written
  ici: float | None  # bytes sent within a slice; None: unknown
  dcn: float | None  # bytes sent to other slices; None: unknown


class Roofline(NamedTuple):
  """Lower bounds on the time of a step, in seconds; None if the work or the rate is unknown."""

  compute: float
  hbm: float
  ici: float | None
  dcn: float | None

  @property
  def bound(self) -> tuple[str, float]:
    """The name and the time of the largest bound; no step is faster, even with full overlap."""
    known = {name: value for name, value in self._asdict().items() if value is not None}
    slowest = max(known, key=lambda name: known[name])
    return slowest, known[slowest]

  @property
  def unknown(self) -> list[str]:
    """The names of the resources whose time is unknown."""
    return [name for name, value in self._asdict().items() if value is None]


def parse_topology(spec: str) -> tuple[str, tuple[int, ...]]:
  """Parses 'v5p:8x8x8' into the chip's name and the shape of a slice.

  Args:
    spec: CHIP:AxB or CHIP:AxBxC.

  Raises:
    ValueError: for an unknown chip, or a shape that no slice of the chip can have.
  """
  name, _, sides = spec.partition(":")
  if name not in CHIPS:
    shown = ", ".join(f"{kind} (such as {chip.example})" for kind, chip in CHIPS.items())
    raise ValueError(f"unknown chip '{one_line(name, QUOTED)}'; legal: {shown}")
  chip = CHIPS[name]
  form = "x".join("ABC"[: chip.dimensions])
  is_sides = re.fullmatch("[1-9][0-9]{0,8}(x[1-9][0-9]{0,8})*", sides)
  if not is_sides or sides.count("x") + 1 != chip.dimensions:
    raise ValueError(f"not {name}:{form}, the sides of a slice; such as {chip.example}")
  shape = tuple(map(int, sides.split("x")))
  if math.prod(shape) > chip.largest:
    raise ValueError(f"{math.prod(shape)} chips; the largest slice of {name} has {chip.largest}")
  return name, shape


def links(shape: tuple[int, ...]) -> int:
  """Returns the number of ICI links of the best-connected chip of a slice.

  Args:
    shape: the sides of a slice, in chips; a chip has one link along a side of two chips, and up to
      two along a longer side.
  """
  return sum(min(side - 1, 2) for side in shape)


def roofline(chip: Chip, shape: tuple[int, ...], work: Work) -> Roofline:
  """Computes the time of one chip's work at each peak rate separately.

  All links of a chip are assumed to carry equal parts of its traffic, in one direction.

  Args:
    chip: the chip's specification.
    shape: the shape of the slice.
    work: the work of one chip in a step.
  """
  return Roofline(
    work.flops / chip.flops,
    work.hbm / chip.hbm_bandwidth,
    _over(work.ici, links(shape) * chip.link),
    _over(work.dcn, chip.dcn),
  )


def _over(amount: float | None, rate: float | None) -> float | None:
  if amount == 0:
    return 0.0
  return None if amount is None or rate is None else amount / rate


def utilization(chip: Chip, flops: float, seconds: float) -> float:
  """Returns the achieved fraction of a chip's peak rate; 0 if seconds is 0.

  Args:
    chip: the chip's specification.
    flops: FLOPs of one chip.
    seconds: the time that the computation took.
  """
  return flops / (chip.flops * seconds) if seconds else 0.0


def crossing(axis: str, slices: int) -> bool:
  """Returns whether traffic over one or more axes, such as 'slice+data', leaves a slice.

  Args:
    axis: one or more axis names, joined by '+'.
    slices: number of slices.
  """
  return slices > 1 and "slice" in axis.split("+")


def split(sent: Mapping[str, float], slices: int) -> tuple[float, float]:
  """Splits traffic into bytes that stay within a slice and bytes that leave it.

  Args:
    sent: bytes by axis.
    slices: number of slices.
  """
  leaving = sum(amount for axis, amount in sent.items() if crossing(axis, slices))
  return sum(sent.values()) - leaving, leaving
