"""Defines the error that reports a broken contract and the observed values."""


class ContractError(AssertionError):
  """Raised if an object breaks a contract."""


def require(held: object, subject: object, contract: str, seen: str) -> None:
  """Raises ContractError if a contract does not hold.

  Args:
    held: whether the contract holds.
    subject: the object under test; the message begins with its repr.
    contract: the contract, as a sentence.
    seen: the observed values.

  Raises:
    ContractError: if the contract does not hold, as in `halved(): C(0) is 0: seen 1.0`.
  """
  if not held:
    raise ContractError(f"{subject!r} breaks a contract. {contract} Seen: {seen}.")
