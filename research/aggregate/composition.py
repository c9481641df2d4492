"""What cannot be combined: the pairs of a wrapper and a wrapped aggregator that have no sense.

A trait is what a wrapper must know of the aggregator that it wraps:

    memory     keeps what a worker did not send, to send it later
    vote       sends signs without a scale
    selects    its value is not the mean of what the workers sent
    noise      adds noise that hides a worker
    whole      looks at all of a worker's leaves at once
    expansive  its compressor may miss more than all of a value
    dense      what it sends is not zero at most positions
    partial    its value is the mean of those workers alone that did not drop out
"""

from research.base import Aggregator, Compressor

_MEMORY = ("error_feedback", "ef21", "diana", "momentum_correction")

# (wrappers, trait of what they wrap, why not): README shows this table, tests walk it.
REFUSED: tuple[tuple[tuple[str, ...], str, str], ...] = (
  (_MEMORY, "memory", "what was not sent would be kept twice, and sent twice"),
  (_MEMORY, "vote", "signs without a scale are no part of the value: the rest of it only grows"),
  (_MEMORY, "selects", "memories add up only where the value is the mean of what was sent"),
  (_MEMORY, "noise", "the memory would send the noise back, and one example many times"),
  (
    ("error_feedback", "ef21", "momentum_correction"),
    "expansive",
    "a compressor that may miss more than all of a value lets the memory grow without bound",
  ),
  (("ef21", "diana"), "partial", "a worker that drops out would leave its shift out of the total"),
  (
    ("momentum_correction",),
    "dense",
    "momentum is cleared where something was sent, and here that is everywhere",
  ),
  (("noisy",), "noise", "one accountant cannot tell what two noises hide"),
  (("a mesh with axes inside a worker",), "whole", "a device there sees only its own shard"),
)


def traits_of(compressor: Compressor) -> frozenset[str]:
  """The traits that an aggregator has from its compressor."""
  found = [] if compressor.contractive else ["expansive"]
  return frozenset(found if compressor.sparse else [*found, "dense"])


def refuse(wrapper: str, inner: Aggregator) -> None:
  """Refuses a pair that stands in the table.

  Raises:
    ValueError: with the reason.
  """
  for wrappers, trait, reason in REFUSED:
    if wrapper in wrappers and trait in inner.traits:
      raise ValueError(f"{wrapper} does not go with what it wraps ({trait}): {reason}")
