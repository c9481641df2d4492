"""Hooks for `research.train(..., hooks=[...])`, and the events that they receive.

A hook is a function `(run, event) -> reason to stop, or None`, or a `Hook`. `run.step` is the
number of local steps so far, and `run.params()` returns the current model to deploy.
"""

from research.training.hooks.hook import End, Evaluation, Hook, Pause, Rounds, Saved, Stop

__all__ = ["End", "Evaluation", "Hook", "Pause", "Rounds", "Saved", "Stop"]
