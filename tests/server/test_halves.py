"""A method's two halves, derived: which methods have them, and that they are the method."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from catalogue import DRAWN, GRAPHS, METHODS, SLICED
from problems import Running, distance, regression
from subset import slow_except

from research.aggregate.mean import Mean, mean
from research.core import registry
from research.core.base import EVERYONE
from research.methods.local import LocalSGD
from research.server.halves import halves

MOMENTUM = optax.sgd(0.1, momentum=0.9)
# Why the others have none.
REASONS = {
  "two_phase": "error_feedback is an exchange among workers",
  "averaged": "averaged has no server's half",
  "restarted": "restarted has no server's half",
  "post_local_sgd": "exchanges more than one message per round",
  "streaming_diloco": "streaming_diloco has no server's half",
  "late": "late has no server's half",
  "eager_diloco": "eager_diloco communicates with other workers outside its exchange",
  "overlap_local_sgd": "the workers of overlap_local_sgd keep models of their own",
  "scaffold": "exchanges more than one message per round",
  "zero_one_adam": "exchanges more than one message per round",
  "onebit_adam": "exchanges more than one message per round",
  "marina": "exchanges more than one message per round",
  "dion": "exchanges more than one message per round",
  "desloc": "exchanges more than one message per round",
  "sparta_diloco": "exchanges more than one message per round",
  "drifting": "exchanges more than one message per round",
  "hierarchical_local_sgd": "exchanges more than one message per round",
  "easgd": "easgd communicates with other workers outside its exchange",
  "eamsgd": "eamsgd communicates with other workers outside its exchange",
  "consensus_admm": "a worker of consensus_admm needs the server's .dual",
  "sparta": "the workers of sparta keep models of their own",
  "d_psgd": "d_psgd replaces the model by the workers'",
  "dgd": "shared state of dgd depends on a worker's private state: .params",
  "gradient_tracking": "does not send one array for each array of the model",
  "extra": "shared state of extra depends on a worker's private state: .params",
  "admm": "the workers of admm keep models of their own",
  "signum_vote": "majority_vote is an exchange among workers",
  "demo": "private state of demo depends on the result of its message: .momentum",
  "delayed": "delayed draws delays",
  "staleness_aware": "staleness_aware draws delays",
  "dc_asgd": "dc_asgd draws delays",
  "dc_asgd_constant": "dc_asgd_constant draws delays",
  "delayed_uniform": "delayed draws delays",
  "delayed_per_worker": "staleness_aware draws delays",
  "residual": "residual is an exchange among workers",
}
NAMES = [name for name in METHODS if name not in GRAPHS and name not in SLICED]
SERVED = [name for name in NAMES if name not in REASONS and name not in DRAWN]


@pytest.mark.parametrize("name", [*REASONS])
def test_what_cannot_be_served_says_why(name):
  params = regression().init(jax.random.key(0))
  with pytest.raises(ValueError, match=re.escape(REASONS[name])):
    halves(METHODS[name], params)


@pytest.mark.parametrize("name", slow_except(("sgd", "local_sgd"), SERVED))
def test_one_worker_and_its_server_are_the_method(name):
  """Three rounds of one worker, by push and by exchange: the same parameters."""
  method, task = METHODS[name], regression()
  params = task.init(jax.random.split(jax.random.key(0))[0])
  apart = halves(method, params)
  run = Running(method, "simulate", {"data": 1}, (240,), None).rounds(3)
  leaves, treedef = jax.tree.flatten(params)
  grad_fn = lambda params: jax.grad(task.loss)(params, task.train, None)

  @jax.jit
  def together(params, memory, own, held, key):
    state = apart.state(params, own)
    local = apart.method.begin(state)
    for _ in range(apart.method.local_steps):
      grads = grad_fn(local.params)
      local = apart.method.step(grads, local, state, key=jax.random.key(0), grad_fn=grad_fn)
    message, own = apart.message(local, params, own, key)
    payloads, memory = apart.link.encode(message, memory, key)
    found = [
      apart.link.decode(p, x, key, i) for i, (p, x) in enumerate(zip(payloads, leaves, strict=True))
    ]
    still = jax.tree.map(jnp.zeros_like, params)
    params, held = apart.receive(treedef.unflatten(found), params, held, jnp.int32(0), still)
    return params, memory, own, held

  carried = params, apart.link.init(params), apart.own(params), apart.init(params)
  for number in range(3):
    carried = together(*carried, jax.random.key(number))
  assert distance(carried[0], run.params()) <= 1e-6


SPLIT = [n for n, m in METHODS.items() if m.splits and n not in SLICED]


@pytest.mark.parametrize("name", slow_except(["local_sgd"], SPLIT))
def test_sync_is_message_exchange_receive(name):
  """Bit for bit, also around another method; `message` keeps the structure of the state."""
  method = METHODS[name]
  params = regression().init(jax.random.key(0))
  spread = lambda key: jax.tree.map(lambda x: jax.random.normal(key, (8, *x.shape)), params)
  grads, key = spread(jax.random.key(1)), jax.random.key(2)

  def begun(grads):
    state = method.init(params)
    elsewhere = lambda at: jax.tree.map(lambda g, x: g + 0.1 * x, grads, at)
    local = method.step(grads, method.begin(state), state, key=key, grad_fn=elsewhere)
    return local, state

  def at_once(grads):
    local, state = begun(grads)
    return method.sync(local, state, key=key)

  def apart(grads):
    local, state = begun(grads)
    tree, after = method.message(local, state, key=key)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    link, presence = method.link(after), method.counted(EVERYONE)
    value, sent, link = method.exchange.aggregate(tree, link, key, presence)
    return method.receive(value, sent, method.with_link(after, link), key=key)

  run = lambda f: jax.jit(jax.vmap(f, axis_name="data"))(grads)
  for a, b in zip(jax.tree.leaves(run(at_once)), jax.tree.leaves(run(apart)), strict=True):
    if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
      np.testing.assert_array_equal(a, b)


def test_corrections_for_age_stay_with_the_server():
  """DC-ASGD's squares and staleness by the server's own count."""
  apart = halves(registry.build("method", "dc_asgd(0.1, mean(), last_pull())"), {"w": jnp.ones(3)})
  held = apart.init({"w": jnp.ones(3)})
  g, moved = {"w": jnp.asarray([1.0, 2.0, -1.0])}, {"w": jnp.asarray([0.5, 0.0, 1.0])}
  params, held = apart.receive(g, {"w": jnp.ones(3)}, held, jnp.int32(2), moved)
  square = 0.05 * np.asarray(g["w"]) ** 2
  lam = 2.0 / np.sqrt(square + 1e-7)
  want = 1 - 0.1 * (g["w"] + lam * g["w"] ** 2 * moved["w"])
  np.testing.assert_allclose(params["w"], want, rtol=1e-6)
  np.testing.assert_allclose(held.memory["w"], square, rtol=1e-6)


class Overriding(LocalSGD, name="overriding"):
  """Half of the step, by an exchange of its own."""

  def sync(self, local, state, *, key, presence=EVERYONE):
    after = super().sync(local, state, key=key, presence=presence)
    half = jax.tree.map(lambda a, b: (a + b) / 2, after.params, state.params)
    return after._replace(params=half)


class Resetting(LocalSGD, name="resetting"):
  """A worker's optimizer starts anew when the exchange is done."""

  def receive(self, value, sent, state, *, key, presence=EVERYONE):
    after = super().receive(value, sent, state, key=key, presence=presence)
    return after._replace(inner=jax.tree.map(jnp.zeros_like, after.inner))


class Drawing(LocalSGD, name="drawing"):
  """Noise on the model when it is received."""

  def receive(self, value, sent, state, *, key, presence=EVERYONE):
    noise = lambda x: x + jax.random.normal(key, x.shape)
    return super().receive(jax.tree.map(noise, value), sent, state, key=key, presence=presence)


class Halving(LocalSGD, name="halving"):
  """A first model that is not the one that was given."""

  def init(self, params):
    return super().init(jax.tree.map(lambda x: x / 2, params))


class Doubling(Mean, name="doubling"):
  """Twice the mean, which its inherited uplink does not say."""

  def aggregate(self, tree, state, key, presence=EVERYONE):
    out = super().aggregate(tree, state, key, presence)
    return out._replace(value=jax.tree.map(lambda x: 2 * x, out.value))


@pytest.mark.parametrize(
  ("method", "reason"),
  [
    (Overriding(MOMENTUM, mean()), "exchanges more than one message per round"),
    (Resetting(MOMENTUM, mean()), "changes a worker's private state after its exchange: .inner"),
    (Drawing(MOMENTUM, mean()), "draws random numbers in receive"),
    (Halving(MOMENTUM, mean()), "is computed from its state"),
    (LocalSGD(MOMENTUM, Doubling()), "doubling does not aggregate what its uplink encodes"),
  ],
)
def test_what_a_server_would_do_otherwise_is_refused(method, reason):
  with pytest.raises(ValueError, match=re.escape(reason)):
    halves(method, {"w": jnp.ones(3)})
