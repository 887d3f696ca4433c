"""Values for inputs that steer shapes: for Reshape, Expand, Slice, Pad, Resize, Loop and their like."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxcompress.samples.roles import Role
from onnxcompress.samples.scopes import Dims


@dataclass(frozen=True)
class Request:
    """Which values are wanted.

    Attributes:
        sample: 0 for the first sample; later ones differ where a value has alternatives.
        attempt: How often values were already refused: shape-like inputs then take another form.
        variant: One of ``VARIANTS``.
        sizes: The size of every axis.
        length: The longest sequence among the inputs.
    """

    seed: int
    sample: int
    attempt: int
    variant: str
    sizes: Mapping[str, int]
    length: int


@dataclass(frozen=True)
class Case:
    """One tensor to be made."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    role: Role
    request: Request
    rng: np.random.Generator

    @property
    def count(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    def dims(self, dims: Dims | None) -> list[int] | None:
        """Dimensions with every name replaced by its size; -1 where that is unknown."""
        if dims is None:
            return None
        return [d if isinstance(d, int) else self.request.sizes.get(d or "", -1) for d in dims]


def _target_shape(case: Case) -> np.ndarray:
    """For Reshape: what the graph declares, the shape of the data, or one axis of everything."""
    count, forms = case.count, []
    result, data = case.dims(case.role.result), case.dims(case.role.data)
    if result is not None and len(result) == count and sum(d < 0 for d in result) <= 1:
        forms.append(result)
    if data is not None and len(data) == count:
        forms.append([0] * count)
    elif data is not None and count > 1:
        forms.append([0] + [1] * (count - 2) + [-1])
    forms += [[1] * (count - 1) + [-1], [-1] + [1] * (count - 1)]
    return np.array(forms[(case.request.sample + case.request.attempt) % len(forms)][:count])


def _broadcast_shape(case: Case) -> np.ndarray:
    """For Expand: axes of size 1, and new ones, become 2 or 3."""
    data, count = case.dims(case.role.data), case.count
    if data is None or len(data) > count or case.request.attempt % 2:
        return np.ones(count)
    wide = 2 + case.request.sample % 2
    return np.array([wide] * (count - len(data)) + [wide if d == 1 else 1 for d in data])


def _split(case: Case) -> np.ndarray:
    data = case.dims(case.role.data)
    size = data[case.role.axis] if data and -len(data) <= case.role.axis < len(data) else -1
    parts = np.full(case.count, max(size, case.count) // max(1, case.count))
    parts[-1:] += max(size, case.count) - parts.sum()
    return parts


def _scaled(case: Case) -> np.ndarray:
    """For Resize: the last two axes twice as large, or three times."""
    factor = 2 + case.request.sample % 2
    scales = np.ones(case.count)
    scales[-2:] = factor
    if case.role.kind == "scales":
        return scales
    data = case.dims(case.role.data) or [-1]
    if len(data) == case.count and min(data) > 0:
        return scales * data
    return np.where(np.arange(case.count) == 0, max(1, data[0]), 8 * scales)  # AffineGrid: only the batch is known


def _pads(case: Case) -> np.ndarray:
    """0 or 1, and 0 on axes of size 1, which cannot be reflected."""
    pads = case.rng.integers(0, 2, case.count)
    data = case.dims(case.role.data)
    return pads * (np.tile(data, 2) != 1) if data is not None and 2 * len(data) == case.count else pads


def _plain(value: Callable[[int], float]) -> Callable[[Case], np.ndarray]:
    return lambda case: np.full(case.shape, value(case.request.sample + case.request.attempt))


RECIPES: dict[str, Callable[[Case], np.ndarray]] = {
    "target-shape": _target_shape,
    "broadcast-shape": _broadcast_shape,
    "split": _split,
    "scales": _scaled,
    "sizes": _scaled,
    "repeats": lambda case: np.arange(case.count) % 2 + 1 + case.request.sample % 2,
    "axes": lambda case: np.arange(case.count),
    "pads": _pads,
    "starts": _plain(lambda n: n % 2),
    "ends": _plain(lambda n: 3 + n),
    "steps": _plain(lambda n: 1 + n % 2),
    "count": _plain(lambda n: 3 - n % 3),
    "start": _plain(lambda n: n % 2),
    "limit": _plain(lambda n: 6 + n),
    "step": _plain(lambda n: 1),
    "window": _plain(lambda n: 16 // (1 + n % 2)),
    "axis": _plain(lambda n: n % 2),
    "flag": _plain(lambda n: 1 - n % 2),
    "ratio": _plain(lambda n: 0.5),
    "inference": _plain(lambda n: 0),
}
