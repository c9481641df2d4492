"""Loads MovieLens 100K: 943 users' ratings of 1682 films, and features of users and films."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from research.core import checks, paths
from research.tasks import files, texts

URL = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
SHA256 = {
  "u.data": "06416e597f82b7342361e41163890c81036900f418ad91315590814211dca490",
  "u.user": "f120e114da2e8cf314fd28f99417c94ae9ddf1cb6db8ce0e4b5995d40e90e62c",
  "u.item": "6284748a19eb56ab68c553ff1b25ad3d0e861714bf10979ecc6083df9be0ce7c",
  "u1.test": "18c6014a4b2c7324f250a63f8904a7b16b2b19f911129e346141507b0cbac950",
  "u2.test": "4de658d1e04ed9104629509a2e2528fce833ac8e048280183f1df167632038c3",
  "u3.test": "0f548b51c78327de4c156461d3e430b7e5579fe2b5681586a59416e48fd35f6d",
}
FOLDS = ("u1", "u2", "u3")
COLD = ("cold_items", "cold_users")
PARTS = ("test", "validation")
LEAST, MOST = 1.0, 5.0  # the fewest and the most stars of a rating
ITEMS = 10**7  # maximum number of items
PAIRS = 2**31  # maximum number of user-item pairs: the metrics use a byte or more for each
ROWS = 64  # table sizes are rounded up to a multiple of this, so that any mesh can shard them
_TENTH = 10  # one of this many ratings, items or users is held out


class Ratings(NamedTuple):
  """Contains ratings of items by users."""

  user: np.ndarray  # int32 [N], from 0
  item: np.ndarray  # int32 [N], from 0
  stars: np.ndarray  # float32 [N], 1 to 5

  def take(self, where: np.ndarray) -> "Ratings":
    return Ratings(*(column[where] for column in self))


class Features(NamedTuple):
  """Contains the feature numbers of each user and each item.

  All rows of an array have the same length; they are padded with `size`, which is no feature
  number.
  """

  users: np.ndarray  # int32 [U, 3]: age group, gender, occupation
  items: np.ndarray  # int32 [I, G]: genres
  size: int  # number of user and item features, which share one numbering


def load(split: str, data_dir: str = "", part: str = "test") -> tuple[Ratings, Ratings]:
  """Loads the training ratings, and those that the model is measured on.

  Args:
    split: "u1", "u2" or "u3" to test on the test file of an official fold and train on all other
      ratings; "cold_items" or "cold_users" to test on all ratings of a fixed random tenth of the
      items or users; or the path of a table like u.data, of which a tenth of the ratings is held
      out. A line of such a table contains a user, an item, stars from 1 to 5 and, optionally, a
      time. Users are numbered from 1 without gaps.
    data_dir: the folder to search first; see `files.find`.
    part: "test" for the test ratings; "validation" for a tenth of the training ratings, items or
      users, which is then left out of training. Choose hyper-parameters with "validation".

  Raises:
    FileNotFoundError: if a file is not found; the archive must be unpacked by hand.
    ValueError: if the split or the part does not exist, a file is not the published one, or a line
      is not a rating.

  Reference: Harper, Konstan, 2015, The MovieLens datasets, ACM TiiS 5; GroupLens does not allow
    copies.
  """
  checks.one_of("part", part, PARTS)
  train, test = _parts(split, data_dir)
  if part == "test":
    return train, test
  return _cold(train, split) if split in COLD else _held_out(train)


def last(*parts: Ratings) -> tuple[int, int]:
  """Returns the largest user number and the largest item number that occur in the ratings."""
  largest = lambda name: max(int(getattr(part, name).max()) for part in parts)
  return largest("user"), largest("item")


def liked(ratings: Ratings, least: float) -> Ratings:
  """Returns the ratings with at least this many stars.

  Args:
    ratings: the training ratings.
    least: the minimum number of stars.

  Raises:
    ValueError: if there is no such rating.
  """
  found = ratings.take(ratings.stars >= least)
  if not len(found.stars):
    most = ratings.stars.max()
    raise ValueError(f"least={least:g}: no rating has so many stars; the maximum is {most:g}")
  return found


def rounded(rows: int) -> int:
  """Returns the size of a table with at least this many rows, which any mesh can shard."""
  return -(-rows // ROWS) * ROWS


def features(data_dir: str = "") -> Features:
  """Loads the users' age groups (of ten years), genders and occupations, and the items' genres.

  Args:
    data_dir: the folder of the files; "" means the default folders.

  Raises:
    FileNotFoundError, ValueError: if a file is not found or is not the published one; see `load`.
  """
  path = lambda name: files.find(f"ml-100k/{name}", data_dir, URL, SHA256[name])
  people = [row.split("|") for row in path("u.user").read_text().splitlines() if row]
  ages = [min(int(row[1]) // 10, 6) for row in people]
  kinds = sorted({row[3] for row in people})
  columns = [ages, [7 + (row[2] == "F") for row in people], [9 + kinds.index(r[3]) for r in people]]
  users = np.array(columns, np.int32).T
  films = [row.split("|") for row in path("u.item").read_bytes().decode("latin-1").splitlines()]
  flags = np.array([row[5:] for row in films if row != [""]]).astype(int)
  first, size = 9 + len(kinds), 9 + len(kinds) + flags.shape[1]
  items = np.full((len(flags), flags.sum(1).max()), size, np.int32)
  for row, of_item in zip(items, flags, strict=True):
    row[: of_item.sum()] = first + np.flatnonzero(of_item)
  return Features(users, items, size)


def _parts(split: str, data_dir: str) -> tuple[Ratings, Ratings]:
  if split not in (*FOLDS, *COLD):
    return _of_file(split)
  whole = _read("u.data", data_dir)
  if split in COLD:
    return _cold(whole, split)
  test = _read(f"{split}.test", data_dir)
  pairs = lambda of: of.user.astype(np.int64) * 10_000 + of.item
  return whole.take(~np.isin(pairs(whole), pairs(test))), test


def _cold(whole: Ratings, split: str) -> tuple[Ratings, Ratings]:
  """Splits off all ratings of a random tenth of the items or the users, always the same."""
  owner = whole.item if split == "cold_items" else whole.user
  owners = np.random.default_rng(0).permutation(np.unique(owner))
  unseen = np.isin(owner, owners[: len(owners) // _TENTH])
  return whole.take(~unseen), whole.take(unseen)


def _of_file(split: str) -> tuple[Ratings, Ratings]:
  path = paths.local(split)
  if not path.is_file():
    raise ValueError(f"split={split!r} is neither a file nor one of {', '.join((*FOLDS, *COLD))}")
  return _held_out(_of_rows(_table(path)))


def _held_out(whole: Ratings) -> tuple[Ratings, Ratings]:
  """Splits ratings at random, always in the same way; the second part is a tenth of them."""
  order = np.random.default_rng(0).permutation(len(whole.user))
  held_out = max(1, len(order) // _TENTH)
  return whole.take(np.sort(order[held_out:])), whole.take(np.sort(order[:held_out]))


def _read(name: str, data_dir: str) -> Ratings:
  path = files.find(f"ml-100k/{name}", data_dir, URL, SHA256[name])
  return _of_rows(np.array(path.read_text().split(), np.int64).reshape(-1, 4))


def _table(path: Path) -> np.ndarray:
  """Reads the users, items and stars of a file, float64 [N, 3], with numbers from 1."""
  seen: set[tuple[int, int]] = set()

  def rating(fields: list[str]) -> tuple[int, int, float]:
    if not 3 <= len(fields) <= 4:
      raise ValueError(
        f"a rating is 'USER ITEM STARS', or has a time as fourth field, not {len(fields)} fields"
      )
    user, item = map(texts.whole, fields[:2])
    if min(user, item) < 1:
      raise ValueError(f"user {user}, item {item}: both are numbered from 1")
    stars, *_ = map(texts.number, fields[2:])
    if not LEAST <= stars <= MOST:
      raise ValueError(f"a rating of {stars:g} is out of range; legal: {LEAST:g} to {MOST:g}")
    if (user, item) in seen:
      raise ValueError(f"user {user} has already rated item {item}")
    seen.add((user, item))
    return user, item, stars

  table = np.array(texts.parsed(path, rating), float).reshape(-1, 3)
  if len(table) < 2:
    raise ValueError(f"{path}: {len(table)} ratings; at least two are needed")
  users, items = table[:, :2].max(0)
  rated = np.unique(table[:, 0])
  if users > len(rated):
    missing = np.flatnonzero(rated != np.arange(1, len(rated) + 1))[0] + 1
    raise ValueError(f"{path}: user {missing} of {users:.0f} has no ratings")
  if items > ITEMS or users * items > PAIRS:
    raise ValueError(
      f"{path}: {users:.0f} users and items up to {items:.0f} are more than {ITEMS} items or "
      f"{PAIRS} pairs, which have to fit the memory; number the items without large gaps"
    )
  return table


def _of_rows(rows: np.ndarray) -> Ratings:
  """Converts rows (user, item, stars, ...), with numbers from 1, to ratings."""
  user, item = rows[:, :2].astype(np.int32).T - 1
  return Ratings(user, item, rows[:, 2].astype(np.float32))
