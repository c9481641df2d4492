"""Checks the contracts of compressors, aggregators and methods, for objects of your own.

    from research.testing import check_compressor

    def test_halved():
      check_compressor(halved(0.5))

Each check runs in seconds on CPU devices and raises ContractError, an AssertionError that names the
broken contract and the observed values. The tests of this codebase run the same checks over all
built-in names.
"""

from research.testing.aggregators import check_aggregator
from research.testing.compressors import check_compressor
from research.testing.contract import ContractError
from research.testing.methods import check_method

__all__ = ["ContractError", "check_aggregator", "check_compressor", "check_method"]
