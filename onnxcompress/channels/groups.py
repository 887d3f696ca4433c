"""Channel groups: sets of channels that can be removed one by one, and everything that goes with each.

    found = find_channels(graph)
    for group in found.groups: print(group.name, group.size, group.frozen)

A *channel* here is an atom: the least that can be removed, often one channel of several tensors, sometimes an attention
head or a group of a convolution. A *group* holds the channels that stand in the same places of the same tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from onnxcompress.channels.labels import Line, varied
from onnxcompress.channels.resolving import Atoms, resolve
from onnxcompress.channels.rules import RULES
from onnxcompress.channels.trace import Keeping, Repair, Trace, Work, name_of, walk
from onnxcompress.cost import count, node_macs
from onnxcompress.graph import Graph

Removed = Mapping[str, Sequence[int]]


@dataclass(frozen=True, eq=False)
class Group:
    """Channels that can be removed one by one.

    Attributes:
        name: The node that makes them first; with a number where it makes several groups.
        atoms: Numbers of its channels in ``Channels``.
        width: Elements of the tensor's axis that one of them takes: 1, the dim of a head, the size of a conv group.
        producers: Nodes whose weights make them.
        consumers: Nodes whose weights read them.
        frozen: Why none of them can be removed; "" where they can.
        approximate: Why the graph without them is not the graph with zeros in what makes them; "" where it is.
    """

    name: str
    atoms: tuple[int, ...]
    width: int
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    frozen: str = ""
    approximate: str = ""

    @property
    def size(self) -> int:
        return len(self.atoms)

    def as_dict(self) -> dict[str, Any]:
        found = {"name": self.name, "channels": self.size, "width": self.width, "producers": list(self.producers)}
        return found | {
            "consumers": list(self.consumers),
            "frozen": self.frozen,
            "approximate": self.approximate,
        }


class Channels:
    """The channels of one graph; valid until the graph is changed.

    Attributes:
        graph: The graph.
        groups: Those that can be removed first, in the order of their nodes; then the frozen ones.
        bindings: What goes with the channels.
        repairs: What is mended when they go.
    """

    def __init__(self, trace: Trace, atoms: Atoms) -> None:
        self.graph = trace.graph
        self.space = trace.space
        self._atoms = atoms
        roots = trace.space.roots
        self.bindings = [replace(b, line=Line(roots(b.line.labels), b.line.axis)) for b in trace.bindings]
        self.repairs: list[Repair] = trace.repairs
        self.references: list[Repair] = trace.references
        self.offsets = trace.offsets
        self.works = [Work(w.node, tuple(roots(f) for f in w.factors)) for w in trace.works]
        self.labels = {tensor: roots(labels) for tensor, labels in trace.labels.items()}
        numbers = sorted({atom for found in atoms.of_label.values() for atom in found})
        self._index = {atom: i for i, atom in enumerate(numbers)}
        # (labels, 2 or more) numbers of atoms by label, padded with the first one
        most = max((len(found) for found in atoms.of_label.values()), default=1)
        self.count = len(numbers)
        self._of_label = np.full((max(len(trace.space), 1), most), self.count, np.int64)
        for label, found in atoms.of_label.items():
            line = [self._index[atom] for atom in found]
            self._of_label[label] = line + [line[0]] * (most - len(line))
        # Slices of a labelling that another one stands for may be frozen as well: nothing is removed by them.
        frozen = {atom: reason for atom, reason in atoms.frozen.items() if atom in self._index}
        self.reasons = {self._index[atom]: reason for atom, reason in frozen.items()}
        # Atoms along axes over which two tensors are multiplied: the places of queries and keys.
        self.contracted = {
            atom
            for line in trace.contracted
            for atoms in self.atoms_of(Line(roots(line.labels), line.axis))
            for atom in atoms
        }
        self.approximate: dict[int, str] = {}
        for place in trace.approximations:
            for gone in self.atoms_of(Line(roots(place.line.labels), place.line.axis)):
                for atom in gone:
                    self.approximate.setdefault(atom, place.why)
        self.groups = self._group()
        self.by_name = {group.name: group for group in self.groups}

    # -- questions ---------------------------------------------------------------------------------------------------

    def atoms_of(self, line: Line) -> list[frozenset[int]]:
        """For each slice the atoms that take it away: those that all of its labels have in common."""
        found = []
        for labels in line.slices():
            own = [set(self._of_label[label].tolist()) for label in np.unique(labels).tolist()]
            found.append(frozenset(set.intersection(*own)) - {self.count})
        return found

    def removed_labels(self, removed: Removed) -> np.ndarray:
        """(labels,) bool: what goes.

        Args:
            removed: Indices of channels by group name.

        Raises:
            ValueError: No such group, a frozen one, an index out of range, or nothing would be left of a group.
        """
        return np.asarray(self.gone(removed)[self._of_label].any(axis=1))

    def atoms_of_labels(self, labels: np.ndarray) -> np.ndarray:
        """(labels, n) atoms of each; the last number stands for none."""
        return np.asarray(self._of_label[labels.reshape(-1)])

    def gone(self, removed: Removed) -> np.ndarray:
        """(atoms + 1,) bool: which go; raises as ``removed_labels``."""
        gone = np.zeros(self.count + 1, bool)
        for name, indices in removed.items():
            group = self.by_name.get(name)
            if group is None:
                raise ValueError(f"there is no channel group {name!r}")
            chosen = sorted(set(map(int, indices)))
            if not chosen:
                continue
            if group.frozen:
                raise ValueError(f"group {name!r} cannot be pruned: {group.frozen}")
            if chosen[0] < 0 or chosen[-1] >= group.size or len(chosen) == group.size:
                raise ValueError(f"group {name!r} has {group.size} channels: {chosen} cannot be removed")
            gone[[group.atoms[i] for i in chosen]] = True
        return gone

    def keeping(self, removed: Removed) -> Keeping:
        """What stays; also asked with labels that are not roots."""
        by_root = self.removed_labels(removed)
        for array in self._atoms.arrays:
            kept = ~by_root[array]
            sides = [kept.any(axis=tuple(a for a in range(kept.ndim) if a != axis)).sum() for axis in range(kept.ndim)]
            if not kept.any() or math.prod(sides) != kept.sum():
                raise ValueError(f"what would be left of a tensor of {array.shape} is no tensor: remove less")
        everything = self.space.roots(np.arange(len(self.space)))
        return Keeping(by_root[everything] if len(everything) else by_root)

    # -- building ----------------------------------------------------------------------------------------------------

    def _group(self) -> list[Group]:
        places = self._places()
        by_place: dict[tuple[frozenset[tuple[int, int]], str], list[int]] = {}
        for atom in range(self.count):
            if places[atom]:
                key = (frozenset(places[atom]), self.reasons.get(atom, ""))
                by_place.setdefault(key, []).append(atom)
        producers, consumers, width = self._users()
        order = {name_of(node): i for i, node in enumerate(self.graph.nodes)}
        found = []
        shadows = self._shadows()
        for (_, reason), atoms in by_place.items():
            if shadows.issuperset(atoms):
                continue
            made = sorted({n for a in atoms for n in producers.get(a, ())}, key=lambda n: order.get(n, 0))
            read = sorted({n for a in atoms for n in consumers.get(a, ())}, key=lambda n: order.get(n, 0))
            if made or reason:
                wide = min((width[a] for a in atoms if a in width), default=1)
                near = "" if reason else next((self.approximate[a] for a in atoms if a in self.approximate), "")
                found.append(Group(made[0] if made else "", tuple(atoms), wide, tuple(made), tuple(read), reason, near))
        found = [group for group in found if group.name]
        found.sort(key=lambda group: (bool(group.frozen), order.get(group.name, 0), group.atoms))
        return _numbered(found)

    def _shadows(self) -> set[int]:
        """Frozen atoms all of whose elements can be removed by other atoms: the three of (q, k, v), heads, dim."""
        by_label = [set(row.tolist()) - {self.count} for row in self._of_label]
        free = [atoms for atoms in by_label if any(atom not in self.reasons for atom in atoms)]
        stuck = {atom for atoms in by_label if all(atom in self.reasons for atom in atoms) for atom in atoms}
        return {atom for atoms in free for atom in atoms if atom in self.reasons} - stuck

    def _places(self) -> list[set[tuple[int, int]]]:
        """Labelling and axis of each place where an atom cuts a slice off."""
        places: list[set[tuple[int, int]]] = [set() for _ in range(self.count)]
        for number, array in enumerate(self._atoms.arrays):
            axes = varied(array)
            for axis in axes:
                for atoms in self.atoms_of(Line(array, axis)):
                    for atom in atoms:
                        places[atom].add((number, axis))
        return places

    def _users(self) -> tuple[dict[int, set[str]], dict[int, set[str]], dict[int, int]]:
        producers: dict[int, set[str]] = {}
        consumers: dict[int, set[str]] = {}
        width: dict[int, int] = {}
        for binding in self.bindings:
            if binding.role not in ("weight", "input"):
                continue
            side = producers if binding.role == "weight" else consumers
            counts: dict[int, int] = {}
            for atoms in self.atoms_of(binding.line):
                for atom in atoms:
                    side.setdefault(atom, set()).add(name_of(binding.user or binding.node))
                    counts[atom] = counts.get(atom, 0) + 1
            if binding.role == "weight":
                for atom, number in counts.items():
                    width[atom] = min(width.get(atom, number), number)
        return producers, consumers, width


def _numbered(groups: list[Group]) -> list[Group]:
    """Names that no two groups share."""
    seen: dict[str, int] = {}
    result = []
    for group in groups:
        number = seen[group.name] = seen.get(group.name, 0) + 1
        name = group.name if number == 1 else f"{group.name}#{number}"
        result.append(replace(group, name=name))
    return result


def find_channels(graph: Graph) -> Channels:
    """The channels of the outermost graph.

    Args:
        graph: Its nodes stand in order and its shapes are inferred. Constants must be initializers (the cleanup
            passes see to that): what a Constant node makes is not known, and freezes what meets it.
    """
    trace = walk(graph, RULES)
    return Channels(trace, resolve(trace.space))


class MacsModel:
    """MACs of the graph with channels removed, without making it: products of what is left of each node's factors."""

    def __init__(self, channels: Channels) -> None:
        self.channels = channels
        self._nodes: list[tuple[float, tuple[np.ndarray, ...]]] = []
        self._names: list[str] = []
        self._near: dict[str, list[int]] = {}
        known = {work.node: work for work in channels.works}
        self._fixed = float(count(channels.graph).macs)  # nested graphs included
        by_atom: dict[int, set[int]] = {}
        for node in channels.graph.nodes:
            macs = float(node_macs(node)[0])
            if node not in known or not macs:
                continue
            self._fixed -= macs
            factors = tuple(channels.atoms_of_labels(labels) for labels in known[node].factors)
            for atom in {atom for factor in factors for atom in np.unique(factor).tolist()}:
                by_atom.setdefault(atom, set()).add(len(self._nodes))
            self._nodes.append((macs, factors))
            self._names.append(name_of(node))
        for group in channels.groups:
            self._near[group.name] = sorted({n for atom in group.atoms for n in by_atom.get(atom, ())})

    def macs(self, removed: Removed) -> float:
        """MACs without these channels."""
        return self.macs_of(self.channels.gone(removed))

    def macs_of(self, gone: np.ndarray) -> float:
        """MACs without atoms, (atoms + 1,) bool."""
        return self._fixed + sum(self._macs(number, gone) for number in range(len(self._nodes)))

    def macs_by_node(self, removed: Removed) -> dict[str, float]:
        """MACs without these channels, of each node that channels have a say in."""
        gone = self.channels.gone(removed)
        return {name: self._macs(number, gone) for number, name in enumerate(self._names)}

    def macs_near(self, gone: np.ndarray, group: Group) -> float:
        """MACs of the nodes that the channels of a group touch."""
        return sum(self._macs(number, gone) for number in self._near[group.name])

    def _macs(self, number: int, gone: np.ndarray) -> float:
        macs, factors = self._nodes[number]
        for factor in factors:
            macs *= 1 - float(np.count_nonzero(gone[factor].any(axis=1))) / len(factor)
        return macs


def share(channels: Channels) -> float:
    """The share of all channels, counted by elements, that can be removed."""
    total = sum(group.size * group.width for group in channels.groups)
    free = sum(group.size * group.width for group in channels.groups if not group.frozen)
    return free / total if total else 0.0
