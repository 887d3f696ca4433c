"""Sizes for the free dimensions of a model's inputs: what each dimension seems to be, and which sizes to try."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import numpy as np
import onnx
from onnx import ModelProto, TensorProto

from onnxcompress.errors import RecipeError
from onnxcompress.samples.scopes import value_dims

# What is tried for a dimension, best first; height and width go together, by position.
CANDIDATES: dict[str, tuple[int, ...]] = {
    "batch": (2, 1, 3),
    "height": (64, 96, 48, 32, 224, 256, 320, 640, 299, 128, 512, 28, 384, 1024),
    "width": (96, 64, 320, 128, 224, 256, 320, 640, 299, 128, 512, 28, 384, 1024),
    "feature": (16, 8, 32, 7, 14, 20, 40, 64, 28, 56),
    "channel": (3, 1, 4, 2, 16),
    "sequence": (16, 8, 32, 64, 128, 12, 100, 77, 256, 384, 512, 1, 2, 3000),
    "audio": (16000, 8000, 512, 576, 1024, 4096, 480, 160, 320, 256, 1536, 32000, 48000, 80000),
    "past": (8, 4, 1, 0),
    "other": (16, 8, 4, 3, 2, 1, 32, 64, 96, 128, 224, 256, 320, 512, 576, 640, 784, 1024, 16000),
    "rank": (4, 2, 3, 1, 0),  # of an input without a shape
}
UNRANKED: dict[int, tuple[int, ...]] = {4: (2, 3, 64, 96), 2: (2, 16), 3: (2, 16, 8), 1: (8,), 0: ()}
MAX_RANDOM_MIXES = 24

_BATCH = {"batch", "bs", "bsz", "batchsize", "nbatch"}
_PAST = {"past", "prev", "previous", "cache", "cached"}
_SEQUENCE = {"seq", "seqlen", "sequence", "len", "length", "time", "timesteps", "token", "tokens", "frame", "frames"}
_SEQUENCE |= {"step", "steps", "t", "l", "text", "words", "phonemes"}
_AUDIO = {"audio", "wave", "wav", "waveform", "pcm", "signal", "speech", "samples"}
_STATE = {"state", "states", "hidden", "h0", "c0", "hx", "cx", "h", "c", "cache", "memory", "hn", "cn"}
_IMAGE_CHANNELS = (1, 3, 4)


def words_of(name: str) -> list[str]:
    """The words of a name: ``encoder.inputIds_1`` gives encoder, input, ids, 1."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return [word.lower() for word in re.split(r"[^A-Za-z0-9]+", spaced) if word]


def has_word(name: str, words: Collection[str]) -> bool:
    """Whether one of ``words`` stands in ``name`` as a word of its own."""
    return any(word in words for word in words_of(name))


@dataclass(frozen=True)
class InputShape:
    """A graph input: its type, and its dimensions as sizes or names of axes (None: any rank).

    A dimension without a name is an axis of its own, named like ``x[1]``. ``wraps`` holds what stands around the
    tensor, outermost first: "optional", "sequence". A map has element type 0.
    """

    name: str
    type: onnx.TypeProto
    elem_type: int
    dims: tuple[int | str, ...] | None
    wraps: tuple[str, ...] = ()

    def __str__(self) -> str:
        kind = TensorProto.DataType.Name(self.elem_type).lower() if self.elem_type else "map"
        return f"{self.name!r} {kind}[{'...' if self.dims is None else ', '.join(map(str, self.dims))}]"


def input_shape(value: onnx.ValueInfoProto) -> InputShape:
    """Read one graph input."""
    wraps, inner = [], value.type
    while inner.WhichOneof("value") in ("optional_type", "sequence_type"):
        kind = inner.WhichOneof("value")
        wraps.append(kind.removesuffix("_type"))
        inner = getattr(inner, kind).elem_type
    kind = inner.WhichOneof("value")
    if kind not in ("tensor_type", "sparse_tensor_type"):
        return InputShape(value.name, value.type, 0, (), tuple(wraps))
    dims = value_dims(inner)
    named = None if dims is None else tuple(f"{value.name}[{i}]" if d is None else d for i, d in enumerate(dims))
    return InputShape(value.name, value.type, getattr(inner, kind).elem_type, named, tuple(wraps))


def axis_kind(shape: InputShape, axis: int) -> str:
    """Guess what a free dimension is, from its name, its place and the input's name: a key of ``CANDIDATES``."""
    dims = shape.dims or ()
    name, rank = str(dims[axis]), len(dims)
    unnamed = name == f"{shape.name}[{axis}]"
    words = [] if unnamed else words_of(name)
    whole_number = shape.elem_type not in _FLOATS
    batch_like = not unnamed and ("batch" in name.lower() or not _BATCH.isdisjoint(words))
    if batch_like or (axis == 0 and rank >= 2 and words in (["n"], ["b"])):
        return "batch"
    if not _PAST.isdisjoint(words):
        return "past"
    spatial = _spatial_kind(dims, axis, words)
    if spatial:
        return spatial
    if axis == 0 and rank >= 2 and _SEQUENCE.isdisjoint(words):
        return "batch"
    if axis == 1 and rank == 3 and has_word(shape.name, _STATE):
        return "batch"
    if not _AUDIO.isdisjoint(words) or (axis == rank - 1 and rank <= 3 and has_word(shape.name, _AUDIO)):
        return "audio"
    if (whole_number and rank >= 2) or not _SEQUENCE.isdisjoint(words):
        return "sequence"
    return "other"


_FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}


def _spatial_kind(dims: Sequence[int | str], axis: int, words: list[str]) -> str | None:
    """Height, width or channel of an image or of a feature map."""
    rank = len(dims)
    for kind, names in (("height", {"height", "h", "rows"}), ("width", {"width", "w", "cols"})):
        if rank >= 3 and not names.isdisjoint(words):
            return kind
    if not {"channel", "channels"}.isdisjoint(words):
        return "channel"
    if rank not in (4, 5) or axis == 0:
        return None
    last = dims[-1] in _IMAGE_CHANNELS and dims[1] not in _IMAGE_CHANNELS
    channel = rank - 1 if last else 1
    if axis == channel:
        return "channel"
    image = rank == 4 and (isinstance(dims[channel], str) or dims[channel] in _IMAGE_CHANNELS)
    return ("height" if axis == (1 if last else 2) else "width") if image else "feature"


@dataclass
class SizePlan:
    """The free axes of all inputs together, and the sizes that were asked for.

    Attributes:
        kinds: Axis name to what it seems to be.
        fixed: Axis name to the size that the user gave.
        derived: Axis name, such as ``past + sequence``, to a function of the other sizes.
    """

    inputs: list[InputShape]
    kinds: dict[str, str] = field(default_factory=dict)
    fixed: dict[str, int] = field(default_factory=dict)
    derived: dict[str, Callable[[Mapping[str, int]], int]] = field(default_factory=dict)

    @property
    def free(self) -> list[str]:
        """Axes whose sizes are ours to choose."""
        return [axis for axis in self.kinds if axis not in self.fixed and axis not in self.derived]

    def complete(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Add the given and the derived sizes."""
        whole = {**sizes, **self.fixed}
        for axis, value in self.derived.items():
            if axis not in whole:
                whole[axis] = max(0, value(whole))
        return whole

    def shape(self, shape: InputShape, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The sizes of one input."""
        if shape.dims is None:
            return UNRANKED[sizes[f"{shape.name}[rank]"]]
        return tuple(dim if isinstance(dim, int) else sizes[dim] for dim in shape.dims)

    def assignments(self, seed: int) -> Iterator[dict[str, int]]:
        """Sizes to try, best first, none twice: every axis at its n-th candidate, then random mixes of these."""
        seen: set[tuple[tuple[str, int], ...]] = set()
        for sizes in self._orders(seed):
            whole = self.complete(sizes)
            key = tuple(sorted(whole.items()))
            if key not in seen:
                seen.add(key)
                yield whole

    def _orders(self, seed: int) -> Iterator[dict[str, int]]:
        free = self.free
        lists = {axis: CANDIDATES[self.kinds[axis]] for axis in free}
        for step in range(max((len(found) for found in lists.values()), default=1)):
            for batch in CANDIDATES["batch"][:2]:
                own = {a: batch if self.kinds[a] == "batch" else c[min(step, len(c) - 1)] for a, c in lists.items()}
                yield own
                yield {a: batch if self.kinds[a] == "other" else size for a, size in own.items()}
        rng = np.random.default_rng(seed)
        for _ in range(MAX_RANDOM_MIXES if free else 0):
            batch = int(rng.choice(CANDIDATES["batch"][:2]))
            yield {a: batch if self.kinds[a] == "batch" else int(rng.choice(c)) for a, c in lists.items()}

    def moved(self, sizes: Mapping[str, int], axes: Collection[str], step: int) -> dict[str, int]:
        """``sizes`` with each of ``axes`` at its ``step``-th other candidate; equal sizes of a kind stay equal.

        After the first come the nearest ones, larger and smaller in turn: what accepts 224 may refuse 16.
        """
        changed = {axis: sizes[axis] for axis in sizes if axis not in self.derived}
        for axis in axes:
            size = sizes[axis]
            others = [other for other in CANDIDATES[self.kinds[axis]] if other != size]
            larger = sorted(other for other in others if other > size)
            smaller = sorted((other for other in others if other < size), reverse=True)
            turns = [other for pair in zip_longest(larger, smaller) for other in pair if other is not None]
            order = list(dict.fromkeys((others[0], *turns)))
            changed[axis] = order[(step - 1) % len(order)]
        return self.complete(changed)


def size_plan(
    model: ModelProto,
    inputs: list[InputShape],
    shapes: Mapping[str, Sequence[int | str | None]] | None = None,
    batch: int | None = None,
) -> SizePlan:
    """Collect the free dimensions of ``inputs`` and bind those that the caller gave.

    Raises:
        RecipeError: A given shape names no input, or contradicts the model or another given size.
    """
    plan = SizePlan(inputs)
    given = {name: [_size(size) for size in sizes] for name, sizes in (shapes or {}).items()}
    for name in given:
        if name not in {shape.name for shape in inputs}:
            known = ", ".join(shape.name for shape in inputs) or "none"
            raise RecipeError(f"--input-shape {name}: the model has no such input to feed; its inputs: {known}")
    for number, shape in enumerate(inputs):
        if shape.dims is None and shape.name in given:
            sized = tuple(f"{shape.name}[{i}]" if size is None else size for i, size in enumerate(given[shape.name]))
            shape = plan.inputs[number] = InputShape(shape.name, shape.type, shape.elem_type, sized, shape.wraps)
        elif shape.dims is None:
            plan.kinds[f"{shape.name}[rank]"] = "rank"
        for axis, dim in enumerate(shape.dims or ()):
            if isinstance(dim, str) and plan.kinds.get(dim, "other") == "other":
                plan.kinds[dim] = axis_kind(shape, axis)
        if shape.dims is not None and shape.name in given:
            _bind(plan.fixed, shape, shape.dims, given[shape.name])
    if batch is not None:
        plan.fixed.update(
            {axis: batch for axis, kind in plan.kinds.items() if kind == "batch" and axis not in plan.fixed}
        )
    names = set(plan.kinds)
    plan.derived = {axis: value for axis in plan.kinds if (value := _expression(axis, names)) is not None}
    return plan


def _size(given: int | str | None) -> int | None:
    return given if isinstance(given, int) and given >= 0 else None


def _bind(fixed: dict[str, int], shape: InputShape, dims: Sequence[int | str], given: Sequence[int | None]) -> None:
    text = f"--input-shape {shape.name}:{','.join('?' if size is None else str(size) for size in given)}"
    if len(given) != len(dims):
        raise RecipeError(f"{text}: {len(given)} sizes, the model declares {len(dims)} dimensions: {shape}")
    for axis, (dim, size) in enumerate(zip(dims, given, strict=True)):
        if size is None:
            continue
        bound = dim if isinstance(dim, int) else fixed.setdefault(dim, size)
        if bound != size:
            held = "declared" if isinstance(dim, int) else f"already given for {dim!r}"
            raise RecipeError(f"{text}: axis {axis} is {size}, but {bound} is {held}")


_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


def _expression(axis: str, names: Collection[str]) -> Callable[[Mapping[str, int]], int] | None:
    """``past_length + length`` as a function of those sizes; None when the name is no expression of other axes."""
    parts = {"past_sequence_length", "sequence_length"}
    text = " + ".join(sorted(parts)) if axis == "total_sequence_length" and parts <= set(names) else axis
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError):
        return None
    if not isinstance(tree, ast.BinOp):
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and (node.id not in names or node.id == axis):
            return None
    try:
        _evaluate(tree, dict.fromkeys(names, 2))
    except (KeyError, TypeError, ZeroDivisionError):
        return None
    return lambda sizes: _evaluate(tree, sizes)


def _evaluate(tree: ast.expr, sizes: Mapping[str, int]) -> int:
    if isinstance(tree, ast.Name):
        return sizes[tree.id]
    if isinstance(tree, ast.Constant) and isinstance(tree.value, int):
        return tree.value
    if isinstance(tree, ast.BinOp):
        return _OPERATORS[type(tree.op)](_evaluate(tree.left, sizes), _evaluate(tree.right, sizes))
    raise TypeError(f"no arithmetic on sizes: {ast.dump(tree)}")
