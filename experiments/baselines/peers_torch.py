"""Runs PyTorch's DistributedDataParallel on several hosts; bench.py compares this library with it.

    python experiments/baselines/peers_torch.py dense 200 16

A launcher starts one process per host. The extra `peers` installs PyTorch. The arguments are
METHOD, steps, steps per timing, and optionally a test accuracy at which to stop; evaluations are
not timed. The perceptron, the data, the batch size and the learning rate are those of
`by_hand_hosts.py`. The output has the format of `by_hand_hosts.py`, and also contains the number of
steps.
"""

# pyright: reportMissingImports=false
# Only the extra `peers` installs PyTorch.
import json
import os
import sys
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, post_localSGD_hook
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as power
from torch.distributed.algorithms.model_averaging import averagers
from torch.nn.parallel import DistributedDataParallel

from experiments.baselines.by_hand import load

RATE, BATCH, PERIOD, RANK = 0.1, 64, 8, 4


def model_of(method: str) -> tuple[DistributedDataParallel, averagers.PeriodicModelAverager | None]:
  """Returns the perceptron under DDP, and the model averager of methods with local steps."""
  layers = [nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)]
  megabytes = 100 if method == "power_sgd" else 25  # PowerSGD needs one bucket
  model = DistributedDataParallel(nn.Sequential(*layers), bucket_cap_mb=megabytes)
  averager = None
  if method == "fp16":
    model.register_comm_hook(None, default_hooks.fp16_compress_hook)
  if method == "power_sgd":
    state = power.PowerSGDState(None, matrix_approximation_rank=RANK, start_powerSGD_iter=2)
    model.register_comm_hook(state, power.powerSGD_hook)
  if method == "local":
    alone = dist.new_subgroups(group_size=1)[0]
    local = post_localSGD_hook.PostLocalSGDState(None, alone, start_localSGD_iter=0)
    model.register_comm_hook(local, post_localSGD_hook.post_localSGD_hook)
    averager = averagers.PeriodicModelAverager(period=PERIOD)
  return model, averager


def main(method: str, steps: int, dispatch: int, target: float | None = None) -> None:
  """Trains the model, and prints the timings."""
  torch.set_num_threads(1)
  torch.manual_seed(0)
  place = f"tcp://{os.environ['JAX_COORDINATOR_ADDRESS']}"
  here, count = (int(os.environ[f"JAX_{name}"]) for name in ("PROCESS_ID", "NUM_PROCESSES"))
  dist.init_process_group("gloo", place, rank=here, world_size=count)
  config = {"task": "mnist()", "mesh": f"data:{count}"}
  examples, tested = load(config), load(config, test=True)
  x = torch.tensor(examples["x"][here].reshape(-1, 784))
  y = torch.tensor(examples["y"][here]).long()
  test_x = torch.tensor(tested["x"].reshape(-1, 784)).float() / 255
  test_y = torch.tensor(tested["y"].reshape(-1)).long()
  model, averager = model_of(method)
  optimizer = torch.optim.SGD(model.parameters(), RATE)
  seconds, value = [], 0.0
  for _ in range(steps // dispatch):
    start = time.perf_counter()
    for _ in range(dispatch):
      rows = torch.randint(len(x), (BATCH,))
      optimizer.zero_grad()
      found = nn.functional.cross_entropy(model(x[rows].float() / 255), y[rows])
      found.backward()
      optimizer.step()
      if averager:
        averager.average_parameters(model.parameters())
    value = found.item()
    seconds.append(time.perf_counter() - start)
    if target is not None:
      with torch.no_grad():
        right = (model.module(test_x).argmax(1) == test_y).float().mean().item()
      if right >= target:
        break
  if here == 0:
    found = {"milliseconds": [1000 * s / dispatch for s in seconds[2:]]}
    print(json.dumps(found | {"loss": value, "steps": dispatch * len(seconds)}), flush=True)
  dist.destroy_process_group()


if __name__ == "__main__":
  main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *map(float, sys.argv[4:]))
