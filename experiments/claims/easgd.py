"""Elastic averaging is stable wherever a simple condition holds; round-robin ADMM is not.

Paper: Zhang, Choromanska, LeCun 2015, EASGD, arXiv:1412.6651, section 3.3 and figure 1.

Same: f(x) = x^2/2, workers that exchange with the centre in turn, the condition
0 <= alpha <= (4 - 2 eta)/(4 - eta) whatever the number of workers, ADMM at eta = .001 and rho = 2.5
with 3 and 8 workers.

Scaled: nothing. The paper shows figures without numbers, so we compute spectral radii instead of
trajectories. A turn is the Jacobian of one round of the library's `easgd` between one worker and
the centre. The condition is sufficient, but not necessary for two workers, so two workers are shown
without a gate on necessity.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.claims.support.claim import Beside, Findings, Gate, Lab, Line, Panel
from research.core import registry

TITLE = "Elastic averaging is stable where a simple condition holds; round-robin ADMM is not"
DATASET = ""
FULL = {
  "alphas": 40,
  "etas": 50,
  "near": 0.02,
  "workers": [1, 2, 3, 8, 16],
  "tight": [1, 3, 16],  # numbers of workers for which the condition is also necessary
  "admm_eta": 0.001,
  "admm_rho": 2.5,
  "inside": 0.9999,
  "outside": 1.0001,
}
QUICK = {"alphas": 5, "workers": [1, 2, 3], "tight": [1, 3]}
SEEDS = {}  # the claim uses a single seed
X64 = True


def measure(lab: Lab) -> Findings:
  """Computes spectral radii of EASGD inside, on and outside the stability boundary, and of ADMM."""
  shares = np.arange(1, lab["etas"] + 1) / (lab["etas"] + 1)
  alphas = np.arange(1, lab["alphas"] + 1) / (lab["alphas"] + 1)
  # all eta with alpha (4 - eta) <= 4 - 2 eta
  within = np.concatenate([turns(a, shares * 4 * (1 - a) / (2 - a)) for a in alphas])
  etas, near = np.linspace(0.1, 1.9, 19), lab["near"]
  at = lambda scale, etas: np.concatenate([turns(scale * boundary(e), [e]) for e in etas])
  below, above = at(1 - near, etas), at(1 + near, etas)
  inside = max(radii(round_robin(within, p)).max() for p in lab["workers"])
  low = {p: float(radii(round_robin(below, p)).max()) for p in lab["tight"]}
  high = {p: float(radii(round_robin(above, p)).min()) for p in [2, *lab["tight"]]}
  admm = lambda rho, p: float(radii(admm_sweep(lab["admm_eta"], rho, p)))
  unstable = {p: admm(lab["admm_rho"], p) for p in (3, 8)}
  scales, rhos = np.linspace(0.5, 1.2, 29), np.linspace(0.1, 10, 34)
  middle = np.concatenate([at(scale, [1.0]) for scale in scales])
  limit = {"above it, it diverges": 1.0}
  return Findings(
    [
      *(Beside(f"ADMM, {p} in turn: radius - 1", r - 1) for p, r in unstable.items()),
      Beside(f"EASGD: radius - 1, largest at {len(within)} stable points", inside - 1),
      *(Beside(f"EASGD, {p} in turn: radius - 1, {near:.0%} inside", low[p] - 1) for p in low),
      *(Beside(f"EASGD, {p} in turn: radius - 1, {near:.0%} outside", high[p] - 1) for p in high),
    ],
    [
      Gate("EASGD: radius at any stable point", inside, "<=", 1.0),
      *(Gate(f"EASGD, {p} in turn: inside", low[p], "<=", lab["inside"]) for p in low),
      *(Gate(f"EASGD, {p} in turn: outside", high[p], ">=", lab["outside"]) for p in low),
      *(Gate(f"ADMM, {p} in turn", r, ">=", lab["outside"]) for p, r in unstable.items()),
    ],
    [
      Panel(
        "Elastic averaging at eta = 1",
        "alpha over (4 - 2 eta)/(4 - eta), the largest stable one",
        "spectral radius of a sweep",
        [Line(f"{p} in turn", scales, radii(round_robin(middle, p))) for p in lab["workers"]],
        levels=limit,
      ),
      Panel(
        f"ADMM at eta = {lab['admm_eta']:g}",
        "rho",
        "spectral radius of a sweep",
        [Line(f"{p} in turn", rhos, [admm(rho, p) for rho in rhos]) for p in unstable],
        levels=limit,
      ),
    ],
  )


def boundary(eta: float) -> float:
  """Returns the largest stable alpha."""
  return (4 - 2 * eta) / (4 - eta)


def turns(alpha: float, etas: Any) -> np.ndarray:
  """Returns the Jacobians [etas, 2, 2] on (x, centre) of one worker's `easgd` round on x^2/2."""
  easgd, mean = registry.lookup(("method",), "easgd"), registry.build("aggregator", "mean()")

  def round_(state, eta):
    method = easgd(optax.sgd(eta), mean, period=1, alpha=alpha)

    def worker(x, centre):
      held = method.init(x)._replace(centre=centre)
      local = method.begin(held)
      grads = jax.grad(lambda x: x**2 / 2)(local.params)
      after = method.sync(method.step(grads, local, held, key=None), held, key=None)
      return jnp.stack([after.params, after.centre])

    return jax.vmap(worker, axis_name="data")(state[:1], state[1:])[0]

  jacobian = jax.vmap(jax.jacobian(round_), (None, 0))
  return np.asarray(jacobian(jnp.zeros(2), jnp.asarray(etas)))


def round_robin(exchanges: np.ndarray, workers: int) -> np.ndarray:
  """Returns the matrices [..., p + 1, p + 1] of one turn of every worker; the centre is last."""
  sweep = np.eye(workers + 1)
  for i in range(workers):
    one = np.zeros((*exchanges.shape[:-2], workers + 1, workers + 1)) + np.eye(workers + 1)
    for row, at in enumerate((i, workers)):
      one[..., at, [i, workers]] = exchanges[..., row, :]
    sweep = one @ sweep
  return sweep


def admm_sweep(eta: float, rho: float, workers: int) -> np.ndarray:
  """Returns the matrix of one turn of each worker in the paper's ADMM, on (x, lambda, centre)."""
  size, sweep = 2 * workers + 1, np.eye(2 * workers + 1)
  x, multiplier, z = np.split(np.eye(size), [workers, 2 * workers])
  for i in range(workers):
    first, second, third = np.eye(size), np.eye(size), np.eye(size)
    # lambda_i <- lambda_i - (x_i - z)
    first[workers + i] = multiplier[i] - x[i] + z[0]
    # x_i <- (x_i - eta grad f(x_i) + eta rho (lambda_i + z)) / (1 + eta rho)
    second[i] = ((1 - eta) * x[i] + eta * rho * (multiplier[i] + z[0])) / (1 + eta * rho)
    # z <- 1/p sum_j (x_j - lambda_j)
    third[-1] = (x - multiplier).mean(0)
    sweep = third @ second @ first @ sweep
  return sweep


def radii(matrices: np.ndarray) -> np.ndarray:
  """Returns the largest absolute eigenvalue of each matrix of [..., n, n]."""
  return np.abs(np.linalg.eigvals(matrices)).max(-1)
