"""The error of a broken contract, with the contract and the observed values."""


class ContractError(AssertionError):
  """An object breaks a contract."""


def require(held: object, subject: object, contract: str, seen: str) -> None:
  """Raises if a contract does not hold.

  Args:
    held: whether the contract holds.
    subject: the object under test; its repr begins the message.
    contract: the contract, as a sentence.
    seen: the observed values.

  Raises:
    ContractError: `halved(): C(0) is 0: seen 1.0`.
  """
  if not held:
    raise ContractError(f"{subject!r} breaks a contract. {contract} Seen: {seen}.")
