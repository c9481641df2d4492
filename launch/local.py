"""Runs a command as the processes of one job on this machine.

    python launch/local.py --processes=2 --devices_per_process=4 --restarts=3 -- \\
        python experiments/run.py --executor=spmd --mesh=data:8

Each line of output starts with the process number, and is also written to the log file of that
process. If a process dies or hangs, all processes are ended and, with --restarts, started again.
After Ctrl-C or SIGTERM, the job saves its state and stops. The exit code is 0, or the exit code of
the first process that failed.
"""

from absl import flags

from launch import command, supervisor

FLAGS = flags.FLAGS


def define_flags() -> None:
  """Defines the flags of this launcher."""
  command.define_flags()
  flags.DEFINE_integer("processes", 2, "Number of processes of the job.", 1)
  text = "Number of devices of each process: CPU devices, or the next GPUs of the machine."
  flags.DEFINE_integer("devices_per_process", 1, text, 1)


def processes(line: list[str]) -> list[supervisor.Process]:
  """Returns the job's processes, which communicate through a port that is currently free."""
  address = f"127.0.0.1:{command.free_port('127.0.0.1')}"
  count, devices = FLAGS.processes, FLAGS.devices_per_process

  def one(number: int) -> supervisor.Process:
    own = range(number * devices, (number + 1) * devices)
    environ = command.environment(address, number, count) | {
      "JAX_NUM_CPU_DEVICES": str(devices),
      "JAX_LOCAL_DEVICE_IDS": ",".join(map(str, own)),
    }
    return supervisor.Process(str(number), line, environ)

  return [one(number) for number in range(count)]


def main(line: list[str]) -> int:
  """Runs the launcher; returns the exit code of the job."""
  return supervisor.supervise(lambda: processes(line), command.log_folder(), command.rules())


if __name__ == "__main__":
  define_flags()
  command.start(main, __doc__)
