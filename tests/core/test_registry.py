"""Spec strings: what they build, and what is said of those that build nothing."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.core import optimizers, registry
from research.core.base import Aggregator
from research.core.builtin import TABLE
from research.core.method import Method

METHOD = "data_parallel(sgd(0.1), mean())"


def updates(optimizers):
  """What each optimizer makes of a matrix of ones, in one program."""
  params = {"w": jnp.ones((2, 2))}
  update = lambda one: one.update(params, one.init(params), params)[0]["w"]
  return jax.device_get(jax.jit(lambda: {name: update(one) for name, one in optimizers.items()})())


@pytest.mark.parametrize("kind", TABLE)
def test_every_name_has_a_factory_with_a_docstring(kind):
  for name in TABLE[kind]:
    factory = registry.lookup((kind,), name)
    assert factory.__doc__, name
    if kind in ("method", "aggregator"):
      wanted = {"method": Method, "aggregator": Aggregator}[kind]
      made = factory if inspect.isclass(factory) else inspect.signature(factory).return_annotation
      assert issubclass(made, wanted), name


def test_a_spec_is_the_object_that_its_calls_would_build():
  spec = (
    "averaged(data_parallel(sgd(0.1, momentum=0.9, nesterov=True), mean(), period=4), burn_in=3)"
  )
  method = registry.build("method", spec)
  assert isinstance(method, Method)
  assert method.local_steps == 4
  optimizer = registry.build("optimizer", "sgd(0.1, momentum=0.9, nesterov=True)")
  hand = optax.sgd(0.1, momentum=0.9, nesterov=True)
  got, want = updates({"got": optimizer, "want": hand}).values()
  np.testing.assert_array_equal(got, want)


def test_nested_schedules_and_chains():
  spec = (
    "chain(clip_by_global_norm(1.0), "
    "adam(join_schedules([constant_schedule(1.0), exponential_decay(0.5, 10, 0.9)], [3])))"
  )
  found = updates({"one": registry.build("optimizer", spec)})
  assert np.isfinite(found["one"]).all()


OPTIMIZERS = [
  name
  for name, factory in optimizers.factories("optimizer").items()
  if next(iter(inspect.signature(factory).parameters), "") == "learning_rate"
]


# Those that want more than an averaged gradient (a loss value, per-example gradients, a Hessian).
REFUSED = ("lbfgs", "momo", "momo_adam", "dpsgd", "sophia")


def spec_of(name: str) -> str:
  """A call of an optimizer of Optax with what it needs."""
  parameters = inspect.signature(optimizers.factories("optimizer")[name]).parameters.values()
  needed = [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
  values = {"learning_rate": "0.1", "key": "0", "seed": "0"}
  given = [n for n in [*needed, "key"] if n in [p.name for p in parameters]]
  return f"{name}({', '.join(f'{n}={values.get(n, 0.5)}' for n in dict.fromkeys(given))})"


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_an_optimizer_that_needs_more_than_gradients_is_refused(name):
  with pytest.raises(ValueError, match=f"{name}.*needs more than averaged gradients"):
    registry.build("optimizer", spec_of(name))


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
def test_every_other_optimizer_of_optax_builds_and_updates():
  built = {n: registry.build("optimizer", spec_of(n)) for n in OPTIMIZERS if n not in REFUSED}
  assert len(built) > 30
  for name, update in updates(built).items():
    assert np.isfinite(update).all(), name


WRONG = {
  "data_paralel(sgd(0.1), mean())": (
    "unknown method 'data_paralel'",
    "did you mean 'data_parallel'",
  ),
  "data_parallel(sdg(0.1), mean())": ("unknown optimizer 'sdg'", "did you mean 'sgd'", "adam"),
  "data_parallel(sgd(0.1), meen())": ("unknown aggregator 'meen'", "did you mean 'mean'"),
  "data_parallel(sgd(constant(0.1)), mean())": ("unknown schedule", "constant_schedule"),
  "data_parallel(sgd(-0.1), mean())": ("learning_rate=-0.1", "(0, inf)"),
  "data_parallel(sgd(0.1, momentum=1.5), mean())": ("momentum=1.5", "[0, 1]"),
  "data_parallel(sgd(1e999), mean())": ("learning_rate=inf", "finite"),
  "data_parallel(sgd(0.1, momentun=0.9), mean())": ("'momentun'", "did you mean 'momentum'"),
  "data_parallel(sgd('a'), mean())": ("learning_rate='a'", "a number or a schedule"),
  "data_parallel(sgd(True), mean())": ("learning_rate=True", "a number"),
  "data_parallel(sgd(0.1), mean(), period=1.5)": ("period=1.5", "a whole number"),
  "data_parallel(sgd(0.1), mean(), period=0)": ("period=0", "at least 1"),
  "data_parallel(sgd(0.1))": ("needs aggregator",),
  "data_parallel(sgd(0.1), mean(), inner=sgd(0.2))": ("got 'inner' twice",),
  "data_parallel(sgd(0.1), mean(), 3)": ("takes 2 positional",),
  "data_parallel(0.1, mean())": ("inner=0.1", "an optimizer"),
  "data_parallel(mean(), sgd(0.1))": ("inner: unknown optimizer 'mean'",),
  "data_parallel(sgd(0.1), mean)": ("'mean' stands alone", "'mean()'"),
  "data_parallel(sgd(0.1), mean()": ("malformed at character",),
  "data_parallel(lbfgs(), mean())": ("lbfgs()", "needs more than averaged gradients"),
  "data_parallel(sgd(0.1), mean(period=sgd(0.1)))": ("no parameter 'period'",),
  "data_parallel(sgd(0.1), mean(), period=sgd(0.1))": ("period is a plain value",),
  "__import__('os').system('true')": ("is not a number, a text, a list or a call",),
  "data_parallel(*[1])": ("is not a number, a text, a list or a call",),
  "data_parallel(sgd(0.1 if True else 1), mean())": ("is not a number",),
  "3": ("'3' is not a call",),
  "": ("malformed",),
}


@pytest.mark.parametrize("spec", WRONG)
def test_wrong_specs_say_in_one_line_what_is_wrong(spec):
  with pytest.raises(ValueError, match=r"\S") as caught:
    registry.build("method", spec)
  message = str(caught.value)
  assert "\n" not in message
  for words in WRONG[spec]:
    assert words in message


def test_bound_values_cannot_be_set_by_a_spec():
  with pytest.raises(ValueError, match="no parameter 'model'"):
    registry.build("task", "digits(model='x')", model=lambda outputs: None)
