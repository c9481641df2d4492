"""Computes how long the traffic patterns of an exchange take on a network.

A worker sends over its uplink and receives over its downlink, a server over its own two links.
Flows that are under way at the same time share these links by max-min fairness; the delay is added
to the end of a flow.
"""

import numpy as np

from research.sim.fair import end_times
from research.sim.network import Links


def through_servers(
  links: Links,
  workers: np.ndarray,
  servers: np.ndarray,
  regions: np.ndarray,
  up: float,
  down: float,
  rate: float,
) -> float:
  """Computes the time until all workers have their server's reply to the messages of all workers.

  Each worker sends a message to its server. When a server has the messages of all its workers, it
  sends one reply to each of them.

  Args:
    links: the network.
    workers: the present workers, int [n].
    servers: the server of each of these workers, int [n].
    regions: the region of each server, int [S].
    up: size of a message in bytes.
    down: size of a reply in bytes.
    rate: the rate of a server's link in each direction, in bytes per second.

  Returns:
    The time in seconds.
  """
  if not len(workers):
    return 0.0
  delay = links.to_hub(workers, regions[servers])
  received = np.zeros(len(regions))
  for size, of_workers in ((up, links.upload), (down, links.download)):
    capacities = np.concatenate([of_workers, np.full(len(regions), rate)])
    routes = np.stack([workers, len(of_workers) + servers], 1)
    ends = end_times(routes, np.full(len(workers), size), capacities) + delay
    last = np.zeros(len(regions))
    np.maximum.at(last, servers, ends)
    received += last
  return float(received.max())


def around_ring(links: Links, workers: np.ndarray, sent: float, hops: int) -> float:
  """Computes the time of a collective on a ring of workers, in which messages are passed on.

  Each worker sends `hops` messages to the next worker, one after the other; each message, except
  the first, waits for the message that the worker receives in the same hop.

  Args:
    links: the network.
    workers: the workers in the order of the ring, int [n].
    sent: bytes that each worker sends in total.
    hops: number of messages of each worker.

  Returns:
    The time in seconds.
  """
  if len(workers) < 2:
    return 0.0
  following = np.roll(workers, -1)
  rate = np.minimum(links.upload[workers], links.download[following])
  transmission, delay = sent / hops / rate, links.delay(workers, following)
  ready, sent_at = np.zeros(len(workers)), np.zeros(len(workers))
  for _ in range(hops):
    np.maximum(ready, sent_at, out=sent_at)
    sent_at += transmission
    ready = np.roll(sent_at + delay, 1)
  return float(ready.max())


def along_links(links: Links, senders: np.ndarray, receivers: np.ndarray, size: float) -> float:
  """Computes the time until every message between pairs of workers has arrived.

  Args:
    links: the network.
    senders: the sender of each message, int [F].
    receivers: the receiver of each message, int [F].
    size: size of a message in bytes.

  Returns:
    The time in seconds.
  """
  if not len(senders):
    return 0.0
  capacities = np.concatenate([links.upload, links.download])
  routes = np.stack([senders, len(links.upload) + receivers], 1)
  ends = end_times(routes, np.full(len(senders), size), capacities)
  return float((ends + links.delay(senders, receivers)).max())
