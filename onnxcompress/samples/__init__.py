"""Inputs to check any model with: seeded, accepted by onnxruntime, and such that a wrong rewrite shows.

The file says what type an input has, seldom what it means. So sizes and values are guessed, best guess first, and the
original model is asked. Two samples differ in every size that can be changed: a dimension read as a constant shows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, numpy_helper

from onnxcompress.errors import ModelError, RuntimeFailure
from onnxcompress.samples.recipes import Request
from onnxcompress.samples.roles import Role, input_roles
from onnxcompress.samples.sizes import InputShape, SizePlan, input_shape, size_plan
from onnxcompress.samples.values import VARIANTS, make_value, near
from onnxcompress.validation.comparison import arrays_of, difference, perturbed, weakness
from onnxcompress.validation.signature import OVERRIDABLE_IR

logger = logging.getLogger(__name__)

Feed = dict[str, Any]
Run = Callable[[Feed], Sequence[Any]]

MAX_TRIES = 80  # sizes for the first sample
MAX_MOVES = 30  # sizes for every further one
MAX_TIMEOUTS = 2
MAX_DEFAULTS_BYTES = 64 << 20  # of overridable initializers that a feed may hold
NEARLY_ZERO = 1e-3


@dataclass(frozen=True)
class Sample:
    """One accepted feed.

    Attributes:
        feed: Input name to value.
        outputs: What the model gave for it.
        sizes: Axis name to size, of the free axes.
        variant: Of the float values, one of ``sample_values.VARIANTS``.
        weakness: Why the outputs say little ("every output is constant"); None when they do not.
        defaults: Inputs with a default that the feed overrides.
    """

    feed: Feed
    outputs: list[Any]
    sizes: dict[str, int]
    variant: str
    weakness: str | None
    defaults: tuple[str, ...] = ()


class Samples(list[Feed]):
    """Check inputs for one model: the feeds, and how they were chosen.

    Attributes:
        samples: At least one; sizes differ between them where the model allows it.
        held: Free axes for which the model accepted only one size.
        tries: How many feeds onnxruntime was asked about.
    """

    def __init__(self, samples: Sequence[Sample], held: Sequence[str] = (), tries: int = 0) -> None:
        super().__init__(sample.feed for sample in samples)
        self.samples, self.held, self.tries = list(samples), tuple(held), tries

    @property
    def outputs(self) -> list[list[Any]]:
        """What the model gave for each feed."""
        return [sample.outputs for sample in self.samples]

    def describe(self) -> list[str]:
        """One line for each sample, and one for what could not be varied."""
        lines = []
        for number, sample in enumerate(self.samples, 1):
            shapes = ", ".join(f"{name} {_describe(value)}" for name, value in sample.feed.items()) or "no inputs"
            notes = [] if sample.variant == "signed" else [f"{sample.variant} values"]
            notes += [sample.weakness] if sample.weakness else []
            lines.append(f"sample {number}: {shapes}" + (f" ({'; '.join(notes)})" if notes else ""))
        if self.held:
            lines.append(f"one size only: {', '.join(f'{axis} = {self.samples[0].sizes[axis]}' for axis in self.held)}")
        return lines


def check_samples(
    model: ModelProto,
    run: Run,
    *,
    seed: int = 0,
    shapes: Mapping[str, Sequence[int | str | None]] | None = None,
    count: int = 2,
    batch: int | None = None,
) -> Samples:
    """Find inputs that a model accepts.

    Inputs that have a default are left to it in the first sample, and given values near it in the second.

    Args:
        model: Without external data loaded.
        run: Runs the original model on one feed; raises RuntimeFailure when that is not accepted.
        seed: Same seed, same inputs.
        shapes: Input name to the sizes that the user gave; None, a name or -1 leaves a size open.
        count: Samples wanted.
        batch: Size of every dimension that looks like a batch.

    Raises:
        ModelError: onnxruntime accepts none of the inputs that were tried.
        RecipeError: ``shapes`` does not fit the model.
    """
    search = _Search(model, run, seed, shapes, batch)
    samples = [search.first()]
    while len(samples) < count and search.inputs:
        samples.append(search.another(samples))
    held = [axis for axis in search.plan.free if len({sample.sizes.get(axis) for sample in samples}) == 1]
    found = Samples(samples, held if count > 1 else (), search.tries)
    for line in found.describe():
        logger.debug("%s", line)
    return found


@dataclass
class _Search:
    model: ModelProto
    run: Run
    seed: int
    shapes: Mapping[str, Sequence[int | str | None]] | None
    batch: int | None
    tries: int = 0
    reason: str = ""
    inputs: list[InputShape] = field(init=False)
    plan: SizePlan = field(init=False)
    roles: dict[str, Role] = field(init=False)
    defaults: dict[str, TensorProto] = field(init=False)
    refused: list[dict[str, int]] = field(default_factory=list)
    timeouts: int = 0

    def __post_init__(self) -> None:
        graph = self.model.graph
        initializers = {tensor.name: tensor for tensor in graph.initializer}
        sparse = {tensor.values.name for tensor in graph.sparse_initializer}
        self.inputs = [input_shape(v) for v in graph.input if v.name not in initializers and v.name not in sparse]
        self.plan = size_plan(self.model, self.inputs, self.shapes, self.batch)
        self.roles = input_roles(self.model, [shape.name for shape in self.inputs])
        self.defaults = {}
        left = MAX_DEFAULTS_BYTES
        for name in (v.name for v in graph.input if v.name in initializers):
            tensor = initializers[name]
            if self.model.ir_version >= OVERRIDABLE_IR and tensor.data_location != TensorProto.EXTERNAL:
                left -= tensor.ByteSize()
                if left >= 0:
                    self.defaults[name] = tensor

    def first(self) -> Sample:
        """The first sizes that are accepted; then other values, while the outputs say little."""
        for number, sizes in enumerate(self._limited()):
            best = self._try(sizes, number)
            if best is not None:
                break
        else:
            raise ModelError(self._refusal())
        for variant in VARIANTS[1:]:
            if best.weakness is None or not self._has_floats():
                break
            other = self._try(best.sizes, number, variant=variant)
            if other is not None and other.weakness is None:
                best = other
        return best

    def _limited(self) -> Iterator[dict[str, int]]:
        for number, sizes in enumerate(self._assignments()):
            if number >= MAX_TRIES or self.timeouts >= MAX_TIMEOUTS:
                return
            yield sizes

    def _assignments(self) -> Iterator[dict[str, int]]:
        """Every size plan once; models without a free size get the other forms of their integer inputs."""
        sizes: dict[str, int] = {}
        for sizes in self.plan.assignments(self.seed):
            yield sizes
        for _ in range(4 if any(self._varies(shape) for shape in self.inputs) else 0):
            yield sizes

    def _varies(self, shape: InputShape) -> bool:
        return shape.elem_type not in _FLOATS or self.roles[shape.name].kind != "number"

    def _has_floats(self) -> bool:
        return any(shape.elem_type in _FLOATS for shape in self.inputs)

    def another(self, samples: list[Sample]) -> Sample:
        """A sample in which as many axes as possible have a size that none of ``samples`` has."""
        index, base = len(samples), samples[0]
        best: Sample | None = None
        moves = 0
        for axes in self._groups(base.sizes):
            open_axes = [axis for axis in axes if best is None or best.sizes[axis] == base.sizes[axis]]
            for step in (index, index + 1, index + 2) if open_axes else ():
                moves += 1
                if moves > MAX_MOVES or self.timeouts >= MAX_TIMEOUTS:
                    break
                sizes = self.plan.moved(base.sizes if best is None else best.sizes, open_axes, step)
                found = self._try(sizes, step, index, base.variant)
                if found is not None:
                    best = found
                    break
        if best is not None and best.weakness is None:
            return best
        for attempt, variant in enumerate(dict.fromkeys((base.variant, *VARIANTS))):
            sizes = base.sizes if best is None else best.sizes
            other = self._try(sizes, attempt, index, variant) if best is None or self._has_floats() else None
            if other is not None and (best is None or other.weakness is None):
                best = other
            if best is not None and best.weakness is None:
                break
        return best or base

    def _groups(self, sizes: Mapping[str, int]) -> Iterator[list[str]]:
        """All axes together, then those of one size together (unnamed axes often have to agree), then each."""
        free = self.plan.free
        together = [[axis for axis in free if sizes[axis] == size] for size in dict.fromkeys(sizes[a] for a in free)]
        seen: list[list[str]] = [[]]
        for axes in [free, *together, *([axis] for axis in free)]:
            if axes not in seen:
                seen.append(axes)
                yield axes

    def _try(self, sizes: dict[str, int], attempt: int, index: int = 0, variant: str = "signed") -> Sample | None:
        for defaults in (self.defaults, {}) if index % 2 and self.defaults else ({},):
            feed = self._feed(sizes, attempt, index, variant)
            for name, tensor in defaults.items():
                feed[name] = near(numpy_helper.to_array(tensor), np.random.default_rng([self.seed, index, len(feed)]))
            self.tries += 1
            try:
                outputs = list(self.run(feed))
            except RuntimeFailure as error:
                if getattr(error, "stage", "run") != "run":
                    raise ModelError(f"{error}") from error
                logger.debug("sizes %s, attempt %d: %s", sizes, attempt, error)
                self.timeouts += getattr(error, "kind", None) == "timeout"
                self.reason = str(error)
                self.refused.append(sizes)
            else:
                reason = weakness(outputs) or self._jumps(feed, outputs)
                return Sample(feed, outputs, sizes, variant, reason, tuple(defaults))
        return None

    def _jumps(self, feed: Feed, outputs: list[Any]) -> str | None:
        """Whether outputs that are all nearly 0, as of a saturated Sigmoid, are more rounding than result."""
        floats = [array for array in arrays_of(outputs) if array.dtype.kind == "f" and array.size]
        if not floats or max(float(np.max(np.abs(array))) for array in floats) >= NEARLY_ZERO:
            return None
        self.tries += 1
        try:
            moved = self.run(perturbed(feed, np.random.default_rng(self.seed)))
        except RuntimeFailure:
            return "the model refuses the same input changed by 1e-6"
        noise = max(difference("", a, b).relative for a, b in zip(outputs, moved, strict=True))
        return f"outputs below {NEARLY_ZERO:.0e} of which {noise:.0e} is noise" if noise > NEARLY_ZERO else None

    def _feed(self, sizes: dict[str, int], attempt: int, index: int, variant: str) -> Feed:
        shapes = {shape.name: self.plan.shape(shape, sizes) for shape in self.inputs}
        lengths = [sizes[axis] for axis, kind in self.plan.kinds.items() if kind in ("sequence", "audio", "other")]
        length = max(lengths, default=max((s[1] for s in shapes.values() if len(s) >= 2), default=8))
        request = Request(self.seed, index, attempt, variant, sizes, length)
        return {s.name: make_value(s, shapes[s.name], self.roles[s.name], request) for s in self.inputs}

    def _refusal(self) -> str:
        what = ", ".join(str(shape) for shape in self.inputs) or "no inputs"
        text = f"onnxruntime accepts no input that was tried for {what}"
        ranges = []
        for axis in self.plan.kinds:
            values = sorted({sizes[axis] for sizes in self.refused})
            shown = [str(value) for value in values]
            ranges.append(f"{axis} = {', '.join(shown if len(shown) < 6 else [*shown[:3], '...', shown[-1]])}")
        tried = f"{self.tries} tries" + (f" with {'; '.join(ranges)}" if ranges else "")
        example = self.inputs[0] if self.inputs else None
        way = "--data FILE.npz"
        if example is not None and self.plan.free:
            dims = "1,3,224,224" if example.dims is None else ",".join(_example(example))
            way = f"--input-shape {example.name}:{dims} or {way}"
        return f"{text} ({tried}); the last reason: {self.reason}; give {way}"


_FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}


def _example(shape: InputShape) -> list[str]:
    spatial = iter((224, 224, 224))
    return [
        str(dim) if isinstance(dim, int) else "1" if axis == 0 else str(next(spatial, 16))
        for axis, dim in enumerate(shape.dims or ())
    ]


def _describe(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return "x".join(map(str, value.shape)) if value.ndim else str(value[()])
    if isinstance(value, list):
        return f"{len(value)} of {_describe(value[0])}"
    return "none" if value is None else f"{len(value)} keys"
