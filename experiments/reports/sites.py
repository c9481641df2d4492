"""Formats and draws what 70 billion parameters on 1,000 sites need; see benchmarks/sites.py."""

from pathlib import Path
from typing import Any

from experiments.benchmarks.sites import (
  BATCH,
  CHIP_DOLLARS,
  CHIPS,
  CHURN,
  CONTEXT,
  DAY,
  RATES,
  SENT_DOLLARS,
  SITES,
  STEPS,
  TOKENS,
  WAITING,
)


def sites_table(rows: list[dict[str, Any]]) -> list[str]:
  """Formats the Markdown tables: the days by link, what sites wait for, and the costs."""
  lines = [
    f"\nDays to process {TOKENS / 1e12:g}e12 tokens ({STEPS:,.0f} steps of {SITES * BATCH} "
    f"sequences of {CONTEXT} tokens), by the median rate of the {SITES:,} sites' links; "
    f"computing alone takes {STEPS * rows[0]['computing'] / DAY:.1f} days:\n",
    "| method | exchange | "
    + " | ".join(f"{rate:g} Gbit/s" for rate in RATES)
    + f" | Gbit/s to wait {WAITING:.0%} of the time | steps per exchange, for that at 1 Gbit/s |",
    "|---|---|" + "---|" * (len(RATES) + 2),
  ]
  for row in rows:
    days = [_number(days_of(row["rates"][f"{rate:g}"])) for rate in RATES]
    needed = row["needed_gbits"]
    cells = [row["name"], row["way"], *days, _number(needed) if needed else "none"]
    cells.append(f"{steps_needed(row):,.0f}" if row["steps_per_round"] > 1 else "")
    lines.append(f"| {' | '.join(cells)} |")
  lines += [
    "\nWhat a local step waits for at 1 Gbit/s, in seconds, and sites that come and go (present "
    f"for {CHURN[0] / DAY:g} day on average, away for {CHURN[1] / 3600:g} hour):\n",
    "| method | delays | bytes over equal links | slow links | sites that take part | days with "
    "churn |",
    "|---|---|---|---|---|---|",
  ]
  lines += [f"| {' | '.join([row['name'], *_waits(row)])} |" for row in rows]
  lines += [
    "\nMemory of a chip, and costs of the whole run at 1 Gbit/s "
    f"({CHIP_DOLLARS:.2f} dollars per chip and hour, {SENT_DOLLARS:.2f} per GB sent):\n",
    "| method | GiB per chip, of 95 | TB that a site sends | of which per round | "
    "chips, million dollars | traffic, million dollars |",
    "|---|---|---|---|---|---|",
  ]
  return lines + [f"| {' | '.join([row['name'], *_costs(row)])} |" for row in rows]


def days_of(step: dict[str, float]) -> float:
  """Returns the days of all steps; the work of absent sites is done by others, later."""
  return STEPS * step["seconds"] / DAY / step["present"]


def steps_needed(row: dict[str, Any]) -> float:
  """Returns the local steps per exchange with which sites wait for a share WAITING at 1 Gbit/s.

  The exchange is assumed to take as long as the simulated one, whatever the steps.
  """
  at_one = row["rates"]["1"]
  waits = at_one["seconds"] * at_one["waiting"]
  computing = at_one["seconds"] - waits
  return row["steps_per_round"] * waits / (computing * WAITING / (1 - WAITING))


def _waits(row: dict[str, Any]) -> list[str]:
  waits = lambda step: step["seconds"] * step["waiting"]
  delays, alike, at_one = (
    waits(step) for step in (row["delays_alone"], row["equal_links"], row["rates"]["1"])
  )
  parts = [_number(max(0.0, x)) for x in (delays, alike - delays, at_one - alike)]
  churn = row["churn"]
  if not churn:
    return [*parts, "refused", "refused"]
  return [*parts, f"{churn['present']:.0%}", _number(days_of(churn))]


def _costs(row: dict[str, Any]) -> list[str]:
  hours = 24 * days_of(row["rates"]["1"])
  sent = STEPS * row["sent_per_step"]
  chips = SITES * CHIPS * hours * CHIP_DOLLARS / 1e6
  traffic = SITES * sent / 1e9 * SENT_DOLLARS / 1e6
  fits = row["used_per_chip"] <= row["hbm"]
  memory = f"{row['used_per_chip'] / 2**30:.1f}" + ("" if fits else ", too much")
  round_ = row["sent_per_step"] * row["steps_per_round"] / 1e12
  return [memory, *(_number(x) for x in (sent / 1e12, round_, chips, traffic))]


def _number(value: float) -> str:
  """Formats a number with three digits, or without decimals from 100 on."""
  return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
  """Draws the days against the rate of the links."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(8.4, 4.6), layout="constrained")
  ax = figure.subplots()
  for number, row in enumerate(rows):
    days = [days_of(row["rates"][f"{rate:g}"]) for rate in RATES]
    ax.plot(
      RATES,
      days,
      label=row["name"],
      marker="osD^v<>Pph*"[number % 11],
      color=f"C{number}" if number < 10 else "black",
    )
  ax.axhline(STEPS * rows[0]["computing"] / DAY, color="gray", ls=":", label="computing alone")
  ax.set(xscale="log", yscale="log", xlabel="median rate of the sites' links, Gbit/s")
  ax.set_xticks(RATES, [f"{rate:g}" for rate in RATES])
  ax.set_ylabel(f"days for {TOKENS / 1e12:g}e12 tokens")
  ax.grid(alpha=0.3, which="both")
  figure.legend(loc="outside right upper", fontsize="small")
  figure.savefig(path, dpi=120)
