"""Operators that pick, place and pad elements: Gather, Scatter, Slice, Pad, GridSample and their kin.

An index may come from the CPU while the data is on an accelerator; it is moved, and a constant one is moved once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from onnxcompress.train.ops.call import Builder, Call, Function, integers
from onnxcompress.train.ops.shaping import on_one_device


class Index:
    """The integer input of a node that says which elements: int64, on the data's device, counted from the start.

    Args:
        call: The node.
        position: Of the input.
    """

    def __init__(self, call: Call, position: int) -> None:
        fixed = call.constants.get(position)
        self.fixed = None if fixed is None else fixed.to(torch.int64)
        self.signed = self.fixed is None or bool((self.fixed < 0).any())

    def at(self, device: torch.device, given: Tensor) -> Tensor:
        """The indices as they are, perhaps negative."""
        if self.fixed is None:
            return given.to(device, torch.int64)
        if self.fixed.device != device:
            self.fixed = self.fixed.to(device)
        return self.fixed

    def from_start(self, device: torch.device, given: Tensor, size: int) -> Tensor:
        """The indices into ``size`` elements, with those counted from the end turned around."""
        index = self.at(device, given)
        return torch.where(index < 0, index + size, index) if self.signed else index


def gather(call: Call) -> Function:
    axis = call.attribute("axis", 0)
    fixed = call.constants.get(1)
    if fixed is not None and fixed.dim() == 0:
        element = int(fixed)
        return lambda x, indices=None: x.select(axis, element)
    index = Index(call, 1)

    def run(x: Tensor, indices: Tensor) -> Tensor:
        places = index.from_start(x.device, indices, x.shape[axis])
        if places.dim() == 1:
            return x.index_select(axis, places)
        at = axis % x.dim()
        picked = x.index_select(at, places.reshape(-1))
        return picked.reshape(x.shape[:at] + places.shape + x.shape[at + 1 :])

    return run


def gather_elements(call: Call) -> Function:
    axis = call.attribute("axis", 0)
    index = Index(call, 1)
    return lambda x, indices: x.gather(axis, index.from_start(x.device, indices, x.shape[axis]))


def coordinates(index: Tensor, batch_sizes: Sequence[int] = ()) -> tuple[Tensor, ...]:
    """What picks from a tensor by index tuples (the last axis of ``index``), after leading axes shared with it."""
    rank = index.dim() - 1
    batch = [
        torch.arange(size, device=index.device).reshape([-1] + [1] * (rank - 1 - axis))
        for axis, size in enumerate(batch_sizes)
    ]
    return (*batch, *index.unbind(-1))


def gather_nd(call: Call) -> Function:
    batch = call.attribute("batch_dims", 0)
    index = Index(call, 1)
    return lambda x, indices: x[coordinates(index.at(x.device, indices), x.shape[:batch])]


REDUCTIONS = {"mul": "prod", "min": "amin", "max": "amax"}


def scatter_elements(call: Call) -> Function:
    axis = call.attribute("axis", 0)
    index = Index(call, 1)
    reduction = call.attribute("reduction", "none")
    if reduction not in ("none", "add", *REDUCTIONS):
        raise call.refuse(f"reduction {reduction!r}")

    def run(x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
        x, updates = on_one_device(x, updates)
        places = index.from_start(x.device, indices, x.shape[axis])
        if reduction == "none":
            return x.scatter(axis, places, updates)
        if reduction == "add":
            return x.scatter_add(axis, places, updates)
        return x.scatter_reduce(axis, places, updates, REDUCTIONS[reduction])

    return run


def scatter_nd(call: Call) -> Function:
    index = Index(call, 1)
    reduction = call.attribute("reduction", "none")
    if reduction not in ("none", "add", *REDUCTIONS):
        raise call.refuse(f"reduction {reduction!r}")

    def run(x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
        x, updates = on_one_device(x, updates)
        places = index.at(x.device, indices)
        if reduction not in REDUCTIONS:
            return x.index_put(coordinates(places), updates, accumulate=reduction == "add")
        depth = places.shape[-1]
        row = torch.zeros(places.shape[:-1], dtype=torch.int64, device=x.device)
        for place, size in zip(places.unbind(-1), x.shape[:depth], strict=True):
            row = row * size + torch.where(place < 0, place + size, place)
        rows = x.reshape(x.shape[:depth].numel(), -1)
        new = updates.reshape(row.numel(), -1)
        return rows.scatter_reduce(0, row.reshape(-1, 1).expand_as(new), new, REDUCTIONS[reduction]).reshape(x.shape)

    return run


FAR = 2**62  # beyond any tensor; torch warns of 2**63, which files hold for "to the end"


def slice_by(x: Tensor, cuts: Sequence[tuple[int, slice]]) -> Tensor:
    """x with some axes cut; torch has no negative steps: what they take is taken forwards, then turned around."""
    index = [slice(None)] * x.dim()
    turned = []
    for axis, cut in cuts:
        if cut.step < 0:
            turned.append(axis)
            cut = forwards(cut, x.shape[axis])
        index[axis] = cut
    cropped = x[tuple(index)]
    return cropped.flip(turned) if turned else cropped


def forwards(cut: slice, size: int) -> slice:
    """The elements of a cut with a negative step, first to last; unlike Python's, it never starts before the first."""
    start, end = (bound + size if bound < 0 else bound for bound in (cut.start, cut.stop))
    taken = range(min(max(start, 0), size - 1), min(max(end, -1), size - 1), cut.step)
    return slice(taken[-1], taken[0] + 1, -cut.step) if taken else slice(0, 0, 1)


def slice_(call: Call) -> Function:
    if call.opset < 10:
        bounds: list[list[int] | None] = [call.attribute(name) for name in ("starts", "ends", "axes")] + [None]
    else:
        bounds = [call.integers(position) for position in (1, 2, 3, 4)]

    def cuts(
        starts: list[int], ends: list[int], axes: list[int] | None, steps: list[int] | None
    ) -> list[tuple[int, slice]]:
        places = axes or range(len(starts))
        return [
            (axis, slice(*(max(min(number, FAR), -FAR) for number in (start, end, step))))
            for axis, start, end, step in zip(places, starts, ends, steps or [1] * len(starts), strict=True)
        ]

    if all(bound is not None or not call.has(position) for position, bound in enumerate(bounds, 1)):
        starts, ends, axes, steps = bounds
        assert starts is not None and ends is not None
        fixed = cuts(starts, ends, axes, steps)
        axis, cut = fixed[0] if len(fixed) == 1 else (-1, slice(0, 0, -1))
        if axis >= 0 and cut.step > 0:  # by far the most frequent form
            index = (*[slice(None)] * axis, cut)
            return lambda x, *_: x[index]
        return lambda x, *_: slice_by(x, fixed)

    def run(x: Tensor, *given: Tensor | None) -> Tensor:
        read = [None if tensor is None else integers(tensor) for tensor in given] + [None, None]
        starts, ends, axes, steps = read[:4]
        assert starts is not None and ends is not None
        return slice_by(x, cuts(starts, ends, axes, steps))

    return run


MODES = {"reflect": "reflect", "edge": "replicate", "wrap": "circular"}


def pad_axis(x: Tensor, axis: int, before: int, after: int, mode: str) -> Tensor:
    """x with one axis made longer by copies of its own elements."""
    size = x.shape[axis]
    place = torch.arange(-before, size + after, device=x.device)
    if mode == "edge":
        place = place.clamp(0, size - 1)
    elif mode == "wrap":
        place = place % size
    else:
        period = max(2 * (size - 1), 1)
        place = place % period
        place = torch.minimum(place, period - place) if size > 1 else place * 0
    return x.index_select(axis, place)


def pad_by(x: Tensor, pads: Sequence[tuple[int, int]], mode: str) -> Tensor:
    """x padded in a mode other than constant; negative pads crop first."""
    for axis, (before, after) in enumerate(pads):
        if before < 0 or after < 0:
            x = x.narrow(axis, max(-before, 0), x.shape[axis] + min(before, 0) + min(after, 0))
    grown = [(max(before, 0), max(after, 0)) for before, after in pads]
    spatial = grown[2:]
    fused = (
        3 <= x.dim() <= 5
        and x.dtype.is_floating_point
        and grown[:2] == [(0, 0), (0, 0)]
        and (mode == "edge" or all(max(pad) < size for pad, size in zip(spatial, x.shape[2:], strict=True)))
    )
    if fused:
        return functional.pad(x, [amount for pad in reversed(spatial) for amount in pad], MODES[mode])
    for axis, (before, after) in enumerate(grown):
        if before or after:
            x = pad_axis(x, axis, before, after, mode)
    return x


def pad_constant(x: Tensor, pads: Sequence[tuple[int, int]], value: float | Tensor) -> Tensor:
    """x padded with a value, which may be trained; negative pads crop."""
    amounts = [amount for pad in reversed(pads) for amount in pad]
    if not isinstance(value, Tensor):
        return functional.pad(x, amounts, value=value)
    inside = functional.pad(torch.ones_like(x, dtype=torch.bool), amounts, value=False)
    return torch.where(inside, functional.pad(x, amounts), value.to(x.device).reshape(()))


def pad(call: Call) -> Function:
    mode = call.attribute("mode", "constant")
    if mode != "constant" and mode not in MODES:
        raise call.refuse(f"mode {mode!r}")
    pads: list[int] | None
    if call.opset < 11:
        pads = call.attribute("pads", call.attribute("paddings"))
    else:
        pads = call.integers(1)
    amount = call.constants.get(2)
    fill = call.attribute("value", 0.0) if amount is None else amount.item()
    fixed_axes = call.integers(3)

    def by_axis(rank: int, amounts: list[int], axes: list[int] | None) -> list[tuple[int, int]]:
        half = len(amounts) // 2
        found = [(0, 0)] * rank
        for axis, before, after in zip(axes or range(half), amounts[:half], amounts[half:], strict=True):
            found[axis] = (before, after)
        return found

    def run(x: Tensor, given: Tensor | None = None, value: Tensor | None = None, axes: Tensor | None = None) -> Tensor:
        amounts = pads if pads is not None or given is None else integers(given)
        assert amounts is not None
        wanted = by_axis(x.dim(), amounts, fixed_axes if fixed_axes is not None or axes is None else integers(axes))
        if mode != "constant":
            return pad_by(x, wanted, mode)
        return pad_constant(x, wanted, fill if value is None or amount is not None else value)

    return run


def non_zero(call: Call) -> Function:
    return lambda x: torch.nonzero(x).t()


def compress(call: Call) -> Function:
    axis = call.attribute("axis")

    def run(x: Tensor, condition: Tensor) -> Tensor:
        kept = torch.nonzero(condition.to(x.device)).reshape(-1)
        return x.reshape(-1).index_select(0, kept) if axis is None else x.index_select(axis, kept)

    return run


def reverse_sequence(call: Call) -> Function:
    axes = (call.attribute("batch_axis", 1), call.attribute("time_axis", 0))

    def run(x: Tensor, lengths: Tensor) -> Tensor:
        sequences = x.movedim(axes, (0, 1))
        return reversed_in_time(sequences, lengths).movedim((0, 1), axes)

    return run


def reversed_in_time(sequences: Tensor, lengths: Tensor) -> Tensor:
    """Each of the sequences (N, T, ...) with its first elements, as many as its length says, in reverse."""
    count, steps = sequences.shape[:2]
    length = lengths.to(sequences.device, torch.int64)[:, None]
    time = torch.arange(steps, device=sequences.device)
    place = torch.where(time < length, length - 1 - time, time)
    return sequences[torch.arange(count, device=sequences.device)[:, None], place]


INTERPOLATIONS = {"bilinear": "bilinear", "linear": "bilinear", "nearest": "nearest"}
INTERPOLATIONS |= {"bicubic": "bicubic", "cubic": "bicubic"}


def grid_sample(call: Call) -> Function:
    mode = INTERPOLATIONS.get(call.attribute("mode", "bilinear"))
    border = call.attribute("padding_mode", "zeros")
    aligned = bool(call.attribute("align_corners", 0))
    if mode is None or border not in ("zeros", "border", "reflection"):
        raise call.refuse(f"mode {call.attribute('mode')!r} with padding {border!r}")

    def run(x: Tensor, grid: Tensor) -> Tensor:
        if mode == "bicubic" and x.dim() != 4:
            raise call.refuse(f"bicubic sampling of a tensor of rank {x.dim()}")
        return functional.grid_sample(x, grid, mode, border, aligned)

    return run


def unique(call: Call) -> Function:
    raise call.refuse("the list of distinct values, whose length follows from the data,")


OPERATORS: dict[str, Builder] = {
    "Compress": compress,
    "Gather": gather,
    "GatherElements": gather_elements,
    "GatherND": gather_nd,
    "GridSample": grid_sample,
    "NonZero": non_zero,
    "Pad": pad,
    "ReverseSequence": reverse_sequence,
    "Scatter": scatter_elements,
    "ScatterElements": scatter_elements,
    "ScatterND": scatter_nd,
    "Slice": slice_,
    "Unique": unique,
}
