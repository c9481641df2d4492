"""What of a model the optimizers for matrices reach, and when they are refused."""

import jax
import jax.numpy as jnp
import optax
import pytest

from research.aggregate.mean import mean
from research.core import registry
from research.methods.data_parallel import data_parallel
from research.training import assemble, reach
from research.training.config import Config, UsageError
from research.training.loop import train

MUON = "muon(0.02)"
# two leaves of two dimensions, 12 and 20 elements, one of which the model embeds with, and 8 others
PARAMS = {
  "bias": jnp.zeros(2),
  "dense": jnp.zeros((5, 4)),
  "embedding": jnp.zeros((6, 2)),
  "stack": jnp.zeros((3, 2, 1)),
}
# method -> optimizer, elements of PARAMS that it reaches, of how many
NESTED = {
  f"data_parallel({MUON}, mean())": ("muon", 32, 40),
  f"averaged(local_sgd(chain(clip_by_global_norm(1.0), {MUON}), mean(), period=4))": (
    "muon", 32, 40
  ),
  f"diloco(sgd(0.1), {MUON}, mean(), period=4)": ("muon", 32, 40),
  f"diloco({MUON}, {MUON}, mean(), period=4)": ("muon", 64, 80),
  f"streaming_diloco({MUON}, sgd(0.1), mean(), fragments=2, period=4)": ("muon", 32, 40),
  f"streaming_diloco(sgd(0.1), {MUON}, mean(), fragments=2, period=4)": ("muon", 32, 40),
  f"d_psgd({MUON}, gossip(ring()))": ("muon", 32, 40),
  "data_parallel(galore(0.1, rank=1), mean())": ("galore", 32, 40),
  "dion2(0.1, adam(0.1), mean())": ("dion2", 32, 40),
  "averaged(dion(0.1, adam(0.1), mean()))": ("dion", 32, 40),
}  # fmt: skip


@pytest.mark.parametrize("method", NESTED)
def test_what_is_reached_is_found_in_any_nesting(method):
  name, reached, total = NESTED[method]
  found = reach.reaches(jax.eval_shape(registry.build("method", method).init, PARAMS))
  assert list(found) == [name]
  assert found[name][:2] == (reached, total)
  assert found[name].embeds == ("streaming_diloco(sgd" not in method)


def test_other_optimizers_reach_all():
  for optimizer in ("sgd(0.1, momentum=0.9)", "adam(0.1)", "lamb(0.1)", "adafactor(0.1)"):
    method = registry.build("method", f"data_parallel({optimizer}, mean())")
    assert reach.reaches(jax.eval_shape(method.init, PARAMS)) == {}


def config(path, **changes) -> Config:
  """A small transformer on a text."""
  text = path / "text.txt"
  text.write_text("Some words that come again, and again. " * 40)
  task = {"task": f"text('{text}', context=8)", "batch_size": 4, "mesh": "data:2", "steps": 2}
  return Config(**task | {"out": str(path / "out"), "eval_every": 0} | changes)


@pytest.mark.parametrize("optimizer", [MUON, "galore(0.1, rank=4)"])
def test_stacks_of_a_model_without_a_declaration_are_refused(optimizer):
  params = {"embedding": jnp.zeros((6, 4)), "layers": {"up": jnp.zeros((4, 4, 8))}}
  state = jax.eval_shape(registry.build("optimizer", optimizer).init, params)
  with pytest.raises(ValueError, match=r"reach 15.8% .*less than half of this model.*scan=False"):
    reach.check(state)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("optimizer", [MUON, "galore(0.1, rank=4)"])
def test_all_hidden_matrices_of_a_transformer_are_reached(optimizer, scan, tmp_path):
  model = f"transformer(layers=4, width=16, heads=4, scan={scan})"
  method = f"local_sgd(chain({optimizer}), mean(), period=2)"
  given = config(tmp_path, model=model, method=method)
  problem = assemble.assemble(given, assemble.check(given))
  found = reach.reaches(problem.executor.layout.state_shapes, problem.job.task.dimensions)
  (found,) = found.values()
  assert found.exact
  assert not found.embeds
  assert "which are all hidden matrices" in reach.describe("muon", found)


@pytest.mark.slow
def test_an_optimizer_of_optax_that_is_not_told_of_the_model_is_refused(tmp_path):
  given = config(tmp_path, model="transformer(layers=4, width=16, heads=4, scan=True)")
  method = data_parallel(optax.contrib.muon(0.02), mean())
  setting = assemble.check(given, assemble.Given(method=method))
  with pytest.raises(UsageError, match=r"--method=.*less than half of this model.*scan=False"):
    assemble.assemble(given, setting)


@pytest.mark.slow
def test_a_run_says_what_is_reached(tmp_path, capsys):
  """Of an mlp all but the biases: 64 32 + 32 10 of these and 42."""
  rest = {"task": "digits()", "model": "mlp(hidden=[32])", "batch_size": 16}
  summary, _ = train(config(tmp_path, method=f"data_parallel({MUON}, mean())", **rest))
  share = 2368 / 2410
  assert summary["muon_reaches"] == pytest.approx(share)
  line = f"muon: its orthogonalized steps reach {share:.1%} of the parameters and all others are"
  assert line in capsys.readouterr().err
