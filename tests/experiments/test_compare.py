"""The comparison of methods: what is trained, who reaches the target when, and what is advised."""

import json

import numpy as np
import pytest
from absl import flags

from experiments import compare, sweep
from experiments.reports import comparison, outcomes
from research.command.flags import parse_flags
from research.training.config import Config

SGD = "data_parallel(sgd(0.1), {})"
DENSE, INT8 = SGD.format("mean()"), SGD.format("error_feedback(two_phase(int8()))")
WILD = "data_parallel(sgd(1e4), mean())"
FEATURES = 10  # of least_squares(), one leaf


@pytest.fixture(scope="module", autouse=True)
def flags_defined():
  compare.define_own_flags()


@pytest.fixture
def command(tmp_path, capsys):
  """Runs the command in this process with the flags given and all others as they are by default."""

  def command(*arguments: str) -> tuple[int, str, str]:
    for name in flags.FLAGS:
      flags.FLAGS[name].unparse()
    quick = ("--task=least_squares()", "--steps=40", "--eval_every=10", f"--out={tmp_path / 'out'}")
    code = 0
    try:
      argv = ["compare.py", *quick, "--compilation_cache=off", *arguments]
      compare.main(parse_flags(argv))
    except SystemExit as error:
      code = int(error.code or 0)
    return code, *capsys.readouterr()

  return command


# ---- the command


@pytest.mark.slow
def test_methods_are_trained_compared_and_found_again(command, tmp_path):
  told = ("--seeds=2", "--seed=3", "--network=10kbit,1ms", "--recommend", "--compute_seconds=0.01")
  out = tmp_path / "out"
  code, text, _ = command(f"--methods={DENSE}", *told)
  assert code == 0
  written = (out / "compare.json").read_text()
  (dense,) = json.loads(written, parse_constant=pytest.fail)["methods"]  # NaN is not JSON
  assert dense["steps_to_target"] == 40  # alone it sets the target
  assert text.splitlines()[-1].startswith("recommended: on 10kbit,1ms data_parallel(")
  before = {path: path.stat().st_mtime_ns for path in out.glob("*/summary.json")}

  code, text, _ = command(f"--methods={DENSE};{WILD};{INT8};", *told)
  assert code == 0
  assert len(before) == 2
  assert before.items() <= {p: p.stat().st_mtime_ns for p in out.glob("*/summary.json")}.items()
  result = json.loads((out / "compare.json").read_text())
  dense, wild, int8 = result["methods"]
  assert [row["label"] for row in (dense, wild, int8)] == [
    "sgd(0.1), mean()",
    "sgd(1e4), mean()",
    "sgd(0.1), error_feedback(two_phase(int8()))",
  ]
  assert wild["diverged_seeds"] == result["seeds"] == [3, 4]
  assert dense["unimproved_seeds"] == []
  assert dense["initial_train_loss"] > dense["train_loss"]
  assert "seconds_to_target" not in wild
  assert result["target"] == max(min(np.mean(r["curve"]["losses"], 0)) for r in (dense, int8))
  assert dense["bytes_per_step_per_worker"] == 2 * 7 / 8 * 4 * FEATURES
  assert dense["ratio_to_dense"] == 1
  ring = 14 * 0.001 + 8 * dense["bytes_per_step_per_worker"] / 10e3
  assert dense["communication_seconds_per_step"] == pytest.approx(ring)
  for row in (dense, int8):
    steps, sent = row["steps_to_target"], row["bytes_per_step_per_worker"]
    assert row["bytes_to_target"] == pytest.approx(steps * sent, abs=1)
    pace = 0.01 + row["communication_seconds_per_step"]
    assert row["seconds_to_target"] == pytest.approx(steps * pace)
  assert text.splitlines()[-1] == result["recommendation"]
  shown = (out / "compare.md").read_text()
  assert text.splitlines()[0] in shown
  assert "2 of 2 seeds diverged" in shown
  assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
  ("arguments", "line"),
  [
    (["--methods="], "--methods='': name at least one method"),
    ([f"--methods={DENSE}; data_parallel(sgd(0.1), mean("], "method 2 of 2: --method='data_par"),
    ([f"--methods={DENSE}; data_parallel(sgd(0.1), men())"], "did you mean 'mean'?"),
    ([f"--methods={DENSE};;{INT8}"], "method 2 of 3: --method='': malformed"),
    ([f"--methods={DENSE};{INT8};{DENSE}"], "method 3 of 3: '" + DENSE + "' stands there twice"),
    (
      [f"--methods={DENSE}; data_parallel(sgd(0.1), mean(), period=3)"],
      "method 2 of 2: --steps=40",
    ),
    (
      [f"--methods={DENSE};{INT8}", "--population=16"],
      "method 2 of 2: ",
    ),
    (["--methods=" + DENSE, "--mesh=rows:2"], "error: --mesh='rows:2': unknown axis"),
    (["--methods=" + DENSE, "--method=" + DENSE], "use --methods"),
    (["--methods=" + DENSE, "--seeds=0"], "seeds"),
    (["--methods=" + DENSE, "--eval_every=0"], "--eval_every=0: "),
    (["--methods=" + DENSE, "--network=fast"], "--network='fast': 'fast' is not a bandwidth"),
    (["--methods=" + DENSE, "--target=nan"], "--target=nan: not a finite number"),
    (["--methods=" + DENSE, "--target=low"], "target"),
    (["--methods=" + DENSE, "--recommend"], "--recommend: needs the network"),
  ],
)
def test_what_cannot_be_is_refused_before_anything_is_trained(command, tmp_path, arguments, line):
  code, out, err = command(*arguments)
  assert code == 2
  assert out == ""
  assert len(err.splitlines()) == 1
  assert line in err
  assert not (tmp_path / "out").exists()


# ---- what is trained


@pytest.mark.parametrize(
  ("text", "parts"),
  [
    ("", []),
    (" ; ", [""]),
    ("a(); b(1)", ["a()", "b(1)"]),
    ("a();", ["a()"]),
    ("a();;b()", ["a()", "", "b()"]),
    ("a('x;y', [1;2]);b(\"';'\")", ["a('x;y', [1;2])", "b(\"';'\")"]),
    ("a(;b()", ["a(;b()"]),
    ("a());b()", ["a())", "b()"]),
  ],
)
def test_methods_are_split_outside_of_brackets_and_quotes(text, parts):
  assert compare.split(text) == parts


@pytest.mark.parametrize(
  ("specs", "labels"),
  [
    (["m(s(1), a())", "m(s(1), b(c()))"], ["a()", "b(c())"]),
    (["m(s(1), a())", "m(s(2), a())"], ["s(1)", "s(2)"]),
    (["m(a(), h=1)", "m(a(), h=2)"], ["h=1", "h=2"]),
    (["m(a())", "m(a(), h=2)"], ["m(a())", "m(a(), h=2)"]),
    (["m(a())", "n(b())"], ["m(a())", "n(b())"]),
    (["m(a())"], ["m(a())"]),
    (["m(s(1,\n    2), a())", "m(s(1), a())"], ["s(1, 2)", "s(1)"]),
  ],
)
def test_a_label_is_what_sets_a_method_apart(specs, labels):
  assert compare.labels(specs) == labels


def test_the_folder_depends_on_the_method_alone():
  assert compare.folder_name(INT8).startswith("data_parallel-error_feedback-two_phase-int8-")
  assert compare.folder_name(INT8) != compare.folder_name(INT8.replace("0.1", "0.2"))


# ---- how they compare

STEPS = np.array([10.0, 20.0, 30.0, 40.0])
LOSSES = np.array([[4.0, 2.0, 3.0, 1.0], [2.0, 2.0, 2.0, 1.0]])
NO_CLOCK = np.full(len(STEPS), np.nan)
CURVE = outcomes.Curve(STEPS, 5 * STEPS, LOSSES, NO_CLOCK)  # best, averaged: 3, 2, 2, 1


@pytest.mark.parametrize(
  ("target", "steps"), [(9, 10), (3, 10), (2.5, 15), (2, 20), (1.5, 35), (1, 40), (0.9, None)]
)
def test_the_target_is_reached_on_a_line_between_the_best_losses(target, steps):
  assert outcomes.steps_to(CURVE, target) == steps
  found = outcomes.to_target(CURVE, target, 2.0 * CURVE.steps)
  assert found.get("bytes_to_target") == (steps and 5 * steps)
  assert found.get("seconds_to_target") == (steps and 2 * steps)
  assert found.get("at_first_evaluation") == (steps and steps == 10)


NAN, INF = np.nan, np.inf
PLACE = outcomes.Conditions("1mbit", 0.1, "")


def outcome(*losses, start: float | None = 5.0, diverged=()) -> outcomes.Outcome:
  """Of seeds 3, 4, ...: the losses of those that did not diverge, at steps 10, 20, ..."""
  seeds = range(3, 3 + len(losses) + len(diverged))
  configs = [Config(seed=seed, out="o") for seed in seeds]
  plan = outcomes.Contender("data_parallel(sgd(0.1), mean())", "m()", False, configs)
  wire = {"bytes_per_step_per_worker": {"data": 5.0}, "dense_bytes_per_step_per_worker": 5.0}
  summary = {"initial_train_loss": start, "wire": wire | {"transfers": []}, "eval": {}}
  summary |= {"mesh": "data:2", "steps_per_second": 10.0, "train_loss": 1.0}
  curve = CURVE._replace(losses=np.array(losses)) if losses else None
  return outcomes.Outcome(plan, [summary] * len(losses), curve, list(diverged))


UNIMPROVED = {
  "never below": (outcome([6, 5, 7, 5]), [3]),
  "early best, then above": (outcome([2, 1, 4, 28]), [3]),
  "chance": (outcome([5.1, 5.2, 5.1, 5.01]), [3]),
  "back at the start": (outcome([2, 3, 4, 5]), []),
  "no number at the end": (outcome([2, 1, 0.5, NAN]), [3]),
  "no number on the way": (outcome([NAN, 2, NAN, 1]), []),
  "never a number": (outcome([NAN] * 4), [3]),
  "infinite at the end": (outcome([2, 1, 0.5, INF]), [3]),
  "one seed of two": (outcome([2, 1, 1, 1], [2, 9, 9, 9]), [4]),
  "beside a lost seed": (outcome([6, 6, 6, 6], diverged=[3]), [4]),
  "start not known": (outcome([6, 6, 6, 6], start=None), []),
}


@pytest.mark.parametrize("case", UNIMPROVED)
def test_who_does_not_improve_on_its_start_neither_wins_nor_sets_the_target(case):
  found, seeds = UNIMPROVED[case]
  good = outcome([4, 3, 2, 1.5])
  assert found.unimproved == seeds
  for target in (None, 0.0, 30.0):
    asked = outcomes.common_target([good, found]) if target is None else target
    row = outcomes.figures(found, asked, PLACE)
    assert row["unimproved_seeds"] == seeds
    if seeds:
      assert outcomes.common_target([good, found]) == 1.5
      assert "seconds_to_target" not in row
      assert comparison.remark(row).split(" on ")[0].endswith(("did not improve", "diverged"))
    elif target != 0:
      assert row["steps_to_target"] <= 40


def test_a_target_is_reached_by_the_loss_that_is_written():
  """That of compare.json, given back as --target."""
  found = outcome([4, 3, 0.1 + 0.2, 0.1 + 0.3])
  target = float(json.dumps(outcomes.common_target([found])))
  assert outcomes.figures(found, target, PLACE)["steps_to_target"] == 30


def test_no_recommendation_where_nothing_improves():
  rows = [outcomes.figures(o, None, PLACE) for o in (outcome([9, 9, 9, 9]), outcome(diverged=[3]))]
  assert outcomes.common_target([outcome([9, 9, 9, 9]), outcome(diverged=[3])]) is None
  told = comparison.recommendation({"methods": rows, "target": None, "place": "1mbit"})
  assert told == ("no recommendation on 1mbit: no method improves on its start with all its seeds")
  assert comparison.remark(rows[0]) == "1 of 1 seeds did not improve on the start's 5"


def test_all_that_did_not_diverge_reach_the_default_target():
  worse = CURVE._replace(losses=LOSSES + 1)
  ended = [outcome(*LOSSES, start=9.0), outcome(*worse.losses, start=9.0)]
  ended.append(outcome(*(LOSSES + 7), start=99.0, diverged=[3]))
  ended.append(outcome(diverged=[3, 4]))
  target = outcomes.common_target(ended)
  assert target == 2
  assert [outcomes.steps_to(c, target) for c in (CURVE, worse)] == [20, 40]
  assert outcomes.common_target(ended[2:]) is None


def test_a_run_that_converged_stays_where_it_ended(tmp_path):
  for name, losses in (("short", [4, 1]), ("long", [6, 3, 2])):
    (tmp_path / name).mkdir()
    rows = [
      {"step": 10 * i, "loss": 9, "seconds": 0, "bytes": 70 * i, "train_loss": loss}
      for i, loss in enumerate(losses, 1)
    ]
    rows.insert(1, {"step": 15, "loss": 9, "seconds": 0, "bytes": 105})  # without an evaluation
    (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
  curve = outcomes.read_curve([tmp_path / "short", tmp_path / "long"])
  assert curve.steps.tolist() == [10, 20, 30]
  assert curve.sent.tolist() == [70, 140, 210]
  assert curve.losses.tolist() == [[4, 1, 1], [6, 3, 2]]


# ---- what is advised


def advice(*methods, target: float | None = 0.5):
  """The recommendation among (label, dense, seconds to the target or None)."""
  rows = [
    {"label": label, "dense": dense} | ({"seconds_to_target": s} if s is not None else {})
    for label, dense, s in methods
  ]
  return comparison.recommendation({"methods": rows, "target": target, "place": "1mbit"})


def test_the_first_at_the_target_is_recommended_or_not_to_compress():
  slow, fast = ("mean()", True, 90.0), ("int8()", False, 30.0)
  best, lost = ("sign()", False, 20.0), ("bad()", False, None)
  assert advice(slow, fast, best, lost) == (
    "recommended: on 1mbit sign() is at training loss 0.5 after 20 s, 1.50 times sooner than the "
    "next, int8(), 4.50 times sooner than the dense mean()"
  )
  assert advice(slow, fast).endswith("3.00 times sooner than the next, the dense mean()")
  alone = "after 30 s, where no other comes"
  assert advice(fast, ("mean()", True, None)).endswith(alone)
  assert advice(fast, lost).endswith(f"{alone}, no dense method was compared")
  assert advice(fast, best, ("mean()", True, None)).endswith("no dense method reaches it")
  assert advice(("mean()", True, 9.0), slow).startswith("recommended: ")
  assert advice(("mean()", True, 10.0), fast) == (
    "do not compress here: on 1mbit mean() is at training loss 0.5 after 10 s, 3.00 times sooner "
    "than the next, int8()"
  )
  assert "int8() (too close to call by timings)" in advice(("sign()", False, 29.0), fast)
  assert advice(lost) == (
    "no recommendation on 1mbit: no method reaches training loss 0.5 with all its seeds"
  )
  assert "no method improves on its start" in advice(lost, target=None)


# ---- the sweep's winner


def test_a_rate_that_ends_worse_than_it_began_cannot_win():
  def summary(loss: float, accuracy: float | None = None, start: float | None = 2.3):
    measured = lambda value: {} if value is None else {"accuracy": value}
    return {
      "initial_train_loss": start,
      "initial_eval": measured(accuracy and 0.1),
      "train_loss": loss,
      "eval": measured(accuracy),
    }

  assert sweep.improved(summary(2.2))
  assert sweep.improved(summary(2.2, 0.1))
  assert sweep.improved(summary(9.0, start=None))
  for wrong in (summary(2.3), summary(28.0), summary(28.0, 0.9), summary(2.2, 0.05), summary(NAN)):
    assert not sweep.improved(wrong)
  row = lambda rate, *scores, unimproved=(): {
    "learning_rate": rate, "by": "test accuracy", "scores": [*scores], "unimproved": [*unimproved]
  }  # fmt: skip
  good, wild = row(0.1, 0.3, 0.3), row(30.0, 0.9, 0.8, unimproved=[1])
  lost = row(99.0, None, 0.9)
  assert sweep.winner([wild, good, lost]) is good
  assert sweep.winner([wild, lost]) is None
  lines = sweep.table([wild, good, lost]).splitlines()[2:]
  said = ("1 of 2 did not improve |", "winner |", "1 of 2 diverged |")
  assert all(line.endswith(note) for line, note in zip(lines, said, strict=True))
