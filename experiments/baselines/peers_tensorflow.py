"""Runs TensorFlow's distribution strategies on several hosts, and a linear regression.

    python experiments/baselines/peers_tensorflow.py mirrored mnist.npz 96 8
    python experiments/baselines/peers_tensorflow.py server mnist.npz 96 8 0.95
    python experiments/baselines/peers_tensorflow.py regression lines.npz 2000 1

The programs are written as TensorFlow's users write them. The arguments are PROGRAM, DATA, steps,
steps per timing, and optionally a test accuracy at which to stop; evaluations are not timed. This
file needs only the extra `tensorflow`, so it may run in a different interpreter from the library.
For the first two programs, a launcher starts one process per host. The perceptron, the batch size
and the learning rate are those of `peers_torch.py`, and initial weights have the same distribution
as ours. Process 0 prints a JSON line: milliseconds per step of each timing, the last loss, steps,
and the bytes per step that all hosts together sent, without headers.
"""

# pyright: reportMissingImports=false, reportMissingModuleSource=false
# Only the extra `tensorflow` installs TensorFlow.
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow as tf

RATE, BATCH, WORKERS = 0.1, 64, 2
HEADERS = 14 + 20 + 32  # header bytes of a packet: Ethernet, IPv4, TCP with timestamps
EVERY = 40  # number of asynchronous updates between two evaluations


def perceptron() -> Any:
  """Builds a 784-1024-1024-10 perceptron with He initialization."""
  layers, start = tf.keras.layers, "he_normal"
  return tf.keras.Sequential(
    [
      tf.keras.Input((784,)),
      layers.Dense(1024, "relu", kernel_initializer=start),
      layers.Dense(1024, "relu", kernel_initializer=start),
      layers.Dense(10),
    ]
  )


def accuracy(model: Any, data: Any) -> float:
  """Returns the fraction of test images that the model classifies correctly."""
  logits = model(tf.cast(data["test_x"], tf.float32) / 255, training=False)
  return float(np.mean(np.argmax(logits, 1) == data["test_y"]))


def mirrored(data: Any, steps: int, dispatch: int, target: float | None) -> dict[str, Any] | None:
  """Trains synchronously: MultiWorkerMirroredStrategy sums all hosts' gradients in every step."""
  here, addresses = number(), [f"{host}:{port() + 1}" for host in hosts()]
  task = {"type": "worker", "index": here}
  os.environ["TF_CONFIG"] = json.dumps(
    {"cluster": {"worker": addresses}, "task": task}, allow_nan=False
  )
  strategy = tf.distribute.MultiWorkerMirroredStrategy()
  with strategy.scope():
    tf.random.set_seed(0)
    model, optimizer = perceptron(), tf.keras.optimizers.SGD(RATE)
  error = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum")

  def step(images: Any, labels: Any) -> Any:
    with tf.GradientTape() as tape:
      logits = model(tf.cast(images, tf.float32) / 255, training=True)
      loss = error(labels, logits) / (BATCH * len(addresses))
    grads = tape.gradient(loss, model.trainable_variables)
    optimizer.apply_gradients(zip(grads, model.trainable_variables, strict=True))
    return loss

  @tf.function
  def run(batches: Any) -> Any:
    loss = tf.zeros(())
    for _ in tf.range(dispatch):  # several steps per call, as TensorFlow's guide advises
      loss = strategy.run(step, next(batches))
    return loss

  rows = slice(here, None, len(addresses))
  made = lambda context: examples(data["x"][rows], data["y"][rows], here)
  batches = iter(strategy.distribute_datasets_from_function(made))
  advance = lambda: float(run(batches))
  found = timed(advance, lambda: accuracy(model, data), steps, dispatch, target)
  return found if here == 0 else None


def server(data: Any, steps: int, dispatch: int, target: float | None) -> dict[str, Any] | None:
  """Trains asynchronously by ParameterServerStrategy, with one server and a worker per host."""
  own, count = hosts(), port()
  of = {"worker": [f"{host}:{count + 2}" for host in own], "ps": [f"{own[0]}:{count + 3}"]}
  of["chief"] = [f"{own[0]}:{count + 1}"]
  if number():
    return serve(of, "worker", number())
  line = [sys.executable, __file__, "serve", json.dumps(of, allow_nan=False)]
  tasks = [subprocess.Popen([*line, kind, "0"]) for kind in ("worker", "ps")]
  with socket.create_server((own[0], count)) as ending:  # workers end when this connection ends
    peers = [ending.accept()[0] for _ in own[1:]]
    try:
      return coordinate(of, data, steps, dispatch, target)
    finally:
      for peer in peers:
        peer.close()
      for task in tasks:
        task.kill()
        task.wait()


def serve(cluster: dict[str, Any], kind: str, index: int) -> None:
  """Runs one task of a cluster until the coordinator ends."""
  spec = tf.train.ClusterSpec(cluster)
  # TensorFlow's guide: workers on few cores need this number of threads
  config = tf.compat.v1.ConfigProto(inter_op_parallelism_threads=WORKERS + 1)
  running = tf.distribute.Server(
    spec, job_name=kind, task_index=index, protocol="grpc", config=config
  )
  if kind == "worker" and index:
    with connected(hosts()[0], port()) as coordinator:
      coordinator.recv(1)
    os._exit(0)  # there is no other way to stop a server
  running.join()


def connected(host: str, where: int) -> socket.socket:
  """Connects to a port that may not be open yet."""
  while True:
    try:
      return socket.create_connection((host, where))
    except OSError:
      time.sleep(0.05)


def coordinate(
  cluster: dict[str, Any], data: Any, steps: int, dispatch: int, target: float | None
) -> dict[str, Any]:
  """Schedules steps on free workers; the rate is halved, since the steps of both workers add up."""
  spec = tf.train.ClusterSpec(cluster)
  resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
    spec, task_type="chief", task_id=0, rpc_layer="grpc"
  )
  strategy = tf.distribute.ParameterServerStrategy(resolver)
  coordinator = tf.distribute.coordinator.ClusterCoordinator(strategy)
  with strategy.scope():
    tf.random.set_seed(0)
    model, optimizer = perceptron(), tf.keras.optimizers.SGD(RATE / WORKERS)
  error = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum")

  def step(images: Any, labels: Any) -> Any:
    with tf.GradientTape() as tape:
      loss = error(labels, model(tf.cast(images, tf.float32) / 255, training=True)) / BATCH
    grads = tape.gradient(loss, model.trainable_variables)
    optimizer.apply_gradients(zip(grads, model.trainable_variables, strict=True))
    return loss

  @tf.function
  def one(batches: Any) -> Any:
    return strategy.run(step, next(batches))

  @tf.function
  def made() -> Any:
    return examples(data["x"], data["y"], None)

  batches = iter(coordinator.create_per_worker_dataset(made))
  each = EVERY if target else dispatch

  def advance() -> float:
    losses = [coordinator.schedule(one, args=(batches,)) for _ in range(each)]
    coordinator.join()
    return float(losses[-1].fetch())

  return timed(advance, lambda: accuracy(model, data), steps, each, target)


def regression(data: Any, steps: int, dispatch: int, target: float | None) -> dict[str, Any]:
  """Trains a linear regression on two devices with batches of 32; reads the loss of every batch."""
  del dispatch, target
  device = tf.config.list_physical_devices("CPU")[0]
  two = [tf.config.LogicalDeviceConfiguration()] * WORKERS
  tf.config.set_logical_device_configuration(device, two)
  strategy = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(WORKERS)])
  with strategy.scope():
    model = tf.keras.Sequential([tf.keras.Input((data["x"].shape[1],)), tf.keras.layers.Dense(1)])
    optimizer = tf.keras.optimizers.SGD(RATE)
  pairs = tf.data.Dataset.from_tensor_slices((data["x"], data["y"])).shuffle(len(data["y"]))
  batches = iter(strategy.experimental_distribute_dataset(pairs.repeat().batch(32)))

  def step(x: Any, y: Any) -> Any:
    with tf.GradientTape() as tape:
      loss = tf.reduce_sum((model(x, training=True)[:, 0] - y) ** 2) / 2 / 32
    grads = tape.gradient(loss, model.trainable_variables)
    optimizer.apply_gradients(zip(grads, model.trainable_variables, strict=True))
    return loss

  @tf.function
  def train(x: Any, y: Any) -> Any:
    return strategy.reduce(tf.distribute.ReduceOp.SUM, strategy.run(step, (x, y)), axis=None)

  seconds, loss = [], 0.0
  for i in range(steps):
    start = time.perf_counter()
    loss = float(train(*next(batches)))
    seconds.append(time.perf_counter() - start)
    print(f"batch {i + 1}: loss {loss:.6f}", file=sys.stderr)
  return {"milliseconds": [1000 * s for s in seconds[2:]], "loss": loss, "steps": steps}


def examples(x: Any, y: Any, seed: int | None) -> Any:
  """Returns an endless data set of batches of images, in random order."""
  whole = tf.data.Dataset.from_tensor_slices((x, y))
  return whole.shuffle(len(x), seed=seed).repeat().batch(BATCH).prefetch(2)


def timed(
  advance: Callable[[], float],
  score: Callable[[], float],
  steps: int,
  each: int,
  target: float | None,
) -> dict[str, Any]:
  """Repeatedly advances by `each` steps; measures time and bytes from the third repetition on."""
  seconds: list[float] = []
  sent, loss = 0, 0.0
  for _ in range(-(-steps // each)):
    if len(seconds) == 2:
      sent = payload()
    start = time.perf_counter()
    loss = advance()
    seconds.append(time.perf_counter() - start)
    if target is not None and score() >= target:
      break
  counted = max(1, len(seconds) - 2) * each
  found = {"milliseconds": [1000 * s / each for s in seconds[2:]], "loss": loss}
  return found | {"steps": each * len(seconds), "bytes": (payload() - sent) / counted}


def payload() -> int:
  """Returns the bytes that all hosts have sent, from the kernel's counters, without headers."""
  interface, _, places = os.environ.get("NETWORK_COUNTERS", "").partition(":")
  total = 0
  for place in filter(None, places.split(",")):
    for name, values in links(Path(place)):
      total += (values[8] - HEADERS * values[9]) if name == interface else 0
  return total


def links(place: Path) -> Iterator[tuple[str, list[int]]]:
  """Yields the interfaces and counters of a file in the format of /proc/net/dev."""
  for line in place.read_text().splitlines()[2:]:
    name, _, values = line.partition(":")
    yield name.strip(), [int(value) for value in values.split()]


def number() -> int:
  """Returns the index of this host."""
  return int(os.environ["JAX_PROCESS_ID"])


def port() -> int:
  """Returns the first process's port, set by the launcher; the next three ports are also free."""
  return int(os.environ["JAX_COORDINATOR_ADDRESS"].rpartition(":")[2])


def hosts() -> list[str]:
  """Returns the addresses of all hosts; the launcher numbers them from the first address on."""
  network, _, last = os.environ["JAX_COORDINATOR_ADDRESS"].partition(":")[0].rpartition(".")
  return [f"{network}.{int(last) + i}" for i in range(int(os.environ["JAX_NUM_PROCESSES"]))]


def main(program: str, place: str, *rest: str) -> None:
  """Runs a program, and prints the timings."""
  if program == "serve":
    serve(json.loads(place), rest[0], int(rest[1]))
    return
  of = {"mirrored": mirrored, "server": server, "regression": regression}
  steps, dispatch, *target = rest
  with np.load(place) as file:
    data = dict(file)
  found = of[program](data, int(steps), int(dispatch), float(target[0]) if target else None)
  if found:
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
  main(*sys.argv[1:])
