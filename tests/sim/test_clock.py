"""The virtual clock: closed forms of who is done when, and the same draws in both forms."""

import math

import numpy as np
import pytest
from problems import regression
from subset import slow_except

from research.core import registry
from research.parallel.job import Job, stages
from research.sim.clock import (
  Lockstep,
  asynchronous,
  exponential,
  lognormal,
  measured,
  steady,
  synchronous,
)
from research.training.plan import Plan
from research.training.virtual import VirtualRounds, played, rounds_within

W = 8
LAWS = {
  "steady": "steady(0.5)",
  "steady of each": f"steady({[0.5 + 0.1 * i for i in range(W)]})",
  "exponential": "exponential(0.4, shift=0.1, slowdown={0: 4})",
  "lognormal": "lognormal(0.5, 1.2)",
  "measured": "measured([[0.3, 0.4, 0.8]], slowdown={2: 0.5, 7: 3.0})",
  "measured of each": f"measured({[[0.3, 0.1 * (i + 1)] for i in range(W)]})",
}


def by_hand(speeds, workers, events, seed, period, communication):
  """The server's loop, one event after the other; a worker's times as `synchronous` draws them."""
  seeds = np.random.SeedSequence(seed).spawn(workers)
  drawn = [speeds.draw(np.random.default_rng(s), i, events * period) for i, s in enumerate(seeds)]
  lasts = [d.reshape(events, period).sum(1) + communication for d in drawn]
  done, pulled, rounds = [times[0] for times in lasts], [0] * workers, [0] * workers
  trace = []
  for version in range(events):
    now, i = min((t, i) for i, t in enumerate(done))
    trace.append((i, version - pulled[i], now))
    pulled[i], rounds[i] = version + 1, rounds[i] + 1
    done[i] = now + lasts[i][min(rounds[i], events - 1)]
  return trace


@pytest.mark.parametrize("law", LAWS)
def test_the_trace_is_that_of_a_server_which_takes_what_comes(law):
  speeds = registry.build("speeds", LAWS[law])
  for seed, period, communication in ((0, 1, 0.0), (3, 5, 0.25)):
    trace = asynchronous(speeds, W, 300, seed, period, communication)
    assert [x.dtype for x in trace] == [np.int32, np.int32, np.float64]
    want = by_hand(speeds, W, 300, seed, period, communication)
    assert list(zip(*(x.tolist() for x in trace), strict=True)) == want
    again = asynchronous(speeds, W, 300, seed, period, communication)
    assert all(map(np.array_equal, trace, again))
    # a longer run goes on as the shorter one did
    longer = asynchronous(speeds, W, 777, seed, period, communication)
    assert all(np.array_equal(a[:300], b) for a, b in zip(longer, trace, strict=True))
    # each worker saw the same steps as in lockstep, where the slowest one sets the pace
    rounds = np.bincount(trace.owners, minlength=W).min()
    own = [trace.seconds[trace.owners == i][:rounds] for i in range(W)]
    lasted = np.diff(own, axis=1, prepend=0) - communication
    ends = synchronous(speeds, W, [period] * rounds, seed, communication)
    np.testing.assert_allclose(ends, np.cumsum(lasted.max(0) + communication), rtol=1e-12)


@pytest.mark.parametrize("law", slow_except([*LAWS][:2], LAWS))
def test_rounds_in_pieces_end_as_rounds_at_once(law, monkeypatch):
  """Bit for bit, whatever the pieces, the periods and the order of the questions."""
  speeds, steps = registry.build("speeds", LAWS[law]), [1] * 5 + [4] * 4 + [2] * 30
  want = synchronous(speeds, W, steps, 3)
  draws = Lockstep(speeds, W, 3)
  pieces = [draws.ends(part) for part in np.split(np.array(steps), [1, 2, 9, 30])]
  np.testing.assert_array_equal(np.concatenate(pieces), want)
  method = registry.build("method", "local_sgd(sgd(0.1), mean(), period=[[0, 1], [5, 4], [9, 2]])")
  plan = Plan(stages(Job(method, regression(), {"data": W}, np.full(W, 30), 8)))
  for count in (1, 8, 2**16):
    monkeypatch.setattr(VirtualRounds, "STEPS", count)
    virtual = played(speeds, plan, W, 3)(len(steps))
    assert [virtual.at(rounds) for rounds in (39, 1, 2, 17, 0, 9)] == [
      want[38], want[0], want[1], want[16], 0, want[8]
    ]  # fmt: skip
    assert virtual.at(9.25) == pytest.approx(want[8] + (want[9] - want[8]) / 4)
    assert virtual.at(0.5) == pytest.approx(want[0] / 2)
    for seconds, rounds in ((want[20], 21), ((want[20] + want[21]) / 2, 21), (want[0], 1)):
      assert rounds_within(played(speeds, plan, W, 3), seconds) == rounds


def test_more_rounds_than_can_be_counted_or_ordered_are_refused(monkeypatch):
  monkeypatch.setattr("research.training.virtual.MOST", 256)
  job = lambda spec: Job(
    registry.build("method", spec), regression(), {"data": 2}, np.full(2, 30), 8
  )
  waiting = played(steady(1.0), Plan((job("data_parallel(sgd(0.1), mean())"),)), 2, 0)
  monkeypatch.setattr(VirtualRounds, "STEPS", 64)
  assert rounds_within(waiting, 100.5) == 100
  with pytest.raises(ValueError, match="256 rounds end after 256 s"):
    rounds_within(waiting, 1e9)
  assert waiting(2**31).at(300) == 300  # a run is as long as it likes
  served = played(steady(1.0), Plan((job("asgd(sgd(0.1), mean())"),)), 2, 0)
  assert rounds_within(served, 50.5) == 100
  with pytest.raises(ValueError, match="256 rounds end after 128 s"):
    rounds_within(served, 1e9)
  with pytest.raises(ValueError, match="257 rounds to be ordered before the first; at most 256"):
    served(257)


def test_another_seed_and_other_workers_draw_otherwise():
  speeds = exponential(1.0)
  one, other = (asynchronous(speeds, W, 50, seed).seconds for seed in (0, 1))
  assert not np.array_equal(one, other)
  random = np.random.SeedSequence(0).spawn(2)
  first, second = (np.random.default_rng(s).standard_exponential(3) for s in random)
  assert not np.intersect1d(first, second).size


def test_equal_speeds_are_a_round_robin():
  owners, staleness, seconds = asynchronous(steady(0.1), W, 10 * W, 0, period=3)
  assert np.array_equal(owners, np.tile(np.arange(W), 10))
  assert np.array_equal(staleness, [*range(W), *[W - 1] * (9 * W)])
  np.testing.assert_allclose(seconds, np.repeat(0.3 * np.arange(1, 11), W))


def test_a_slow_worker_holds_up_all_or_delivers_less():
  """Four times slower: a quarter of the work, or a quarter of everybody's."""
  slow = steady(1.0, slowdown={0: 4})
  trace = asynchronous(slow, W, 1000 * (4 * (W - 1) + 1), 0)
  assert np.array_equal(np.bincount(trace.owners), [1000, *[4000] * (W - 1)])
  # at second 4 it comes before the others' fourth
  stale = trace.staleness[trace.owners == 0]
  assert np.array_equal(stale, [3 * (W - 1), *[4 * (W - 1)] * 999])
  ends = synchronous(slow, W, [5] * 10, 0, communication=2.0)
  np.testing.assert_allclose(ends, 22.0 * np.arange(1, 11))
  each = synchronous(steady([1.0, 2.0, 3.0]), 3, np.array([1, 2, 2, 4]), 0)
  np.testing.assert_allclose(each, [3, 9, 15, 27])


def test_the_laws_have_their_means_and_stragglers_their_price():
  n, random = 200_000, np.random.default_rng(0)
  for law, mean, deviation in (
    (exponential(2.0, shift=1.0), 3.0, 2.0),
    (lognormal(2.0, 0.5), 2.0, 2.0 * math.sqrt(math.expm1(0.25))),
    (measured([[1.0, 2.0, 6.0]], slowdown={0: 2}), 6.0, 2 * math.sqrt(14 / 3)),
  ):
    seconds = law.draw(random, 0, n)
    assert seconds.dtype == np.float64
    assert abs(seconds.mean() - mean) < 4 * deviation / math.sqrt(n)
    assert abs(seconds.std() / deviation - 1) < 0.05
  # the mean of the largest of W exponentials is H_W means
  rounds = 20_000
  per_round = synchronous(exponential(2.0), W, [1] * rounds, 0)[-1] / rounds
  harmonic, squares = (sum(1 / k**power for k in range(1, W + 1)) for power in (1, 2))
  assert abs(per_round - 2 * harmonic) < 4 * 2 * math.sqrt(squares / rounds)
  # one at a time, W workers deliver W works per mean
  events = 40_000
  trace = asynchronous(exponential(2.0), W, events, 0)
  assert abs(trace.seconds[-1] * W / (2 * events) - 1) < 4 / math.sqrt(events)
  assert abs(trace.staleness.mean() - (W - 1)) < 0.01


REFUSED = {
  "seconds=0 is not in .0, inf": lambda: steady([1.0, 0.0]),
  r"seconds=\[\] is not in": lambda: measured([[]]),
  "seconds is not a list of step times": lambda: measured([]),
  "mean=-1 is not in": lambda: exponential(-1.0),
  "shift=-1 is not in": lambda: exponential(1.0, shift=-1),
  "sigma=nan is not in": lambda: lognormal(1.0, math.nan),
  "slowdown=0 is not in": lambda: steady(1.0, slowdown={0: 0}),
  "is not a factor by worker number, such as .0: 4": lambda: steady(1.0, slowdown=[4, 1]),  # type: ignore
  "is not a dictionary .a whole number: a number": lambda: registry.build(
    "speeds", "steady(1.0, slowdown={0: [1, 2]})"
  ),
  "speeds are those of 3 workers, and there are 8": lambda: synchronous(
    steady([1, 2, 3]), W, [1], 0
  ),
  "those of 2 workers": lambda: asynchronous(measured([[1], [2]]), W, 1, 0),
  "slowdown names worker 8, and there are 8 workers": lambda: asynchronous(
    steady(1.0, slowdown={8: 2}), W, 1, 0
  ),
  "workers=0": lambda: asynchronous(steady(1.0), 0, 1, 0),
  "events=0": lambda: asynchronous(steady(1.0), W, 0, 0),
  "rounds=0": lambda: synchronous(steady(1.0), W, [], 0),
  "steps=0": lambda: synchronous(steady(1.0), W, [1, 0], 0),
  "period=0": lambda: asynchronous(steady(1.0), W, 1, 0, 0),
  "communication=-1 is not in": lambda: synchronous(steady(1.0), W, [1], 0, -1),
}


@pytest.mark.parametrize("message", REFUSED)
def test_mistakes_are_refused(message):
  with pytest.raises(ValueError, match=message) as caught:
    REFUSED[message]()
  assert "\n" not in str(caught.value)
