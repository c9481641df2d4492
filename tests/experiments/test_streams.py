"""Standard streams that are closed, full, or lose their reader: the command's work goes on."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from research.command.errors import exit_if_stopped, one_line_errors
from research.training.config import UsageError, flag

ROOT = Path(__file__).parents[2]
# Prints to both streams, opens a file, and leaves in it which descriptors are open.
PROGRAM = """
import os, sys
from research.core import streams
streams.prepare()
file = open("result", "w")
assert file.fileno() > 2, "a file has the number of a standard stream"
for number in range(3):
  os.fstat(number)
print(chr(252) + "nicode" + " " * 100_000)
print("told", file=sys.stderr)
sys.stdout.flush()
print("again", flush=True)
file.write("done " + sys.stdin.read())
"""


def program(folder: Path, redirected: str, **environ: str) -> subprocess.CompletedProcess[str]:
  command = ["bash", "-c", f'set -o pipefail; "$0" -c "$1" {redirected}', sys.executable, PROGRAM]
  env = os.environ | {"PYTHONPATH": str(ROOT)} | environ
  none = subprocess.DEVNULL
  return subprocess.run(command, cwd=folder, env=env, stdin=none, capture_output=True, text=True)


@pytest.mark.parametrize(
  "redirected", ["2>&-", ">&-", "<&-", "<&- >&- 2>&-", "2>/dev/full", "| true", "2>&1 | true"]
)
def test_work_is_done_whoever_listens(redirected, tmp_path):
  ended = program(tmp_path, redirected)
  assert (ended.returncode, ended.stderr.strip()) in ((0, ""), (0, "told"))
  assert (tmp_path / "result").read_text() == "done "


@pytest.mark.parametrize("encoding", ["", "ascii"])
def test_a_locale_without_the_characters_gets_them_escaped(encoding, tmp_path):
  ended = program(tmp_path, "", LC_ALL="POSIX", PYTHONUTF8="0", PYTHONIOENCODING=encoding)
  assert ended.returncode == 0
  assert ended.stdout.startswith("\\xfcnicode ")
  assert ended.stderr == "told\n"


def test_a_full_disk_under_standard_output_is_one_error(tmp_path):
  ended = program(tmp_path, ">/dev/full")
  assert ended.returncode == 1
  assert ended.stderr.splitlines()[-1] == (
    f"OSError: [Errno {errno.ENOSPC}] No space left on device: 'standard output'"
  )
  assert "Exception ignored" not in ended.stderr


def test_being_told_to_stop_before_training_is_a_line(capfd):
  before = signal.getsignal(signal.SIGTERM)
  with pytest.raises(SystemExit) as caught, one_line_errors():
    os.kill(os.getpid(), signal.SIGTERM)
  assert caught.value.code == 143
  assert capfd.readouterr().err == "error: terminated before there was anything to save\n"
  assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
  ("reason", "saved", "code"),
  [("interrupted", True, 130), ("terminated", True, 0), ("terminated", False, 143)],
)
def test_a_command_of_several_runs_ends_when_a_signal_has_stopped_one(reason, saved, code):
  exit_if_stopped({"stopped_because": "steps"}, saved)
  with pytest.raises(SystemExit) as caught:
    exit_if_stopped({"stopped_because": reason}, saved)
  assert caught.value.code == code


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_exit_code_5_even_where_a_flag_is_blamed(number, capsys):
  with pytest.raises(SystemExit) as caught, one_line_errors(), flag("out", "here"):
    raise OSError(number, os.strerror(number), "here/config.json")
  assert caught.value.code == 5
  assert len(capsys.readouterr().err.splitlines()) == 1
  with pytest.raises(SystemExit) as caught, one_line_errors():
    raise UsageError("--out='here': another reason")
  assert caught.value.code == 2
