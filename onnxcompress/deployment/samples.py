"""Inputs of a model with the outputs that onnxruntime gave for them, as a page or a script can read them back.

All arrays stand one after the other in ``sample.bin``, little-endian and each on a multiple of 8 bytes; the manifest
has name, type, dimensions and place of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto

from onnxcompress.data import load_data
from onnxcompress.errors import EquivalenceError, ModelError
from onnxcompress.runtime import DEPLOYED, REFERENCE, Runtime
from onnxcompress.samples import check_samples
from onnxcompress.validation.comparison import Comparison
from onnxcompress.validation.equivalence import Reference
from onnxcompress.validation.judge import input_specs

SAMPLE_FILE = "sample.bin"
SAMPLES = 3  # of a data source
TYPES = frozenset(
    ("float16", "float32", "float64", "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
)
ALIGNMENT = 8


@dataclass(frozen=True)
class CheckedSamples:
    """Feeds and what the model gives for them.

    Attributes:
        feeds: One value per input name.
        outputs: Per feed, one array for each of ``names``, by onnxruntime without its own optimizations.
        names: The outputs.
        comparison: As onnxruntime runs for everybody, against that.
        described: What the feeds are, one line each.
    """

    feeds: list[dict[str, np.ndarray]]
    outputs: list[list[np.ndarray]]
    names: list[str]
    comparison: Comparison
    described: list[str]

    @property
    def allowed(self) -> dict[str, float | None]:
        """Largest error of each output; None where the model is random and nothing can be said."""
        outputs = self.comparison.outputs
        return {found.name: found.allowed if found.unchecked is None else None for found in outputs}

    def write(self, folder: Path) -> list[dict[str, Any]]:
        """Write ``sample.bin``; returns what the manifest says of it."""
        entries: list[dict[str, Any]] = []
        with open(folder / SAMPLE_FILE, "wb") as out:
            for feed, outputs in zip(self.feeds, self.outputs, strict=True):
                given = [_written(out, name, value) for name, value in feed.items()]
                made = [
                    {**_written(out, name, value), "allowed": self.allowed[name]}
                    for name, value in zip(self.names, outputs, strict=True)
                ]
                entries.append({"inputs": given, "outputs": made})
        return entries


def checked_samples(
    model: Path,
    proto: ModelProto,
    runtime: Runtime,
    *,
    data: str | None,
    preprocess: str | None,
    shapes: Mapping[str, Sequence[int]],
    tolerance: float,
    seed: int,
) -> CheckedSamples:
    """Samples of a data source, or seeded inputs, run by onnxruntime.

    Raises:
        ModelError: An input or output is no tensor of a type that NumPy has, or no input was accepted.
        DataError: The data is missing or does not fit.
        EquivalenceError: onnxruntime's own optimizations change an output by more than the tolerance.
        RuntimeFailure: onnxruntime refused the model.
    """
    _, outputs = runtime.interface(model, options=DEPLOYED)
    names = [value.name for value in outputs]
    if data is not None:
        specs = input_specs(proto)
        batch = next((size for spec in specs for size in spec.shape[:1] if isinstance(size, int)), 1)
        dataset = load_data(data, inputs=specs, limit=SAMPLES * batch, preprocess=preprocess, seed=seed)
        feeds = [dict(feed) for feed, _ in dataset.batches(1)]
        described = [f"{len(feeds)} samples of {dataset.source}"]
    else:
        found = check_samples(proto, lambda one: runtime.run(model, [one])[0], seed=seed, shapes=shapes)
        feeds, described = list(found), found.describe()
    reference = Reference(model, feeds, runtime, options=REFERENCE, outputs=runtime.run(model, feeds))
    for feed, values in zip(feeds, reference.outputs, strict=True):
        for name, value in [*feed.items(), *zip(names, values, strict=True)]:
            if not isinstance(value, np.ndarray) or value.dtype.name not in TYPES:
                kind = value.dtype.name if isinstance(value, np.ndarray) else "no tensor"
                raise ModelError(f"{model.name}: {name!r} is {kind}; deploy takes tensors of numbers and booleans")
    comparison = reference.compare(model, tolerance=tolerance, options=DEPLOYED)
    if not comparison.equivalent:
        differs = comparison.message()
        raise EquivalenceError(f"{model.name} with onnxruntime's own optimizations: {differs}; --tolerance allows more")
    arrays = [[np.asarray(value) for value in values] for values in reference.outputs]
    return CheckedSamples(feeds, arrays, names, comparison, described)


def _written(out: Any, name: str, value: np.ndarray) -> dict[str, Any]:
    value = np.asarray(value)
    out.write(b"\0" * (-out.tell() % ALIGNMENT))
    entry = {"name": name, "type": value.dtype.name, "dims": list(value.shape), "offset": out.tell()}
    data = np.ascontiguousarray(value).astype(value.dtype.newbyteorder("<"), copy=False).tobytes()
    out.write(data)
    return {**entry, "bytes": len(data)}
