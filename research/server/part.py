"""One shard of a server: its model leaves, its optimizer, and the validation of pushes."""

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from research.core.base import Tree
from research.server.events import Push
from research.server.work import Side

KEPT = 3  # number of models that a worker may still use: two in flight, and one being pulled


class Refused(Exception):
  """Refuses a push. The metrics count refusals by `kind`; the text gives the reason."""

  def __init__(self, kind: str, text: str):
    super().__init__(text)
    self.kind = kind


class Pulled(NamedTuple):
  """A shard of the model, as sent to a worker."""

  version: int
  leaves: list[np.ndarray]


class ShardState:
  """The state of a shard. The caller decides in which order pushes become updates.

  Inputs and outputs are numpy arrays. The model's arrays are immutable, so old versions and
  snapshots use memory only for arrays that have changed since.
  """

  def __init__(
    self,
    side: Side,
    params: dict[str, Any],
    payloads: Sequence[Tree],
    number: int = 0,
    version: int = 0,
    state: Sequence[np.ndarray] | None = None,
  ):
    """Creates the state from given parameters.

    Args:
      side: the server's half of the method, compiled.
      params: the shard's leaves by name.
      payloads: the shapes of the pushed payload of each leaf.
      number: the index of the shard.
      version: the number of updates that led to these parameters.
      state: leaves of the optimizer's state at that version; None initializes a new state.
    """
    self.side, self.payloads, self.number, self.version = side, payloads, number, version
    self.names = list(params)
    self.params = jax.tree.map(jnp.asarray, params)
    self.state = side.init(self.params)
    if state is not None:
      flat, treedef = jax.tree.flatten(self.state)
      like = zip(flat, state, strict=True)
      self.state = treedef.unflatten([jnp.asarray(new, was.dtype) for was, new in like])
    self._shown: list[np.ndarray] | None = None  # the current version, as numpy arrays
    self.incarnations: dict[int, int] = {}
    self.pulled: dict[int, deque[tuple[int, Any]]] = {}
    self.staged: dict[tuple[int, int], tuple[Push, Sequence[Tree], Any]] = {}

  def join(self, worker: int, incarnation: int) -> None:
    """Registers a new incarnation; discards the previous incarnation's pulls and staged pushes."""
    self.incarnations[worker] = incarnation
    self.pulled[worker] = deque(maxlen=KEPT)
    self.staged = {name: found for name, found in self.staged.items() if name[0] != worker}

  def pull(self, worker: int) -> Pulled:
    """Returns the current version, and allows the worker to compute with it from now on."""
    kept = self.pulled.setdefault(worker, deque(maxlen=KEPT))
    if not kept or kept[-1][0] != self.version:
      kept.append((self.version, self.params))
    if self._shown is None:
      self._shown = [np.asarray(self.params[name]) for name in self.names]
    return Pulled(self.version, self._shown)

  def stage(self, push: Push, payloads: Sequence[Tree]) -> None:
    """Stages a push, to be applied later.

    Raises:
      Refused: if the push is malformed.
    """
    self._check(push, payloads)
    then = dict(self.pulled[push.worker])[push.versions[self.number]]
    self.staged[push.name] = (push, payloads, then)

  def apply(self, pushes: Sequence[Push], shares: Sequence[float]) -> None:
    """Applies an update: one staged push, or the weighted mean of a round's staged pushes."""
    assert pushes, "an update is made of something"
    if len(pushes) == 1:
      (push,) = pushes
      payloads, then = self._taken(push)
      staleness = np.int32(self.version - push.versions[self.number])
      own = (np.int32(push.worker), np.int32(push.number))
      self._set(self.side.one(self.params, self.state, payloads, then, *own, staleness))
      return
    total = jax.tree.map(jnp.zeros_like, self.params)
    for push, share in zip(pushes, shares, strict=True):
      payloads, _ = self._taken(push)
      own = (np.int32(push.worker), np.int32(push.number))
      total = self.side.add(total, payloads, np.float32(share), *own)
    self._set(self.side.mean(self.params, self.state, total))

  def drop(self, push: Push) -> None:
    """Discards a staged push that will not be counted."""
    self.staged.pop(push.name, None)

  def snapshot(self) -> tuple[int, dict[str, np.ndarray], list[np.ndarray]]:
    """Returns the version, the parameters, and the leaves of the optimizer's state."""
    shown = {name: np.asarray(x) for name, x in self.params.items()}
    return self.version, shown, [np.asarray(x) for x in jax.tree.leaves(self.state)]

  def _set(self, found: tuple[dict[str, Any], Any]) -> None:
    self.params, self.state = found
    self.version += 1
    self._shown = None

  def _taken(self, push: Push) -> tuple[Sequence[Tree], Any]:
    """Returns the payloads of a push and the model that the push started from."""
    staged, payloads, then = self.staged.pop(push.name)
    assert staged == push, "what is applied is what was staged"
    return payloads, then

  def _check(self, push: Push, payloads: Sequence[Tree]) -> None:
    who = f"push {push.number} of worker {push.worker}"
    if push.incarnation != self.incarnations.get(push.worker):
      raise Refused("order", f"{who}: incarnation {push.incarnation} is not the one that joined")
    version = push.versions[self.number] if self.number < len(push.versions) else None
    if version not in dict(self.pulled.get(push.worker, ())):
      raise Refused("version", f"{who}: computed with version {version}, which it has not pulled")
    if jax.tree.structure(payloads) != jax.tree.structure(list(self.payloads)):
      raise Refused("shape", f"{who}: another model or compressor")
    for place, like in enumerate(
      zip(*map(jax.tree.leaves, (payloads, self.payloads)), strict=True)
    ):
      found, wanted = like
      if not isinstance(found, np.ndarray) or found.dtype != wanted.dtype:
        kind = getattr(found, "dtype", type(found).__name__)
        raise Refused("shape", f"{who}: array {place} is {kind}, not {wanted.dtype}")
      if found.shape != wanted.shape:
        shapes = f"{list(found.shape)}, not {list(wanted.shape)}"
        raise Refused("shape", f"{who}: array {place} is {shapes}")
      if jnp.issubdtype(found.dtype, jnp.floating) and not _finite(found):
        raise Refused("not finite", f"{who}: array {place} has values that are not finite")


def _finite(x: np.ndarray) -> bool:
  """Tests whether all values are finite, by testing their sum, which rarely overflows."""
  with np.errstate(all="ignore"):
    return bool(np.isfinite(np.sum(x, dtype=np.float32)))
