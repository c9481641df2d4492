"""A package that adds a compressor, an aggregator, a method and a task to `research`."""

from spirals.aggregator import Agreeing
from spirals.compressor import Fixed
from spirals.method import Relaxed
from spirals.task import spirals

__all__ = ["Agreeing", "Fixed", "Relaxed", "spirals"]
