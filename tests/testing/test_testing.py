"""The checks for objects of one's own: what breaks a contract is named, with what was seen."""

import jax
import jax.numpy as jnp
import pytest

from research.aggregate.gather_mean import gather_mean
from research.aggregate.mean import Mean, mean
from research.comm import collectives
from research.compress.cast import BF16
from research.core import registry
from research.core.base import EVERYONE, Aggregate, Compressor, Trait
from research.methods.data_parallel import DataParallel
from research.testing import ContractError, check_aggregator, check_compressor, check_method

SGD = registry.build("optimizer", "sgd(0.1)")


class Narrow(BF16):
  """Forgets to widen what it decodes."""

  def decode(self, payload, like, shared):
    return payload


class Doubled(BF16):
  """Is not contractive, though it says so."""

  def decode(self, payload, like, shared):
    return 3 * payload.astype(like.dtype)


class Shifted(BF16):
  """Does not send zero as zero."""

  def decode(self, payload, like, shared):
    return payload.astype(like.dtype) + jnp.ones((), like.dtype)


class NotLinear(Compressor):
  """Says that payloads may be added."""

  linear = True

  def encode(self, x, shared, own):
    return jnp.sqrt(jnp.abs(x)) * jnp.sign(x)

  def decode(self, payload, like, shared):
    return payload * jnp.abs(payload)


class Blind(BF16):
  """Hides what is not a number."""

  def encode(self, x, shared, own):
    return super().encode(jnp.nan_to_num(x), shared, own)


class Halved(BF16):
  """Sends half, which is contractive."""

  def decode(self, payload, like, shared):
    return payload.astype(like.dtype) / 2


class Crowded(BF16):
  """Says that most of what it decodes is zero."""

  sparse = True


@jax.custom_batching.custom_vmap
def alone(x):
  return x


@alone.def_vmap
def together(size, batched, x):
  del size, batched
  return x / 2, True


class Batched(BF16):
  """Sends something else under vmap."""

  def encode(self, x, shared, own):
    return super().encode(alone(x), shared, own)


COMPRESSORS = {
  Crowded: r"C\(x\) is zero at most positions. Seen: 100% of 1000 are not",
  Batched: "Under vmap, a worker sends the same as on its own",
  Narrow: "decode returns an array of the leaf's shape and dtype. Seen: bfloat16",
  Doubled: r"E \|\|C\(x\) - x\|\|\^2 <= 1 \|\|x\|\|\^2 for 40 elements. Seen: 4",
  Shifted: "Zero is sent as zero",
  NotLinear: "the sum of payloads is decoded to the sum",
  Blind: "so has the decoded leaf. Seen: nothing of nan at 0",
}


@pytest.mark.parametrize("kind", COMPRESSORS)
def test_a_compressor_that_breaks_a_contract_is_named(kind):
  with pytest.raises(ContractError, match=rf"^{kind.__name__}\(\).*{COMPRESSORS[kind]}"):
    check_compressor(kind())


def test_what_a_docstring_promises_is_checked_too():
  check_compressor(BF16(), error=lambda n: 2**-16, content=lambda n, size: 2 * n)
  with pytest.raises(ContractError, match=r"<= 1e-12 \|\|x\|\|\^2"):
    check_compressor(BF16(), error=lambda n: 1e-12)
  with pytest.raises(ContractError, match="has the promised bytes"):
    check_compressor(BF16(), content=lambda n, size: n)
  with pytest.raises(ContractError, match=r"E C\(x\) = x, within four standard errors of 3000"):
    check_compressor(Halved(), unbiased=True)
  with pytest.raises(ContractError, match=r"C\(C\(x\)\) = C\(x\) with the same shared key"):
    check_compressor(Halved(), idempotent=True)


def test_a_compressor_of_another_type_is_refused_where_it_is_built_in():
  with pytest.raises(ValueError, match=r"decode of Narrow\(\) returns bfloat16\[4, 6\] for a leaf"):
    gather_mean(Narrow())


class Leaking(Mean):
  """Averages over absent workers too."""

  def aggregate(self, tree, state, key, presence=EVERYONE):
    return Aggregate(collectives.mean(tree), tree, state)


class Own(Mean):
  """Gives each worker something else."""

  def aggregate(self, tree, state, key, presence=EVERYONE):
    value = collectives.mean(tree, presence=presence)
    number = collectives.worker_index().astype(jnp.float32)
    return Aggregate(jax.tree.map(lambda x: x + number, value), tree, state)


class Widened(Mean):
  """Returns another type."""

  def aggregate(self, tree, state, key, presence=EVERYONE):
    value = collectives.mean(tree, presence=presence)
    return Aggregate(jax.tree.map(lambda x: x.astype(jnp.bfloat16), value), tree, state)


class Shrinking(Mean):
  """Divides by the number of all workers, though some are absent."""

  def aggregate(self, tree, state, key, presence=EVERYONE):
    there = jax.tree.map(lambda x: jnp.where(presence.active, x, jnp.zeros_like(x)), tree)
    return Aggregate(collectives.mean(there), tree, state)


AGGREGATORS = {
  Leaking: "An absent worker's values do not affect the others",
  Own: r"All workers receive the same value; one that differs has Trait\.LOCAL",
  Widened: "The value has the structure, shapes and types of what a worker has",
  Shrinking: "Equal contributions give that value",
}


@pytest.mark.parametrize("kind", AGGREGATORS)
def test_an_aggregator_that_breaks_a_contract_is_named(kind):
  with pytest.raises(ContractError, match=rf"^{kind.__name__}\(\).*{AGGREGATORS[kind]}"):
    check_aggregator(kind())


class Hasty(DataParallel):
  """Averages what absent workers have."""

  def sync(self, local, state, *, key, presence=EVERYONE):
    return super().sync(local, state, key=key)


class Narrowing(DataParallel):
  """Changes the type of its state."""

  def receive(self, value, sent, state, *, key, presence=EVERYONE):
    state = super().receive(value, sent, state, key=key, presence=presence)
    return state._replace(params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.params))


def test_a_method_that_breaks_a_contract_is_named():
  with pytest.raises(ContractError, match=r"^Hasty\(.*A lost round does not affect any worker"):
    check_method(Hasty(SGD, mean()))
  with pytest.raises(ContractError, match=r"The state has the structure, shapes and types that"):
    check_method(Narrowing(SGD, mean()))


class Neighbourly(Own):
  """The same as Own, and says so."""

  adds = Trait.LOCAL


@pytest.mark.slow
def test_traits_decide_what_is_checked():
  check_aggregator(Neighbourly())
