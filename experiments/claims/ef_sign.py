"""Sign steps fail on simple convex problems; error feedback repairs them.

Paper: Karimireddy, Rebjock, Stich, Jaggi 2019, Error feedback fixes SignSGD, arXiv:1901.09847,
counterexamples 1 and 2, and EF-signSGD, algorithm 1.

Same: x/4 over [-1, 1] with a stochastic gradient of 4 or -1, and .5 |x1 + x2| + |x1 - x2| from (1,
1); one worker; the methods are the sign, the scaled sign with error feedback, and plain SGD. Here
sign(0) = +1.

Scaled: the paper proves where sign steps lead, but shows no runs. Step sizes and numbers of steps
are our choice, and equal for all three methods. We reproduce the ordering. With one variable, the
scaled sign is the gradient itself, so error feedback is SGD on the first problem.
"""

from experiments.claims.support.claim import Beside, Findings, Gate, Lab, Line, Panel
from research.core.spec import calls

TITLE = "Steps along signs of gradients fail on simple convex problems; error feedback repairs them"
DATASET = ""
FULL = {
  "rate": 0.001,
  "first_steps": 20_000,
  "second_steps": 5000,
  "near": -0.24,
  "far": 0.24,
  "kept": 0.999,
  "solved": 5e-3,
}
QUICK = {"rate": 0.005, "first_steps": 3000, "second_steps": 1000, "near": -0.2, "solved": 2e-2}
SEEDS = {"full": 3, "quick": 1}
X64 = False
SGD, SIGN, FEEDBACK = "SGD", "signSGD", "EF-signSGD"
AGGREGATORS = {
  SGD: calls.mean(),
  SIGN: calls.majority_vote(),  # for one worker, the vote equals the worker's signs
  FEEDBACK: calls.error_feedback(calls.gather_mean(calls.sign())),
}
FIRST, SECOND = "rare_large_gradient()", "narrow_valley(epsilon=0.5)"


def measure(lab: Lab) -> Findings:
  """Measures the objectives over the steps; the seed that least supports the claim counts."""
  lines = {FIRST: [], SECOND: []}
  ends: dict[tuple[str, str], list[float]] = {}
  for task, steps in ((FIRST, lab["first_steps"]), (SECOND, lab["second_steps"])):
    for name, aggregator in AGGREGATORS.items():
      for seed in lab.seeds if task == FIRST else [0]:  # the second problem has no noise
        found = lab.run(
          task=task,
          method=calls.data_parallel(calls.sgd(lab["rate"]), aggregator),
          mesh="data:1",
          batch_size=1,
          steps=steps,
          eval_every=steps // 50,
          seed=seed,
        )
        values = found.column("train_loss")
        lines[task].append(Line(name, found.column("step"), values, "o" if name == SGD else ""))
        ends.setdefault((task, name), []).append(float(values[-1]))
  worst = {key: (min if key[1] == SIGN else max)(values) for key, values in ends.items()}
  return Findings(
    [
      *(Beside(f"x/4, least -.25: {name}", worst[FIRST, name]) for name in AGGREGATORS),
      *(Beside(f"narrow valley, least 0: {name}", worst[SECOND, name]) for name in AGGREGATORS),
    ],
    [
      Gate(f"x/4: {SGD}", worst[FIRST, SGD], "<=", lab["near"]),
      Gate(f"x/4: {SIGN} ends at the other side", worst[FIRST, SIGN], ">=", lab["far"]),
      Gate(f"x/4: {FEEDBACK}", worst[FIRST, FEEDBACK], "<=", lab["near"]),
      Gate(f"narrow valley: {SIGN} stays", worst[SECOND, SIGN], ">=", lab["kept"]),
      Gate(f"narrow valley: {FEEDBACK}", worst[SECOND, FEEDBACK], "<=", lab["solved"]),
    ],
    [
      Panel("x/4 over [-1, 1]", "steps", "objective", lines[FIRST], levels={"least": -0.25}),
      Panel(".5 |x1 + x2| + |x1 - x2|", "steps", "objective", lines[SECOND], levels={"least": 0.0}),
    ],
  )
