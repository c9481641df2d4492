"""The cost model: what a link is, and collectives against their schedules, hop by hop."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from research.analysis import cost, wire
from research.analysis.cost import LinkSpeed, parse_link
from research.core import registry

LINK = LinkSpeed(8e3, 0.25)  # a byte per millisecond
LENGTH = 48  # float32 that a worker puts in


@pytest.mark.parametrize(
  ("spec", "link"),
  [
    ("100mbit", (1e8, 0)),
    ("100mbit,20ms", (1e8, 0.02)),
    ("1.5gbit,5us", (1.5e9, 5e-6)),
    (" 10 kbit , 1s ", (1e4, 1)),
    (".5tbit,0s", (5e11, 0)),
    ("56000bit", (56e3, 0)),
    ("100Mbit", (1e8, 0)),
  ],
)
def test_a_link_is_a_bandwidth_and_a_latency(spec, link):
  assert parse_link(spec) == pytest.approx(link)


@pytest.mark.parametrize(
  ("spec", "wrong", "legal"),
  [
    ("", "''", "mbit"),
    ("100", "'100'", "mbit"),
    ("100mb", "'100mb'", "kbit, mbit"),
    ("mbit", "'mbit'", "mbit"),
    ("-1mbit", "'-1mbit'", "mbit"),
    ("nan mbit", "'nan mbit'", "mbit"),
    ("0mbit", "'0mbit'", "not a bandwidth"),
    ("20ms", "'20ms'", "mbit"),
    ("100mbit,", "''", "us, ms, s"),
    ("100mbit,20", "'20'", "us, ms, s"),
    ("100mbit,1gbit", "'1gbit'", "us, ms, s"),
    ("100mbit,20ms,3ms", "'20ms,3ms'", "us, ms, s"),
  ],
)
def test_another_link_is_refused_by_what_is_wrong(spec, wrong, legal):
  with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
    parse_link(spec)
  assert wrong in str(error.value)
  assert legal in str(error.value)


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
  hop = LINK.latency_seconds + 8 * 4 * LENGTH * part(workers) / LINK.bits_per_second
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
