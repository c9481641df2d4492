"""What `gcloud compute tpus` does for launch/tpu_vm.py, with folders in place of machines.

In $STAND_IN: `calls` has a line per call, `state` is that of the queued resource, and a folder
NODE-WORKER is the home of each of two workers per slice. `python3` is a stand-in, too: it installs
nothing.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

WORKERS = 2


def flag(words: list[str], name: str) -> str:
  return next((word.partition("=")[2] for word in words if word.startswith(f"--{name}=")), "")


def homes(at: Path, node: str) -> list[Path]:
  return sorted(at.glob(f"{node}-worker*"))


def queued_resources(at: Path, action: str, words: list[str]) -> None:
  state = at / "state"
  if action == "create":
    if state.exists():
      sys.exit("ERROR: (gcloud) ALREADY_EXISTS: the resource is there")
    count, prefix = flag(words, "node-count"), flag(words, "node-prefix")
    nodes = [f"{prefix}-{i}" for i in range(int(count or 0))] or [flag(words, "node-id")]
    for node in nodes:
      for worker in range(WORKERS):
        (at / f"{node}-worker{worker}").mkdir()
    state.write_text("PROVISIONING")
  elif action == "describe":
    print(state.read_text())
    if state.read_text() == "PROVISIONING":
      state.write_text("ACTIVE")
  else:
    state.unlink()
    for home in at.glob("*-worker*"):
      shutil.rmtree(home)


def tpu_vm(at: Path, action: str, words: list[str]) -> None:
  if action == "scp":
    node, _, name = words[1].partition(":")
    for home in homes(at, node):
      shutil.copy(words[0], home / name)
    return
  if not homes(at, words[0]):
    sys.exit(f"ERROR: (gcloud) NOT_FOUND: {words[0]}")
  for home in homes(at, words[0]):
    line = ["bash", "-c", flag(words, "command")]
    ended = subprocess.run(line, cwd=home, env=os.environ | {"HOME": str(home)})
    if ended.returncode:
      sys.exit(ended.returncode)


def python3(words: list[str]) -> None:
  if words[:3] == ["-m", "uv", "venv"]:
    place = Path(words[-1]) / "bin"
    place.mkdir(parents=True)
    (place / "python").symlink_to(sys.executable)


if __name__ == "__main__":
  if Path(sys.argv[0]).name == "python3":
    python3(sys.argv[1:])
  else:
    folder = Path(os.environ["STAND_IN"])
    with (folder / "calls").open("a") as calls:
      calls.write(json.dumps(sys.argv[1:]) + "\n")
    group, verb, *rest = sys.argv[3:]
    {"queued-resources": queued_resources, "tpu-vm": tpu_vm}[group](folder, verb, rest)
