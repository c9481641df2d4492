"""Computes what it takes to train 70 billion parameters on 1,000 sites, without training.

This is bench.py's suite sites. The bytes are those of each method's traced program. The computing
and the memory beside the state are those of programs that XLA:TPU compiled for two sites
(results/compile/70b_v5p_mean and 70b_v5p_diloco). The time of exchanges and the sites' presence are
those of the simulated network. Whether a method learns as much per token with 1,000 workers is not
computed.
"""

import functools
import json
from typing import Any, NamedTuple

import numpy as np

from experiments.benchmarks.hosts import ROOT, tell

SITES, REGIONS = 1000, ("eastus", "westeurope", "brazilsouth", "southeastasia", "japaneast")
MODEL = "transformer('8b', layers=80, width=8192, heads=64, kv_heads=8, hidden=28672, remat=True)"
# The programs of two sites, with an exchange in every step, and with one in 50 steps.
EVERY_STEP, SELDOM = "70b_v5p_mean", "70b_v5p_diloco"
TOKENS, BATCH, CONTEXT = 15e12, 8, 4096  # in all; sequences per site and step; tokens of each
CHIPS = 32  # of each site, v5p:2x4x4
STEPS, DAY = TOKENS / (SITES * BATCH * CONTEXT), 86_400
JITTER = 0.05  # of the logarithm of a step's time
UTILIZATION = 0.5  # of the chip's peak rate
RATES = (0.1, 1.0, 10.0)  # medians of the sites' links in Gbit/s, in each direction
SPREAD, SERVER = 0.5, 100.0  # of the logarithm of the rates; Gbit/s of a server
ROUNDS, MESSAGES = 20, 20  # simulated rounds; simulated messages of each site to a server
CHURN = (86_400.0, 3_600.0)  # mean seconds of a presence, and of an absence
WAITING = 0.2  # share of the time that sites may wait, for the link that would be needed
CHIP_DOLLARS = 4.20  # per chip and hour: an assumption; see https://cloud.google.com/tpu/pricing
SENT_DOLLARS = 0.05  # per GB beyond 150 TB a month; https://aws.amazon.com/ec2/pricing/on-demand/

_ADAMW = "adamw(3e-4)"
_NESTEROV = "sgd(0.7, momentum=0.9, nesterov=True)"
METHODS = {
  "AdamW float32": f"data_parallel({_ADAMW}, mean())",
  "AdamW bfloat16": f"data_parallel({_ADAMW}, two_phase(bf16()))",
  "AdamW PowerSGD of rank 16": f"data_parallel({_ADAMW}, error_feedback(power_sgd(16)))",
  "DiLoCo float32": f"diloco({_ADAMW}, {_NESTEROV}, mean(), period=100)",
  "DiLoCo int4": f"diloco({_ADAMW}, {_NESTEROV}, error_feedback(two_phase(int4())), period=100)",
  "streaming DiLoCo int4": f"streaming_diloco({_ADAMW}, {_NESTEROV}, two_phase(int4()), "
  "period=100, fragments=4, delay=10)",
  "MuLoCo 2 bits": f"diloco(muon(3e-4), {_NESTEROV}, error_feedback(gather_mean(statistical(2))), "
  "period=100)",
  "SparseLoCo": f"diloco({_ADAMW}, sgd(1.0), error_feedback(gather_mean(block_top_k()), "
  "decay=0.95), period=100)",
  "hierarchical averaging": f"hierarchical_local_sgd({_ADAMW}, mean(axis='data'), "
  "mean(axis='slice'), inner_period=100, outer_period=4)",
  "gossip": f"d_psgd({_ADAMW}, gossip(one_peer_exponential()), period=100)",
  "buffered asynchrony": f"delayed(diloco({_ADAMW}, chain(apply_every(250), sgd(0.0028)), mean(), "
  "period=100), last_pull())",
}
SERVED, SLICED = "buffered asynchrony", "hierarchical averaging"
INSIDE = {"fsdp": 8, "model": 4}  # the axes inside a site
_WITHOUT_RATES = 1e9  # Gbit/s at which only delays count


class Step(NamedTuple):
  """A local step of all sites on a simulated network."""

  seconds: float
  waiting: float  # share of the time in which sites wait for the network
  present: float  # share of the sites that take part


class Site(NamedTuple):
  """What a compiled program says of a site."""

  computing: float  # seconds of a local step
  beside: float  # bytes of a chip's memory beside the state: activations, gradients, copies, code
  hbm: float  # bytes of a chip's memory


def site(name: str) -> Site:
  """Reads a compiled program."""
  found = json.loads((ROOT / "results" / "compile" / name / "compile.json").read_text())
  memory = found["memory"]
  rate = found["chip"]["flops"] * UTILIZATION
  beside = memory["used"] - memory["of_arguments"]["state"]
  return Site(found["flops"]["run"] / rate, beside, memory["hbm"])


def network(rate: float, way: str, *, spread: float = SPREAD, churn: Any = None) -> Any:
  """Returns the network of the sites.

  Args:
    rate: the median of the links' rates, in Gbit/s.
    way: "ring" or "server".
    spread: the standard deviation of the logarithm of the rates.
    churn: when the sites are present; None: always.
  """
  from research.sim.churn import Always
  from research.sim.network import Internet

  return Internet(
    REGIONS,
    upload=1000 * rate,
    download=1000 * rate,
    spread=spread,
    server=1000 * (SERVER if rate < _WITHOUT_RATES else rate),
    collective=way,
    churn=churn or Always(),
  )


def sites(names: list[str]) -> list[dict[str, Any]]:
  """Returns what each of the named methods sends, needs and costs."""
  return [_row(name) for name in names]


def merged(earlier: list[dict[str, Any]], found: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """Returns the new rows and the earlier rows of other methods, in the order of METHODS."""
  rows = {row["name"]: row for row in (*earlier, *found)}
  return [rows[name] for name in METHODS if name in rows]


def _row(name: str) -> dict[str, Any]:
  from research.core import registry
  from research.sim.churn import OnOff

  job, state = _job(name)
  found = site(EVERY_STEP if job.method.local_steps == 1 else SELDOM)
  speeds = registry.build("speeds", f"lognormal({found.computing!r}, {JITTER})")
  play = (_Served if name == SERVED else _Together)(job, speeds)
  gossips = name == "gossip"
  ways = ("server",) if name == SERVED else ("ring",) if gossips else ("ring", "server")
  by_way = {way: play.step(network(1.0, way)) for way in ways}
  way = min(by_way, key=lambda way: by_way[way].seconds)
  at = {rate: play.step(network(rate, way)) for rate in (*RATES, _WITHOUT_RATES)}
  alike = play.step(network(1.0, way, spread=0.0))
  away = None if gossips else play.step(network(1.0, way, churn=OnOff(*CHURN)))
  tell(f"{name}: {STEPS * at[1.0].seconds / DAY:,.0f} days at 1 Gbit/s")
  return {
    "name": name,
    "method": METHODS[name],
    "way": "neighbors" if gossips else way,
    "steps_per_round": job.method.local_steps,
    "computing": found.computing,
    "sent_per_step": play.sent(network(1.0, way)),
    "state_per_chip": state / CHIPS,
    "used_per_chip": state / CHIPS + found.beside,
    "hbm": found.hbm,
    "rates": {f"{rate:g}": at[rate]._asdict() for rate in RATES},
    "delays_alone": at[_WITHOUT_RATES]._asdict(),
    "equal_links": alike._asdict(),
    "churn": away and away._asdict(),
    "needed_gbits": needed(play, way, at),
  }


def _job(name: str) -> tuple[Any, int]:
  """Returns the job of a method, and the bytes of a site's state with its parameters."""
  from experiments.reports.work import memory
  from research.training import assemble
  from research.training.config import Config

  inside = ",".join(f"{axis}:{size}" for axis, size in INSIDE.items())
  slices = f"slice:{len(REGIONS)},data:{SITES // len(REGIONS)}"
  workers = slices if name == SLICED else f"data:{SITES}"
  config = Config(
    task="random_tokens()",
    model=MODEL,
    method=METHODS[name],
    mesh=f"{workers},{inside}",
    batch_size=SITES,  # what is sent does not depend on it
  )
  if name == SERVED:
    config = config.replace(mesh=workers, clock="steady(1.0)")
  problem = assemble.assemble(config, assemble.check(config))
  return problem.job, memory(problem.executor.layout)


class _Together:
  """Sites that wait for each other."""

  def __init__(self, job: Any, speeds: Any):
    from research.training.exchanges import traced

    self._job, self._speeds = job, speeds
    everyone = np.ones((1, SITES), bool)
    self._traced = functools.cache(
      lambda churn: traced(job._replace(present=everyone) if churn else job)
    )

  def step(self, network: Any) -> Step:
    """Simulates ROUNDS rounds."""
    from research.training.over_network import Rounds

    program = self._traced(not network.presence.constant)
    play = Rounds([program], network, self._links(network), self._speeds, 0)(ROUNDS)
    seconds, waited = play.seconds[-1], play.network[-1]
    steps = ROUNDS * self._job.method.local_steps
    return Step(seconds / steps, waited / seconds, float(play.counts.mean()) / SITES)

  def sent(self, network: Any) -> float:
    """Returns the bytes that a site sends per local step."""
    from research.training.exchanges import Exchanges

    links = self._links(network)
    exchanges = Exchanges(self._traced(False), network, links, 0)
    of_round = [exchanges.sending(number)[0] * links.upload[0] for number in range(ROUNDS)]
    return sum(of_round) / (ROUNDS * self._job.method.local_steps)

  def _links(self, network: Any) -> Any:
    from research.comm import mesh

    return network.links(mesh.worker_axes(self._job.axes), np.random.default_rng(0))


class _Served:
  """Sites that a server serves one by one."""

  def __init__(self, job: Any, speeds: Any):
    self._job, self._speeds = job, speeds

  def step(self, network: Any) -> Step:
    """Simulates MESSAGES messages per site, and looks at the second half."""
    from research.training.over_network import played_over
    from research.training.plan import Plan

    count = MESSAGES * SITES
    play = played_over(network, self._speeds, Plan((self._job,)), SITES, 0)(count)
    took = play.seconds[-1] - play.seconds[count // 2 - 1]
    steps = (count - count // 2) / SITES * self._job.method.local_steps
    shares, present = play.network, play.present
    assert shares is not None
    assert present is not None
    return Step(took / steps, float(shares[-1]), float(present.mean()) / SITES)

  def sent(self, network: Any) -> float:
    """Returns the bytes that a site sends per local step."""
    from research.training.exchanges import push_bytes

    return push_bytes(self._job, network.factor) / self._job.method.local_steps


def needed(play: Any, way: str, at: dict[float, Step]) -> float | None:
  """Returns the median link in Gbit/s at which sites wait for a share WAITING of the time.

  None if no link is fast enough, because delays or the server take longer.
  """
  waits = lambda one: one.seconds * one.waiting
  slow, fast = at[RATES[0]], at[RATES[1]]
  per_rate = (waits(slow) - waits(fast)) / (1 / RATES[0] - 1 / RATES[1])
  fixed = waits(fast) - per_rate / RATES[1]
  computing = fast.seconds - waits(fast)
  allowed = computing * WAITING / (1 - WAITING) - fixed
  if allowed <= 0 or per_rate <= 0:
    return None
  rate = per_rate / allowed
  return rate if play.step(network(rate, way)).waiting < WAITING + 0.02 else None
