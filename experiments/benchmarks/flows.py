"""Sends and receives TCP flows on one host, and prints when they end.

    python experiments/benchmarks/flows.py '{"number": 0, "address": "10.77.0.1", ...}'

The argument is a JSON object: `number` and `address` are those of the host, `incoming` is the
number of flows to receive, `sends` is a list of [address, bytes], and `hops` is the number of
pieces of a flow that is passed on around a ring, or 0. The program prints `ready`, reads a line,
connects, prints `connected`, and reads the start time on the monotonic clock. It then prints a JSON
object: for each sender, the seconds from the start until its last byte arrived.
"""

import json
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

PORT, CHUNK = 7000, 2**16
CONGESTION = b"cubic"  # Linux's default, so that the times do not depend on a machine's setting


def main(given: dict[str, Any]) -> None:
  """Runs the flows of one host."""
  listener = socket.create_server((given["address"], PORT), backlog=64)
  print("ready", flush=True)
  sys.stdin.readline()
  found: list[tuple[socket.socket, int]] = []
  accepting = threading.Thread(target=_accept, args=(listener, given["incoming"], found))
  accepting.start()
  out = [(_connected(address, given["number"]), size) for address, size in given["sends"]]
  accepting.join()
  print("connected", flush=True)
  start = float(sys.stdin.readline())
  ends: dict[int, float] = {}
  hops = given["hops"]
  received = threading.Semaphore(1)  # pieces that a host on a ring may send

  def receive(one: socket.socket, sender: int) -> None:
    size = int.from_bytes(_exactly(one, 8), "big")
    for piece in _pieces(size, hops or 1):
      _exactly(one, piece)
      received.release()
    ends[sender] = time.monotonic() - start

  def send(one: socket.socket, size: int) -> None:
    one.sendall(size.to_bytes(8, "big"))
    for piece in _pieces(size, hops or 1):
      if hops:
        received.acquire()
      one.sendall(bytes(piece))

  time.sleep(max(0.0, start - time.monotonic()))
  _all([lambda one=one, of=of: receive(one, of) for one, of in found] + _sends(send, out))
  print(json.dumps(ends), flush=True)


def _sends(send: Callable[..., None], out: list[tuple[socket.socket, int]]) -> list[Callable]:
  return [lambda one=one, size=size: send(one, size) for one, size in out]


def _all(tasks: list[Callable[[], None]]) -> None:
  """Runs tasks in threads, and waits for their ends."""
  threads = [threading.Thread(target=task) for task in tasks]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()


def _accept(listener: socket.socket, count: int, found: list[tuple[socket.socket, int]]) -> None:
  for _ in range(count):
    one, _ = listener.accept()
    found.append((one, int.from_bytes(_exactly(one, 4), "big")))


def _connected(address: str, number: int) -> socket.socket:
  one = socket.create_connection((address, PORT))
  one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
  one.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, CONGESTION)
  one.sendall(number.to_bytes(4, "big"))
  return one


def _pieces(size: int, count: int) -> list[int]:
  return [size * (i + 1) // count - size * i // count for i in range(count)]


def _exactly(one: socket.socket, size: int) -> bytes:
  """Receives a number of bytes; returns the last part of them."""
  part = b""
  while size:
    part = one.recv(min(size, CHUNK))
    if not part:
      raise ConnectionError("the sender closed the connection early")
    size -= len(part)
  return part


if __name__ == "__main__":
  main(json.loads(sys.argv[1]))
