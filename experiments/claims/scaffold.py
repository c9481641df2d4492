"""Clients' differences increase the number of rounds of FedAvg, but not that of SCAFFOLD.

Paper: Karimireddy, Kale, Mohri, Reddi, Stich, Suresh 2020, SCAFFOLD, arXiv:1910.06378. Figure 3: on
quadratics, SCAFFOLD is about 2 times as fast as SGD with 2 local steps, and about 5 times as fast
with 10, for every dissimilarity G, while FedAvg becomes slower as G grows. Table 3: if clients have
nothing in common, SCAFFOLD needs fewer rounds than FedAvg.

Same: two clients with f_1 = x^2 + G x and f_2 = -G x, full gradients, full participation, G of 1,
10 and 100, control variates initialized to the clients' first gradients in a round that is counted.
For images, a linear classifier, 100 clients sorted by label, 20 clients per round, tuned step
sizes.

Scaled: SGD and SCAFFOLD use the step size .1, since a tuned SGD would solve a one-dimensional
problem in one round; the step size of FedAvg is tuned for each G. Rounds are counted until the
distance is a hundredth of the initial distance; the rounds of FedAvg are counted in fiftieths of a
run. The images are MNIST instead of EMNIST, with two passes of five batches per round, and rounds
are counted until the accuracy stays above a level. For the images, we reproduce only the ordering.
"""

from collections.abc import Callable

import jax
import numpy as np

from experiments.claims.support.claim import Beside, Findings, Found, Gate, Lab, Line, Panel
from research.core.spec import Call, calls

TITLE = "SCAFFOLD's rounds do not depend on how clients differ; those of federated averaging do"
DATASET = "mnist()"
FULL = {
  "dissimilarity": [1.0, 10.0, 100.0],
  "rate": 0.1,
  "near": 0.01,
  "rounds": 60,
  "average_rounds": 25.0,  # times G: about FedAvg's number of rounds at the best step sizes
  "average_rates": [0.08, 0.12, 0.16, 0.2],  # divided by G
  "two_faster": 1.9,
  "ten_faster": 5.0,
  "average_slower": 20.0,
  "images_rates": [0.3, 1.0, 3.0],
  "images_rounds": 48,
  "accuracy": 0.87,
  "images_slower": 1.1,
}
QUICK = {
  "dissimilarity": [1.0, 100.0],
  "average_rates": [0.16],
  "images_rates": [0.3],
  "images_rounds": 16,
  "accuracy": 0.83,
  "images_slower": 0.9,  # only checks that both methods learn; the rounds are too few for more
}
SEEDS = {}  # the claim uses a single seed
X64 = False
SGD, TWO, TEN, AVERAGE = "SGD", "SCAFFOLD, K=2", "SCAFFOLD, K=10", "FedAvg, K=2"
CLIENTS = 100
IMAGES = {
  "FedAvg": lambda rate: calls.fed_avg(calls.sgd(rate), calls.mean(), epochs=2),
  "SCAFFOLD": lambda rate: calls.scaffold(rate, calls.mean(), epochs=2),
}


def measure(lab: Lab) -> Findings:
  """Counts the rounds until x is near the minimum, for each method and each G."""
  rate, spread = lab["rate"], lab["dissimilarity"]
  methods = {SGD: (calls.data_parallel(calls.sgd(rate), calls.mean()), 1)}
  for name, steps in ((TWO, 2), (TEN, 10)):
    methods[name] = (calls.scaffold(rate, calls.mean(), period=steps, warm_up=True), steps)
  found = {
    name: [solved(lab, *method, g, lab["rounds"], 1) for g in spread]
    for name, method in methods.items()
  }
  found[AVERAGE] = [averaged(lab, g) for g in spread]
  rounds = {name: [count for count, _ in of_name] for name, of_name in found.items()}
  images = {name: on_images(lab, name, method) for name, method in IMAGES.items()}
  first = [rounds_to(run, lab["accuracy"]) for run, _ in images.values()]
  one = {name: max(counts) for name, counts in rounds.items()}
  apart = max(max(rounds[name]) - min(rounds[name]) for name in methods)
  return Findings(
    [
      Beside("rounds of SGD over those of SCAFFOLD with K=2", one[SGD] / one[TWO], 2.0),
      Beside("rounds of SGD over those of SCAFFOLD with K=10", one[SGD] / one[TEN], 5.0),
      *(Beside(f"{name}: rounds, most of all G", one[name]) for name in methods),
      *(
        Beside(f"{AVERAGE}, tuned: rounds at G={g:g}", n)
        for g, n in zip(spread, rounds[AVERAGE], strict=True)
      ),
      Beside(f"FedAvg: rounds until images stay above {lab['accuracy']:.0%}", first[0]),
      Beside(f"SCAFFOLD: rounds until images stay above {lab['accuracy']:.0%}", first[1]),
      *(
        Beside(f"{name}: rounds until it is first reached, at any step size", soonest)
        for name, (_, soonest) in images.items()
      ),
    ],
    [
      Gate("SGD, SCAFFOLD: most minus least rounds over G", apart, "==", 0.0, True),
      Gate("rounds of SGD over K=2", one[SGD] / one[TWO], ">=", lab["two_faster"], True),
      Gate("rounds of SGD over K=10", one[SGD] / one[TEN], ">=", lab["ten_faster"], True),
      Gate(
        f"FedAvg: rounds at G={spread[-1]:g} over those at {spread[0]:g}",
        rounds[AVERAGE][-1] / rounds[AVERAGE][0],
        ">=",
        lab["average_slower"],
        True,
      ),
      Gate(
        "images: rounds of FedAvg over SCAFFOLD's", first[0] / first[1], ">=", lab["images_slower"]
      ),
    ],
    [
      Panel(
        f"At G={spread[-1]:g}",
        "rounds",
        "distance from the minimum",
        [Line(name, *curve(of_name[-1][1])) for name, of_name in found.items()],
        x_scale="log",
        y_scale="log",
      ),
      Panel(
        f"Rounds to {lab['near']:.0%} of the first distance",
        "G, how much clients differ",
        "rounds",
        [Line(name, spread, counts, "o") for name, counts in rounds.items()],
        x_scale="log",
        y_scale="log",
      ),
      Panel(
        "Images, clients of one or two classes",
        "rounds",
        "test accuracy",
        [
          Line(label, run.column("round"), run.column("accuracy"))
          for label, (run, _) in images.items()
        ],
        levels={"to reach": lab["accuracy"]},
      ),
    ],
  )


def solved(
  lab: Lab, method: Call, period: int, spread: float, rounds: int, every: int
) -> tuple[float, Found]:
  """Returns the number of rounds until x is near the minimum, or infinity, and the run."""
  task = calls.client_drift(dissimilarity=spread)
  start = float(lab.task(task=task).init(jax.random.key(0))["x"])
  found = lab.run(
    task=task,
    method=method,
    partition="in_order()",
    mesh="data:2",
    batch_size="all",
    rounds=rounds,
    eval_every=every * period,
    watch=lambda params, state: {"round": int(state.round), "distance": abs(float(params["x"]))},
  )
  rows = [row["round"] for row in found.rows if row["distance"] <= lab["near"] * abs(start)]
  return float(min(rows, default=np.inf)), found


def averaged(lab: Lab, spread: float) -> tuple[float, Found]:
  """Runs FedAvg with the best step size of its grid."""
  rounds = round(lab["average_rounds"] * spread) + 25
  found = {}

  def score(share: float) -> float:
    method = calls.fed_avg(calls.sgd(share / spread), calls.mean(), period=2)
    found[share] = solved(lab, method, 2, spread, rounds, max(1, rounds // 50))
    return found[share][0]

  best, _ = lab.tune(f"FedAvg's step size times G, at G={spread:g}", lab["average_rates"], score)
  return found[best]


def curve(found: Found) -> tuple[np.ndarray, np.ndarray]:
  """Returns the rounds and the distances."""
  return found.column("round"), found.column("distance")


def on_images(lab: Lab, name: str, method: Callable[[float], Call]) -> tuple[Found, float]:
  """Trains an image classifier on clients that are sorted by label.

  Returns:
    The run at the best step size, and the first round in which any run reaches the accuracy.
  """
  runs, accuracy = {}, lab["accuracy"]

  def score(rate: float) -> float:
    size = len(lab.task(model="logistic()").train["y"]) // CLIENTS
    runs[rate] = lab.run(
      model="logistic()",
      method=method(rate),
      partition="sorted()",
      population=CLIENTS,
      mesh=f"data:{CLIENTS // 5}",
      batch_size=CLIENTS // 5 * (size // 5),
      rounds=lab["images_rounds"],
      eval_every=10,
      watch=lambda params, state: {"round": int(state.round)},
    )
    return rounds_to(runs[rate], accuracy)

  best, _ = lab.tune(f"{name}: step size on images", lab["images_rates"], score)
  reached = [row["round"] for r in runs.values() for row in r.rows if row["accuracy"] >= accuracy]
  return runs[best], float(min(reached, default=np.inf))


def rounds_to(found: Found, accuracy: float) -> float:
  """Returns the first round after which the test accuracy stays at `accuracy`, or infinity."""
  below = np.flatnonzero(found.column("accuracy") < accuracy)
  rounds = [*found.column("round"), np.inf]
  return float(rounds[below[-1] + 1 if len(below) else 0])
