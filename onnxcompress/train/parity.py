"""What a module gives on several inputs, for an exported file to be held against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from onnx import ModelProto, ValueInfoProto, helper
from torch import Tensor, nn

from onnxcompress.errors import DataError, ModelError, OnnxCompressError, RecipeError
from onnxcompress.runtime import Runtime
from onnxcompress.train.call import check_names, to_array
from onnxcompress.train.exporters import BATCH, quiet
from onnxcompress.validation.comparison import Comparison, difference, weakness, worse
from onnxcompress.validation.equivalence import run_model

RANDOM_FEEDS = 2  # beside the example

Shape = tuple[int | str, ...]


class Calls:
    """A module's inputs, and once ``run`` was called its outputs.

    The first feed is the example, the others are random: floats normal, integers between the example's least and
    greatest. With a dynamic batch they have sizes of their own, 1 among them; the example is doubled where it is 1,
    because a tracer takes a size of 1 for one that never changes.

    Args:
        module: Returns a tuple of tensors, see ``flat_forward``.
        example: One tensor per input.
        inputs: Their names.
        dynamic_batch: Let the first axis of every input vary.
        seed: Of the random feeds.

    Attributes:
        feeds: One tensor per input each; the example first.
        sizes: The batch of each feed; empty where it is fixed.
        batched: Per input, whether its first axis is the batch; None where shapes are fixed.
        outputs: Names.
        notes: What the comparison cannot see.
    """

    def __init__(
        self, module: nn.Module, example: Sequence[Tensor], inputs: Sequence[str], dynamic_batch: bool, seed: int
    ) -> None:
        self.module = module
        self.inputs = list(inputs)
        self.outputs: list[str] = []
        self.notes: list[str] = []
        self.sizes: list[int] = []
        self.batched: list[bool] | None = None
        self.results: list[tuple[Tensor, ...]] = []
        generator = torch.Generator().manual_seed(seed)
        if not dynamic_batch:
            self.feeds = [list(example)]
            self.feeds += [[_draw(tensor, None, generator) for tensor in example] for _ in range(RANDOM_FEEDS)]
            return
        size = self._batch(example)
        if size == 1:
            example, size = [torch.cat([tensor, tensor]) if tensor.ndim else tensor for tensor in example], 2
        self.batched = [tensor.ndim > 0 for tensor in example]
        self.sizes = [size, size + 1, 1]
        self.feeds = [list(example), *([_draw(t, n, generator) for t in example] for n in self.sizes[1:])]

    def _batch(self, example: Sequence[Tensor]) -> int:
        sizes = {name: len(t) for name, t in zip(self.inputs, example, strict=True) if t.ndim}
        if len({*sizes.values()}) != 1 or 0 in sizes.values():
            found = ", ".join(f"{name} {size}" for name, size in sizes.items()) or "no axis"
            raise RecipeError(f"a dynamic batch needs inputs that share their first axis, and they have {found}")
        return next(iter(sizes.values()))

    def run(self, returned: Sequence[str], wanted: Sequence[str] | None) -> None:
        """Call the module on every feed.

        Args:
            returned: What ``flat_forward`` gives.
            wanted: Names of the outputs; by default those returned.

        Raises:
            DataError: The module does not take the example, or no other batch.
            ModelError: It returns no tensors.
            RecipeError: ``wanted`` cannot be.
        """
        taken = []
        for place, feed in enumerate(self.feeds):
            try:
                with quiet():
                    result = self.module(*feed)
            except OnnxCompressError:
                raise
            except Exception as error:  # whatever the module's code raises
                what = f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"
                shapes = ", ".join(f"{n} {tuple(t.shape)}" for n, t in zip(self.inputs, feed, strict=True))
                if place == 0:
                    raise DataError(f"{type(self.module).__name__} does not take {shapes}: {what}") from error
                if self.sizes and place == 1:
                    raise DataError(
                        f"the batch is not dynamic, {type(self.module).__name__} does not take {shapes}: {what}"
                    ) from error
                self.notes.append(f"not compared on random inputs {shapes}, which the module does not take: {what}")
                continue
            self.results.append(result)
            taken.append(place)
        self.feeds = [self.feeds[place] for place in taken]
        self.sizes = [self.sizes[place] for place in taken] if self.sizes else []
        if not self.results[0]:
            raise ModelError(f"{type(self.module).__name__} returns no tensor")
        if len({len(result) for result in self.results}) > 1:
            raise ModelError(f"{type(self.module).__name__} returns now more tensors, now fewer: a graph cannot")
        if wanted is not None:
            check_names(self.module, wanted, len(self.results[0]), "output")
        self.outputs = _unlike(list(wanted or returned), {*self.inputs, *self.module.state_dict()})
        weak = weakness([to_array(tensor) for result in self.results for tensor in result])
        if weak is not None:
            self.notes.append(f"the comparison says little: {weak}")

    def input_shapes(self) -> dict[str, Shape]:
        """Sizes by name; the batch is symbolic where it is dynamic."""
        return dict(zip(self.inputs, map(self._shape, zip(*self.feeds, strict=True)), strict=True))

    def output_shapes(self) -> dict[str, Shape]:
        """Sizes by name; symbolic where they changed with the feed."""
        return dict(zip(self.outputs, map(self._shape, zip(*self.results, strict=True)), strict=True))

    def _shape(self, tensors: Sequence[Tensor]) -> Shape:
        def size(axis: int) -> int | str:
            seen = [tensor.shape[axis] for tensor in tensors]
            if axis == 0 and self.sizes and seen == self.sizes:
                return BATCH
            return int(seen[0]) if len({*seen}) == 1 else f"size_{axis}"

        if len({tensor.ndim for tensor in tensors}) > 1:
            raise ModelError(
                f"{type(self.module).__name__} returns a tensor of now more, now fewer axes: a graph cannot"
            )
        return tuple(size(axis) for axis in range(tensors[0].ndim))

    def declare(self, proto: ModelProto) -> None:
        """Write the interface into an exported model: all inputs, also one that is not read, and all known sizes."""
        if [value.name for value in proto.graph.output] != self.outputs:
            found = ", ".join(value.name for value in proto.graph.output)
            raise ModelError(f"the exporter wrote the outputs {found}, expected {', '.join(self.outputs)}")
        declared = {value.name: value for value in proto.graph.input}
        inputs = [
            _value_info(name, shape, tensor)
            for (name, shape), tensor in zip(self.input_shapes().items(), self.feeds[0], strict=True)
        ]
        outputs = [
            _value_info(name, shape, tensor)
            for (name, shape), tensor in zip(self.output_shapes().items(), self.results[0], strict=True)
        ]
        others = [value for name, value in declared.items() if name not in self.inputs]
        if others:
            raise ModelError(f"the exporter wrote the input {others[0].name}, expected {', '.join(self.inputs)}")
        del proto.graph.input[:], proto.graph.output[:]
        proto.graph.input.extend(inputs)
        proto.graph.output.extend(outputs)

    def compare(self, path: Path, runtime: Runtime, tolerance: float) -> Comparison:
        """Hold the file against what the module gave.

        Raises:
            RuntimeFailure: onnxruntime does not run it.
        """
        feeds = [
            {name: to_array(tensor) for name, tensor in zip(self.inputs, feed, strict=True)} for feed in self.feeds
        ]
        found = run_model(runtime, path, feeds, outputs=self.outputs)
        judged = []
        for place, name in enumerate(self.outputs):
            pairs = zip(self.results, found, strict=True)
            one = worse([difference(name, to_array(ours[place]), theirs[place]) for ours, theirs in pairs], name)
            judged.append(replace(one, allowed=0.0 if one.mismatches else max(tolerance, one.ulp)))
        return Comparison(judged, tolerance, len(feeds))

    def repeats(self) -> bool:
        """Whether the module gives for the example what it gave before."""
        with quiet():
            again = self.module(*self.feeds[0])
        pairs = zip(self.results[0], again, strict=True)
        return all(a.shape == b.shape and torch.allclose(a, b, equal_nan=True) for a, b in pairs)


def _draw(tensor: Tensor, size: int | None, generator: torch.Generator) -> Tensor:
    shape = list(tensor.shape)
    if size is not None and shape:
        shape[0] = size
    if tensor.is_floating_point() or tensor.is_complex():
        kind = torch.complex64 if tensor.is_complex() else torch.float32
        drawn = torch.randn(shape, generator=generator, dtype=kind)
    elif tensor.dtype == torch.bool:
        drawn = torch.randint(0, 2, shape, generator=generator)
    else:
        low, high = (int(tensor.min()), int(tensor.max())) if tensor.numel() else (0, 0)
        drawn = torch.randint(low, high + 1, shape, generator=generator)
    return drawn.to(tensor.device, tensor.dtype)


def _unlike(names: list[str], taken: set[str]) -> list[str]:
    """The names, with a number behind those that are taken."""
    free = []
    for name in names:
        found, number = name, 0
        while found in taken:
            number += 1
            found = f"{name}_{number}"
        taken.add(found)
        free.append(found)
    return free


def _value_info(name: str, shape: Shape, tensor: Tensor) -> ValueInfoProto:
    kind = helper.np_dtype_to_tensor_dtype(to_array(tensor).dtype)
    return helper.make_tensor_value_info(name, kind, list(shape))
