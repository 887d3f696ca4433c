"""What the layers of a graph read on calibration samples: in the float net, and in the net quantized so far.

    with Calibration(graph, layers, samples, runtime=runtime) as calibration:
        for stage in calibration.stages():
            for layer in stage:  # independent of each other
                quantized = quantize_layer(layer.matrix(), layer.bias(), calibration.statistics(layer), ...)
                calibration.replace(layer, quantized.decode(), quantized.bias)

Float weights and the weights quantized so far each see every sample once, segment by segment: two forward passes in
all. Between segments the tensors that are still needed are kept, for all samples. Tensors that no quantized layer has
touched yet are the same in both nets and are computed and kept once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np

from onnxcompress.codebook.activations import Activations
from onnxcompress.codebook.augmentation import cut, image_axes
from onnxcompress.codebook.codebook import Statistics
from onnxcompress.codebook.layers import Layer
from onnxcompress.codebook.moments import MIN_ROWS, Sums, add_batch, id_counts
from onnxcompress.codebook.rows import Rows, RowSource
from onnxcompress.codebook.segments import Network, Operation, Replacements, prune
from onnxcompress.graph import Graph
from onnxcompress.runtime import RunOptions, Runtime

logger = logging.getLogger(__name__)

# Thousands of short runs: threads that spin between them would take the cores from what sums up.
SEGMENT_OPTIONS = RunOptions(session_config={"session.intra_op.allow_spinning": "0"})
Part = Literal["fit", "held_out"]
Feed = Mapping[str, Any]


class Calibration:
    """Runs the samples through both nets, stage by stage, and sums up what the layers read.

    Args:
        graph: The outermost graph; changes to it after this call are not seen.
        layers: Those to be quantized, of ``find_layers(graph)``.
        samples: Values by input name, each of one batch; None or empty for no data.
        runtime: Runs the segments.
        held_out_fraction: Part of the samples that is kept apart, at least one where there are two.
        cuts: Further samples made of each that is not kept apart, see ``augmentation``; only of images.
        rows_per_input: Rows of a layer of length D at most, in multiples of D, and a quarter of it from what is kept
            apart; up to 8192 rows are always used. See ``moments`` for what fewer rows cost.
        memory_limit_bytes: Tensors between segments beyond this go to temporary files.
        gram_limit_bytes: A layer whose Gram matrices would take more gets no statistics.
        options: How onnxruntime loads the segments.
        folder: Where the temporary files are made.
        seed: Chooses the samples that are kept apart, and the rows.
    """

    def __init__(
        self,
        graph: Graph,
        layers: Sequence[Layer],
        samples: Sequence[Feed] | None,
        *,
        runtime: Runtime | None,
        held_out_fraction: float = 0.25,
        cuts: int = 0,
        rows_per_input: int = 16,
        memory_limit_bytes: int = 1 << 30,
        gram_limit_bytes: int = 3 << 30,
        options: RunOptions = SEGMENT_OPTIONS,
        folder: Path | None = None,
        seed: int = 0,
    ) -> None:
        if not 0 <= held_out_fraction < 1:
            raise ValueError(f"held_out_fraction is {held_out_fraction}, expected 0 or more and less than 1")
        self.layers = list(layers)
        self.samples = list(samples or [])
        self.rows_per_input = rows_per_input
        self.gram_limit_bytes = gram_limit_bytes
        self.options = options
        self.seed = seed
        self.runs = 0
        self._runtime = runtime
        self._network = Network(graph, layers, list(self.samples[0]) if self.samples else [])
        self._floats = Activations(memory_limit_bytes // 2, folder)
        self._quantized = Activations(memory_limit_bytes // 2, folder)
        self._touched: set[str] = set()
        self._replacements = Replacements()
        self._known: dict[tuple[tuple[RowSource, ...], str | None, Part], Statistics | None] = {}
        self._current: list[Layer] = []
        self._parts = split_samples(len(self.samples), held_out_fraction, seed)
        if cuts and self.samples and all(map(image_axes, self.samples)):
            self._add_cuts(cuts)

    def __enter__(self) -> Calibration:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Forget all tensors and remove the temporary files."""
        self._floats.close()
        self._quantized.close()
        self._known.clear()

    @property
    def peak_memory_bytes(self) -> int:
        """The most that tensors between segments took in memory."""
        return self._floats.peak_memory_bytes + self._quantized.peak_memory_bytes

    def stages(self) -> Iterator[list[Layer]]:
        """The layers whose inputs are known by now, in execution order; those of one stage are independent.

        Layers without statistics because they stand in a body come first. Without data there is one stage.

        Raises:
            SessionFailure: onnxruntime refused a segment or crashed on it.
        """
        bodies = [layer for layer in self.layers if layer.in_body]
        if not self.samples:
            self._current = self.layers
            yield self.layers
            return
        for index, sample in enumerate(self.samples):
            for name, value in sample.items():
                self._floats.put(name, index, value)
        if bodies:
            self._current = bodies
            yield bodies
        for number, stage in enumerate(self._network.stages):
            self._run_segment(number)
            self._current = stage
            if stage:
                yield stage
            self._known.clear()
            self._forget(number)
        self._current = []

    def statistics(self, layer: Layer, part: Part = "fit") -> Statistics | None:
        """The moments of a layer's rows; None where there are none, see ``why_no_statistics``.

        Args:
            layer: One of the present stage.
            part: "fit", or "held_out" for the samples that are kept apart.
        """
        self._check_present(layer)
        if self.why_no_statistics(layer) is not None or not self._parts[part]:
            return None
        skip = self._network.skips.get(layer)
        skip = skip if skip in self._touched else None
        key = (tuple(use.rows for use in layer.uses if use.rows.form != "ids"), skip, part)
        if key not in self._known:
            self._known[key] = self._sum(layer, key[0], skip, part)
        return self._known[key]

    def why_no_statistics(self, layer: Layer) -> str | None:
        """The reason why a layer is quantized without data, or None."""
        if not self.samples:
            return "there are no samples"
        if layer.in_body:
            return "it is read in the body of an If, Loop or Scan, which is not cut"
        if all(use.rows.form == "ids" for use in layer.uses):
            return "it is a table from which ids pick rows: its input has no correlations"
        needed = 3 * 8 * layer.groups * layer.length**2
        if needed > self.gram_limit_bytes:
            return f"its Gram matrices take {needed} bytes, allowed {self.gram_limit_bytes}"
        return None

    def counts(self, layer: Layer, part: Part = "fit") -> np.ndarray | None:
        """(rows of the table,) int64: how often the samples pick each row of an embedding; None for other layers."""
        self._check_present(layer)
        sources = [use.rows for use in layer.uses if use.rows.form == "ids"]
        if not sources or not self.samples or layer.in_body:
            return None
        batches = (
            self._value(source.tensor, index, quantized=True) for source in sources for index in self._parts[part]
        )
        return id_counts(batches, layer.outputs)

    def replace(self, layer: Layer, weight: np.ndarray, bias: np.ndarray | None = None) -> None:
        """Let the quantized net use a decoded weight from here on.

        Args:
            layer: One of the present stage.
            weight: (outputs, D) float32.
            bias: (outputs,) float32; None leaves the layer's own.

        Raises:
            QuantizationError: There is a bias and no place for it.
        """
        self._check_present(layer)
        if self.samples and not layer.in_body:
            self._replacements.replace(layer, weight, bias)

    # -- running -----------------------------------------------------------------------------------------------------

    def _run_segment(self, number: int) -> None:
        operations = self._network.segment(number)
        made = {name for operation in operations for name in operation.writes}
        needed = self._network.needed_until
        # A row source of this very stage is needed after the segment; what only its own nodes read is not.
        read_here = {name for operation in operations for name in operation.reads}
        rows = self._network.read_by(self._network.stages[number])
        wanted = {n for n in made if needed.get(n, -1) > number or n in rows}
        touched: list[Operation] = []
        for operation in operations:
            if operation.origin in self._replacements or self._touched.intersection(operation.reads):
                touched.append(operation)
                self._touched.update(operation.writes)
        touched = prune(touched, {name for name in wanted if name in self._touched})
        border = {name for operation in touched for name in operation.reads} & (made & read_here) - self._touched
        logger.debug("segment %s: %s nodes, %s of them again", number, len(operations), len(touched))
        self._run(operations, wanted | border, self._floats, quantized=False)
        self._run(touched, {name for name in wanted if name in self._touched}, self._quantized, quantized=True)

    def _run(self, operations: Sequence[Operation], wanted: set[str], store: Activations, *, quantized: bool) -> None:
        kept = prune(operations, wanted)
        outputs = sorted(name for operation in kept for name in operation.writes if name in wanted)
        if not outputs:
            return
        made = {name for operation in kept for name in operation.writes}
        given = [
            name
            for name in dict.fromkeys(name for operation in kept for name in operation.reads)
            if name not in made and self._has(name)
        ]
        first = {name: self._value(name, 0, quantized=quantized) for name in given}
        model = self._network.model(kept, first, outputs, self._replacements if quantized else None)
        assert self._runtime is not None, "samples need a runtime"
        start, size = 0, 1
        while start < len(self.samples):
            indices = range(start, min(start + size, len(self.samples)))
            feeds = ({name: self._value(name, index, quantized=quantized) for name in given} for index in indices)
            results = self._runtime.run(model, feeds, options=self.options, outputs=outputs)
            self.runs += len(indices)
            for index, values in zip(indices, results, strict=True):
                for name, value in zip(outputs, values, strict=True):
                    store.put(name, index, value)
            # The replies of one call are in memory together.
            largest = max(sum(getattr(value, "nbytes", 0) for value in values) for values in results)
            start, size = start + len(indices), max(1, store.memory_limit_bytes // 4 // max(largest, 1))

    def _add_cuts(self, cuts: int) -> None:
        rng = np.random.default_rng([self.seed, len(self.samples)])
        for index in self._parts["fit"] * cuts:
            self._parts["fit"] = [*self._parts["fit"], len(self.samples)]
            self.samples.append(cut(self.samples[index], rng))

    def _has(self, name: str) -> bool:
        return (name, 0) in self._floats or (name, 0) in self._quantized

    def _value(self, name: str, sample: int, *, quantized: bool) -> Any:
        """A tensor in the float net, or in the quantized net, where it may be the same one."""
        if quantized and (name, sample) in self._quantized:
            return self._quantized.get(name, sample)
        if (name, sample) in self._floats:
            return self._floats.get(name, sample)
        return self._network.constant(name)

    def _forget(self, number: int) -> None:
        for store in (self._floats, self._quantized):
            for name in store.names():
                if self._network.needed_until.get(name, -1) <= number:
                    store.drop(name)

    def _check_present(self, layer: Layer) -> None:
        if not any(layer is present for present in self._current):
            raise ValueError(f"layer {layer.name!r} is not of the present stage")

    # -- sums --------------------------------------------------------------------------------------------------------

    def _sum(self, layer: Layer, sources: Sequence[RowSource], skip: str | None, part: Part) -> Statistics | None:
        samples = self._parts[part]
        tensors = {name for source in sources for name in source.tensors}
        if skip is not None and not self._fits(layer, sources[0], skip, samples):
            skip = None
        paired = (skip is not None or not self._touched.isdisjoint(tensors)) and self._same_shapes(tensors, samples)
        skip = skip if paired else None
        sums = Sums(layer.groups, layer.length, paired, 0 if skip is None else layer.outputs // layer.groups)
        share = self.rows_per_input if part == "fit" else -(-self.rows_per_input // 4)
        most = -(-max(MIN_ROWS, share * layer.length) // (len(samples) * len(sources)))
        rng = np.random.default_rng([self.seed, part == "held_out"])
        for source in sources:
            for index in samples:
                quantized = [self._value(name, index, quantized=True) for name in source.tensors]
                floats = [self._value(name, index, quantized=False) for name in source.tensors] if paired else None
                missing = None if skip is None else self._missing(skip, index)
                add_batch(sums, source, quantized, floats, most, rng, missing)
        return sums.statistics()

    def _missing(self, skip: str, index: int) -> np.ndarray:
        """c = s_f - s_q, float32."""
        floats = np.asarray(self._value(skip, index, quantized=False), np.float32)
        return floats - np.asarray(self._value(skip, index, quantized=True), np.float32)

    def _same_shapes(self, names: Iterable[str], samples: Sequence[int]) -> bool:
        """Whether tensors are of one size in both nets: one that depends on values may differ."""
        return all(
            np.shape(self._value(name, index, quantized=True)) == np.shape(self._value(name, index, quantized=False))
            for name in names
            for index in samples
        )

    def _fits(self, layer: Layer, source: RowSource, skip: str, samples: Sequence[int]) -> bool:
        """Whether the tensor that the output is added to has the output's shape, so that neither is broadcast."""
        if not self._same_shapes([skip], samples):
            return False
        for index in samples:
            rows = Rows(source, [self._value(name, index, quantized=True) for name in source.tensors])
            if np.shape(self._value(skip, index, quantized=True)) != rows.output_shape(layer.outputs):
                return False
        return True


def split_samples(count: int, fraction: float, seed: int) -> dict[Part, list[int]]:
    """Sample numbers of both parts."""
    held = 0 if count < 2 or fraction == 0 else min(max(1, round(fraction * count)), count - 1)
    order = np.random.default_rng(seed).permutation(count)
    return {"fit": sorted(map(int, order[held:])), "held_out": sorted(map(int, order[:held]))}
