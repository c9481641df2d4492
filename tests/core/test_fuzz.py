"""Any text gives an object or one line of at most 1,000 characters: specs, flags, their values."""

import contextlib
import copy
import inspect
import io
import random
from collections.abc import Callable
from typing import Any

import pytest
from absl import flags
from hypothesis import example, given, settings
from hypothesis import strategies as st

from experiments import compare, reproduce
from experiments import compile as ahead
from research.analysis import chips, network
from research.comm import join, mesh
from research.command import flags as command
from research.core import arguments, registry
from research.core.spec import literal
from research.core.text import LINE, one_line
from research.server import setup
from research.training.config import Config, UsageError

quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)
pytestmark = pytest.mark.filterwarnings("ignore")  # optax's own, of what it is given here

MONSTERS = [
  *("", " ", "\0", "a\0()", "\ud800", "f('\udcff')", "\u0663", "f(\u0663)", "\ufeff", "1e400", "'"),
  *("1" * 5000, "f(" + "9" * 5000 + ")", "f(1" + "0" * 400 + ")", "f(" + "9" * 300 + ".0)"),
  *("+".join(["1"] * 3000), "a" + "()" * 3000, "a" + ".a" * 3000, "-" * 9000 + "1"),
  *("f(" * 150 + ")" * 150, "[" * 150 + "]" * 150, "(" * 5000, "f(" + "-" * 500 + "1)"),
  *("f(a=1, a=2)", "f({[0]: 4})", "f({f(): 1})", "f({**a})", "f(**{})", "f(*[])"),
  *("x" * 10**5, "f('" + "x" * 10**5 + "')", "f([" + "1, " * 10**4 + "])"),
  *("f([" + "g()," * 9999 + "])", "f({0: 1, 0: 2})", "f(\n1,\r\n2)\x1b[2J", "'\\d'()"),
  *("1if 1else 2", "lambda: 1", "f(x:=1)", "f'{a}'", "f(b'x')", "1j"),
]  # fmt: skip
VALID = [
  "averaged(data_parallel(sgd(0.1, momentum=0.9), error_feedback(two_phase(int8()))), burn_in=3)",
  "diloco(adamw(3e-4), sgd(0.7, nesterov=True), mean(), period=50)",
  "data_parallel(chain(clip_by_global_norm(1.0), adam(join_schedules([constant_schedule(1.0), "
  "exponential_decay(0.5, 10, 0.9)], [3]))), gather_mean(top_k(0.1)))",
  "steady(0.1, slowdown={0: 4})",
]
texts = st.text(st.characters(codec=None, categories=None), max_size=60)
near = st.text("()[]{},:='\".*-+0123456789 \nabmeansgd_\0\u0663\ud800", max_size=60)
words = st.one_of(texts, near, st.sampled_from(MONSTERS))


def is_one_line(text: str) -> bool:
  return len(text) <= LINE and text.isprintable()


def said(read: Callable[[str], Any], text: str) -> str:
  """What `read` refuses the text with; '' if it does not."""
  try:
    read(text)
  except UsageError as error:
    return one_line(error)  # as it is shown
  except ValueError as error:
    return str(error)
  return ""


# ---- specs

KINDS = [*registry.KINDS]


@pytest.mark.parametrize("text", MONSTERS, ids=range(len(MONSTERS)))
def test_a_monster_is_one_line(text):
  for kind in ("method", "speeds", "optimizer"):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (whatever it says)
      registry.build(kind, text)
    assert is_one_line(str(caught.value))


@quick
@given(st.sampled_from(KINDS), words)
def test_any_text_is_an_object_or_one_line(kind, text):
  assert is_one_line(said(lambda text: registry.build(kind, text), text))


@quick
@given(words)
def test_any_literal_is_a_value_or_one_line(text):
  assert is_one_line(said(literal, text))


@quick
@given(st.sampled_from(VALID), st.data())
def test_a_valid_spec_with_a_change_is_an_object_or_one_line(spec, data):
  for _ in range(data.draw(st.integers(1, 3))):
    first = data.draw(st.integers(0, len(spec)))
    last = data.draw(st.integers(first, min(len(spec), first + 8)))
    spec = spec[:first] + data.draw(st.one_of(near, st.just(spec[first:last] * 2))) + spec[last:]
  kind = "speeds" if spec.startswith("steady") else "method"
  assert is_one_line(said(lambda text: registry.build(kind, text), spec))


LITERALS = (
  *("0", "1", "-1", "+2", "0.5", "-0.0", "1e400", "1" + "0" * 400, "True", "None", "'a'", "''"),
  *("[]", "[1]", "[0.5, [1]]", "{}", "{0: 4}", "{'a': []}", "nothing()"),
)  # fmt: skip


def call(kind: str, depth: int, choose: random.Random) -> str:
  """A call of a name of a kind with arguments by its parameters, some of them wrong."""
  name = choose.choice(registry.names(kind))
  parameters = inspect.signature(registry.lookup((kind,), name)).parameters.values()
  given = []
  for parameter in parameters:
    kinds = arguments.kinds_of(parameter.annotation) or KINDS
    needed = parameter.default is parameter.empty
    if not needed and choose.random() < 0.7:
      continue
    value = choose.choice(LITERALS)
    if depth and choose.random() < (0.8 if kinds is not KINDS else 0.1):
      value = call(choose.choice(kinds), depth - 1, choose)
    variadic = parameter.kind is parameter.VAR_POSITIONAL
    given.append(value if variadic else f"{parameter.name}={value}")
  return f"{name}({', '.join(given)})"


@settings(quick, max_examples=120)
@given(st.sampled_from([kind for kind in KINDS if kind != "task"]), st.integers(0, 2**32))
def test_any_call_of_known_names_is_an_object_or_one_line(kind, seed):
  assert is_one_line(
    said(lambda text: registry.build(kind, text), call(kind, 2, random.Random(seed)))
  )


def test_every_parameter_of_every_factory_is_described():
  for kind in KINDS:
    for name in registry.names(kind):
      for parameter in inspect.signature(registry.lookup((kind,), name)).parameters.values():
        assert arguments.described(parameter.annotation)


# ---- flags


@pytest.fixture(scope="module")
def parse():
  """Parses a command line with flags of its own: (exit code, what is on stderr)."""
  others = set(flags.FLAGS)
  if "task" not in others:
    command.define_flags()
  mine, before = copy.deepcopy(flags.FLAGS), command.FLAGS
  for name in set(flags.FLAGS) - others:  # which other tests define for themselves
    delattr(flags.FLAGS, name)

  def parse(*argv: str) -> tuple[int, str]:
    err = io.StringIO()
    command.FLAGS = copy.deepcopy(mine)
    try:
      with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        command.parse_flags(["run.py", *argv])
        command.batch_size(command.FLAGS.batch_size)
    except SystemExit as ended:
      return int(ended.code or 0), err.getvalue()
    finally:
      command.FLAGS = before
    return 0, err.getvalue()

  return parse


def is_fine(code: int, err: str) -> bool:
  """Nothing was wrong, or one line says what was."""
  if code == 0:
    return err == ""
  return code == 2 and err.endswith("\n") and err[:-1].isprintable() and len(err) <= LINE + 1


NAMES = [*Config.names(), "coordinator", "processes", "nothing", "n" * 5000]


def test_any_value_of_any_flag_is_taken_or_one_line(parse):
  @quick
  @given(st.sampled_from(NAMES), words)
  @example("batch_size", "9" * 5000)
  @example("steps", "9" * 5000)
  @example("batch_size", "\u0663")
  def check(name, text):
    code, err = parse(f"--{name}={text}")
    assert is_fine(code, err), err[:2000]

  check()


def test_any_command_line_is_taken_or_one_line(parse):
  @quick
  @given(st.lists(words, max_size=3))
  def check(words):
    code, err = parse(*words)
    assert is_fine(code, err), err[:2000]

  check()


SIZES = ["\u0663", "0", "-1", "1.5", "9" * 5000, str(2**31), "", "al", "1_0"]


@pytest.mark.parametrize("size", SIZES, ids=range(len(SIZES)))
def test_a_batch_size_is_a_positive_whole_number(size, parse):
  code, err = parse(f"--batch_size={size}")
  assert code == 2
  assert err.startswith("error: --batch_size=")


FILES = {
  "latin1": "--steps=3\n# caf\u00e9\n".encode("latin-1"),
  "utf16": "--steps=3\n".encode("utf-16"),
  "nul": b"--steps=3\0\n",
  "bom": b"\xef\xbb\xbf--steps=3\n",
  "long": b"--steps=" + b"9" * 10**5,
  "unknown": b"--stepz=3\n",
  "text": b"steps 3\n",
  "bytes": bytes(range(256)),
}


@pytest.mark.parametrize("name", FILES)
def test_a_flagfile_that_is_none_is_one_line(name, parse, tmp_path):
  (tmp_path / "flags").write_bytes(FILES[name])
  code, err = parse(f"--flagfile={tmp_path / 'flags'}")
  assert code == 2
  assert is_fine(code, err), err[:2000]


@pytest.mark.parametrize("name", ["", "missing", ".", "a\0b", "x" * 5000])
def test_a_flagfile_that_is_not_there_is_one_line(name, parse, tmp_path):
  code, err = parse(f"--flagfile={tmp_path / name}")
  assert code == 2
  assert is_fine(code, err), err[:2000]


def test_a_flagfile_is_read(parse, tmp_path):
  (tmp_path / "flags").write_text("# caf\u00e9\n--steps=3\n", encoding="utf-8")
  assert parse(f"--flagfile={tmp_path / 'flags'}") == (0, "")


# ---- what flags hold

LANGUAGES: dict[str, Callable[[str], Any]] = {
  "mesh": mesh.parse_mesh,
  "network": network.parse,
  "topology": chips.parse_topology,
  "coordinator": lambda text: join._check_explicit(text, 2, 0),
  "processes": lambda text: join._of_environment({"JAX_NUM_PROCESSES": text}),
  "slurm": lambda text: join.detect_cluster({"SLURM_STEP_NODELIST": "", "SLURM_NTASKS": text}),
  "slowdown": lambda text: setup.slowdown(Config(slowdown=text)),
  "node_ip": lambda text: setup.legal(Config(node_ip=text)),
  "methods": lambda text: compare.labels(compare.split(text) or ["mean()"]),
  "sweep": lambda text: ahead.grid(text, Config()),
  "set": lambda text: reproduce.given([text]),
}


@pytest.mark.parametrize("language", LANGUAGES)
def test_any_text_in_a_flag_is_read_or_one_line(language):
  @settings(quick, max_examples=40)
  @given(words)
  def check(text):
    assert is_one_line(said(LANGUAGES[language], text))

  check()
