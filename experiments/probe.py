"""Measures the constants of the machines and of the network between them, in under two minutes.

    python launch/netlab.py --hosts=2 --rate=100mbit --cores_per_host=1 -- \\
        python experiments/probe.py --out=net.json --rate=100mbit

Any launcher starts one process per host, as for run.py; a single process measures only its machine.
The command measures, with all hosts busy at the same time:

- the computation of a local step of --task and --model with the batch of one worker,
- encoding and decoding, per element, with each of --kernels,
- the library's collectives of several sizes, at once after each other and after pauses.

The constants of the network are fitted to the times of the collectives (`analysis/fitting.py`). The
file contains the constants and all times. compare.py and advise.py take the file as --network, and
net.json,1gbit,20ms as the same machines on another link. If the link's rate on the wire is known,
--rate determines how much of it is payload.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from experiments.benchmarks import constants as measure
from experiments.compare import split
from research.analysis import fitting, network
from research.analysis.network import Network
from research.command.errors import one_line_errors
from research.command.flags import define_flags, launch
from research.command.start import start
from research.core import paths
from research.training.config import Config, flag

FLAGS = flags.FLAGS
KERNELS = (
  "int8(); bf16(); sign(); qsgd(); top_k(0.01); block_top_k(); random_k(0.01); statistical(2); "
  "power_sgd(4); majority_vote()"
)


def measured(config: Config, rate: str) -> dict[str, Any]:
  """Measures everything; returns the contents of the file.

  Args:
    config: task, model and batch size of the local step.
    rate: the rate of every host's link on the wire, or '' if it is unknown or there is none.

  Raises:
    UsageError: if a flag is invalid.
  """
  hosts = measure.Hosts()
  steps = measure.computing(hosts, config)
  kernels = measure.kernels(hosts, split(FLAGS.kernels))
  samples = measure.exchanges(hosts) if hosts.count > 1 else []
  found = fitting.fitted(samples, FLAGS.limited) if samples else fitting.Fit(Network(), [])
  constants = found.network.replace(
    computing=float(np.quantile(steps, measure.QUARTILE)),
    spread=float(np.quantile(steps.std(0) / steps.mean(0), measure.QUARTILE)),
    kernels=kernels,
    workers=hosts.count,
  )
  if rate and samples:
    wire_rate, _ = network.parse_link(rate)
    constants = constants.replace(efficiency=min(1.0, constants.upload / wire_rate))
  return {
    "constants": constants.as_dict(),
    "samples": [one._asdict() for one in samples],
    "errors": found.errors,
    "step_seconds": steps.tolist(),
    "task": config.task,
    "model": config.model,
    "batch_size": config.batch_size,
    "rate": rate,
  }


def main(argv: list[str]) -> None:
  """Measures the constants, writes the file and prints the constants."""
  del argv
  with one_line_errors():
    with flag("out", FLAGS.out):
      place = paths.local(FLAGS.out or "net.json")
      if place.suffix != ".json":
        raise ValueError("is the name of the file to write, such as net.json")
    with flag("rate", FLAGS.rate):
      if FLAGS.rate:
        network.parse_link(FLAGS.rate)
    config = start()
    import jax

    _check_kernels(split(FLAGS.kernels))

    from research.training import folder as folders
    from research.training.reports import report

    begin = time.monotonic()
    found = measured(config, FLAGS.rate)
    if jax.process_index():
      return
    found["seconds"] = time.monotonic() - begin
    found["environment"] = folders.environment()
    place.parent.mkdir(parents=True, exist_ok=True)
    report.write_json(place, found)
    print(told(found, place), flush=True)


def _check_kernels(specs: list[str]) -> None:
  """Rejects invalid specs before anything is measured."""
  from research.core import registry
  from research.core.spec import parse

  for spec in specs:
    with flag("kernels", spec):
      is_compressor = parse(spec).name in registry.names("compressor")
      registry.build("compressor" if is_compressor else "aggregator", spec)


def told(found: dict[str, Any], place: Path) -> str:
  """Formats the constants as a table, and says how well they fit."""
  constants = network.of_dict(found)
  rows = [
    ("a host's link", f"{constants.upload / 1e6:,.4g} Mbit/s of payload"),
    ("its burst after a pause", f"{constants.burst / 1e3:,.4g} kB"),
    ("a message of a collective", f"{1e6 * constants.message:,.4g} us"),
    ("a sent byte, beside the link's time", f"{1e9 * constants.byte:,.4g} ns"),
    ("a local step", f"{1e3 * constants.computing:,.4g} ms, spread {constants.spread:.1%}"),
  ]
  for spec, (encode, decode) in constants.kernels.items():
    rows.append((spec, f"{1e9 * encode:.3g} ns to encode an element, {1e9 * decode:.3g} to decode"))
  lines = [f"{name:36} {value}" for name, value in rows[0 if found["samples"] else 4 :]]
  if found["errors"]:
    errors = np.abs(found["errors"])
    fit = f"{np.median(errors):.1%} of a collective's time (median), {errors.max():.0%} at most"
    lines.append(f"{'the fit errs by':36} {fit}")
  return "\n".join([*lines, f"{'file':36} {place}"])


def define_own_flags() -> None:
  """Defines the flags of run.py and the flags of the probe; --out is a file."""
  define_flags()
  flags.DEFINE_string("kernels", KERNELS, "Compressors and aggregators to time, separated by ';'.")
  flags.DEFINE_string("rate", "", "Rate of every host's link on the wire, if known: 100mbit.")
  flags.DEFINE_bool("limited", True, "Whether the link limits the rate; if not, it has none.")


if __name__ == "__main__":
  define_own_flags()
  launch(main, __doc__)
