"""What is read off a run's specs: topologies, noise, and the epsilon that its rounds spend."""

import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import regression, split
from subset import slow_except

from research.aggregate.mean import mean
from research.aggregate.privacy import accounting, private
from research.core import registry
from research.core.base import EVERYONE, Aggregator
from research.methods.data_parallel import DataParallel, data_parallel
from research.parallel import inference
from research.parallel.job import Job, resolved
from research.training.config import Config
from research.training.reports.facts import facts

W = 8
TASK = regression()


def read(method: str, axes=None, owners: int = W, uneven: bool = False, task=TASK, **rest):
  """The facts of a method on eight workers, or on those of a mesh."""
  sizes = [240 // owners] * owners
  if uneven:
    sizes[:2] = [sizes[0] + 1, sizes[1] - 1]
  _, sizes = split(task, sizes)
  built = registry.build("method", method)
  job = resolved(Job(built, task, axes or {"data": W}, sizes, 3, **rest))
  return facts(Config(method=method), job, inference.layout_of(job))


def noisy(inner: str = "mean()") -> str:
  return f"data_parallel(sgd(0.1), noisy({inner}, clip=1.5, noise=1.3))"


def test_topologies_have_their_gap(monkeypatch):
  found = read("d_psgd(sgd(0.1), gossip(ring()))")
  assert (found.epsilon, found.note) == (None, "")
  assert found.found == {
    "topology": "ring()",
    "spectral_gap": pytest.approx(1 - (1 + 2 * math.cos(math.pi / 4)) / 3),
    "described": "ring of 8 workers: 2 links each, spectral gap 0.195 a round",
  }
  axes = {"slice": 2, "data": 4}
  within = read("averaged(d_psgd(sgd(0.1), gossip(star(), axis='data')))", axes)
  assert within.found["described"].startswith("star of 4 workers")
  two = "d_psgd(sgd(0.1), warm_up(gossip(ring()), steps=3, stages=[gossip(complete())]))"
  assert read(two).found["topology"] == ["ring()", "complete()"]
  assert read("data_parallel(sgd(0.1), mean())").found == {}
  monkeypatch.setattr("research.training.reports.facts.MOST", 7)
  many = read("d_psgd(sgd(0.1), gossip(torus()))")
  assert many.found["spectral_gap"] is None
  assert many.found["described"].endswith("spectral gap not computed for more than 7")


SLICED = {"slice": 2, "data": 4}
HALF = TASK._replace(
  init=lambda key: jax.tree.map(lambda x: x.astype(jnp.bfloat16), TASK.init(key))
)
BUCKETED = "data_parallel(sgd(0.1), bucketed(noisy(mean(), clip=1.5, noise=1.3)))"
RATE = {"rate": 0.05}
NOISE = {"noise": 1.3, "clip": 1.5, "delta": 1e-5}
TWICE = "scaffold(0.1, noisy(mean(), clip=1.5, noise=1.3), period=2)"
PARTLY = "streaming_diloco(sgd(0.1), sgd(0.7), noisy(mean(), clip=1.5, noise=1.3), fragments=2)"
POISSON = {"axes": {"data": 16}, "owners": 16, "sampling_rate": 0.05}
VANISHING = "secure_sum(clip=9.0, dropout=0.1, threshold=0.5)"
# what is said to be counted, how the run is made, what the accountant is told
COUNTED = {
  "each round": ("the sum with noise 1.3, everybody", lambda: read(noisy()), 1.3, {}),
  "Poisson": ("Poisson sampling at 0.05", lambda: read(noisy(), **POISSON), 1.3, RATE),
  "strata": ("one of 5 clients", lambda: read(noisy(), owners=40), 1.3, {"clients": 5}),
  # weights, what clients keep, or an order tell whom a round serves
  "weights": ("everybody", lambda: read(noisy(), owners=40, uneven=True), 1.3, {}),
  "memory": ("everybody", lambda: read(TWICE, owners=40), 1.3 / math.sqrt(2), {}),
  "order": ("everybody", lambda: read(noisy(), {"data": 1}, 40, order=np.arange(40)), 1.3, {}),
  # each message has its share of the noise alone, whoever sends it
  "messages": ("each message", lambda: read(noisy("median()")), 1.3 / math.sqrt(W), {}),
  "seen": ("everybody", lambda: read(noisy("median()"), **POISSON), 1.3 / math.sqrt(16), {}),
  "one of two branches": ("the sum", lambda: read(PARTLY), 1.3, {}),
  "vanishing": ("the sum", lambda: read(noisy(VANISHING)), 1.3 / math.sqrt(2), {}),
  "linear": ("the sum", lambda: read(noisy("sum_mean(random_k(0.5))")), 1.3, {}),
  "low rank": ("the sum", lambda: read(noisy("bucketed(power_sgd(1))")), 1.3, {}),
  "two levels": ("the sum", lambda: read(noisy("hierarchical_mean()"), SLICED), 1.3, {}),
  "in buckets": ("the sum", lambda: read(BUCKETED), 1.3, {}),
  # rounded after the noise, in steps that depend on the value, or in steps as large as the noise
  "rounded": ("each message", lambda: read(noisy("sum_mean(bf16())")), 1.3 / math.sqrt(W), {}),
  "narrow": ("each message", lambda: read(noisy(), task=HALF), 1.3 / math.sqrt(W), {}),
  "coarse": ("each", lambda: read(noisy("secure_sum(clip=9.0, bits=4)")), 1.3 / math.sqrt(W), {}),
  "cut": ("each message", lambda: read(noisy("secure_sum(clip=5.0)")), 1.3 / math.sqrt(W), {}),
  "neither": ("the sum", lambda: read(noisy("secure_sum(clip=9.0, bits=6)")), 1.3, {}),
  # the sum of a slice has the noise of its workers alone
  "a slice": ("the sum", lambda: read(noisy("mean(axis='data')"), SLICED), 1.3 / math.sqrt(2), {}),
}


@pytest.mark.parametrize("case", slow_except([*COUNTED][:6], COUNTED))
def test_epsilon_grows_as_the_accountant_says(case):
  said, run, noise, sampling = COUNTED[case]
  found, epsilon, note = run()
  assert (note, {name: found[name] for name in NOISE}) == ("", NOISE)
  assert said in found["accounted"]
  spent = [epsilon(rounds) for rounds in (0, 1, 10, 1000)]
  want = accounting.spending(noise, 1e-5, **sampling)
  assert spent == pytest.approx([want(rounds) for rounds in (0, 1, 10, 1000)])
  assert spent == sorted(set(spent))
  if case == "Poisson":
    assert spent[-1] == accounting.epsilon(1.3, 0.05, 1000, 1e-5)


def test_what_is_not_counted_says_why(monkeypatch):
  two = "noisy(mean(axis='data'), clip=1.0, noise=1.0, axis='data')"
  several = f"hierarchical_local_sgd(sgd(0.1), {two}, {two.replace('data', 'slice')})"
  found, epsilon, note = read(several, {"slice": 2, "data": 4})
  assert (epsilon, found["noise"], found["clip"]) == (None, [1.0, 1.0], [1.0, 1.0])
  assert "several noises" in note
  bare = f"hierarchical_local_sgd(sgd(0.1), {two}, mean(axis='slice'))"
  assert "more than what has noise" in read(bare, {"slice": 2, "data": 4}).note
  none = noisy().replace("noise=1.3", "noise=0.0")
  assert read(none).found["privacy"] == ("no guarantee: epsilon is infinite: noise=0 hides nothing")
  little = read(noisy().replace("noise=1.3", "noise=1e-25").replace("1.5", "1e3"))
  assert little.epsilon
  assert little.epsilon(1) > 1e40
  alike = noisy("mean()").replace("noise=1.3", "noise=1.3, axis='data'")
  assert "along 'slice' draw the same noise" in read(alike, SLICED).found["privacy"]
  assert read(alike).found["accounted"].startswith("the sum")
  monkeypatch.setitem(sys.modules, "dp_accounting", None)
  found, epsilon, note = read(noisy())
  assert (epsilon, found["privacy"].split(":")[0]) == (None, "not computed")
  assert note.endswith('pip install -e ".[private]"')


HIDDEN = private.noisy(mean(), clip=1.5, noise=1.3)


class KeptApart(Aggregator):
  """A wrapper that does not say what is seen of what it wraps."""

  inner: Aggregator = HIDDEN

  def init(self, params):
    return self.inner.init(params)

  def aggregate(self, tree, state, key, presence=EVERYONE):
    return self.inner.aggregate(tree, state, key, presence)


class Concealed(Aggregator):
  """An aggregator whose noise is in no field of it."""

  def aggregate(self, tree, state, key, presence=EVERYONE):
    return HIDDEN.aggregate(tree, state, key, presence)


class Opaque(DataParallel):
  """A method that adds noise by itself."""

  def sync(self, local, state, *, key, presence=EVERYONE):
    return super().sync(local, state, key=key, presence=presence)

  @property
  def exchange(self):
    return HIDDEN


class Plain(DataParallel):
  """A method of somebody else without noise."""


@pytest.fixture
def plugin(monkeypatch):
  """Aggregators and methods that are registered under names of their own."""
  monkeypatch.setattr(registry, "ADDED", {})
  closed = lambda rate: data_parallel(registry.build("optimizer", f"sgd({rate})"), HIDDEN)
  registry.register("aggregator", "dp")(private.noisy)
  registry.register("aggregator", "hidden")(lambda: HIDDEN)
  registry.register("aggregator", "kept_apart")(KeptApart)
  registry.register("aggregator", "concealed")(Concealed)
  registry.register("method", "closed")(closed)
  registry.register("method", "opaque")(lambda: Opaque(optax.sgd(0.1), mean()))
  registry.register("method", "plain")(lambda: Plain(optax.sgd(0.1), mean()))


def test_noise_is_counted_whatever_it_is_called(plugin):
  """By an alias, inside a plugin's aggregator or method, in any nesting; or it is said that not."""
  want = read(noisy())
  for method in (
    noisy().replace("noisy", "dp"),
    "data_parallel(sgd(0.1), hidden())",
    "data_parallel(sgd(0.1), bucketed(hidden()))",
    "averaged(delayed(data_parallel(sgd(0.1), hidden()), constant(1)))",
    "closed(0.1)",
  ):
    found = read(method)
    assert (found.found, found.note) == (want.found, "")
    assert found.epsilon
    assert want.epsilon
    assert found.epsilon(10) == want.epsilon(10)
  for method, reason in (
    ("data_parallel(sgd(0.1), kept_apart())", "does not declare what is visible"),
    ("data_parallel(sgd(0.1), bucketed(kept_apart()))", "does not declare what is visible"),
    ("data_parallel(sgd(0.1), concealed())", "noise that its fields do not declare"),
    ("opaque()", "noise that its fields do not declare"),
  ):
    found = read(method)
    assert found.epsilon is None
    assert reason in found.note
    assert found.found["privacy"].startswith("no guarantee: ")
  assert read("plain()") == ({}, None, "")
