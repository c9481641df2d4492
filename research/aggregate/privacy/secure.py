"""Implements secure aggregation, which sums the workers' values without revealing any of them."""

import math
from dataclasses import KW_ONLY

import jax
import jax.numpy as jnp
import numpy as np

from research.aggregate.privacy import masks, shamir
from research.aggregate.privacy.hiding import Sum
from research.comm import collectives
from research.core import checks
from research.core.base import (
  EVERYONE,
  WORKER_AXES,
  Aggregate,
  Aggregator,
  Array,
  Key,
  Presence,
  Trait,
  Tree,
)


class SecureSum(Aggregator, name="secure_sum"):
  """Averages fixed-point values; each value is sent under a mask, and the masks cancel in the sum.

      x_i in Z_{2^32}, round(clip(v_i) / unit) with unit = clip / (2^(bits-1) - 1)
      y_i = x_i + PRG(b_i) + sum_{j>i} PRG(s_ij) - sum_{j<i} PRG(s_ij)       sent by i in U
      z   = sum_{i in U} (y_i - PRG(b_i)) - sum_{i in U, j not in U} +-PRG(s_ij) = sum_{i in U} x_i
      value = unit z / |U|,   sent_i = unit x_i if i in U, else 0

  Before worker i sends y_i, it gives every worker a Shamir share of the seed b_i of its self mask
  and of its pair seeds s_ij. U is the set of workers that then send y_i; before sending, a worker
  drops out with probability `dropout`. The workers in U use their shares to reconstruct b_i for
  each worker i in U, and s_ij for each worker i outside U, never both for the same worker. The
  masks are computed from these seeds. The result z is the plain sum, bit for bit. If U has fewer
  than t = ceil(threshold W) members, no share is revealed and the round is rejected: value and sent
  are zero on all workers.

  If the weights are unequal, workers clip their values, send w_i x_i / max_j w_j, and reveal their
  weights. An absent worker sends masked zeros. The mean is normalized by the weights of U.

  What is hidden: an honest but curious server that sees all y_i and all revealed shares learns only
  the sum over U, alone or together with up to t - 1 workers, if outputs of PRG look random to it.
  If y_i arrives after worker i was declared to have dropped out, the mask of b_i still hides x_i.
  What is not hidden: the sum and what follows from it (use `noisy`), who participated, and whether
  some value was not finite. There is no defence against a server or workers that deviate from the
  protocol; the paper uses signatures and a consistency check.

  This implementation serves only to study the protocol: every worker's secrets are functions of the
  run's key. Of two workers, the one with the lower index draws s_ij and sends it to the other, and
  shares are sent directly to their holders. In the paper, workers agree on s_ij by Diffie-Hellman
  and share the secret keys of this exchange, and the server relays encrypted shares. Here, the
  all-reduce takes the place of the server. PRG is Threefry with 64-bit keys: neither the function
  nor the key length is suitable for deployment. Groups of workers along an axis that is not in
  `axis` need different keys, which `hierarchical` provides; otherwise, all groups use the same
  masks.

  Args:
    clip: the bound of the elementwise clipping to [-clip, clip], in [1e-20, 1e20]. If any worker
      has a non-finite value, the mean is NaN.
    bits: the number of bits per value, in [2, 31]; with more than 25 bits, the rounding of float32
      is coarser than the unit.
    threshold: the minimum fraction of the workers that must send, in (0, 1].
    dropout: the probability that a worker drops out, in [0, 1).
    axis: the worker axes to sum over.

  Raises:
    ValueError: if an argument is out of range; or, at trace time, if bits + ceil(log2 W) > 32,
      since the sum could overflow the ring.

  Reference: Bonawitz et al. 2017, ePrint 2017/281, figure 4, for an honest but curious server.
  """

  _: KW_ONLY
  clip: float
  bits: int = 16
  threshold: float = 2 / 3
  dropout: float = 0.0
  axis: collectives.Axes = WORKER_AXES
  adds = Trait.DENSE | Trait.SECRET

  def check(self):
    note = ", where float32 resolves the grid"
    checks.in_range("clip", self.clip, "[1e-20, 1e20]", note=note)
    checks.in_range("bits", self.bits, "[2, 31]")
    checks.in_range("threshold", self.threshold, "(0, 1]")
    checks.in_range("dropout", self.dropout, "[0, 1)")

  @property
  def traits(self):
    return super().traits | (Trait.PARTIAL if self.dropout else Trait(0))

  @property
  def privacy(self):
    return Sum(self.axis, self.clip / (2 ** (self.bits - 1) - 1), self.clip, self._least_present)

  def _least_present(self, count: int) -> float:
    """Returns the minimum fraction of the W workers in an accepted sum."""
    return quorum_of(self.threshold, count) / count if self.dropout else 1.0

  def aggregate(self, tree, state, key, presence=EVERYONE):
    own, most = _shares(presence, self.axis)
    count, here = collectives.worker_count(self.axis), collectives.worker_index(self.axis)
    _check_ring(self.bits, count)
    quorum = quorum_of(self.threshold, count)
    seed_key, share_key, dropout_key = jax.random.split(key, 3)
    seeds = _agree(collectives.worker_key(seed_key, self.axis), self.axis)
    shares = shamir.share(seeds, quorum, count, collectives.worker_key(share_key, self.axis))
    held = collectives.exchange(shares.astype(jnp.uint16), self.axis).astype(jnp.uint32)

    alive = jax.random.uniform(dropout_key, (count,)) >= self.dropout
    to_ring = lambda x: quantize(_clipped(x, self.clip) * own, self.clip, self.bits)
    ring = jax.tree.map(to_ring, tree)
    message = jax.tree.map(jnp.add, ring, masks.mask(seeds, here, ring))
    received = collectives.total(_where(alive[here], message), self.axis)
    shown = reveal(held, alive, quorum) * shamir.weights(alive)[here] % shamir.PRIME
    found = collectives.total(shown, self.axis) % shamir.PRIME
    total = masks.unmask(received, found, alive)

    survivors = jnp.sum(alive, dtype=jnp.int32)
    accepted, members = survivors >= quorum, jnp.maximum(survivors, 1)
    if self.dropout and presence is not EVERYONE:  # normalize by the weights of U
      pair = jnp.where(alive[here], own, 0), own
      of_those, of_all = collectives.total(pair, self.axis)
      accepted &= of_those > 0
      members = count * of_those / jnp.where(of_all > 0, of_all, 1)
      members = jnp.where(of_those > 0, members, 1)
    broken = alive[here] & (own > 0) & ~_all_finite(tree)
    any_broken = collectives.total(broken.astype(jnp.int32), self.axis) > 0

    def back(ring, members, is_nan, counts):
      mean = lambda r, x: dequantize(r, self.clip, self.bits, members / most).astype(x.dtype)
      visible = lambda x: jnp.where(is_nan, jnp.full_like(x, jnp.nan), x)
      return _where(counts, jax.tree.map(lambda r, x: visible(mean(r, x)), ring, tree))

    value = back(total, members, any_broken, accepted)
    return Aggregate(value, back(ring, 1, broken, accepted & alive[here]), state)


secure_sum = SecureSum


def _shares(presence: Presence, axis: collectives.Axes) -> tuple[Array | float, Array | float]:
  """Returns this worker's weight relative to the largest weight, and the largest weight."""
  if presence is EVERYONE:
    return 1.0, 1.0
  own = jnp.where(presence.active, jnp.asarray(presence.weight, jnp.float32), 0)
  most = jnp.max(collectives.gather(own, axis))
  return own / jnp.where(most > 0, most, 1), most


def _clipped(x: Array, clip: float) -> Array:
  """Clips x to [-clip, clip] in float32, and replaces non-finite elements by zero."""
  return jnp.clip(jnp.where(jnp.isfinite(x), x, 0).astype(jnp.float32), -clip, clip)


def quorum_of(threshold: float, workers: int) -> int:
  """Returns t, the minimum number of workers of a valid round: ceil(threshold W).

  Args:
    threshold: the minimum fraction of the workers, in (0, 1].
    workers: W, the number of workers.
  """
  return max(1, math.ceil(threshold * workers - 1e-9))


def quantize(x: Array, clip: float, bits: int) -> Array:
  """Rounds values to fixed point in Z_{2^32}: the nearest multiples of clip / (2^(bits-1) - 1).

  Args:
    x: the floating-point values, of any shape.
    clip: the bound; values are clipped to [-clip, clip].
    bits: the number of bits per value, in [2, 31].

  Returns:
    The codes, uint32, of the shape of x.
  """
  levels = 2 ** (bits - 1) - 1
  codes = jnp.round(_clipped(x, clip) * (levels / clip)).astype(jnp.int32)
  return jnp.clip(codes, -levels, levels).view(jnp.uint32)


def dequantize(ring: Array, clip: float, bits: int, members: Array | int = 1) -> Array:
  """Converts the sum of several values in Z_{2^32} to their mean.

  Args:
    ring: the sum, uint32, of any shape.
    clip: the bound, as in `quantize`.
    bits: the number of bits per value, as in `quantize`.
    members: the number of values in the sum, or their total weight.

  Returns:
    The mean, float32, of the shape of `ring`.
  """
  unit = clip / (2 ** (bits - 1) - 1)
  return ring.view(jnp.int32).astype(jnp.float32) * (unit / members)


def reveal(held: Array, alive: Array, quorum: int) -> Array:
  """Selects the shares that a holder reveals: those of b_i if worker i sent, else those of s_ij.

  Args:
    held: the holder's shares [..., W, W, LIMBS], with the share of owner i's seed for peer j in row
      i and column j.
    alive: a mask [W], True for the workers that sent.
    quorum: t, the minimum number of workers that must send; if fewer did, nothing is revealed.

  Returns:
    The revealed shares, of the shape of `held`, with zeros elsewhere.
  """
  self_mask = jnp.eye(len(alive), dtype=bool)
  shown = jnp.where(self_mask, alive[:, None], ~alive[:, None]) & (jnp.sum(alive) >= quorum)
  return jnp.where(shown[..., None], held, 0)


def recover(messages: Tree, held: Array, alive: Array, quorum: int) -> Tree:
  """Computes the sum of the senders' ring values on the host, as a server would.

  Args:
    messages: the masked values, with leaves [W, ...]; rows of workers that did not send are
      ignored.
    held: the shares [W holders, W owners, W peers, LIMBS]; those of holders that did not send are
      ignored.
    alive: a mask [W], True for the workers that sent.
    quorum: t, the minimum number of workers that must have sent.

  Returns:
    The sum, a tree of uint32 leaves [...].

  Raises:
    ValueError: if fewer than t workers sent.
  """
  if (survivors := int(np.sum(alive))) < quorum:
    raise ValueError(f"{survivors} of {len(alive)} workers sent; the sum needs {quorum} or more")
  sent = lambda y: jnp.sum(y[np.asarray(alive)], 0, dtype=jnp.uint32)
  seeds = shamir.reconstruct(reveal(held, alive, quorum), alive)
  return masks.unmask(jax.tree.map(sent, messages), seeds, alive)


def _agree(own: Key, axis: collectives.Axes) -> Array:
  """Returns this worker's seeds [W, LIMBS]; workers with lower indices send theirs to this one."""
  count, here = collectives.worker_count(axis), collectives.worker_index(axis)
  drawn = jax.random.randint(own, (count, masks.LIMBS), 0, shamir.PRIME, jnp.uint32)
  received = collectives.exchange(drawn.astype(jnp.uint16), axis).astype(jnp.uint32)
  return jnp.where(jnp.arange(count)[:, None] >= here, drawn, received)


def _where(condition: Array, tree: Tree) -> Tree:
  return jax.tree.map(lambda x: jnp.where(condition, x, jnp.zeros_like(x)), tree)


def _all_finite(tree: Tree) -> Array:
  each = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]
  return jnp.all(jnp.array([True, *each]))


def _check_ring(bits: int, workers: int) -> None:
  if bits + (workers - 1).bit_length() > 32:
    raise ValueError(
      f"bits={bits}: the sum of {workers} workers' values needs bits + ceil(log2 {workers}) <= 32"
    )
