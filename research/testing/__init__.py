"""Checks the contracts of your own compressors, aggregators and methods.

    from research.testing import check_compressor

    def test_halved():
      check_compressor(halved(0.5))

Each check runs in seconds on CPU devices. If a contract is broken, it raises ContractError, an
AssertionError that names the contract and the observed values. The tests of this codebase run the
same checks for all built-in names.
"""

from research.testing.aggregators import check_aggregator
from research.testing.compressors import check_compressor
from research.testing.contract import ContractError
from research.testing.methods import check_method

__all__ = ["ContractError", "check_aggregator", "check_compressor", "check_method"]
