"""Splits the time of a run into compilation, training steps, and all other work."""

import contextlib
import time
from collections.abc import Iterator

import jax

_COMPILING = (
  "/jax/core/compile/jaxpr_trace_duration",
  "/jax/core/compile/jaxpr_to_mlir_module_duration",
  "/jax/core/compile/backend_compile_duration",
)


class Timing:
  """Measures the time of one run.

  Steps are timed from the end of the first dispatch, without compilation. The time of compilation
  is measured in `with timing:`.
  """

  def __init__(self):
    self._start = time.perf_counter()
    self.compiling = 0.0
    self.largest = 0  # number of steps of the longest dispatch
    self._aside = 0.0
    self._steps = 0
    self._first: tuple[float, int] | None = None  # seconds and steps of the first dispatch
    self._last = 0.0

  def __enter__(self) -> "Timing":
    jax.monitoring.register_event_duration_secs_listener(self._listen)
    return self

  def __exit__(self, *error: object) -> None:
    del error
    jax.monitoring.unregister_event_duration_listener(self._listen)

  def _listen(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
    del kwargs
    if event in _COMPILING:
      self.compiling += duration_secs

  def resume(self, seconds: float) -> None:
    """Adds the seconds that the run took before it was resumed."""
    self._start -= seconds
    self._aside += seconds

  def elapsed(self) -> float:
    """Returns the seconds of the run so far."""
    return time.perf_counter() - self._start

  @contextlib.contextmanager
  def aside(self) -> Iterator[None]:
    """Context manager for work other than training steps, which the rate does not include."""
    start, compiling = time.perf_counter(), self.compiling
    yield
    compiled = self.compiling - compiling
    self._aside += time.perf_counter() - start - compiled

  def dispatch_done(self, steps: int) -> None:
    """Records that the metrics of a dispatch have arrived.

    Args:
      steps: number of steps of the dispatch.
    """
    self._steps += steps
    self.largest = max(self.largest, steps)
    self._last = self.elapsed() - self.compiling - self._aside
    if self._first is None:
      self._first = (self._last, self._steps)

  def steps_per_second(self) -> float:
    """Returns the rate over all dispatches except the first, or the rate of a single dispatch."""
    if self._first is None:
      return 0.0
    seconds, steps = self._last - self._first[0], self._steps - self._first[1]
    return steps / seconds if steps and seconds > 0 else self._steps / max(self._last, 1e-9)
