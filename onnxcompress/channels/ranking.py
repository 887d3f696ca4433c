"""In which order the channels of a group go, and what each costs.

Without data as in Liu et al. 2017 (Network Slimming): |scale| of the BatchNormalizations on a channel, summed; where a
group has none, the L1 norm of the weights that make it, over the mean of its layer. With data see ``compensation.py``;
numbers from elsewhere come in through ``ranking_of``.
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
    scales = _sums(channels, "scale")
    weights = _sums(channels, "weight")
    found = {}
    has_scales = {group.name: bool(np.any(scales[list(group.atoms)])) for group in free}
    all_scales = all(has_scales.values())
    for group in free:
        source = scales if has_scales[group.name] else weights
        values = source[list(group.atoms)]
        if not all_scales:  # numbers of two kinds are compared by their groups' means
            values = values / (values.mean() or 1.0)
        found[group.name] = ranking_of(values)
    return found


def _sums(channels: Channels, role: str) -> np.ndarray:
    """(atoms,) sums of absolute numbers; of weights relative to the mean channel of their layer."""
    total = np.zeros(channels.count + 1)
    for binding in channels.bindings:
        if binding.role == role:
            norms = _norms(binding)
            if role == "weight":
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
