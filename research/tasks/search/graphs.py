"""Reads directed graphs from edge lists, and draws random ones with power-law degrees."""

import io
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from research.core import paths
from research.tasks import files, texts

EXPONENT = 2.1  # exponent of the in-degrees of `power_law`
WIKI_VOTE_URL = "https://snap.stanford.edu/data/wiki-Vote.txt.gz"
WIKI_VOTE_SHA256 = "b05c0226f5544f0e4a8ac607ae573db42e42716b6dd5aa00e8c769a1219c796f"


class Graph(NamedTuple):
  """Contains edges between nodes 0, ..., N - 1, sorted by target.

  Duplicate edges of a file are merged.
  """

  source: np.ndarray  # int32 [E]
  target: np.ndarray  # int32 [E], nondecreasing
  names: np.ndarray  # [N], the nodes' original numbers

  @property
  def nodes(self) -> int:
    return len(self.names)


def load(name: str, data_dir: str) -> Graph:
  """Loads a published graph by name, or reads a graph from a file.

  Args:
    name: "wiki-Vote", or the path of a file, plain, .gz or .bz2, with one edge "FROM TO" (two
      integers) per line; lines that begin with # or % are comments.
    data_dir: the folder to search first; see `files.find`.

  Raises:
    FileNotFoundError: if wiki-Vote is not found and cannot be downloaded.
    ValueError: if the file does not exist or has no edges, or a line is not an edge.

  Reference: Leskovec, Huttenlocher, Kleinberg, 2010, Predicting positive and negative links in
    online social networks; SNAP, wiki-Vote.
  """
  if name == "wiki-Vote":
    path = files.find("wiki-vote/wiki-Vote.txt", data_dir, WIKI_VOTE_URL, WIKI_VOTE_SHA256)
  elif not (path := paths.local(name)).is_file():
    raise ValueError(f"{name!r} is neither a file nor 'wiki-Vote'")
  pairs = _pairs(path)
  if not len(pairs):
    raise ValueError(f"{path} has no edges")
  return of_edges(pairs)


def _pairs(path: Path) -> np.ndarray | list[tuple[int, int]]:
  """Reads the edges of a file: at once if all comments precede the edges, else line by line."""
  content = texts.read(path)
  begun = re.match(r"\ufeff?(?:[ \t]*(?:[#%][^\r\n]*)?(?:\r\n?|\n))*", content)
  assert begun
  with warnings.catch_warnings():
    warnings.simplefilter("error")  # about numbers that are not integers, or an empty file
    try:
      found = np.loadtxt(io.StringIO(content[begun.end() :]), np.int64, comments=None, ndmin=2)
    except (ValueError, Warning):
      found = np.zeros((0, 0), np.int64)
  if found.shape[1] == 2 and max(int(found.max()), -int(found.min())) < 10**18:
    return found  # no number has more digits than `texts.whole` accepts
  return texts.parsed(path, _edge, comments="#%")


def _edge(fields: list[str]) -> tuple[int, int]:
  if len(fields) != 2:
    raise ValueError(
      f"an edge is 'FROM TO', two fields, not {len(fields)}; weights are not supported"
    )
  return texts.whole(fields[0]), texts.whole(fields[1])


def of_edges(pairs: np.ndarray | Sequence[Sequence[int]]) -> Graph:
  """Builds a graph from edges between any integers.

  Args:
    pairs: the (source, target) pairs, integers [E, 2].

  Raises:
    ValueError: if there are no edges.
  """
  pairs = np.asarray(pairs, np.int64).reshape(-1, 2)
  if not len(pairs):
    raise ValueError("a graph without edges has no walk to rank by")
  names, ends = np.unique(pairs, return_inverse=True)
  ends = ends.reshape(pairs.shape)
  keys = np.unique(ends[:, 1] * len(names) + ends[:, 0])  # sorted by target, then source
  target, source = np.divmod(keys, len(names))
  return Graph(source.astype(np.int32), target.astype(np.int32), names)


def power_law(edges: int, nodes: int) -> Graph:
  """Draws a random graph in which a node's in-degree is proportional to its popularity on average.

  The popularity of a node is rank^(-1/1.1), so that the in-degrees follow a power law with exponent
  2.1, as in the web (Broder et al. 2000). The sources of edges are uniform. Duplicate edges are
  kept and act as weights.

  Args:
    edges: E, the number of edges, at least 1.
    nodes: N, the number of nodes, at least 2.

  Raises:
    ValueError: if a number is out of range.
  """
  if edges < 1 or nodes < 2:
    raise ValueError(f"edges={edges}, nodes={nodes}: need at least 1 and 2")
  rng = np.random.default_rng(0)
  popularity = np.cumsum(np.arange(1, nodes + 1, dtype=np.float64) ** (-1 / (EXPONENT - 1)))
  ranks = np.searchsorted(popularity, rng.random(edges) * popularity[-1])
  target = rng.permutation(nodes)[ranks].astype(np.int32)
  target.sort()
  source = rng.integers(nodes, size=edges, dtype=np.int32)
  return Graph(source, target, np.arange(nodes))
