"""optax's optimizers and schedules, built from specs, show their spec and equal their like."""

import jax
import jax.numpy as jnp
import optax
import pytest

from research.core import optimizers, registry
from research.core.spec import parse

SPECS = {
  "sgd(0.1)": "sgd(0.1)",
  "sgd(1e-1, momentum=None)": "sgd(0.1)",
  "sgd(0.1, 0.9, True)": "sgd(0.1, momentum=0.9, nesterov=True)",
  "adamw(learning_rate=3e-4, weight_decay=0.1)": "adamw(0.0003, weight_decay=0.1)",
  "chain(clip_by_global_norm(1), sgd(0.1))": "chain(clip_by_global_norm(1), sgd(0.1))",
  "sgd(cosine_decay_schedule(0.1, 100))": "sgd(cosine_decay_schedule(0.1, 100))",
  "sgd(join_schedules([constant_schedule(1.), constant_schedule(.1)], [3]))": (
    "sgd(join_schedules([constant_schedule(1.0), constant_schedule(0.1)], [3]))"
  ),
}


@pytest.mark.parametrize("spec", SPECS)
def test_an_optimizer_says_its_spec_and_is_built_again_by_it(spec):
  optimizer = registry.build("optimizer", spec)
  assert repr(optimizer) == SPECS[spec]
  again = registry.build("optimizer", repr(optimizer))
  assert (again, hash(again), repr(again)) == (optimizer, hash(optimizer), repr(optimizer))
  assert (again != optimizer) is False
  assert isinstance(optimizer, optax.GradientTransformation)
  other = registry.build("optimizer", "rmsprop(0.1)")
  assert optimizer != other
  assert optimizer not in (other, optax.sgd(0.1))


@pytest.mark.parametrize("spec", SPECS)
def test_it_takes_extra_arguments_where_optax_s_own_does(spec):
  call = parse(spec)
  args = [registry.build(_kind(one), one) if hasattr(one, "kwargs") else one for one in call.args]
  made = registry.lookup(("optimizer",), call.name)(*args, **call.kwargs)
  extra = isinstance(made, optax.GradientTransformationExtraArgs)
  named = registry.build("optimizer", spec)
  assert isinstance(named, optax.GradientTransformationExtraArgs) == extra


def _kind(call):
  return "optimizer" if call.name in optimizers.factories("optimizer") else "schedule"


def test_a_schedule_says_its_spec_and_is_called_under_jit():
  schedule = registry.build("schedule", "polynomial_schedule(1., 0.0, 2, 10)")
  assert repr(schedule) == "polynomial_schedule(1.0, 0.0, 2, 10)"
  want = optax.polynomial_schedule(1.0, 0.0, 2, 10)(jnp.asarray(3))
  assert float(jax.jit(schedule)(jnp.asarray(3))) == pytest.approx(float(jnp.asarray(want)))
  assert schedule == registry.build("schedule", repr(schedule))
  assert schedule != registry.build("schedule", "constant_schedule(1.0)")


def test_a_changed_optimizer_does_not_show_the_spec_that_it_no_longer_has():
  optimizer = registry.build("optimizer", "sgd(0.1)")
  changed = optimizer._replace(update=optax.sgd(0.2).update)
  assert repr(changed) != "sgd(0.1)"
  assert changed != optimizer
