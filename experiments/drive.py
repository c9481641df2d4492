"""Records expert driving in a simulator, judges drivers in closed loop, or draws a scene.

    python experiments/drive.py --do=record --episodes=200
    python experiments/drive.py --do=judge --driver=planner --episodes=50
    python experiments/drive.py --do=judge --run=runs/RUN --episodes=50
    python experiments/drive.py --do=picture --out=scene.png

The command needs `pip install -e ".[driving]"`. The recording is in --out, or by default in the
folder "driving" of $RESEARCH_DATA_DIR or of the user's cache; the task `driving()` trains on it.
With --run, the model of a complete run drives. With --do=record, the model drives round --round of
DAgger, and the recorded actions are the actions that the expert (--driver) would have chosen. The
same command continues an interrupted recording. The seeds of --do=judge are never used for
recordings.
"""

import contextlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator

from absl import flags, logging

from research.command.errors import fail, one_line_errors
from research.command.flags import define_compilation_cache, define_import, launch
from research.command.start import import_modules, use_compilation_cache
from research.core import checks, paths
from research.core.text import quoted
from research.tasks.driving.experts import EXPERTS
from research.tasks.driving.scenarios import SCENARIOS
from research.tasks.driving.scene import Driver
from research.training.config import Config, UsageError, flag

FLAGS = flags.FLAGS
Told = Callable[[int], None]


def main(argv: list[str]) -> None:
  """Records, judges or draws, according to the flags."""
  del argv
  logging.set_verbosity(logging.WARNING)
  logging.get_absl_logger().setLevel("CRITICAL")  # Orbax logs every file that it reads
  if importlib.util.find_spec("highway_env") is None:
    fail(2, 'the simulator is highway-env: pip install -e ".[driving]"')
  for name in FLAGS.scenarios:
    if name not in SCENARIOS:
      fail(2, f"--scenarios={quoted(name)}: {checks.unknown(name, SCENARIOS)}")
  with one_line_errors():
    use_compilation_cache(FLAGS.compilation_cache)
    import_modules()
    {"record": record, "judge": judge, "picture": picture}[FLAGS.do]()


def record() -> None:
  """Records episodes and prints the folder's digest."""
  from research.tasks.driving import recorded

  if bool(FLAGS.run) != (FLAGS.round > 0):
    raise UsageError(
      "--round: 1 and above are driven by a policy, --run=FOLDER, and 0 by an expert"
    )
  with flag("out", FLAGS.out):
    folder = paths.writable(FLAGS.out or recorded.default())
  expert = EXPERTS[FLAGS.driver]
  with flag("episodes", FLAGS.episodes), bar(len(FLAGS.scenarios) * FLAGS.episodes) as told:
    driver = of_run(FLAGS.run) if FLAGS.run else expert
    given = (folder, FLAGS.scenarios, FLAGS.episodes, driver, expert, FLAGS.round)
    digest = recorded.record(*given, told)
  print(f"{folder}: sha256 of the list of blocks {digest}")


def judge() -> None:
  """Prints the results of a driver in each scenario, and over all scenarios."""
  from research.tasks.driving import judging

  driver = of_run(FLAGS.run) if FLAGS.run else EXPERTS[FLAGS.driver]
  found = {}
  with bar(len(FLAGS.scenarios) * FLAGS.episodes) as told:
    for name in FLAGS.scenarios:
      found[name] = judging.judge(driver, name, FLAGS.episodes, told=told)
  found["all"] = judging.together(found.values())
  for name, outcomes in found.items():
    print(f"{name}, {len(outcomes)} episodes; value and 95% interval")
    for what, (value, low, high) in judging.measures(outcomes).items():
      print(f"  {what:22}  {value:8.3f}  {low:8.3f}  {high:8.3f}")


def picture() -> None:
  """Draws each scenario a few seconds after the start of an episode, one below the other."""
  from research.tasks.driving import pictures

  driver = of_run(FLAGS.run) if FLAGS.run else EXPERTS[FLAGS.driver]
  with flag("out", FLAGS.out):
    target = paths.local(FLAGS.out)
  pictures.draw(FLAGS.scenarios, driver, target)
  print(target)


def of_run(text: str) -> Driver:
  """Returns the driver with the model of a complete run."""
  from research.tasks.driving import judging
  from research.training import loop
  from research.training.assemble import NOTHING_GIVEN

  with flag("run", text):
    folder = paths.local(text)
    if not (folder / "summary.json").exists():
      raise ValueError("is not the folder of a complete run")
    stored = json.loads((folder / "config.json").read_text())
  config = Config(**{name: stored[name] for name in Config.names() if name in stored})
  result = loop.trained(
    config.replace(out=str(folder)), NOTHING_GIVEN, (), writes=True, shown=False
  )
  return judging.policy(result.model)


@contextlib.contextmanager
def bar(total: int) -> Iterator[Told]:
  """Shows a progress bar on a terminal, and prints lines elsewhere."""
  from rich.console import Console
  from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

  console = Console(stderr=True)
  if not console.is_interactive:
    done = 0

    def told(count: int) -> None:
      nonlocal done
      before, done = done, done + count
      if done * 10 // total != before * 10 // total:
        print(f"episode {done}/{total}", file=sys.stderr, flush=True)

    yield told
    return
  columns = (TextColumn("episode"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
  with Progress(*columns, console=console) as progress:
    task = progress.add_task("", total=total)
    yield lambda count: progress.advance(task, count)


if __name__ == "__main__":
  flags.DEFINE_enum("do", "record", ["record", "judge", "picture"], "What to do.")
  flags.DEFINE_string("out", "", "Folder of the recording, or file of the picture.")
  flags.DEFINE_string("run", "", "Folder of a complete run whose model drives.")
  flags.DEFINE_enum("driver", "planner", [*EXPERTS], "Who drives, or says what to do.")
  flags.DEFINE_list("scenarios", [*SCENARIOS], "Which ones.")
  flags.DEFINE_integer("episodes", 200, "Of each scenario.", 1)
  flags.DEFINE_integer("round", 0, "Of DAgger: 0 is the expert's own driving.", 0)
  flags.DEFINE_bool("debug", False, "Shows the traceback of every error, JAX's own frames too.")
  define_compilation_cache()
  define_import()
  launch(main, __doc__)
