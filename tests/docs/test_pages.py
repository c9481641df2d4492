"""Documentation pages and README: commands parse, their specs build, names and linked files exist.

Nothing is trained and no data file is read. A value in capitals, such as PATH or HOST:PORT, is a
placeholder.
"""

import ast
import functools
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import research
from experiments import bench
from experiments.applications import suite as applications
from experiments.benchmarks import overlap, pairs, peers, servers, speed
from experiments.compare import split
from research.analysis import chips
from research.core import arguments, plugins, registry
from research.core.spec import parse
from research.server import setup
from research.sim.network import is_simulated
from research.training.assemble import check
from research.training.config import Config

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
GENERATED = [DOCS / "api", DOCS / "catalogue", DOCS / "results"]  # folders where a build writes
_built = {*(DOCS / "_build").rglob("*"), *(DOCS / "results" / "claims").rglob("*")}
_built |= {page for folder in GENERATED[:2] for page in folder.glob("*.md") if page.stem != "index"}
PAGES = [page for page in PAGES if page not in _built]

FENCED = re.compile(r"^(`{3,})([^\n`]*)\n(.*?)^\1 *$", re.DOTALL | re.MULTILINE)
PLACEHOLDER = re.compile(r"[A-Z][A-Z0-9_]*(:[A-Z]+)?")
PROGRAM = re.compile(r"(?:.*/)?((?:experiments|launch)/\w+)\.py|distopt")
ENDS = {"&&", "||", "|", ";", ">", "2>", "&", "--"}  # of a program's own arguments
OF_ABSL = {"flagfile", "help"}
OF_CONFIG = ("run", "compare", "sweep", "compile", "probe")  # programs that take the flags of a run


def by_name(page: Path) -> str:
  return str(page.relative_to(ROOT))


def blocks(page: Path) -> Iterator[tuple[str, str]]:
  """Fenced blocks of a page: language or directive, and text."""
  for _, info, text in FENCED.findall(page.read_text()):
    yield info.strip(), text


def commands(page: Path) -> Iterator[list[str]]:
  """Command lines of a page as words: those of shell blocks, and those in the text.

  Lines that begin with a prompt, `$`, are examples of mistakes.
  """
  for language, text in blocks(page):
    if language in ("", "bash", "console", "sh") and re.search(r"\.py\b|distopt", text):
      yield from lines(re.sub(r"^\$ .*\n(?:.*\n)*", "", text, flags=re.MULTILINE))
  prose = FENCED.sub("", page.read_text())
  for span in re.findall(r"`([^`]+)`", prose):
    if re.search(r"\.py --|^distopt", span):
      yield shlex.split(" ".join(span.split()))


def lines(text: str) -> Iterator[list[str]]:
  """Splits a shell block into commands; a quoted argument may contain line ends."""
  pending = ""
  for line in re.sub(r"\\\n\s*", "", text).splitlines():
    pending += line + "\n"
    try:
      words = shlex.split(pending, comments=True)
    except ValueError:  # inside quotes
      continue
    pending = ""
    if words:
      yield words
  assert not pending, f"not a command: {pending}"


def programs(words: list[str]) -> Iterator[tuple[str, list[str]]]:
  """The programs of this repository in a command, each with its own arguments."""
  for place, word in enumerate(words):
    if found := PROGRAM.fullmatch(word):
      rest = words[place + 1 :]
      end = next((n for n, other in enumerate(rest) if other in ENDS), len(rest))
      yield found[1] or "experiments/run", rest[:end]


def pairs_of(words: list[str]) -> list[tuple[str, str]]:
  """Names and values of flags, those of flag files included."""
  found = []
  for word in words:
    if word.startswith("--"):
      name, _, value = word[2:].partition("=")
      if name == "flagfile":
        kept = [line for line in (ROOT / value).read_text().splitlines() if line[:2] == "--"]
        found += pairs_of(kept)
      else:
        found.append((name, value))
  return found


@functools.cache
def defined(path: Path) -> frozenset[str]:
  """Names of the flags that a module defines itself."""
  calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
  makers = [call for call in calls if getattr(call.func, "attr", "").startswith("DEFINE_")]
  names = [call.args[0].value for call in makers if isinstance(call.args[0], ast.Constant)]
  return frozenset(map(str, names))


def legal_flags(program: str) -> set[str]:
  folder, name = program.split("/")
  found = set(OF_ABSL | defined(ROOT / f"{program}.py"))
  if folder == "launch":
    return found.union(*map(defined, (ROOT / "launch").rglob("*.py")))  # modules that they share
  if name == "run":
    found |= defined(ROOT / "research/command/run.py")
  if name in OF_CONFIG:
    return found.union(Config.names(), defined(ROOT / "research/command/flags.py"))
  return found | {"import", "compilation_cache"}


def is_bool(name: str) -> bool:
  return isinstance(Config.defaults().get(name), bool)


def config_of(flags: list[tuple[str, str]]) -> Config:
  """The run that flags describe; placeholders are left at their defaults."""
  typed: dict[str, Any] = {}
  for name, value in flags:
    switch = name.removeprefix("no") if is_bool(name.removeprefix("no")) else name
    if is_bool(switch):
      typed[switch] = switch == name and value != "false"
    elif name in Config.names() and not PLACEHOLDER.fullmatch(value):
      value = re.sub(r"\{([^{}|]+)\|[^{}]*\}", r"\1", value)  # alternatives of a job array
      typed[name] = value if value == "all" else type(Config.defaults()[name])(value)
  return Config(**typed)


def check_run(config: Config) -> None:
  """Builds all specs of a run but the task, whose arguments alone are checked."""
  if config.executor == "server":
    setup.check(config, needs_ray=False)
  else:
    check(config)
  call = parse(config.task)
  parameters = registry.signature_of(registry.lookup(("task",), call.name)).parameters
  settable = {n: p for n, p in parameters.items() if n not in ("model", "data_dir")}
  arguments.matched(call, settable, lambda kinds, inner: registry.build(kinds[0], inner))


def check_bench(flags: dict[str, str]) -> None:
  suite = flags.get("suite", "loop")
  assert suite in bench.SUITES
  loop = {*pairs.CASES, *bench.OTHERS}
  known = {"loop": loop, "server": {*servers.CASES}, "hosts": {*speed.PAIRS}}
  known |= {"applications": {*applications.CASES}, "peers": {*peers.CASES}}
  known = (known | {"overlap": {*overlap.CASES}}).get(suite, set())
  cases = [case for case in flags.get("cases", "").split(",") if case]
  assert {*cases} <= known or not cases or PLACEHOLDER.fullmatch(flags["cases"])


def check_program(program: str, words: list[str]) -> None:
  """Raises if a command does not parse."""
  flags = pairs_of(words)
  legal = legal_flags(program)
  for name, _ in flags:
    assert name in legal or (is_bool(name[2:]) and name[:2] == "no"), f"unknown flag --{name}"
  if program == "launch/tpu_vm":  # has subcommands
    return
  others = [word for word in words if not word.startswith("--")]
  assert not others, f"arguments that are no flags: {others}"
  name, given = program.split("/")[1], dict(flags)
  if "topology" in given:
    chips.parse_topology(given["topology"])
  if name == "bench":
    check_bench(given)
  if name == "reproduce" and not PLACEHOLDER.fullmatch(given.get("claim", "all")):
    claims = {"all", *(path.stem for path in (ROOT / "experiments/claims").glob("*.py"))}
    assert {*given.get("claim", "all").split(",")} <= claims
  if program not in [f"experiments/{name}" for name in OF_CONFIG]:
    return
  for text in [value for name, value in flags if name == "import"]:
    if not PLACEHOLDER.fullmatch(text):
      plugins.load(str(ROOT / text))
  links = [("network", value) for n, value in flags if n == "network" and not is_simulated(value)]
  if name == "compare":  # times are predicted for a link
    flags = [pair for pair in flags if pair not in links]
  config = config_of([(n, v.replace("{learning_rate}", "0.1")) for n, v in flags])
  for method in split(given["methods"]) if "methods" in given else [config.method]:
    check_run(config.replace(method=method))


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
  """Forgets what --import registers."""
  monkeypatch.setattr(registry, "ADDED", {**registry.ADDED})
  monkeypatch.setattr(plugins, "_loaded", {**plugins._loaded})
  monkeypatch.setattr(sys, "path", [*sys.path])
  yield
  for name in [name for name in sys.modules if name.partition(".")[0] == "spirals"]:
    del sys.modules[name]


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_commands_parse_and_their_specs_build(page):
  for words in commands(page):
    for program, own in programs(words):
      try:
        check_program(program, own)
      except Exception as error:  # of any kind; the page and the command are added
        raise AssertionError(f"{by_name(page)}: {shlex.join(words)}") from error


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_python_is_python_and_public_names_exist(page):
  for language, text in blocks(page):
    if language != "python" and not language.startswith("{code-cell}"):
      continue
    code = re.sub(r"\A(?::\S+:[^\n]*\n)+", "", text)  # options of the cell
    tree = ast.parse(re.sub(r"^%.*", "", code, flags=re.MULTILINE))
    for node in ast.walk(tree):
      if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        known = node.value.id not in ("dx", "research") or node.attr in vars(research)["__all__"]
        assert known, f"{node.value.id}.{node.attr} is not public"
      if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "research":
        exec(ast.unparse(node), {})


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_linked_files_exist(page):
  prose = FENCED.sub("", page.read_text())
  targets = re.findall(r"\]\(([^)\s#]+)(?:#[^)]*)?\)", prose)
  for info, _ in blocks(page):
    targets += re.findall(r"^\{(?:include|literalinclude)\} (\S+)", info)
  for target in targets:
    if re.match(r"[a-z]+:", target):
      continue
    path = (page.parent / target).resolve()
    is_built = bool({*path.parents} & {*GENERATED})
    assert path.exists() or is_built, f"{by_name(page)}: {target} does not exist"


def test_wrong_commands_are_found():
  """The checks of this file reject an unknown flag, name, argument and case."""
  wrong = (
    "python experiments/run.py --stepz=3",
    "python experiments/run.py --method='data_paralel(sgd(0.1), mean())'",
    "python experiments/run.py --task='mnist(1, 2, 3)'",
    "python experiments/run.py --mesh=data:3 --batch_size=256",
    "python experiments/compare.py --methods='local_sgd(sgd(0.1), mean()); local_sgd(sgd(0.1))'",
    "python experiments/bench.py --cases=compressors",
    "python experiments/reproduce.py --claim=everything",
    "distopt steps=3",
  )
  for command in wrong:
    ((program, own),) = programs(shlex.split(command))
    with pytest.raises((ValueError, AssertionError)):
      check_program(program, own)
