"""With six of twenty workers faulty, training with the mean fails; robust rules still learn.

Papers: Blanchard, El Mhamdi, Guerraoui, Stainer 2017, Krum, arXiv:1703.02757 (the Gaussian attack
with a deviation of 200); Yin, Chen, Ramchandran, Bartlett 2018, medians and trimmed means,
arXiv:1803.01498; Karimireddy, He, Jaggi 2021, centered clipping and workers' momentum,
arXiv:2012.10333 (bit flips).

Same: the rules, the attacks, momentum 0.9 on every worker, and batches of 32 examples per worker.

Scaled: softmax regression, one step size for all rules, bit flips that are ten times as large as an
honest worker's message, and centered clipping with an untuned radius of 1. The papers show curves
for other models and numbers of workers, so we reproduce only the ordering.
"""

from experiments.claims.support.claim import Beside, Findings, Found, Gate, Lab, Line, Panel
from research.core.spec import Call, calls

TITLE = "When six of twenty workers lie, averaging learns nothing and robust rules still learn"
DATASET = "mnist()"
FULL = {
  "attacks": ["bit flips", "Gaussian noise"],
  "rules": ["Krum", "median", "trimmed mean", "centered clipping", "mean"],
  "steps": 600,
  "learning_rate": 0.25,
  "batch_size": 640,
  "mean_at_most": 0.2,
  "gaussian_at_least": 0.9,
  "krum_at_least": 0.9,
  "flip_at_least": 0.87,
}
QUICK = {
  "attacks": ["bit flips"],
  "rules": ["Krum", "median", "mean"],
  "steps": 100,
  "krum_at_least": 0.8,
  "flip_at_least": 0.8,
}
SEEDS = {"full": 1, "quick": 1}
X64 = False

WORKERS, FAULTY = 20, 6
RULES = {
  "Krum": calls.krum(FAULTY),
  "median": calls.median(),
  "trimmed mean": calls.trimmed_mean(FAULTY / WORKERS),
  "centered clipping": calls.centered_clip(1.0),
  "mean": calls.mean(),
}
ATTACKS = {
  "bit flips": lambda rule: calls.sign_flip(rule, faulty=FAULTY, scale=10.0),
  "Gaussian noise": lambda rule: calls.gaussian(rule, faulty=FAULTY, deviation=200.0),
}


def measure(lab: Lab) -> Findings:
  """Measures each rule's test accuracy under each attack; the accuracy of the worst seed counts."""
  runs = {
    (attack, rule): [_run(lab, ATTACKS[attack](RULES[rule]), seed) for seed in lab.seeds]
    for attack in lab["attacks"]
    for rule in lab["rules"]
  }
  honest = min(_accuracy(_run(lab, RULES["mean"], seed)) for seed in lab.seeds)
  least = {key: min(map(_accuracy, found)) for key, found in runs.items()}
  lines = lambda attack: [
    Line(rule, found.column("step"), found.column("accuracy"))
    for rule in lab["rules"]
    for found in runs[attack, rule]
  ]
  return Findings(
    [
      *[Beside(f"test accuracy, {attack}: {rule}", v) for (attack, rule), v in least.items()],
      Beside("test accuracy, nobody lies: mean", honest),
    ],
    [gate for key in runs for gate in _gates(lab, *key, [_accuracy(f) for f in runs[key]])],
    [
      Panel(
        f"{FAULTY} of {WORKERS} workers send {attack}",
        "steps",
        "test accuracy",
        lines(attack),
        levels={"mean, nobody lies": honest},
      )
      for attack in lab["attacks"]
    ],
  )


def _gates(lab: Lab, attack: str, rule: str, accuracies: list[float]) -> list[Gate]:
  what = f"test accuracy, {attack}: {rule}"
  if rule == "mean":
    return [Gate(what, max(accuracies), "<=", lab["mean_at_most"])]
  if attack == "Gaussian noise":
    return [Gate(what, min(accuracies), ">=", lab["gaussian_at_least"])]
  if rule == "centered clipping":
    return []  # the radius is not tuned
  bound = lab["krum_at_least" if rule == "Krum" else "flip_at_least"]
  return [Gate(what, min(accuracies), ">=", bound)]


def _run(lab: Lab, rule: Call, seed: int) -> Found:
  aggregator = calls.worker_momentum(rule, momentum=0.9)
  return lab.run(
    model="logistic()",
    method=calls.data_parallel(calls.sgd(lab["learning_rate"]), aggregator),
    mesh=f"data:{WORKERS}",
    batch_size=lab["batch_size"],
    steps=lab["steps"],
    eval_every=max(1, lab["steps"] // 12),
    seed=seed,
  )


def _accuracy(found: Found) -> float:
  """Returns the final accuracy; 0 for a run that diverged."""
  return found.last("accuracy") if found.finite else 0.0
