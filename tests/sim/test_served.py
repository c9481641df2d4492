"""The event order of a server: equal to a vectorised transcription, and conservation of bytes."""

import numpy as np
import pytest

from research.sim.churn import Always, OnOff, RecordedTimes
from research.sim.fair import fair_rates
from research.sim.network import Internet, Links
from research.sim.served import Served
from research.sim.shared_link import SharedLink

W = 30
SIZE, REPLY = 5e6, 8e6  # bytes
UPLOAD, DELAY = 2, 0.05


def water_level(limits: np.ndarray, capacity: float) -> float:
  """Where flows fill a common link: flow i has min(limit_i, level); limits ascend."""
  below = np.cumsum(limits)
  if not len(limits) or below[-1] <= capacity:
    return np.inf
  # If the first n flows are limited by their own links, the others share what these leave.
  others = len(limits) - np.arange(len(limits))
  levels = (capacity - below + limits) / others
  return float(levels[np.argmax(levels <= limits)])


@pytest.mark.parametrize("capacity", [0.5, 3.0, 20.0, 1e9])
def test_the_water_level_is_that_of_the_fair_rates(capacity):
  limits = np.sort(np.random.default_rng(3).lognormal(0, 1, 40))
  routes = np.stack([np.arange(40), np.full(40, 40)], 1)
  want = fair_rates(routes, np.append(limits, capacity))
  np.testing.assert_allclose(np.minimum(limits, water_level(limits, capacity)), want)


class Slow:
  """The events of `Served`, with a pass over all workers for every event."""

  def __init__(self, links, rate, up, down, computing, timeline):
    workers = len(links.region)
    self.computing, self.timeline, self.rate = computing, timeline, rate
    self.delay = links.to_hub(np.arange(workers), 0)
    self.limits = {1: links.upload, 3: links.download}
    self.phase = np.zeros(workers, int)  # computing, upload, flight, download, return
    self.left = np.array([computing(i) for i in range(workers)])
    self.next_left = {1: lambda i: up, 3: lambda i: down, 0: computing}
    self.now = self.busy = self.waiting = 0.0
    self.rows = []  # owner, seconds, share, present

  def trace(self, events):
    while len(self.rows) < events:
      self.go_on()
    return map(np.array, zip(*self.rows[:events], strict=True))

  def go_on(self):
    on = self.timeline.on.copy()
    speed = on.astype(float)
    for phase, limits in self.limits.items():
      under_way = on & (self.phase == phase)
      level = water_level(np.sort(limits[under_way]), self.rate)
      speed[under_way] = np.minimum(limits[under_way], level)
    seconds = np.full(len(on), np.inf)
    np.divide(self.left, speed, out=seconds, where=on)
    change = float(self.timeline.until.min()) - self.now
    step = min(float(seconds.min()), change)
    self.busy += step * on.sum()
    self.waiting += step * (on & (self.phase != 0)).sum()
    self.now += step
    self.left -= np.where(on, step * speed, 0)
    if change <= step:
      self.timeline.advance(self.now)
    for worker in np.flatnonzero(on & (seconds <= step * (1 + 1e-12))).tolist():
      self.next_phase(worker)

  def next_phase(self, worker):
    self.phase[worker] = phase = int(self.phase[worker] + 1) % 5
    if phase == 3:
      share = self.waiting / self.busy
      self.rows.append((worker, self.now, share, self.timeline.on.sum()))
    self.left[worker] = self.next_left.get(phase, self.delay.__getitem__)(worker)


def lognormal_links(spread=1.2):
  network = Internet(("eastus", "westeurope", "japaneast"), spread=spread)
  return network.links({"data": W}, np.random.default_rng(4))


def drawn(seed=0):
  generators = [np.random.default_rng([seed, i]) for i in range(W)]
  return lambda worker: 20 * float(generators[worker].lognormal(0.0, 0.5))


def compare(links, rate, churn, computing, events=300):
  """Compares `Served` with the transcription; returns the columns of the messages.

  A full link makes the times chaotic: a relative change of its rate by 1e-15 becomes one of 1e-6
  in the times of the transcription after 1,500 messages. So few messages are compared.
  """
  timelines = [churn.timeline(W, np.random.default_rng(7)) for _ in range(2)]
  owners, seconds, shares, present = Slow(
    links, rate, SIZE, REPLY, computing(), timelines[0]
  ).trace(events)
  served = Served(links, rate, SIZE, REPLY, computing(), timelines[1])
  for part in (events // 3, events):
    trace, found_shares, found_present = served.trace(part)
    assert (trace.owners == owners[:part]).all()
    np.testing.assert_allclose(trace.seconds, seconds[:part], rtol=1e-9)
    np.testing.assert_allclose(found_shares, shares[:part], rtol=1e-9)
    assert (found_present == present[:part]).all()
  return trace, found_shares, found_present


MIDDLE = 86.04e6 / 8  # the median download rate
# The link is never full; is full if most workers send at once; is nearly always full.
RATES = {"wide": 1e12, "crossing": 1.5 * MIDDLE, "narrow": 0.1 * MIDDLE}


@pytest.mark.parametrize("churn", [Always(), OnOff(60.0, 15.0)], ids=["always", "on_off"])
@pytest.mark.parametrize("rate", RATES.values(), ids=RATES)
def test_events_are_those_of_the_transcription(rate, churn):
  _, shares, present = compare(lognormal_links(), rate, churn, drawn)
  assert ((shares > 0) & (shares < 1)).all()
  assert (present == W).all() if churn.constant else 0.7 < present.mean() / W < 0.9


@pytest.mark.parametrize("spread", [0.0, 1.2], ids=["equal", "unequal"])
@pytest.mark.parametrize("rate", [1e12, 1.5 * MIDDLE])
def test_equal_times_are_served_in_the_order_of_the_workers(rate, spread):
  """Workers that compute for 2 s or 4 s, so that many events are at one time."""
  computing = lambda: lambda worker: 2.0 + 2.0 * (worker % 2)
  links = lognormal_links(spread)._replace(region=np.zeros(W, int))
  trace, _, _ = compare(links, rate, Always(), computing)
  if not spread:
    assert (np.diff(trace.seconds) == 0).sum() > 100


def test_workers_that_leave_while_they_send_continue_when_they_return(tmp_path):
  file = tmp_path / "times.csv"
  spans = [(i, a, a + 7 + i % 5) for i in range(W) for a in range(i % 3, 4000, 13 + i % 4)]
  text = "".join(f"{i},{a},{b}\n" for i, a, b in spans)
  file.write_text(f"worker,start,end\n{text}")
  compare(lognormal_links(), RATES["narrow"], RecordedTimes(str(file)), drawn, 150)
  # all leave for good
  file.write_text("worker,start,end\n" + "".join(f"{i},0,50\n" for i in range(W)))
  timeline = RecordedTimes(str(file)).timeline(W, np.random.default_rng(0))
  served = Served(lognormal_links(), 1e12, SIZE, REPLY, drawn(), timeline)
  with pytest.raises(ValueError, match="no worker is present after 50 s"):
    served.trace(1000)


def test_a_worker_that_leaves_at_the_end_of_its_work_sends_when_it_returns(tmp_path):
  file = tmp_path / "times.csv"
  file.write_text("worker,start,end\n0,0,2\n0,5,100\n")
  timeline = RecordedTimes(str(file)).timeline(1, np.random.default_rng(0))
  zero, one = np.zeros(1, int), np.ones(1)
  links = Links(zero, one, one, one, np.zeros((1, 1)), 0.0)
  trace, _, _ = Served(links, 9.0, 4.0, 1.0, lambda _: 2.0, timeline).trace(2)
  assert trace.seconds.tolist() == [9.0, 16.0]


# ---- the shared link


@pytest.mark.parametrize("limits", ["lognormal", "equal", "few"])
@pytest.mark.parametrize("rate", [3.0, 12.0, 1e9])
def test_a_link_moves_all_bytes_and_never_more_than_its_rate(limits, rate):
  """Random starts, departures and returns; every rate is that of the water level."""
  random = np.random.default_rng(0)
  limits = {
    "lognormal": random.lognormal(0.0, 1.5, W),
    "equal": np.full(W, 0.7),
    "few": random.choice([0.1, 0.5, 2.0], W),
  }[limits]
  link, left, now = SharedLink(limits, rate), {}, 0.0
  paused: dict[int, float] = {}
  for _ in range(400):
    own = limits[list(left)]
    level = water_level(np.sort(own), rate)
    rates = np.minimum(own, level)
    assert rates.sum() <= rate * (1 + 1e-12)
    after = min(link.first(), now + random.exponential(0.3))
    assert (np.abs(np.minimum(own, link.level) - rates) <= 1e-12 * rates).all()
    for worker, speed in zip(left, rates, strict=True):
      left[worker] -= speed * (after - now)
    now = after
    ended = link.ended(now)
    for worker in ended:
      assert left.pop(worker) == pytest.approx(0.0, abs=1e-8)
    worker = int(random.integers(W))
    if worker in left:
      paused[worker] = link.stop(worker, now)
      assert paused[worker] == pytest.approx(left.pop(worker), abs=1e-8)
    else:
      left[worker] = paused.pop(worker, 10 * float(random.random()))
      link.start(worker, left[worker], now)


def test_messages_fill_a_narrow_link():
  """The bytes that arrive are those of the link's rate, but for the transfers under way."""
  rate, events = RATES["narrow"], 600
  links = lognormal_links()._replace(access=0.0, between=np.zeros((3, 3)))
  timeline = Always().timeline(W, np.random.default_rng(0))
  trace, _, _ = Served(links, rate, SIZE, 1e-3, drawn(), timeline).trace(events)
  arrived = SIZE * np.arange(1, events + 1)
  assert (arrived <= rate * trace.seconds).all()
  idle = trace.seconds[0]  # the link is idle until workers have computed, and hardly ever again
  assert (arrived + W * SIZE >= 0.99 * rate * (trace.seconds - idle)).all()
