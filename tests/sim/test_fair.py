"""Fair sharing: cases by hand, a lexicographic linear program, and conservation of bytes."""

import numpy as np
import pytest
from scipy.optimize import linprog

from research.sim.fair import end_times, fair_rates


@pytest.mark.parametrize(
  ("routes", "capacities", "rates"),
  [
    ([[0]], [5], [5]),
    ([[0], [0]], [5], [2.5, 2.5]),
    # a slow sender leaves the rest of the server's link to the others
    ([[0, 3], [1, 3], [2, 3]], [1, 10, 10, 9], [1, 4, 4]),
    ([[0, 3], [1, 3], [2, 3]], [1, 3, 10, 9], [1, 3, 5]),
    # each flow crosses two of three links
    ([[0, 1], [0, 2], [1, 2]], [1, 2, 9], [0.5, 0.5, 1.5]),
    # two senders, two receivers, and one link between each pair except one
    ([[0, 2], [0, 3], [1, 3]], [4, 6, 10, 5], [2, 2, 3]),
  ],
)
def test_cases_by_hand(routes, capacities, rates):
  found = fair_rates(np.array(routes), np.array(capacities, float))
  np.testing.assert_allclose(found, rates)


def by_linear_programs(routes, capacities):
  """Raises the lowest rate as far as possible, fixes the rates at this limit, and repeats."""
  flows, links = len(routes), len(capacities)
  uses = np.zeros((links, flows))
  for flow, route in enumerate(routes):
    uses[route, flow] = 1
  fixed = {}
  while len(fixed) < flows:
    free = [flow for flow in range(flows) if flow not in fixed]
    bounds = lambda low: [(fixed[f], fixed[f]) if f in fixed else (low, None) for f in range(flows)]
    above = np.zeros((len(free), flows + 1))
    above[range(len(free)), free], above[:, -1] = -1, 1
    limits = np.concatenate([np.c_[uses, np.zeros(links)], above])
    room = np.concatenate([capacities, np.zeros(len(free))])
    goal = np.r_[np.zeros(flows), -1]
    lowest = linprog(goal, limits, room, bounds=[*bounds(0), (0, None)]).x[-1]
    for flow in free:
      goal = -np.eye(flows)[flow]
      most = -linprog(goal, uses, capacities, bounds=bounds(lowest * (1 - 1e-9))).fun
      if most <= lowest * (1 + 1e-6):
        fixed[flow] = lowest
  return np.array([fixed[flow] for flow in range(flows)])


@pytest.mark.parametrize("seed", range(6))
def test_rates_are_those_of_linear_programs(seed):
  random = np.random.default_rng(seed)
  links, flows = 6, 7
  routes = np.array([random.choice(links, 2, replace=False) for _ in range(flows)])
  capacities = (
    random.integers(1, 6, links).astype(float) if seed % 2 else random.random(links) + 0.1
  )
  np.testing.assert_allclose(
    fair_rates(routes, capacities), by_linear_programs(routes, capacities), rtol=1e-5
  )


def test_every_flow_of_thousands_is_the_fastest_on_a_full_link():
  random = np.random.default_rng(0)
  workers = 3000
  senders, receivers = random.integers(0, workers, (2, 2 * workers))
  routes = np.stack([senders, workers + receivers], 1)
  capacities = random.lognormal(0, 1, 2 * workers)
  rates = fair_rates(routes, capacities)
  used, most = np.zeros(2 * workers), np.zeros(2 * workers)
  for column in routes.T:
    np.add.at(used, column, rates)
    np.maximum.at(most, column, rates)
  assert (used <= capacities * (1 + 1e-6)).all()
  is_bottleneck = (used >= capacities * (1 - 1e-6))[routes]
  is_bottleneck &= rates[:, None] >= most[routes] * (1 - 1e-6)
  assert is_bottleneck.any(1).all()


def test_flows_speed_up_when_others_end():
  # two flows share a link of 2: 1 byte is done at 1; the other has 2 of 3 bytes left, at rate 2
  np.testing.assert_allclose(
    end_times(np.zeros((2, 1), int), np.array([1, 3]), np.array([2.0])), [1, 2]
  )
  # by progressive filling, flow 0 has the rate 1 until it ends at 2; then flow 1 has 3
  routes, links = np.array([[0, 2], [1, 2]]), np.array([1.0, 5.0, 3.0])
  np.testing.assert_allclose(end_times(routes, np.array([2, 10]), links), [2, 4])
  np.testing.assert_allclose(end_times(routes, np.array([0, 10]), links), [0, 10 / 3])


def test_a_full_link_is_full_until_its_last_flow_ends():
  """The bytes of all flows over the capacity is the end of the last one."""
  random = np.random.default_rng(1)
  sizes = random.random(50) + 0.1
  ends = end_times(np.zeros((50, 1), int), sizes, np.array([2.0]))
  assert ends.max() == pytest.approx(sizes.sum() / 2)
  assert (np.argsort(ends) == np.argsort(sizes)).all()


def test_the_shortcut_for_links_of_one_flow_is_exact():
  """Ten thousand pairs end as each alone; a flow more on one link changes only its neighbours."""
  random = np.random.default_rng(2)
  count = 10_000
  up, down = random.lognormal(0, 1, (2, count))
  to = random.permutation(count)
  routes = np.stack([np.arange(count), count + to], 1)
  ends = end_times(routes, np.ones(count), np.concatenate([up, down]))
  np.testing.assert_allclose(ends, 1 / np.minimum(up, down[to]))
