"""Implements BM25: an index of terms, and the scores of documents for queries."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import sparse

from research.core import checks

K1, B = 1.2, 0.75  # defaults, as in Lucene

# Stop words: Lucene's list for English.
STOP_WORDS = frozenset(
  re.findall(
    r"\w+",
    "a an and are as at be but by for if in into is it no not of on or such that the their then "
    "there these they this to was will with",
  )
)


class Index(NamedTuple):
  """Contains the term counts of each document."""

  vocabulary: dict[str, int]  # term -> column
  counts: sparse.csr_array  # float64 [D, V]
  lengths: np.ndarray  # float64 [D], number of terms of each document

  @property
  def idf(self) -> np.ndarray:
    """Returns inverse document frequencies [V], log(1 + (D - n + 1/2) / (n + 1/2)).

    Here, n is the number of documents that contain the term.
    """
    n = np.bincount(self.counts.indices, minlength=len(self.vocabulary))
    return np.log1p((len(self.lengths) - n + 0.5) / (n + 0.5))


def terms(text: str) -> list[str]:
  """Splits a text into terms: runs of letters and digits in lower case, without stop words.

  Args:
    text: the text.
  """
  return [word for word in re.findall(r"[a-z0-9]+", text.lower()) if word not in STOP_WORDS]


def index(documents: Sequence[Sequence[str]]) -> Index:
  """Indexes documents, each a sequence of terms.

  Args:
    documents: the terms of each document.

  Raises:
    ValueError: if there are no documents, or no document has a term.
  """
  vocabulary: dict[str, int] = {}
  rows, columns, values = [], [], []
  for row, document in enumerate(documents):
    for term, count in Counter(document).items():
      rows.append(row)
      columns.append(vocabulary.setdefault(term, len(vocabulary)))
      values.append(float(count))
  if not vocabulary:
    raise ValueError(f"the {len(documents)} documents have no terms: there is nothing to search")
  shape = len(documents), len(vocabulary)
  counts = sparse.csr_array((values, (rows, columns)), shape=shape)
  return Index(vocabulary, counts, np.array([float(len(d)) for d in documents]))


def scores(of: Index, queries: Sequence[Sequence[str]], k1: float = K1, b: float = B) -> np.ndarray:
  """Computes the BM25 scores of all documents for queries, each a sequence of terms.

      sum over terms t of the query, with multiplicity, of
      idf(t) f / (f + k1 (1 - b + b length / mean length)),     f the count of t in the document

  Terms that occur in no document are ignored.

  Args:
    of: the index of the documents.
    queries: the Q queries, each a sequence of terms.
    k1: the saturation of term counts, >= 0; the smaller k1, the less the score grows with a count.
    b: the strength of the normalization by document length, in [0, 1].

  Returns:
    The scores, float64 [Q, D].

  Raises:
    ValueError: if a query is empty, or k1 or b is out of range.

  Reference: Robertson, Zaragoza, 2009, The probabilistic relevance framework; this is Lucene's
    variant, without the factor k1 + 1, as in Kamphuis, de Vries, Boytsov, Lin, 2020, Which BM25 do
    you mean?
  """
  check(k1, b)
  rows, columns = [], []
  for row, query in enumerate(queries):
    if not query:
      raise ValueError(f"query {row + 1} is empty: it has no terms to search for")
    known = [of.vocabulary[term] for term in query if term in of.vocabulary]
    rows += [row] * len(known)
    columns += known
  asked = sparse.csr_array(
    (np.ones(len(rows)), (rows, columns)), shape=(len(queries), len(of.vocabulary))
  )
  place = np.repeat(np.arange(len(of.lengths)), np.diff(of.counts.indptr))
  norm = k1 * (1 - b + b * of.lengths / of.lengths.mean())
  weights = of.counts.copy()
  weights.data = of.idf[weights.indices] * weights.data / (weights.data + norm[place])
  return (asked @ weights.T).toarray()


def check(k1: float, b: float) -> None:
  """Rejects invalid BM25 parameters.

  Args:
    k1: the saturation of term counts.
    b: the strength of the normalization by document length.

  Raises:
    ValueError: if k1 is negative, or b is not in [0, 1].
  """
  checks.in_range("k1", k1, "[0, inf)")
  checks.in_range("b", b, "[0, 1]")
