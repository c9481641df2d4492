"""Ahead of time: the table of chips, the roofline by hand, and rounds compiled for TPU chips.

The tests with `tpu` in their names compile, and need libtpu.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from experiments import compile as command
from experiments.reports import ahead
from research.analysis import chips
from research.comm import mesh as meshes
from research.parallel import inference, traffic
from research.training.config import Config, UsageError

COMPILE = Path(__file__).parents[2] / "experiments" / "compile.py"
HAS_COMPILER = importlib.util.find_spec("libtpu") is not None
needs_compiler = pytest.mark.skipif(
  not HAS_COMPILER, reason='compiling for a TPU ahead of time needs: pip install -e ".[tpu]"'
)


@pytest.mark.parametrize("name", chips.CHIPS)
def test_every_chip_has_a_source_and_a_legal_example(name):
  chip = chips.CHIPS[name]
  kind, shape = chips.parse_topology(chip.example)
  assert (kind, len(shape)) == (name, chip.dimensions)
  assert chip.source.startswith("https://cloud.google.com/tpu/docs/")
  assert 1e14 < chip.flops < 1e15
  assert 15 * 2**30 < chip.hbm < 96 * 2**30
  assert chip.link < chip.hbm_bandwidth / 10
  assert chip.dcn is None or chip.dcn < chip.link


@pytest.mark.parametrize(
  ("spec", "wrong", "legal"),
  [
    ("", "''", "v5p:8x8x8"),
    ("v9:2x2", "'v9'", "v4 (such as v4:4x4x4)"),
    ("8x8", "'8x8'", "v6e"),
    ("v5e", "v5e:AxB", "v5e:16x16"),
    ("v5e:2x2x2", "v5e:AxB", "v5e:16x16"),
    ("v5p:2x2", "v5p:AxBxC", "v5p:8x8x8"),
    ("v5e:0x4", "v5e:AxB", "v5e:16x16"),
    ("v6e:16x32", "512 chips", "256"),
  ],
)
def test_another_topology_is_refused_with_the_legal_ones(spec, wrong, legal):
  with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
    chips.parse_topology(spec)
  assert wrong in str(error.value)
  assert legal in str(error.value)


def test_a_chip_has_two_links_along_each_long_side():
  shapes = {(2, 2): 2, (2, 4): 3, (16, 16): 4, (2, 2, 1): 2, (2, 2, 2): 3, (8, 8, 8): 6}
  assert {shape: chips.links(shape) for shape in shapes} == shapes


CHIP = chips.Chip(1e12, 2**34, 1e10, 1e9, 1e8, 2, 256, "v5e:16x16", "")


@pytest.mark.parametrize(
  ("work", "seconds", "bound"),
  [
    (chips.Work(3e12, 1e10, 4e9, 1e8), (3, 1, 1, 1), "compute"),
    (chips.Work(1e12, 5e10, 4e9, 1e8), (1, 5, 1, 1), "hbm"),
    (chips.Work(1e12, 1e10, 8e9, 1e8), (1, 1, 2, 1), "ici"),
    (chips.Work(1e12, 1e10, 4e9, 7e8), (1, 1, 1, 7), "dcn"),
    (chips.Work(1e12, 1e10, None, None), (1, 1, None, None), "compute"),
  ],
)
def test_the_roofline_by_hand(work, seconds, bound):
  found = chips.roofline(CHIP, (4, 4), work)
  assert tuple(found) == pytest.approx(seconds)
  known = [x for x in seconds if x is not None]
  assert found.bound == (bound, pytest.approx(max(known)))
  assert found.unknown == ["ici", "dcn"][: 2 * (None in seconds)]
  assert chips.utilization(CHIP, work.flops, found.bound[1]) == pytest.approx(
    work.flops / 1e12 / max(known)
  )


def test_an_unpublished_network_is_not_known_unless_it_is_not_used():
  chip = CHIP._replace(dcn=None)
  assert chips.roofline(chip, (4, 4), chips.Work(1, 1, 1, 0)).dcn == 0
  assert chips.roofline(chip, (4, 4), chips.Work(1, 1, 1, 1)).unknown == ["dcn"]


def test_only_what_goes_over_slices_leaves_them():
  sent = {"data": 3.0, "slice": 5.0, "slice+data": 7.0, "fsdp": 11.0}
  assert chips.split(sent, 1) == (26, 0)
  assert chips.split(sent, 2) == (14, 12)


def test_a_sweep_crosses_meshes_and_methods():
  config = Config(mesh="data:4", method="local_sgd(sgd(0.1), mean(), period=2)")
  pairs = lambda text: [(c.mesh, c.method) for c in command.grid(text, config)]
  one, two = "data_parallel(sgd(0.1), mean())", "signum(0.1)"
  assert pairs("data:4;data:2,fsdp:2") == [(m, config.method) for m in ("data:4", "data:2,fsdp:2")]
  assert pairs(f" x {one}; {two}") == [("data:4", one), ("data:4", two)]
  assert pairs(f"data:4;data:8 x {one};{two}") == [
    ("data:4", one),
    ("data:4", two),
    ("data:8", one),
    ("data:8", two),
  ]
  with pytest.raises(UsageError, match="name several"):
    command.grid("data:4", config)


@pytest.mark.parametrize(
  ("says", "held", "shown"),
  [
    ("temporaries (24.50G) exceeds available HBM (15.75G)", (20, 1), ("8.75", "state (20.00", "4")),
    ("Used 20.00G of 15.75G hbm. Exceeded by", (1, 2), ("4.25", "temporaries (17.00", "4")),
    ("out of memory", (1, 40), ("25.25", "examples (40.00", "8")),
  ],
)
def test_what_does_not_fit_and_what_helps(says, held, shown):
  state, examples = (2**30 * size for size in held)
  target = ahead.Target("v5e:2x2", chips.CHIPS["v5e"], (2, 2), 1, ())
  parts = {"state": state, "examples": examples}
  line = ahead.too_large(f"RESOURCE_EXHAUSTED: {says}", parts, {"data": 2, "fsdp": 2}, target)
  more, most, size = shown
  axis = "data" if "examples" in most else "fsdp"
  assert f"{more} GiB more than its 15.75 GiB; most of it {most} GiB)" in line
  assert f"'{axis}:{size}'" in line
  assert ("--batch_size" in line) == ("temporaries" in most)


def row(seconds: float, used: int, left_out: tuple[str, ...] = ()) -> dict[str, Any]:
  roofline = {"seconds_per_step": seconds, "left_out": list(left_out)}
  return {"roofline": roofline, "memory": {"used": used}}


def test_the_best_takes_least_time_of_which_all_is_known():
  rows = [row(2, 5), row(1, 9), row(1, 7), row(0.5, 1, ("dcn",)), {"refused": "no"}]
  assert command.best(rows) is rows[2]
  assert command.best(rows[3:]) is None


@pytest.mark.skipif(HAS_COMPILER, reason="the compiler is here")
def test_without_the_compiler_a_line_says_how_to_get_it():
  ended = run_command()
  assert (ended.returncode, ended.stdout) == (2, "")
  assert ended.stderr.count("\n") == 1
  assert 'pip install -e ".[tpu]"' in ended.stderr


def run_command(*arguments: str) -> subprocess.CompletedProcess:
  clean = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "TPU_"))}
  return subprocess.run(
    [sys.executable, str(COMPILE), *arguments], capture_output=True, text=True, env=clean
  )


# ---- with the compiler

MEAN = "data_parallel(sgd(0.1, momentum=0.9), mean())"
DILOCO = "diloco(sgd(0.1), sgd(0.7), error_feedback(two_phase(int8())), period=10)"
SHAPE = Config(executor="spmd", rounds=1, model="mlp(hidden=[256])", method=MEAN, batch_size=256)
PARAMETERS = 64 * 256 + 256 + 256 * 10 + 10


@pytest.fixture(autouse=True, scope="module")
def environment():
  with pytest.MonkeyPatch.context() as patch:
    for name, value in command.ENVIRONMENT.items():
      patch.setenv(name, value)
    yield


# The runs of results/compile/ in small.
HYBRID = Config(
  executor="spmd",
  rounds=1,
  task="random_tokens(512, 128, 16384)",
  model="transformer('tiny', layers=2, hidden=256, scan=True, remat=True)",
  method="data_parallel(sgd(0.1), mean())",
  mesh="data:2,fsdp:2,model:2",
  batch_size=8,
)
PERIOD = 20
OUTER = f"sgd(0.7), error_feedback(two_phase(int8())), period={PERIOD}"


@pytest.fixture(scope="module")
def hybrid(environment):
  """Collectives of a language model on three axes, with a mean and with DiLoCo."""
  target = ahead.target("v5e:2x4", 1)
  config = HYBRID.replace(method=f"diloco(sgd(0.1), {OUTER})")
  job = ahead.problem_of(config, target).job
  mean, diloco = (ahead.compiled_round(c, target) for c in (HYBRID, config))
  assert min(mean["memory"]["left"], diloco["memory"]["left"]) > 0.1
  traced = traffic.of_method(job, inference.layout_of(job), 1).transfers
  return mean["collectives"], diloco["collectives"], traced


def between(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """The collectives between workers."""
  return [row for row in rows if "data" in row["axis"].split("+")]


def sent(rows: list[dict[str, Any]]) -> float:
  return sum(row["sent_bytes"] * row["times"] for row in rows)


@needs_compiler
def test_tpu_workers_send_the_encoded_shards_and_nothing_else(hybrid):
  """Between workers: what was traced of a device's own shard, and the losses of a round."""
  _, diloco, traced = hybrid
  devices = 4  # of a worker, whose payloads were traced together
  largest = max(row["payload_bytes"] for row in between(diloco))
  assert largest == max(transfer.payload for transfer in traced) / devices
  losses = 4 * (PERIOD + 1) / PERIOD
  assert sent(between(diloco)) == pytest.approx(
    sum(t.total for t in traced) / devices / PERIOD + losses, rel=0.05
  )


@needs_compiler
def test_tpu_compression_adds_nothing_inside_a_worker(hybrid):
  """But a flag of 4 bytes for each leaf of the memory: whether it is finite."""
  inside = lambda rows: Counter(
    {
      (row["operation"], row["axis"], row["dtype"], row["payload_bytes"]): row["times"]
      for row in rows
      if row["payload_bytes"] > 4 and not between([row])
    }
  )
  mean, diloco, _ = hybrid
  assert inside(mean).total() > 20
  assert inside(diloco) == inside(mean)


@needs_compiler
def test_tpu_diloco_sends_less_than_a_mean_by_its_period(hybrid):
  """And by the four bytes of which its quantised exchange sends one."""
  mean, diloco, _ = hybrid
  assert 0 < sent(between(diloco)) <= 1.1 / PERIOD / 4 * sent(between(mean))


@needs_compiler
def test_tpu_chips_are_single_devices():
  counts = {"v4:2x2x1": 4, "v5p:2x2x1": 4, "v5e:2x4": 8, "v6e:2x2": 4}
  assert {name: len(ahead.target(name, 1).devices) for name in counts} == counts
  assert len(ahead.target("v5e:2x2", 3).devices) == 12


@needs_compiler
@pytest.mark.parametrize(("axes", "slices"), [("data:2,fsdp:8", 1), ("slice:2,data:2,fsdp:8", 2)])
def test_tpu_axes_may_share_a_side_of_the_torus(axes, slices):
  """Of 4 x 4 chips: no side, and not both, has 2 or 8."""
  devices = ahead.target("v6e:4x4", slices).devices
  mesh = meshes.device_mesh(meshes.parse_mesh(axes), devices)
  assert sorted(device.id for device in mesh.devices.flat) == sorted(d.id for d in devices)


@needs_compiler
def test_tpu_round_by_hand():
  """A worker's batch is 128 examples, shared by two chips; an input layer has no input gradient."""
  target = ahead.target("v5e:2x2", 1)
  found = ahead.compiled_round(SHAPE.replace(mesh="data:2,fsdp:2"), target)
  flops = 2 * 128 * (2 * 64 * 256 + 3 * 256 * 10) / 2
  assert found["flops"] == {"run": flops, "needed": flops}

  memory = found["memory"]
  assert memory["of_arguments"]["state"] == pytest.approx(2 * 4 * PARAMETERS / 2, rel=0.01)
  assert memory["arguments"] >= sum(memory["of_arguments"].values())
  parts = (memory[name] for name in ("arguments", "outputs", "temporaries", "code"))
  assert memory["used"] == sum(parts) - memory["aliased"]
  assert memory["left"] == pytest.approx(1 - memory["used"] / (15.75 * 2**30))

  sent = lambda axis: sum(
    row["sent_bytes"] * row["times"] for row in found["collectives"] if row["axis"] == axis
  )
  assert sent("data") == pytest.approx(4 * PARAMETERS / 2, rel=0.01)  # shards of the gradient
  assert not any(row["crosses_slices"] for row in found["collectives"])

  roof = found["roofline"]
  assert roof["seconds"]["compute"] == pytest.approx(flops / 197e12)
  assert roof["seconds"]["ici"] == pytest.approx((sent("data") + sent("fsdp")) / (2 * 50e9))
  assert roof["seconds"]["hbm"] >= 2 * memory["of_arguments"]["state"] / 819e9
  assert (roof["dcn_bytes"], roof["left_out"]) == (0, [])
  slowest = max(roof["seconds"].values())
  assert roof["seconds_per_step"] == slowest == roof["seconds"][roof["bound_by"]]
  assert roof["mfu"] == pytest.approx(flops / (slowest * 197e12))

  text = command.report(found, target)
  for shown in ("temporaries", "left", "all-reduce", "compute", "HBM", "ICI", "DCN", "MFU"):
    assert shown in text


@needs_compiler
def test_tpu_slices_talk_over_their_axis_alone():
  """Of DiLoCo in ten steps: an exchange of int8, once."""
  target = ahead.target("v5e:2x2", 2)
  config = SHAPE.replace(mesh="slice:2,data:2,fsdp:2", method=DILOCO)
  found = ahead.compiled_round(config, target)
  crossing = [row for row in found["collectives"] if row["crosses_slices"]]
  assert {row["axis"] for row in crossing} == {"slice"}
  assert any(row["dtype"] == "uint8" and row["times"] == 0.1 for row in crossing)
  roof = found["roofline"]
  dense = 4 * PARAMETERS / 2  # of a chip's gradient, to another slice
  assert 0 < roof["dcn_bytes"] < dense / 10
  assert roof["seconds"]["dcn"] == pytest.approx(roof["dcn_bytes"] / 3.125e9)
  assert found["flops"]["run"] == pytest.approx(found["flops"]["needed"])


@needs_compiler
def test_tpu_slices_exchange_while_they_compute():
  """Each of two fragments is on its way during the 3 of 4 local steps before it is due."""
  target = ahead.target("v5e:2x2", 2)
  late = "streaming_diloco(sgd(0.1), sgd(0.7), mean(), period=8, fragments=2, delay=3)"
  config = SHAPE.replace(mesh="slice:2,fsdp:4", model="mlp(hidden=[1024, 1024])", method=late)
  found = ahead.compiled_round(config, target)
  crossing = [row for row in found["collectives"] if row["crosses_slices"]]
  assert found["rounds"] == 5
  assert all(row["asynchronous"] for row in crossing)
  hidden = [row for row in crossing if row["products_meanwhile"]]
  sent = lambda rows: sum(row["sent_bytes"] * row["times"] for row in rows)
  assert sent(hidden) >= 0.75 * sent(crossing)  # all but a dispatch's last exchange
  text = command.report(found, target)
  assert "matrix products in a loop of 3 turns" in text


@needs_compiler
def test_tpu_model_that_does_not_fit_says_by_how_much():
  """Three times 4 bytes of 1.6e9 parameters are 17.9 GiB, and the gradient 6.0."""
  large = {"model": "mlp(hidden=[40000, 40000])", "method": "data_parallel(adam(1e-3), mean())"}
  config = SHAPE.replace(mesh="data:4", **large)
  with pytest.raises(UsageError, match=r"^--mesh='data:4': does not fit[^\n]*$") as error:
    ahead.compiled_round(config, ahead.target("v5e:2x2", 1))
  for part in ("23.92 GiB", "8.17 GiB more", "state (17.9", "'fsdp:2'"):
    assert part in str(error.value)


@needs_compiler
@pytest.mark.parametrize(
  ("changes", "slices", "message"),
  [
    ({"mesh": "data:2"}, 1, "has 2 places, and 1 x v5e:2x2 has 4 chips"),
    ({"mesh": "data:8"}, 2, "with --slices=2 the mesh has slice:2"),
    ({"mesh": "data:4", "batch_size": 6}, 1, "does not divide among 4 workers"),
    (
      {"mesh": "data:2,fsdp:2", "batch_size": 6},
      1,
      "'fsdp:2' does not divide the batch of 3 examples of a worker; nearest: --batch_size=8",
    ),
    ({"mesh": "data:2,place:2"}, 1, "unknown axis 'place'"),
  ],
)
def test_tpu_refusals(changes, slices, message):
  with pytest.raises(UsageError, match=r"^--[^\n]*$") as error:
    ahead.problem_of(SHAPE.replace(**changes), ahead.target("v5e:2x2", slices))
  assert message in str(error.value)


@needs_compiler
def test_tpu_programs_take_the_kernels_and_the_types_of_a_tpu():
  """Although a CPU traces them: attention that only TPUs have, and bfloat16 on the wire."""
  config = SHAPE.replace(
    mesh="data:4",
    task="random_tokens(512, 128, 16384)",
    model="transformer('tiny', layers=1, attention='splash')",
    method="data_parallel(sgd(0.1), gather_mean(bf16()))",
    batch_size=4,
  )
  found = ahead.compiled_round(config, ahead.target("v5e:2x2", 1), effort=-1)
  large = {row["dtype"] for row in found["collectives"] if row["payload_bytes"] > 4}
  assert large == {"bfloat16"}


@needs_compiler
def test_tpu_topology_that_no_compiler_knows():
  with pytest.raises(UsageError, match=r"the compiler says .*not divisible"):
    ahead.target("v5e:3x3", 1)


@needs_compiler
def test_tpu_command_compares_and_writes(tmp_path):
  flags = ["--topology=v5e:2x2", f"--model={SHAPE.model}", "--effort=-1"]
  ended = run_command(*flags, "--sweep=data:4;data:2", f"--out={tmp_path}")
  assert (ended.returncode, ended.stderr.count("\n")) == (0, 2)  # a line for each run
  written = json.loads((tmp_path / "compile.json").read_text())
  assert [(row["mesh"], row.get("effort")) for row in written["rows"]] == [
    ("data:4", -1),
    ("data:2", None),
  ]
  assert "has 2 places" in written["rows"][1]["refused"]
  assert written["best"]["mesh"] == "data:4"
  assert written["environment"]["versions"]["jax"]
  assert written["libtpu"]
  assert (tmp_path / "compile.md").read_text() == ended.stdout
  assert "best: --mesh='data:4'" in ended.stdout

  refused = run_command("--topology=v5e:2x2", "--mesh=data:3")
  assert refused.returncode == 2
  assert refused.stderr.startswith("error: --batch_size=256")
  assert refused.stderr.count("\n") == 1
