"""Exports hooks for `research.train(..., hooks=[...])`, and the events that hooks receive.

A hook is a `Hook` or a function `(run, event)` that returns None, or a reason to stop. `run.step`
is the number of local steps so far, and `run.params()` returns the current model to deploy.
`Interrupted` is what `train` raises after Ctrl-C.
"""

from research.training.hooks.hook import End, Evaluation, Hook, Pause, Rounds, Saved, Stop
from research.training.result import Interrupted

__all__ = ["End", "Evaluation", "Hook", "Interrupted", "Pause", "Rounds", "Saved", "Stop"]
