"""Samples clients: determines each worker's client, examples and weight in each round."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from research.comm import collectives
from research.core.base import Array, Key, Tree
from research.core.task import Data
from research.parallel.job import Job

_DROPOUT = 0x64726F70
_RARE = 0x72617265


class Draw(NamedTuple):
  """One worker's assignment for each of K rounds."""

  owner: Array  # [K] int32, the client that the worker serves
  weight: Array  # [K], that client's weight in the objective; zero if the worker serves no client
  anybody: Array  # [K] bool, whether any worker serves a client
  share: Array  # [K], weight of this worker's losses in the metrics; the workers' mean is one
  index: Tree  # [K, H, b], indices into the client's examples; None: all examples


def draw(job: Job, data: Data, key: Key, numbers: Array, worker: Array) -> Draw:
  """Computes a worker's assignment as a pure function of (keys, round, worker).

  Every worker draws the full cohort, since a client's weight is relative to the cohort's mean
  weight.

  Args:
    job: the resolved job.
    data: the examples, and the number of examples per client.
    key: the run's typed key, equal on all workers.
    numbers: [K] int32, round numbers.
    worker: int32 scalar, the worker's index.
  """
  owners, served = cohorts(job, key, numbers)
  sizes = data.sizes[owners]
  present = jnp.where(served, sizes, 0).astype(float)
  mean = jnp.mean(data.sizes[None] if job.sampling_rate else present, -1, dtype=float)
  weights = present / jnp.maximum(mean, 1 / job.workers)[..., None]
  anybody = jnp.where(jnp.any(served, -1, keepdims=True), present, 1)  # without clients: all 1
  shares = anybody / jnp.mean(anybody, -1, keepdims=True)
  index = None
  if job.batch_size is not None:
    index = _examples(job, data, numbers, owners[:, worker], worker)
  anybody = jnp.any(weights > 0, -1)
  return Draw(owners[:, worker], weights[:, worker], anybody, shares[:, worker], index)


def _examples(job: Job, data: Data, numbers: Array, owners: Array, worker: Array) -> Tree:
  """Returns the indices [K, H, b] of a worker's examples; rounds in epochs start a new pass."""
  period, sizes = job.method.local_steps, data.sizes[owners]
  per_round = job.own_steps(sizes) if job.by_epochs else jnp.full_like(sizes, period)
  first = job.first_step + (numbers - job.first_round) * per_round
  steps = first[:, None] + jnp.arange(period, dtype=jnp.int32)[None]
  own = jax.random.fold_in(data.key, job.clients * worker)
  if job.clients > 1:
    own = jax.vmap(lambda owner: jax.random.fold_in(data.key, owner))(owners)

  def sample(size, step, key):
    return job.task.sample(size, step, key, batch_size=job.batch_size)

  of_rounds = (0, 0, 0 if job.clients > 1 else None)
  return jax.vmap(jax.vmap(sample, (None, 0, None)), of_rounds)(sizes, steps, own)


def cohorts(job: Job, key: Key, numbers: Array) -> tuple[Array, Array]:
  """Samples the clients that the workers serve.

  Without a sampling rate, each worker serves one client drawn from its own stratum. With a rate
  (Poisson sampling), every client takes part independently with a probability equal to the rate.
  Workers without a client idle. If more clients take part than there are workers, the excess
  clients are left out, so choose enough workers to make such rounds negligibly rare. With an
  `order`, a single worker serves the clients in that order. Dropout then removes clients at random,
  and workers that are not present on the job's network serve nobody.

  Args:
    job: the resolved job, with W workers and P clients.
    key: the run's typed key, equal on all workers.
    numbers: [K] int32, round numbers.

  Returns:
    The clients, int32 [K, W], and whether each worker serves a client, bool [K, W].
  """
  everyone = jnp.arange(job.workers, dtype=jnp.int32)
  key_of_round = lambda number: collectives.round_keys(key, number)[2]

  def of_strata(number):
    client = jax.random.randint(key_of_round(number), everyone.shape, 0, job.clients, jnp.int32)
    return client + job.clients * everyone, jnp.ones(job.workers, bool)

  def of_population(number):
    taking_part = at_rate(job.sampling_rate, key_of_round(number), len(job.sizes))
    # Entry n is the first position at which the running sum is n. XLA:CPU would lower cumsum to
    # slow windows.
    so_far = jax.lax.associative_scan(jnp.add, taking_part.astype(jnp.int32))
    owners = jnp.minimum(jnp.searchsorted(so_far, everyone + 1), len(job.sizes) - 1)
    return owners.astype(jnp.int32), everyone < so_far[-1]

  def present(number):
    own = jax.random.fold_in(key_of_round(number), _DROPOUT)
    return jax.random.uniform(own, everyone.shape) >= job.dropout

  if job.order is not None:
    owners = jnp.asarray(job.order, jnp.int32)[numbers % len(job.order)][:, None]
    served = jnp.ones(owners.shape, bool)
  elif job.sampling_rate:
    owners, served = jax.vmap(of_population)(numbers)
  elif job.clients > 1:
    owners, served = jax.vmap(of_strata)(numbers)
  else:
    owners = jnp.tile(everyone, (len(numbers), 1))
    served = jnp.ones(owners.shape, bool)
  if job.present is not None:
    served &= jnp.asarray(job.present)[numbers]
  return owners, (served & jax.vmap(present)(numbers) if job.dropout else served)


def at_rate(rate: float, key: Key, count: int) -> Array:
  """Draws `count` independent bools; each is true with a probability of at most `rate`.

  The privacy accountant assumes `rate`, so the true probability must not exceed it. A uniform float
  has only 24 random bits; this function uses 32 bits, or 64 if the rate is below 2^-32.

  Args:
    rate: the probability, in [0, 1].
    key: a typed key.
    count: number of draws.
  """
  bits = jax.random.bits(key, (count,))
  if rate >= 2.0**-32:
    return bits <= np.uint32(math.floor(rate * 2**32) - 1)
  rest = jax.random.bits(jax.random.fold_in(key, _RARE), (count,))
  return (bits == 0) & (rest <= np.uint32(math.floor(rate * 2**64) - 1))
