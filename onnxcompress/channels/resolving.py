"""From labels to atoms: the least that can be removed at once.

A label of labellings with one axis is an atom of its own. In a labelling with several axes the atoms are its slices,
one for each index of each axis, and an element goes when a slice through it goes. Labellings that share elements must
agree: slices that cut the shared elements alike are one atom, and what the other labelling cannot express stays.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from onnxcompress.channels.labels import LabelSpace, Line, varied


@dataclass
class Atoms:
    """The atoms of a graph.

    Attributes:
        of_label: Atoms of each label (by its root); a label goes when one of them goes.
        frozen: Reason by atom that must stay.
        arrays: Labellings, as roots, each once.
    """

    of_label: dict[int, tuple[int, ...]] = field(default_factory=dict)
    frozen: dict[int, str] = field(default_factory=dict)
    arrays: list[np.ndarray] = field(default_factory=list)


class _Resolver:
    def __init__(self, space: LabelSpace) -> None:
        self.space = space
        self.atoms = LabelSpace()  # a union-find of atoms
        self.frozen: list[tuple[int, str]] = []
        self.grids: list[np.ndarray] = []  # labellings with several axes, as roots, axes of size 1 left out
        self.slices: list[list[np.ndarray]] = []  # their atoms: by axis and index
        self.own: dict[int, int] = {}  # atoms of labels without a grid
        self.in_grid: dict[int, tuple[int, tuple[int, ...]]] = {}  # a label's first grid and place there

    def run(self) -> Atoms:
        arrays = self._distinct()
        for array in arrays:
            if len(varied(array)) > 1:
                self._add_grid(array.squeeze())
        self._match_grids()
        for a, b in self.space.links:
            self._link(a, b)
        for atoms in itertools.chain.from_iterable(self.slices):
            if len({self.atoms.find(atom) for atom in atoms.tolist()}) == 1:
                self._freeze(atoms.tolist(), "nothing would be left along its axis")
        for labels, reason in self.space.frozen_labels:
            for label in np.unique(self.space.roots(labels)).tolist():
                self._freeze(self._of(label), reason)
        for line, reason in self.space.frozen_lines:
            roots = self.space.roots(line.labels)
            for index in range(line.size):
                self._freeze(self._slice_atoms(Line(roots, line.axis), index), reason)
        result = Atoms(arrays=arrays)
        for array in arrays:
            for label in np.unique(array).tolist():
                result.of_label.setdefault(label, tuple(dict.fromkeys(map(self.atoms.find, self._of(label)))))
        for atom, reason in self.frozen:
            result.frozen.setdefault(self.atoms.find(atom), reason)
        return result

    def _distinct(self) -> list[np.ndarray]:
        seen: dict[tuple[tuple[int, ...], bytes], np.ndarray] = {}
        by_identity = {id(array): array for array in self.space.arrays}
        for array in by_identity.values():
            roots = self.space.roots(array)
            seen.setdefault((roots.shape, roots.tobytes()), roots)
        return list(seen.values())

    def _add_grid(self, grid: np.ndarray) -> None:
        if any(_same_grid(grid, other) for other in self.grids):
            return
        number = len(self.grids)
        self.grids.append(grid)
        self.slices.append([self.atoms.new(size) for size in grid.shape])
        for place in np.ndindex(*grid.shape):
            self.in_grid.setdefault(int(grid[place]), (number, place))
        self._repeated(number)

    def _repeated(self, number: int) -> None:
        """Slices of one axis with the same labels are one; those with some in common stay."""
        grid = self.grids[number]
        if len(np.unique(grid)) == grid.size:
            return
        for axis, atoms in enumerate(self.slices[number]):
            rows = [frozenset(row) for row in np.moveaxis(grid, axis, 0).reshape(grid.shape[axis], -1).tolist()]
            for i, j in itertools.combinations(range(len(rows)), 2):
                if rows[i] == rows[j]:
                    self.atoms.unite(atoms[i : i + 1], atoms[j : j + 1])
                elif rows[i] & rows[j]:
                    self._freeze([int(atoms[i]), int(atoms[j])], "its channels are mixed with others in another order")

    def _match_grids(self) -> None:
        members: dict[int, list[int]] = {}
        for number, grid in enumerate(self.grids):
            for label in np.unique(grid).tolist():
                members.setdefault(label, []).append(number)
        pairs = {pair for numbers in members.values() for pair in itertools.combinations(numbers, 2)}
        for first, second in sorted(pairs):
            self._match(first, second)

    def _match(self, first: int, second: int) -> None:
        """Unite the atoms of two grids that cut the shared elements alike, freeze the others."""
        shared = np.intersect1d(self.grids[first], self.grids[second])
        places = [self._places(number, shared) for number in (first, second)]
        matched: tuple[set[int], set[int]] = (set(), set())
        for a, b in itertools.product(range(self.grids[first].ndim), range(self.grids[second].ndim)):
            pairs = set(zip(places[0][a].tolist(), places[1][b].tolist(), strict=True))
            if len(pairs) < 2 or len({i for i, _ in pairs}) != len(pairs) or len({j for _, j in pairs}) != len(pairs):
                continue
            matched[0].add(a)
            matched[1].add(b)
            for i, j in pairs:
                self.atoms.unite(self.slices[first][a][i : i + 1], self.slices[second][b][j : j + 1])
        for side, number in enumerate((first, second)):
            for axis in range(self.grids[number].ndim):
                if axis not in matched[side]:
                    touched = np.unique(places[side][axis])
                    atoms = self.slices[number][axis][touched].tolist()
                    self._freeze(atoms, "its channels are laid out in another way elsewhere")

    def _places(self, number: int, shared: np.ndarray) -> list[np.ndarray]:
        """Index of each shared label on each axis; of a label that stands in several slices the first."""
        _, flat = np.unique(self.grids[number], return_index=True)
        labels = np.unique(self.grids[number])
        where = flat[np.searchsorted(labels, shared)]
        return list(np.unravel_index(where, self.grids[number].shape))

    def _of(self, label: int) -> list[int]:
        """Atoms of a root label."""
        if label in self.in_grid:
            number, place = self.in_grid[label]
            return [int(self.slices[number][axis][index]) for axis, index in enumerate(place)]
        if label not in self.own:
            self.own[label] = int(self.atoms.new(1)[0])
        return [self.own[label]]

    def _slice_atoms(self, line: Line, index: int) -> list[int]:
        """The atom of a slice of roots; several when it is not one."""
        axes = varied(line.labels)
        if len(axes) <= 1:
            return [atom for label in np.unique(line.slices()[index]).tolist() for atom in self._of(int(label))]
        number, order = self._grid_of(line.labels.squeeze())
        axis = order[axes.index(line.axis)]
        return [int(self.slices[number][axis][index])]

    def _grid_of(self, grid: np.ndarray) -> tuple[int, tuple[int, ...]]:
        for number, other in enumerate(self.grids):
            for order in itertools.permutations(range(grid.ndim)):
                if _is_turned(grid, other, order):
                    return number, order
        self._add_grid(grid)
        number = len(self.grids) - 1
        for earlier in range(number):
            if np.intersect1d(self.grids[earlier], grid).size:
                self._match(earlier, number)
        return number, tuple(range(grid.ndim))

    def _link(self, a: Line, b: Line) -> None:
        lines = [Line(self.space.roots(line.labels), line.axis) for line in (a, b)]
        for index in range(a.size):
            first, second = (self._slice_atoms(line, index) for line in lines)
            if len(set(map(self.atoms.find, first))) == 1 and len(set(map(self.atoms.find, second))) == 1:
                self.atoms.unite(np.array(first[:1]), np.array(second[:1]))
            else:
                self._freeze([*first, *second], "several of its channels belong to one elsewhere")

    def _freeze(self, atoms: Sequence[int], reason: str) -> None:
        self.frozen += [(int(atom), reason) for atom in atoms]


def _same_grid(a: np.ndarray, b: np.ndarray) -> bool:
    return a.ndim == b.ndim and any(_is_turned(a, b, order) for order in itertools.permutations(range(a.ndim)))


def _is_turned(grid: np.ndarray, other: np.ndarray, order: tuple[int, ...]) -> bool:
    """Whether axis i of ``grid`` is axis ``order[i]`` of ``other``."""
    if grid.ndim != other.ndim or any(other.shape[order[i]] != size for i, size in enumerate(grid.shape)):
        return False
    return bool((other.transpose(order) == grid).all())


def resolve(space: LabelSpace) -> Atoms:
    """The atoms of all labels."""
    return _Resolver(space).run()
