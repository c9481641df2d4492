"""Converts molecules to Morgan fingerprints, graphs and scaffolds, with RDKit."""

# pyright: reportMissingImports=false
# Only the extra `applications` installs RDKit.
from collections.abc import Sequence
from typing import Any

import numpy as np

from research.core.task import Batch

ELEMENTS = ("C", "N", "O", "F", "P", "S", "Cl", "Br", "I", "Si", "B", "Se", "As", "Na", "H")
BONDS = ("SINGLE", "DOUBLE", "TRIPLE", "AROMATIC")
RINGS = (3, 4, 5, 6, 7)  # numbers of atoms in a ring
COUNTS = 255  # the largest uint8


def parsed(smiles: Sequence[str]) -> list[Any]:
  """Parses SMILES into RDKit molecules; the result is None if a SMILES is invalid or has no atoms.

  Args:
    smiles: the SMILES strings.

  Raises:
    ValueError: if RDKit is not installed.
  """
  try:
    from rdkit import Chem, rdBase
  except ImportError:
    raise ValueError('molecules need RDKit: pip install -e ".[applications]"') from None
  with rdBase.BlockLogs():
    found = [Chem.MolFromSmiles(text) for text in smiles]
  return [molecule if molecule and molecule.GetNumAtoms() else None for molecule in found]


def fingerprints(molecules: Sequence[Any], radius: int, bits: int) -> np.ndarray:
  """Computes Morgan fingerprints, uint8 [N, bits]: counts of hashed neighbourhoods of atoms.

  Args:
    molecules: the molecules, as RDKit objects.
    radius: the radius of the neighbourhoods, in bonds.
    bits: the number of different hashes.

  Reference: Rogers, Hahn, 2010, Extended-connectivity fingerprints, J. Chem. Inf. Model. 50.
  """
  from rdkit.Chem import rdFingerprintGenerator

  generator = rdFingerprintGenerator.GetMorganGenerator(radius=radius, fpSize=bits)
  found = np.zeros((len(molecules), bits), np.uint8)
  for row, molecule in zip(found, molecules, strict=True):
    row[:] = np.minimum(generator.GetCountFingerprintAsNumPy(molecule), COUNTS)
  return found


def scaffolds(molecules: Sequence[Any]) -> list[str]:
  """Returns the Bemis-Murcko scaffold of each molecule as SMILES.

  The scaffold consists of the rings and the links between them. Molecules without rings share the
  empty scaffold.

  Args:
    molecules: the molecules, as RDKit objects.

  Reference: Bemis, Murcko, 1996, The properties of known drugs: molecular frameworks, J. Med. Chem.
  """
  from rdkit.Chem.Scaffolds import MurckoScaffold

  return [MurckoScaffold.MurckoScaffoldSmiles(mol=molecule) for molecule in molecules]


def graphs(molecules: Sequence[Any]) -> Batch:
  """Converts molecules to graphs of their heavy atoms.

  The graphs are padded with zeros to the largest number of atoms per molecule and bonds per atom.

  Every real atom or bond has at least one bit set, so that padding needs no mask.

  Args:
    molecules: the molecules, as RDKit objects.

  Returns:
    "atoms" uint8 [N, A, 6], the features of each atom as bits, packed as by `np.packbits`; "bonds"
    uint8 [N, A, K, 2], the features of each atom's bonds as packed bits; and "neighbours" [N, A,
    K], the index of the atom at the other end of each bond.
  """
  most = max(molecule.GetNumAtoms() for molecule in molecules)
  degree = max(atom.GetDegree() for molecule in molecules for atom in molecule.GetAtoms())
  shape = len(molecules), most, max(1, degree)
  atoms = np.zeros((*shape[:2], 6), np.uint8)
  bonds = np.zeros((*shape, 2), np.uint8)
  neighbours = np.zeros(shape, np.uint8 if most <= 256 else np.uint16)
  for row, molecule in enumerate(molecules):
    own = [_of_atom(atom) for atom in molecule.GetAtoms()]
    atoms[row, : len(own)] = np.packbits(np.array(own, bool), axis=1)
    filled = [0] * len(own)
    for bond in molecule.GetBonds():
      of_bond = np.packbits(_of_bond(bond))
      ends = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
      for here, there in (ends, ends[::-1]):
        bonds[row, here, filled[here]] = of_bond
        neighbours[row, here, filled[here]] = there
        filled[here] += 1
  return {"atoms": atoms, "bonds": bonds, "neighbours": neighbours}


def _of_atom(atom: Any) -> list[bool]:
  """Returns the features of an atom, 46 bits."""
  from rdkit.Chem import HybridizationType as Kind

  symbol, charge = atom.GetSymbol(), min(max(atom.GetFormalCharge(), -2), 2)
  degree, hydrogens = min(atom.GetDegree(), 6), min(atom.GetTotalNumHs(), 4)
  known = symbol in ELEMENTS
  hybrid, turn = atom.GetHybridization(), str(atom.GetChiralTag())
  return [
    *(symbol == element for element in ELEMENTS),
    not known,
    *(degree == count for count in range(7)),
    *(charge == value for value in range(-2, 3)),
    *(hydrogens == count for count in range(5)),
    *(hybrid == kind for kind in (Kind.SP, Kind.SP2, Kind.SP3, Kind.SP3D)),
    *(turn == name for name in ("CHI_TETRAHEDRAL_CW", "CHI_TETRAHEDRAL_CCW")),
    *(atom.IsInRingSize(size) for size in RINGS),
    atom.GetIsAromatic(),
    atom.IsInRing(),
  ]


def _of_bond(bond: Any) -> list[bool]:
  """Returns the features of a bond, 9 bits."""
  kind, stereo = str(bond.GetBondType()), str(bond.GetStereo())
  known = kind in BONDS
  return [
    *(kind == name for name in BONDS),
    not known,
    bond.GetIsConjugated(),
    bond.IsInRing(),
    *(stereo == name for name in ("STEREOZ", "STEREOE")),
  ]
