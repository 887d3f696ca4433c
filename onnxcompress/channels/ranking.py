"""In which order the channels of a group go, and what each costs.

Without data as in Liu et al. 2017 (Network Slimming): |scale| of the BatchNormalizations on a channel, summed. Where a
group has none, all numbers are relative to the mean of their layer, and the L1 norm of the weights that make a channel
stands in for its scale. With data see ``compensation.py``; numbers from elsewhere come in through ``given``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from onnxcompress.channels.groups import Channels, Group
from onnxcompress.channels.trace import Binding


@dataclass(frozen=True, eq=False)
class Ranking:
    """The channels of one group, the first to go first.

    Attributes:
        order: (size,) indices of channels.
        costs: (size,) what removing each costs once those before it are gone, 0 or more; inf for one that stays.
    """

    order: np.ndarray
    costs: np.ndarray


def ranking_of(importance: np.ndarray) -> Ranking:
    """A ranking by one number per channel."""
    order = np.argsort(importance, kind="stable")
    return Ranking(order, np.asarray(importance, np.float64)[order])


def magnitudes(channels: Channels) -> dict[str, Ranking]:
    """Rankings by weights alone of the groups that can be pruned."""
    free = [group for group in channels.groups if not group.frozen]
    scales = _sums(channels, "scale", relative=False)
    if all(np.any(scales[list(group.atoms)]) for group in free):
        return {group.name: ranking_of(scales[list(group.atoms)]) for group in free}
    # Numbers of two kinds are compared relative to the mean channel of their layer.
    scales, weights = _sums(channels, "scale", relative=True), _sums(channels, "weight", relative=True)
    found = {}
    for group in free:
        own = scales[list(group.atoms)]
        found[group.name] = ranking_of(own if np.any(own) else weights[list(group.atoms)])
    return found


def _sums(channels: Channels, role: str, *, relative: bool) -> np.ndarray:
    """(atoms,) sums of absolute numbers over the slices that go with each atom."""
    total = np.zeros(channels.count + 1)
    for binding in channels.bindings:
        if binding.role == role:
            norms = _norms(binding)
            if relative:
                norms = norms / (norms.mean() or 1.0)
            for atoms, norm in zip(channels.atoms_of(binding.line), norms, strict=True):
                for atom in atoms:
                    total[atom] += norm
    return total


def _norms(binding: Binding) -> np.ndarray:
    """(slices,) L1 norms."""
    values = np.abs(np.asarray(binding.tensor.values, np.float64))
    rows = np.moveaxis(values, binding.axis, 0).reshape(values.shape[binding.axis], -1).sum(axis=1)
    return np.asarray(rows.reshape(binding.line.size, -1).sum(axis=1))


def given(channels: Channels, importance: Mapping[str, np.ndarray]) -> dict[str, Ranking]:
    """Rankings from outside: an array for each group that may be pruned.

    Raises:
        ValueError: No such group, or another number of channels.
    """
    found = {}
    for name, values in importance.items():
        group: Group | None = channels.by_name.get(name)
        if group is None or len(values) != group.size:
            raise ValueError(f"group {name!r}: {len(values)} numbers for {0 if group is None else group.size} channels")
        found[name] = ranking_of(np.asarray(values))
    return found
