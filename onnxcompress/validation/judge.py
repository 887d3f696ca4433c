"""``validate``: whether one model can stand in for another.

Both run on onnxruntime, on data or on seeded inputs: interface, differences per output, and a metric on labelled data,
once with onnxruntime's own optimizations off and once as it runs for everybody.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, TensorProto

from onnxcompress.data import Dataset, InputSpec, load_data
from onnxcompress.errors import DataError, RecipeError
from onnxcompress.runtime import DEPLOYED, REFERENCE, RunOptions, Runtime
from onnxcompress.samples.shared import shared_samples
from onnxcompress.samples.sizes import input_shape
from onnxcompress.validation.comparison import Comparison, Difference
from onnxcompress.validation.equivalence import (
    DEFAULT_TOLERANCE,
    Model,
    Reference,
    Sensitivity,
    compare,
    for_runtime,
    read_model,
    run_model,
)
from onnxcompress.validation.metrics import Metric, find_metric
from onnxcompress.validation.signature import interface_differences

__all__ = [
    "DEFAULT_TOLERANCE",
    "Comparison",
    "Difference",
    "Reference",
    "Sensitivity",
    "Validation",
    "compare",
    "data_feeds",
    "for_runtime",
    "interface_differences",
    "read_model",
    "run_model",
    "validate",
]

METRIC_TOLERANCE = 0.005  # half a point of accuracy: below the sampling error of 10,000 labelled images at 70 %
_FLOATS = frozenset({TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16})
COMPARED_BATCHES = 8  # of the data, for the differences of the outputs; the metric sees all
DEFAULT_BATCH = 32


@dataclass(frozen=True)
class MetricFigures:
    """A metric of both models.

    Attributes:
        name: The metric.
        samples: How many were used.
        labelled: Whether there were labels; without them the first model's outputs are what is expected.
        plain: (first, second) with onnxruntime's optimizations off.
        deployed: (first, second) as onnxruntime runs by default.
        drop: How much worse the second is, the larger of both ways of running; NaN where that cannot be said.
    """

    name: str
    samples: int
    labelled: bool
    plain: tuple[float, float]
    deployed: tuple[float, float]
    drop: float


@dataclass(frozen=True)
class Validation:
    """What ``validate`` found.

    Attributes:
        interface: Differences in inputs and outputs, one line each.
        comparison: The outputs.
        metric: Figures on data; None without a metric.
        tolerance: Limit for the metric's drop, or for the outputs without a metric.
        inputs: What the models were compared on, one line each.
    """

    interface: list[str]
    comparison: Comparison
    metric: MetricFigures | None
    tolerance: float
    inputs: list[str] = field(default_factory=list)

    @property
    def within_tolerance(self) -> bool:
        """Whether the second model can stand in for the first, by the metric when there is one."""
        if self.metric is None or math.isnan(self.metric.drop):
            return self.comparison.equivalent
        return self.comparison.failure is None and self.metric.drop <= self.tolerance

    @property
    def quality(self) -> dict[str, tuple[float, float]]:
        """The metric's figures (first, second) by how onnxruntime ran."""
        if self.metric is None:
            return {}
        name = self.metric.name
        return {f"{name}, optimizations off": self.metric.plain, f"{name}, as deployed": self.metric.deployed}

    def message(self) -> str:
        """One line."""
        if self.metric is None or math.isnan(self.metric.drop):
            return self.comparison.message()
        (before, after), drop = self.metric.plain, self.metric.drop
        figures = f"{self.metric.name} {before:.4g} -> {after:.4g} on {self.metric.samples} samples"
        return f"{figures}, drop {drop:.2g}, allowed {self.tolerance:.2g}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        figures = None
        if self.metric is not None:
            figures = {
                "name": self.metric.name,
                "samples": self.metric.samples,
                "labelled": self.metric.labelled,
                "optimizations_off": [_finite(value) for value in self.metric.plain],
                "as_deployed": [_finite(value) for value in self.metric.deployed],
                "drop": _finite(self.metric.drop),
            }
        return {
            "within_tolerance": self.within_tolerance,
            "summary": self.message(),
            "tolerance": self.tolerance,
            "interface": self.interface,
            "inputs": self.inputs,
            "equivalence": self.comparison.as_dict(),
            "metric": figures,
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has neither NaN nor infinity


def validate(
    a: Model,
    b: Model,
    *,
    data: str | Dataset | None = None,
    metric: str | None = None,
    output: str | None = None,
    limit: int | None = None,
    batch: int | None = None,
    tolerance: float | None = None,
    shapes: Mapping[str, Sequence[int | str | None]] | None = None,
    preprocess: str | None = None,
    custom_ops: Path | None = None,
    seed: int = 0,
    runtime: Runtime | None = None,
) -> Validation:
    """Compare model ``b`` with model ``a``.

    Args:
        a: The reference; a path where it has external data.
        b: The model to judge.
        data: Samples, see ``onnxcompress.data``; seeded inputs without.
        metric: A name from ``onnxcompress.validation.metrics`` or ``module:function``; needs ``data``.
        output: Which output the metric is taken of; the first of floats when None.
        limit: At most so many samples.
        batch: Samples in a batch; also the batch size of seeded inputs.
        tolerance: Largest drop of the metric (0.005 when None), or largest max|d| / max|y| of an output (1e-5).
        shapes: Input name to sizes, for seeded inputs.
        preprocess: How images are prepared, see ``onnxcompress.data``.
        custom_ops: Shared library with custom operators.
        seed: Same seed, same inputs.
        runtime: Where the models run; one of its own when None.

    Raises:
        ModelError: A model cannot be read, or ``a`` accepts no input that was tried.
        DataError: The data is missing, does not fit ``a``, or has no labels where the metric needs them.
        RecipeError: The metric or the output is unknown, or a metric comes without data.
    """
    chosen = None if metric is None else find_metric(metric)
    if chosen is not None and data is None:
        raise RecipeError(f"metric {metric} needs samples: give --data")
    first, second = read_model(a), read_model(b)
    index = _output_index(first, output)
    options = replace(REFERENCE, custom_ops=custom_ops)
    numeric = DEFAULT_TOLERANCE if tolerance is None or chosen is not None else tolerance
    interface = interface_differences(first, second)
    with contextlib.ExitStack() as stack:
        runtime = runtime or stack.enter_context(Runtime(timeout_s=300.0))
        dataset = None
        outputs = None
        if data is not None:
            dataset = data if isinstance(data, Dataset) else _load(data, first, limit, preprocess, seed)
            feeds, lines = _first_batches(dataset, batch), [f"{len(dataset)} samples of {dataset.source}"]
        else:
            found = shared_samples(a, b, first, runtime, options, bool(interface), shapes, batch, seed)
            feeds, lines, outputs = list(found), found.describe(), found.outputs
        known = {value.name for value in second.graph.input}
        narrowed = [{name: value for name, value in feed.items() if name in known} for feed in feeds]
        reference = Reference(a, feeds, runtime, options=options, outputs=outputs)
        comparison = reference.compare(b, tolerance=numeric, options=options, feeds=narrowed)
        figures = None
        if chosen is not None and dataset is not None and comparison.failure is None:
            figures = _measure(chosen, (a, b), index, dataset, batch, runtime, custom_ops, known)
    limit_of = tolerance if tolerance is not None else DEFAULT_TOLERANCE if chosen is None else METRIC_TOLERANCE
    return Validation(interface, comparison, figures, limit_of, lines)


def _output_index(model: ModelProto, name: str | None) -> int:
    names = [value.name for value in model.graph.output]
    if name is None:
        # Integers in front are often ids that a model hands through.
        kinds = [value.type.tensor_type.elem_type for value in model.graph.output]
        return next((index for index, kind in enumerate(kinds) if kind in _FLOATS), 0)
    if name not in names:
        raise RecipeError(f"output {name!r}: the model has {', '.join(map(repr, names))}")
    return names.index(name)


def input_specs(model: ModelProto) -> list[InputSpec]:
    """The tensors that a model must be given, as ``onnxcompress.data`` wants them.

    Raises:
        DataError: An input is a sequence, an optional or a map: no source of samples holds these.
    """
    given = {tensor.name for tensor in model.graph.initializer}
    specs = []
    for shape in (input_shape(value) for value in model.graph.input if value.name not in given):
        if shape.wraps or not shape.elem_type:
            raise DataError(f"input {shape.name!r} is no tensor, and --data holds tensors only: leave it out")
        dims = tuple(None if isinstance(dim, str) else dim for dim in shape.dims or ())
        specs.append(InputSpec(shape.name, onnx.helper.tensor_dtype_to_np_dtype(shape.elem_type), dims))
    return specs


def _load(spec: str, model: ModelProto, limit: int | None, preprocess: str | None, seed: int) -> Dataset:
    return load_data(spec, inputs=input_specs(model), limit=limit, preprocess=preprocess, seed=seed)


def _first_batches(dataset: Dataset, batch: int | None) -> list[dict[str, Any]]:
    size = min(batch or DEFAULT_BATCH, len(dataset))
    return [feed for _, (feed, _) in zip(range(COMPARED_BATCHES), dataset.batches(size), strict=False)]


def data_feeds(
    data: str, model: ModelProto, *, limit: int | None = None, preprocess: str | None = None, seed: int = 0
) -> list[dict[str, Any]]:
    """Feeds for a check: ``limit`` samples of a data source, in batches of two where the model's batch is open.

    Raises:
        DataError: The data is missing, unreadable, or does not fit the model.
    """
    return [feed for feed, _ in _load(data, model, limit, preprocess, seed).batches(2)]


def _measure(
    metric: Metric,
    models: tuple[Model, Model],
    index: int,
    dataset: Dataset,
    batch: int | None,
    runtime: Runtime,
    custom_ops: Path | None,
    known: set[str],
) -> MetricFigures:
    if metric.labels == "needed" and dataset.labels is None:
        raise DataError(
            f"metric {metric.name} needs labels, and {dataset.source} has none: take mse, cosine, agreement"
        )
    size = min(batch or DEFAULT_BATCH, len(dataset))

    def predict(number: int, options: RunOptions) -> np.ndarray:
        names = [value.name for value in read_model(models[number]).graph.output]

        def feeds() -> Iterator[dict[str, Any]]:
            for feed, _ in dataset.batches(size):
                yield feed if number == 0 else {name: value for name, value in feed.items() if name in known}

        options = replace(options, custom_ops=custom_ops)
        rows = run_model(runtime, models[number], feeds(), options, outputs=[names[index]])
        values = [np.asarray(row[0]) for row in rows]
        try:
            return np.concatenate([np.atleast_1d(value) for value in values])
        except ValueError as error:
            raise DataError(
                f"metric {metric.name}: output {names[index]!r} changes its shape between batches"
            ) from error

    plain = predict(0, REFERENCE), predict(1, REFERENCE)
    deployed = predict(0, DEPLOYED), predict(1, DEPLOYED)
    labelled = dataset.labels is not None and metric.labels != "ignored"
    expected = dataset.labels if labelled and dataset.labels is not None else plain[0]
    figures = [(metric.measure(expected, one), metric.measure(expected, two)) for one, two in (plain, deployed)]
    drops = [metric.drop(before, after, expected) for before, after in figures]
    drop = float(np.max(drops))
    if metric.name == "psnr" and not labelled:
        drop = math.nan  # the first model against itself is infinitely good: the outputs decide
    return MetricFigures(metric.name, len(dataset), labelled, figures[0], figures[1], drop)
