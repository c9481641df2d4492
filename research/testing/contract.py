"""What a check raises: which contract an object breaks, and what was seen."""


class ContractError(AssertionError):
  """A contract that an object does not keep."""


def require(held: object, subject: object, contract: str, seen: str) -> None:
  """Raises if a contract does not hold.

  Args:
    held: whether it does.
    subject: the object that is checked; its repr begins the message.
    contract: what has to hold, as a sentence.
    seen: what was found instead.

  Raises:
    ContractError: `halved(): C(0) is 0: seen 1.0`.
  """
  if not held:
    raise ContractError(f"{subject!r} breaks a contract. {contract} Seen: {seen}.")
