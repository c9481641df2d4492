"""Trains a model with a method on a task, like the command `distopt` of an installed package.

python experiments/run.py --task="digits()" --method="data_parallel(adam(1e-3), mean())"
"""

from research.command.run import run

if __name__ == "__main__":
  run()
