"""Range errors and unknown names are phrased once, and NaN is in no range."""

import math

import pytest

from research.core import checks


@pytest.mark.parametrize(
  ("check", "message"),
  [
    (lambda: checks.at_least("period", 0), "period=0 is not at least 1"),
    (lambda: checks.at_least("switch", -1, 0), "switch=-1 is not at least 0"),
    (lambda: checks.at_least("period", math.nan), "period=nan is not at least 1"),
    (lambda: checks.above("tau", 0.0), "tau=0.0 is not above 0"),
    (lambda: checks.in_range("b1", 1, "[0, 1)"), "b1=1 is not in [0, 1)"),
    (lambda: checks.in_range("b1", -0.1, "[0, 1)"), "b1=-0.1 is not in [0, 1)"),
    (lambda: checks.in_range("x", math.inf, "(0, inf)"), "x=inf is not in (0, inf)"),
    (lambda: checks.in_range("x", 9, "[1, 8]", note=", the data's"), "x=9 is not in [1, 8], the"),
    (
      lambda: checks.one_of("mode", "asink", ("async", "sync")),
      "mode='asink' is unknown; did you mean 'async'? legal: async, sync",
    ),
  ],
)
def test_what_is_outside_is_rejected_in_one_phrase(check, message):
  with pytest.raises(ValueError) as caught:  # noqa: PT011 the text is compared below
    check()
  assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
  ("value", "interval"), [(0, "[0, 1)"), (1, "(0, 1]"), (0.5, "(0, 1)"), (1e300, "(0, inf)")]
)
def test_what_is_inside_passes(value, interval):
  assert checks.in_range("x", value, interval) is None
  assert not checks.is_in(math.nan, interval)


def test_only_a_similar_name_is_suggested():
  assert checks.nearest("ringg", ["torus", "ring"]) == "ring"
  assert checks.nearest("ringg", ["torus"]) is None
  assert checks.unknown("zzz", ["ring"]) == "unknown; legal: ring"
