"""Lists the invalid combinations of a wrapper or method with an aggregator, with reasons.

The attribute `refuses` of a wrapper lists the aggregator traits that the wrapper rejects. This
module contains the lists that several wrappers share, and builds the table of all rejected
combinations.
"""

from research.core import registry
from research.core.base import Trait, Wrapper

# Traits that wrappers reject if they keep the compression error in a memory.
_KEPT = "the compression error would be stored twice and sent twice"
MEMORY = {
  Trait.MEMORY: _KEPT,
  Trait.VOTE: "signs have no scale, so the compression error grows without bound",
  Trait.SELECTS: "memories cancel only if the value is the mean of the messages",
  Trait.LOCAL: "neighbours receive different averages; memories cancel only in the mean of all",
  Trait.NOISE: "the memory would subtract the noise, and send an example again in later rounds",
  Trait.FORGED: "a faulty worker's memory would grow without bound; put the attack around it",
}
BOUNDED = {
  Trait.EXPANSIVE: "a compressor that is not contractive lets the memory grow without bound"
}
PARTIAL = {Trait.PARTIAL: "the total would lack the shift of a worker that drops out"}
SENDERS = {Trait.SENDERS: "the total would not be the mean of the workers' shifts"}
# Traits that wrappers and methods reject if they bypass the aggregator for some leaves or rounds.
AROUND = {
  Trait.NOISE: "messages that bypass it are not hidden",
  Trait.SECRET: "messages that bypass it are not masked",
  Trait.SELECTS: "messages that bypass it are not protected from faulty workers",
}
SHARDED = {Trait.WHOLE: "each device sees only a part of a worker's leaves"}


def refused() -> tuple[tuple[tuple[str, ...], Trait, str], ...]:
  """Returns the rows (wrapper names, rejected trait, reason) for all registered names."""
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
