"""Invalid combinations of a wrapper or a method with an aggregator, with reasons.

A wrapper lists in `refuses` the aggregator traits that it rejects. This module has the lists that
several wrappers share, and builds the table of all rejected combinations.
"""

from research.core import registry
from research.core.base import Trait, Wrapper

# Rejected by wrappers that keep the compression error in a memory.
_KEPT = "what was not sent would be kept twice, and sent twice"
MEMORY = {
  Trait.MEMORY: _KEPT,
  Trait.VOTE: "signs without a scale are no part of the value: the rest of it only grows",
  Trait.SELECTS: "memories add up only where the value is the mean of what was sent",
  Trait.LOCAL: "neighbours receive other averages: memories add up in the mean of all alone",
  Trait.NOISE: "the memory would send the noise back, and one example many times",
  Trait.FORGED: "the attack belongs around: a faulty worker's memory would only grow",
}
BOUNDED = {
  Trait.EXPANSIVE: "a compressor that may miss more than all of a value lets the memory grow "
  "without bound"
}
PARTIAL = {Trait.PARTIAL: "a worker that drops out would leave its shift out of the total"}
# Rejected by wrappers and methods that bypass the aggregator for some leaves or in some rounds.
AROUND = {
  Trait.NOISE: "what goes around it is not hidden",
  Trait.SECRET: "what goes around it is not masked",
  Trait.SELECTS: "what goes around it is not protected from faulty workers",
}
SHARDED = {Trait.WHOLE: "each sees only a part of a worker's leaves"}


def refused() -> tuple[tuple[tuple[str, ...], Trait, str], ...]:
  """Returns rows (wrapper names, rejected trait, reason) for all registered names."""
  rows: dict[tuple[Trait, str], list[str]] = {}
  for kind in ("aggregator", "method"):
    for name in registry.names(kind):
      factory = registry.lookup((kind,), name)
      if isinstance(factory, type) and issubclass(factory, Wrapper):
        for row in factory.refuses.items():
          rows.setdefault(row, []).append(name)
  for row in SHARDED.items():
    rows.setdefault(row, []).append("fsdp")
  return tuple((tuple(names), trait, why) for (trait, why), names in rows.items())
