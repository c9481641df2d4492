"""Networks: closed forms of exchanges, presence, and the virtual time of runs."""

import itertools
from typing import Any

import jax
import numpy as np
import pytest
from problems import regression

import research
from research.analysis import wire
from research.core import registry
from research.parallel import inference, traffic
from research.parallel.cohorts import cohorts
from research.parallel.job import Job, resolved, stages
from research.sim import clock, regions
from research.sim.churn import Always, OnOff, RecordedTimes
from research.sim.exchange import along_links, around_ring, through_servers
from research.sim.network import Internet, Links
from research.sim.served import Served
from research.training.config import UsageError
from research.training.exchanges import Exchanges, phases, pull_bytes, push_bytes, traced
from research.training.over_network import played_over
from research.training.plan import Plan

W = 8
FREE = {"spread": 0.0, "upload": 1e9, "download": 1e9, "server": 1e12, "access": 0.0}
ALONE = {"regions": ("eastus",), **FREE}  # no delay, and links that nothing fills


def links_of(upload, download, delay=0.0):
  upload = np.asarray(upload, float)
  zeros = np.zeros(len(upload), int)
  return Links(zeros, upload, np.asarray(download, float), zeros + 1.0, np.zeros((1, 1)), delay / 2)


def plan_of(method, axes=None, sizes=None):
  axes = axes or {"data": W}
  sizes = np.full(W, 30) if sizes is None else sizes
  return Plan(stages(Job(registry.build("method", method), regression(), axes, sizes, 6)))


def played(network, speeds, plan, seed) -> Any:
  return played_over(network, speeds, plan, W, seed)


# ---- the parts


def test_round_trips_are_those_of_the_source():
  table = regions.round_trips(["eastus", "westeurope", "australiaeast"])
  assert (table == np.array([[0, 89, 207], [89, 0, 282], [207, 282, 0]]) / 1000).all()
  whole = regions.round_trips(regions.NAMES)
  assert (whole == whole.T).all()
  assert (whole[~np.eye(len(whole), dtype=bool)] > 0).all()


def test_links_depend_on_the_seed_only():
  network, axes = Internet(datacentre=0.25, slowest_decile=0.5), {"data": 4000}
  one, two, other = (network.links(axes, np.random.default_rng(seed)) for seed in (0, 0, 1))
  for a, b in zip(one[:4], two[:4], strict=True):
    assert (a == b).all()
  assert (one.upload != other.upload).any()
  mbit = 8 * one.upload / 1e6
  assert np.median(mbit[mbit < 1e4]) == pytest.approx(11.86, rel=0.1)
  assert (mbit == 1e4).mean() == pytest.approx(0.25, abs=0.03)
  assert (mbit == 0.5).mean() == pytest.approx(0.075, abs=0.02)
  assert mbit.min() == 0.5 or (mbit < 0.5).mean() == 0
  sliced = network.links({"slice": 4, "data": 2}, np.random.default_rng(0)).region
  assert sliced.tolist() == [0, 0, 1, 1, 2, 2, 0, 0]


def test_workers_come_and_go_for_exponential_times():
  timeline = OnOff(300, 100).timeline(2000, np.random.default_rng(0))
  shares = []
  for second in range(0, 4000, 50):
    timeline.advance(second)
    assert (timeline.until > second).all()
    shares.append(timeline.on.mean())
  assert np.mean(shares) == pytest.approx(0.75, abs=0.01)
  assert min(shares) > 0.7


def test_workers_come_and_go_as_recorded(tmp_path):
  file = tmp_path / "times.csv"
  file.write_text("worker,start,end\n0,0,10\n1,5,7\n0,9,12\n1,20,30\n")
  timeline = RecordedTimes(str(file)).timeline(2, np.random.default_rng(0))
  assert (timeline.on.tolist(), timeline.until.tolist()) == ([True, False], [12, 5])
  timeline.advance(6)
  assert (timeline.on.tolist(), timeline.until.tolist()) == ([True, True], [12, 7])
  timeline.advance(12)
  assert (timeline.on.tolist(), timeline.until.tolist()) == ([False, False], [np.inf, 20])
  with pytest.raises(ValueError, match="has the times of 2 workers, up to number 1, and there"):
    RecordedTimes(str(file)).timeline(3, np.random.default_rng(0))
  file.write_text("worker,start,end\n0,5,1\n")
  with pytest.raises(ValueError, match="line 2 is not worker >= 0 and 0 <= start < end"):
    RecordedTimes(str(file)).timeline(1, np.random.default_rng(0))
  with pytest.raises(ValueError, match="cannot be read: No such file"):
    RecordedTimes(str(tmp_path / "none.csv")).timeline(1, np.random.default_rng(0))


# ---- patterns


def test_a_server_receives_ten_thousand_messages_at_its_own_rate():
  count, server = 10_000, np.zeros(10_000, int)
  links = links_of(np.full(count, 5.0), np.full(count, 7.0), delay=2.0)
  found = through_servers(links, np.arange(count), server, np.zeros(1, int), 10.0, 10.0, 100.0)
  assert found == pytest.approx(2 * (count * 10 / 100 + 1.0))
  # a wide server leaves each worker the rate of its own link
  found = through_servers(links, np.arange(count), server, np.zeros(1, int), 10.0, 7.0, 1e9)
  assert found == pytest.approx(10 / 5 + 7 / 7 + 2 * 1.0)


def test_servers_of_slices_do_not_wait_for_each_other():
  links = links_of([1.0, 1.0, 4.0, 4.0], [1.0, 1.0, 0.5, 4.0])
  servers, where = np.array([0, 0, 1, 1]), np.zeros(2, int)
  found = through_servers(links, np.arange(4), servers, where, 4.0, 4.0, 1e9)
  assert found == pytest.approx(max(4 + 4, 1 + 8))


def test_a_ring_waits_for_its_slowest_link_in_each_hop():
  n, hops = 6, 10
  equal = links_of(np.full(n, 2.0), np.full(n, 8.0), delay=0.5)
  found = around_ring(equal, np.arange(n), 60.0, hops)
  assert found == pytest.approx(hops * (60 / hops / 2 + 0.5))
  # without delay, one slow link keeps all others waiting: it sends all its messages in a row
  slow = links_of([2.0, 2.0, 0.1, 2.0, 2.0, 2.0], np.full(n, 8.0))
  found = around_ring(slow, np.arange(n), 60.0, hops)
  assert 60 / 0.1 <= found <= 60 / 0.1 + n * 6 / 2


def test_messages_along_links_share_the_links_of_their_ends():
  links = links_of([2.0, 4.0, 4.0], [9.0, 9.0, 3.0], delay=1.0)
  assert along_links(links, np.array([0, 0]), np.array([1, 2]), 6.0) == pytest.approx(6 / 1 + 1)
  assert along_links(links, np.array([0, 1]), np.array([2, 2]), 6.0) == pytest.approx(6 / 1.5 + 1)


# ---- what a method sends


def seconds_of(method, network, axes=None, present=None, number=0):
  plan = plan_of(method, axes)
  job = plan.jobs[0]
  if present is not None:
    job = job._replace(present=np.ones((1, W), bool))
  links = network.links(axes or {"data": W}, np.random.default_rng(0))
  everyone = np.ones(W, bool) if present is None else present
  exchanges = Exchanges(traced(job), network, links, 0)
  layout = inference.layout_of(job)
  own = traffic.by_round(job, layout).between(number, number + 1).transfers
  return exchanges.seconds(number, everyone), wire.happened(own)


def test_the_bytes_are_those_of_the_traced_program():
  slow = Internet(**{**ALONE, "upload": 1.0, "download": 2.0})
  found, own = seconds_of("data_parallel(sgd(0.1), mean())", slow)
  payload = sum(t.payload for t in own)
  assert found == pytest.approx(8 * payload * (1 / 1e6 + 1 / 2e6))
  ring = slow.replace(collective="ring")
  found, own = seconds_of("data_parallel(sgd(0.1), mean())", ring)
  assert found == pytest.approx(8 * sum(t.sent for t in own) / 1e6)
  found, own = seconds_of("d_psgd(sgd(0.1), gossip(one_peer_exponential()))", slow, number=2)
  assert found == pytest.approx(8 * sum(t.total for t in own) / 1e6)
  found, own = seconds_of("d_psgd(sgd(0.1), gossip(ring()))", slow)
  assert found == pytest.approx(8 * sum(t.total for t in own) / 1e6)  # two messages on one uplink


@pytest.mark.slow
def test_slices_send_to_servers_of_their_own_and_then_to_one():
  axes = {"slice": 2, "data": 4}
  narrow = Internet(**{**ALONE, "server": 1.0})
  found, own = seconds_of("data_parallel(sgd(0.1), hierarchical_mean())", narrow, axes)
  inside, between, back = phases(own, 1.0)
  assert [inside.operation, between.operation, back.operation] == [
    *("all-to-all", "all-reduce", "all-gather")
  ]
  bits = 4 * 2 * inside.sent + 2 * 8 * between.payload + 4 * (back.payload + back.sent)
  assert found == pytest.approx(8 * bits / 1e6)
  local = "hierarchical_local_sgd(sgd(0.1), mean(axis='data'), mean(axis='slice'), {})"
  local = local.format("inner_period=2, outer_period=3")
  first, third = (seconds_of(local, narrow, axes, number=n)[0] for n in (0, 2))
  assert third > first
  assert seconds_of(local, narrow, axes, number=5)[0] == third


def test_a_push_is_the_encoded_gradient_and_a_pull_is_the_model():
  job = plan_of("asgd(sgd(0.1), gather_mean(int8()))", {"data": 1}).jobs[0]
  model = pull_bytes(job, 1.0)
  own = Job(
    registry.build("method", "asgd(sgd(0.1), mean())"), regression(), {"data": 1}, job.sizes, 6
  )
  assert pull_bytes(job, 3.0) == 3 * model
  assert push_bytes(resolved(own), 2.0) == 2 * model
  assert push_bytes(job, 1.0) < model


def test_absent_workers_send_nothing():
  narrow = Internet(**{**ALONE, "server": 1.0})
  half = np.arange(W) % 2 == 0
  whole, _ = seconds_of("local_sgd(sgd(0.1), mean(), period=2)", narrow, present=half | True)
  part, _ = seconds_of("local_sgd(sgd(0.1), mean(), period=2)", narrow, present=half)
  assert part == pytest.approx(whole / 2)


# ---- virtual time


@pytest.mark.parametrize(
  "method",
  [
    pytest.param("local_sgd(sgd(0.1), mean(), period=3)", marks=pytest.mark.slow),
    "asgd(sgd(0.1), mean())",
  ],
)
def test_a_free_network_leaves_the_times_of_the_clock(method):
  speeds, plan = clock.exponential(1.0, slowdown={2: 3}), plan_of(method)
  network = Internet(**ALONE)
  found = played(network, speeds, plan, 5)(40)
  if plan.jobs[0].method.one_by_one:
    want = clock.asynchronous(speeds, W, 40, 5)
    assert (found.order == want.owners).all()
    assert (found.staleness == want.staleness).all()
    np.testing.assert_allclose(found.seconds, want.seconds, rtol=1e-6)
  else:
    want = clock.synchronous(speeds, W, [3] * 40, 5)
    np.testing.assert_allclose(found.seconds, want, rtol=1e-6)
    assert found.columns(40)["present"] == W
  assert found.columns(40)["network_share"] < 1e-6


def test_a_server_on_a_network_is_a_queue():
  """Two workers that compute for 1 s, and a message that fills the server's link for 4 s alone."""
  links = links_of([9.0, 9.0], [1e9, 1e9])
  timeline = Always().timeline(2, np.random.default_rng(0))
  served = Served(links, 1.0, 4.0, 1e-9, lambda worker: 1.0 + worker, timeline)
  trace, shares, present = served.trace(3)
  # worker 0 sends 1 of 4 bytes alone until 2 s, and 3 at half the rate; worker 1 then finishes
  np.testing.assert_allclose(trace.seconds[:2], [1 + 1 + 6, 9], atol=1e-6)
  assert trace.owners.tolist()[:2] == [0, 1]
  assert (present == 2).all()
  assert ((shares > 0.5) & (shares < 1)).all()


@pytest.mark.slow
def test_a_longer_run_begins_as_a_shorter_one():
  plan = plan_of("local_sgd(sgd(0.1), mean(), period=3)")
  network = Internet(churn=OnOff(30, 30), unequal=0.5)
  run = played(network, clock.exponential(1.0), plan, 1)
  short, long = run(10), run(60)
  again = played(network, clock.exponential(1.0), plan, 1)(60)
  assert (long.seconds[:10] == short.seconds).all()
  assert (again.seconds == long.seconds).all()
  assert (again.present == long.present).all()
  assert (long.counts == long.present.sum(1)).all()
  assert 0 < long.present.mean() < 0.7
  assert (np.diff(long.seconds) > 0).all()
  whole = long.columns(60)["network_share"] * long.seconds[-1]
  assert whole == pytest.approx(long.network[-1], rel=1e-4)


@pytest.mark.slow
def test_a_worker_that_leaves_while_it_computes_is_absent(tmp_path):
  file = tmp_path / "times.csv"
  spans = [(i, 0, 1000) for i in range(1, W)]
  file.write_text("worker,start,end\n" + "".join(f"{i},{a},{b}\n" for i, a, b in spans) + "0,0,5\n")
  network = Internet(**ALONE, churn=RecordedTimes(str(file)))
  plan = plan_of("local_sgd(sgd(0.1), mean(), period=2)")
  found = played(network, clock.steady(1.0), plan, 0)(4)
  assert found.counts.tolist() == [W, W, W - 1, W - 1]
  assert found.present[:, 0].tolist() == [True, True, False, False]
  job = resolved(plan.jobs[0]._replace(present=found.present))
  served = cohorts(job, jax.random.key(0), jax.numpy.arange(4))[1]
  assert (np.asarray(served) == found.present).all()
  with pytest.raises(ValueError, match="no worker is present after 1000"):
    played(network, clock.steady(1.0), plan, 0)(600)


@pytest.mark.slow
def test_methods_refuse_churn_as_they_refuse_dropout():
  network = Internet(churn=OnOff(30, 30))
  for method, reason in (
    ("d_psgd(sgd(0.1), gossip(ring()))", "averages neighbours, which must all be present"),
    ("data_parallel(sgd(0.1), ef21(gather_mean(top_k(0.1))))", "incompatible with dropout"),
  ):
    with pytest.raises(ValueError, match=reason):
      played(network, clock.steady(1.0), plan_of(method), 0)


@pytest.mark.slow
def test_a_run_has_the_columns_of_its_network():
  result = research.train(
    "least_squares(samples=64, features=4)",
    "local_sgd(sgd(0.1), mean(), period=2)",
    mesh="data:8",
    batch_size=16,
    steps=20,
    eval_every=10,
    log_every=10,
    clock="steady(1.0)",
    network=Internet(churn=OnOff(20, 10)),
    progress=False,
  )
  seconds = [row["virtual_seconds"] for row in result.metrics]
  assert all(a < b for a, b in itertools.pairwise([20 / 2, *seconds]))
  assert {row["present"] for row in result.metrics} <= set(range(W + 1))
  assert 0 < result.summary["network_share"] < 1


@pytest.mark.parametrize(
  ("changes", "reason"),
  [
    ({"clock": ""}, "needs clock, the time of a local step, such as steady"),
    ({"population": 8}, "cannot be combined with population"),
    ({"network": "internet(upload=0.0)"}, r"upload=0.0 is not in \(0, inf\)"),
    ({"network": "internet(['west'])"}, "did you mean 'westus2'"),
    ({"network": "internet(collective='tree')"}, "legal: server, ring"),
    ({"network": "internet(churn=on_off(0, 1))"}, r"up=0 is not in \(0, inf\)"),
  ],
)
def test_networks_that_cannot_be_are_rejected_in_one_line(changes, reason):
  arguments = {"clock": "steady(1.0)", "network": "internet()", **changes}
  with pytest.raises(UsageError, match=reason) as error:
    research.train(
      "least_squares()", "local_sgd(sgd(0.1), mean())", batch_size=16, steps=20, **arguments
    )
  assert "\n" not in str(error.value)
