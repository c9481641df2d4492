"""The cost model: parts of a step, and collectives against their schedules, hop by hop."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from research.analysis import cost, wire
from research.analysis.network import Network
from research.core import registry

LINK = Network(8e3, 8e3, 0.25)  # a byte per millisecond
LENGTH = 48  # float32 that a worker puts in


def ring(workers: int) -> list[tuple[int, int]]:
  return [(i, (i + 1) % workers) for i in range(workers)]


# operation -> (program, hops in sequence, the part of what a worker puts in that each hop carries)
SCHEDULES = {
  "all-reduce": (lambda x, w: lax.psum(x, "data"), lambda w: 2 * (w - 1), lambda w: 1 / w),
  "reduce-scatter": (
    lambda x, w: lax.psum_scatter(x, "data", tiled=True),
    lambda w: w - 1,
    lambda w: 1 / w,
  ),
  "all-gather": (lambda x, w: lax.all_gather(x, "data"), lambda w: w - 1, lambda w: 1),
  "all-to-all": (
    lambda x, w: lax.all_to_all(x, "data", 0, 0, tiled=True),
    lambda w: w - 1,
    lambda w: 1 / w,
  ),
  "permute": (lambda x, w: lax.ppermute(x, "data", ring(w)), lambda w: 1, lambda w: 1),
}


def rows(program, axes, times=1.0):
  """A program's transfers as summary.json has them."""
  shape = jax.ShapeDtypeStruct((LENGTH,), jnp.float32)
  return [
    {
      "operation": found.operation,
      "axis": "+".join(found.axes),
      "payload_bytes": times * found.payload * found.times,
      "sent_bytes": times * found.total,
      "messages": times * found.times,
    }
    for found in wire.traffic(program, shape, axes=axes)
  ]


@pytest.mark.parametrize("workers", [1, 2, 8])
@pytest.mark.parametrize("operation", SCHEDULES)
def test_a_collective_takes_what_its_hops_take(operation, workers):
  program, hops, part = SCHEDULES[operation]
  found = rows(lambda x: program(x, workers), {"data": workers})
  assert [row["operation"] for row in found] == [operation]
  hop = LINK.latency + 8 * 4 * LENGTH * part(workers) / LINK.bits_per_second
  want = sum(hop for _ in range(hops(workers))) if workers > 1 else 0
  assert cost.seconds(found, {"data": workers}, LINK) == pytest.approx(want)


def test_what_is_sent_one_after_the_other_adds_up():
  axes = {"slice": 2, "data": 4}
  over_both = rows(lambda x: lax.psum(x, ("slice", "data")), axes)
  within = rows(lambda x: lax.scan(lambda c, _: (lax.pmean(c, "data"), None), x, None, 3)[0], axes)
  one = lambda w: 2 * (w - 1) * (0.25 + 8 * 4 * LENGTH / w / 8e3)
  assert cost.seconds(over_both, axes, LINK) == pytest.approx(one(8))
  assert cost.seconds(over_both + within, axes, LINK) == pytest.approx(one(8) + 3 * one(4))
  every_other_step = rows(lambda x: lax.psum(x, ("slice", "data")), axes, times=1 / 2)
  assert cost.seconds(every_other_step, axes, LINK) == pytest.approx(one(8) / 2)


def test_those_who_send_nothing_wait_for_the_one_who_does():
  one = rows(lambda x: lax.ppermute(x, "data", [(0, 1)]), {"data": 8})
  all_of_them = rows(lambda x: lax.ppermute(x, "data", ring(8)), {"data": 8})
  assert one[0]["sent_bytes"] < all_of_them[0]["sent_bytes"]
  assert cost.seconds(one, {"data": 8}, LINK) == cost.seconds(all_of_them, {"data": 8}, LINK)


@pytest.mark.parametrize(
  ("talking", "delay", "waiting"),
  [
    (3.0, 0, 3.0),  # all of it
    (3.0, 4, 1.0),  # half of a round computes meanwhile
    (3.0, 8, 0.0),
    (3.0, 20, 0.0),
    (5.0, 8, 1.0),  # the link is the limit: a step takes 5
    (5.0, 20, 1.0),
    (1.0, 2, 0.0),
  ],
)
def test_an_exchange_that_overlaps_costs_what_is_left(talking, delay, waiting):
  """A step computes for 4, and an exchange starts after every 8."""
  assert cost.exposed(talking, 4.0, 8, delay) == pytest.approx(waiting)


def test_a_method_says_how_long_its_exchange_may_take():
  steps = lambda spec: registry.build("method", spec).hidden_steps
  assert steps("local_sgd(sgd(0.1), mean(), period=8)") == 0
  assert steps("late(local_sgd(sgd(0.1), mean(), period=8), 11)") == 11
  assert steps("eager_diloco(sgd(0.1), sgd(0.1), mean(), period=8)") == 8
  assert steps("streaming_diloco(sgd(0.1), sgd(0.1), mean(), period=8, delay=3)") == 3


SENT = cost.Load(1000.0, 4.0)
MACHINE = LINK.replace(message=0.01, byte=1e-4)  # 4 * 0.01 s on messages, 0.1 s to copy


def step(network=MACHINE, sent=SENT, computing=4.0, **changes) -> cost.Step:
  return cost.step(sent, network, workers=8, computing=computing, **changes)


def test_a_step_is_the_sum_of_its_parts():
  assert step(encoding=0.5) == pytest.approx((4.0, 0.5, 0.04, 2.0, 2.0))
  assert step(encoding=0.5).seconds == pytest.approx(4 + 0.5 + 0.04 + 2)
  assert step(Network()).seconds == 4


def test_an_idle_link_saves_up_a_burst():
  saved = lambda burst, **changes: 2.0 - step(MACHINE.replace(burst=burst), **changes).link
  assert saved(0.0) == 0
  assert saved(100.0) == pytest.approx(0.1)
  assert saved(100.0, period=10) == pytest.approx(0.01)  # the exchange of ten steps saves it once
  assert saved(1e6, computing=0.3) == pytest.approx(0.3 + 0.04)  # it fills in the time there is
  assert saved(1e6) == pytest.approx(0.9)  # latency and copying remain
  assert saved(100.0, encoding=0.3) == pytest.approx(0.1 + 0.3)  # and between messages
  assert saved(10.0, encoding=0.3) == pytest.approx(0.01 + 4 * 0.01)  # once per message
  long = step(MACHINE.replace(burst=1e9), SENT._replace(sent=1e5), computing=0.0)
  assert long.seconds == pytest.approx(8e5 / 8e3 + 1)  # in the long run, the rate is the limit


def test_only_the_link_overlaps_with_local_steps():
  late = step(period=8, delay=8)
  assert (late.waiting, late.seconds) == pytest.approx((0.0, 4.04))
  assert step(period=8, delay=2).waiting == pytest.approx(1.0)


def test_workers_wait_for_the_slowest():
  """Of two standard normal variables the larger has the mean 1 / sqrt(pi)."""
  pair = lambda period: (
    cost.step(SENT, Network(spread=0.1), workers=2, computing=4.0, period=period).seconds
  )
  assert pair(1) == pytest.approx(4 * (1 + 0.1 / math.pi**0.5))
  assert pair(16) == pytest.approx(4 * (1 + 0.025 / math.pi**0.5))
