"""Shares links between flows by max-min fairness, and computes when the flows end.

A flow crosses some links, such as the uplink of its sender and the downlink of its receiver. An
allocation of rates is max-min fair if no flow's rate can increase without decreasing the rate of a
flow that is no faster. Progressive filling finds it: all rates rise together, and a flow stops at
the first of its links that is full.

Reference: Bertsekas and Gallager 1992, Data Networks, section 6.5.2 (max-min flow control).
"""

import numpy as np

_SAME = 1e-9  # relative difference up to which two rates or two times are equal


def fair_rates(routes: np.ndarray, capacities: np.ndarray) -> np.ndarray:
  """Computes the max-min fair rates of flows by progressive filling.

  A link whose equal share is the lowest of all links that its flows cross is a bottleneck: it fills
  first, and its flows get this share, whatever the others get. Every pass therefore fixes the flows
  of all such links at once.

  Args:
    routes: the links of each flow, int [F, K], distinct within a flow.
    capacities: the capacity of each link, float [L], above 0.

  Returns:
    The rates, float64 [F], in the unit of the capacities.
  """
  left, links = np.array(capacities, np.float64), len(capacities)
  rates, active = np.zeros(len(routes)), np.arange(len(routes))
  while active.size:
    crossed = routes[active]
    count = np.bincount(crossed.ravel(), minlength=links)
    share = left / np.maximum(count, 1)
    of_flow = share[crossed].min(1)
    lowest = np.full(links, np.inf)
    for column in crossed.T:
      np.minimum.at(lowest, column, of_flow)
    fixed = (share <= lowest * (1 + _SAME))[crossed].any(1)
    rates[active[fixed]] = of_flow[fixed]
    for column in crossed[fixed].T:
      left -= np.bincount(column, of_flow[fixed], links)
    left = np.maximum(left, 0)
    active = active[~fixed]
  return rates


def end_times(routes: np.ndarray, sizes: np.ndarray, capacities: np.ndarray) -> np.ndarray:
  """Computes when flows end that all start at time 0 and share their links fairly.

  Whenever flows end, the rates of the others are computed again. If each remaining flow fills a
  link that no other one crosses, the rates never change again, and all remaining ends follow at
  once.

  Args:
    routes: the links of each flow, int [F, K], distinct within a flow.
    sizes: the size of each flow, float [F], at least 0.
    capacities: the capacity of each link in sizes per second, float [L], above 0.

  Returns:
    The end times, float64 [F], in seconds.
  """
  left, ends, now = np.array(sizes, np.float64), np.zeros(len(routes)), 0.0
  active = np.flatnonzero(left > 0)
  while active.size:
    crossed = routes[active]
    rates = fair_rates(crossed, capacities)
    seconds = left[active] / rates
    if _own_links_full(crossed, rates, capacities):
      ends[active] = now + seconds
      break
    step = seconds.min()
    done = seconds <= step * (1 + _SAME)
    now += step
    left[active] -= step * rates
    ends[active[done]] = now
    active = active[~done]
  return ends


def _own_links_full(routes: np.ndarray, rates: np.ndarray, capacities: np.ndarray) -> bool:
  """Returns whether every flow fills a link that no other flow crosses."""
  count = np.bincount(routes.ravel(), minlength=len(capacities))
  own = (count[routes] == 1) & (rates[:, None] >= capacities[routes] * (1 - _SAME))
  return bool(own.any(1).all())
