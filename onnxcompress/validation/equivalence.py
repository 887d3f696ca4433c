"""Whether a model still computes what the original computes.

The reference run is onnxruntime without its own optimizations. An output that moves further than the tolerance is held
against how far the original moves by itself: some int8 models jump by 1 % when an input changes by 1e-6.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import ModelProto

from onnxcompress.errors import ModelError, RuntimeFailure
from onnxcompress.runtime import REFERENCE, RunOptions, Runtime, Value
from onnxcompress.validation.comparison import PERTURBATION, Comparison, Difference, difference, perturbed, worse
from onnxcompress.validation.randomness import random_outputs

logger = logging.getLogger(__name__)

# onnxruntime's own default optimization moves the outputs of seven out of nine trained models by less than 8e-6 (median
# 5e-7). The other two, a detector (2e-5) and an int8 model (2e-3), move as far when their inputs change by 1e-6.
DEFAULT_TOLERANCE = 1e-5
# The newest ir_version that an onnxruntime loads: 13 from 1.31 on; what is older loads 10 (seen with 1.23).
RUNTIME_IR_VERSIONS = ((1, 31), 13, 10)
PERTURBED_RUNS = 3
TRUSTED_NOISE = 1e-2  # onnxruntime's own optimization may be wrong: beyond this it says nothing about the model
_IR_VERSION_TAG = 0x08  # field 1 of ModelProto, a varint; written first

Feed = Mapping[str, Any]
Model = bytes | str | os.PathLike[str] | ModelProto


class LoweredModel(bytes):
    """A serialized model with its ir_version lowered; its external data lie in ``folder``."""

    folder: Path | None = None


def read_model(model: Model) -> ModelProto:
    """The proto without its external data.

    Raises:
        ModelError: The file is missing or is no ONNX model.
    """
    if isinstance(model, ModelProto):
        return model
    try:
        if isinstance(model, bytes):
            return onnx.load_model_from_string(model)
        return onnx.load(os.fspath(model), load_external_data=False)
    except OSError as error:
        name = "the model" if isinstance(model, bytes) else os.fspath(model)
        raise ModelError(f"cannot read {name}: {error.strerror or error}") from error
    except (ValueError, RuntimeError, DecodeError) as error:
        label = "the model" if isinstance(model, bytes) else os.fspath(model)
        raise ModelError(f"{label} is no ONNX model: {error}") from error


def _ir_version(model: Model) -> int:
    """The ir_version, off the first bytes where they hold it: a file of 2 GB need not be parsed for it."""
    if isinstance(model, ModelProto):
        return int(model.ir_version)
    if isinstance(model, bytes):
        start = model[:2]
    else:
        try:
            with open(model, "rb") as file:
                start = file.read(2)
        except OSError as error:
            raise ModelError(f"cannot read {model}: {error.strerror or error}") from error
    if len(start) == 2 and start[0] == _IR_VERSION_TAG and start[1] < 0x80:
        return start[1]
    return int(read_model(model).ir_version)


@cache
def runtime_ir_version() -> int:
    """The ir_version that models are lowered to for the installed onnxruntime."""
    since, newest, older = RUNTIME_IR_VERSIONS
    try:
        parts = version("onnxruntime").split(".")
    except PackageNotFoundError:
        return newest  # onnxruntime-gpu and the like: presumably of today
    return newest if tuple(int(part) for part in parts[:2]) >= since else older


def for_runtime(model: Model) -> bytes | Path:
    """What onnxruntime is given: a model above its ir_version limit as a copy with the highest one that it takes.

    The opset stays. External data of a lowered path are found by ``run_model`` (``LoweredModel.folder``).
    """
    limit = runtime_ir_version()
    if _ir_version(model) <= limit:
        if isinstance(model, ModelProto):
            return bytes(model.SerializeToString())
        return model if isinstance(model, bytes) else Path(model)
    proto = read_model(model)
    declared = proto.ir_version
    try:
        proto.ir_version = limit
        lowered = LoweredModel(proto.SerializeToString())
    finally:
        proto.ir_version = declared  # a ModelProto belongs to the caller
    lowered.folder = Path(model).resolve().parent if isinstance(model, (str, os.PathLike)) else None
    return lowered


def run_model(
    runtime: Runtime,
    model: Model,
    feeds: Iterable[Feed],
    options: RunOptions = REFERENCE,
    *,
    outputs: Sequence[str] | None = None,
) -> list[list[Value]]:
    """Run a model as ``for_runtime`` gives it.

    Raises:
        RuntimeFailure: onnxruntime refused it, or died.
    """
    source = model if isinstance(model, LoweredModel) else for_runtime(model)
    if isinstance(source, LoweredModel) and source.folder is not None:
        config = {**options.session_config, "session.model_external_initializers_file_folder_path": str(source.folder)}
        options = replace(options, session_config=config)
    return runtime.run(source, feeds, options=options, outputs=outputs)


@dataclass(frozen=True)
class Sensitivity:
    """How far an output of the original moves by itself.

    Attributes:
        optimized: Error of onnxruntime's default optimization against none.
        perturbed: Error when float inputs move by 1e-6, or by one step of a coarser type.
        repeated: Error of a second run.
        changes: Kinds of problems ("shape", "values") that come and go with a repeated or a perturbed run.
    """

    optimized: float = 0.0
    perturbed: float = 0.0
    repeated: float = 0.0
    changes: frozenset[str] = frozenset()

    @property
    def noise(self) -> float:
        """The largest of these, unless only the optimization moves the output, and too far to be rounding."""
        own = max(self.perturbed, self.repeated)
        return max(own, self.optimized if self.optimized <= max(TRUSTED_NOISE, 10 * own) else 0.0)


class Reference:
    """The original on some feeds: run once, compared with any number of candidates.

    Args:
        model: The original; a path where it has external data.
        feeds: Inputs that it accepts.
        runtime: Where it runs.
        options: How it is loaded.
        outputs: What it gave for ``feeds``, when that is known already.
    """

    def __init__(
        self,
        model: Model,
        feeds: Sequence[Feed],
        runtime: Runtime,
        *,
        options: RunOptions = REFERENCE,
        outputs: Sequence[Sequence[Value]] | None = None,
    ) -> None:
        self.model, self.feeds, self.runtime, self.options = model, list(feeds), runtime, options
        self._outputs = outputs

    @cached_property
    def proto(self) -> ModelProto:
        """The original, without external data."""
        return read_model(self.model)

    @cached_property
    def names(self) -> list[str]:
        """Its outputs."""
        return [value.name for value in self.proto.graph.output]

    @cached_property
    def outputs(self) -> Sequence[Sequence[Value]]:
        """Per feed, one value for each output."""
        if self._outputs is not None:
            return self._outputs
        return run_model(self.runtime, self.model, self.feeds, self.options)

    def compare(
        self,
        candidate: Model,
        *,
        tolerance: float = DEFAULT_TOLERANCE,
        options: RunOptions = REFERENCE,
        allowance: bool = True,
        feeds: Sequence[Feed] | None = None,
    ) -> Comparison:
        """Run ``candidate`` on the feeds and judge every output. What the candidate does wrong is no exception.

        Args:
            candidate: The model to judge.
            tolerance: Largest max|d| / max|y|, at least one step of a 16-bit output type.
            options: How it is loaded.
            allowance: Hold what exceeds the tolerance against the original's own noise.
            feeds: What the candidate is given instead of the reference's feeds, where its inputs differ.
        """
        reference = self.outputs
        try:
            found = run_model(self.runtime, candidate, self.feeds if feeds is None else feeds, options)
        except RuntimeFailure as failure:
            return Comparison([], tolerance, len(self.feeds), f"the candidate does not run: {failure}")
        if any(len(ours) != len(self.names) for ours in found):
            count = len(found[0])
            return Comparison([], tolerance, len(self.feeds), f"{count} outputs, expected {len(self.names)}")
        outputs = [replace(d, allowed=max(tolerance, d.ulp)) for d in _differences(self.names, reference, found)]
        outputs = [replace(d, allowed=0.0) if d.mismatches else d for d in outputs]
        if allowance:
            outputs = [d if d.equivalent else self._allow(d) for d in outputs]
        return Comparison(outputs, tolerance, len(self.feeds))

    def _allow(self, found: Difference) -> Difference:
        own = self.sensitivity[found.name]
        random = found.name in self.random or own.repeated > TRUSTED_NOISE
        if found.problem_kind is not None and found.problem_kind not in own.changes | ({"values"} if random else set()):
            return found
        if random:
            return replace(found, problem=None, problem_kind=None, unchecked="the model is random")
        if found.problem is not None:
            unstable = f"the original's {found.problem_kind} change when its inputs change by {PERTURBATION:.0e}"
            return replace(found, problem=None, problem_kind=None, unchecked=unstable)
        noise = 2 * own.noise
        if noise <= found.allowed:
            return found
        reason = (
            f"twice the original's own noise: {own.optimized:.1e} under onnxruntime's optimization, "
            f"{own.perturbed:.1e} when its inputs change by {PERTURBATION:.0e}"
        )
        return replace(found, allowed=noise, reason=reason)

    @cached_property
    def random(self) -> set[str]:
        """Outputs that depend on a random operator."""
        return random_outputs(self.proto)

    @cached_property
    def sensitivity(self) -> dict[str, Sensitivity]:
        """How far each output moves by itself. Five more runs, made when first asked for."""
        repeated = self._noise(self.feeds, self.options)
        optimized = self._noise(self.feeds, replace(self.options, optimization="all"))
        draws = [np.random.default_rng(number) for number in range(PERTURBED_RUNS)]
        moved = [self._noise([perturbed(feed, rng) for feed in self.feeds], self.options) for rng in draws]
        own = {}
        for index, name in enumerate(self.names):
            runs = [run[index] for run in moved if run]
            again = repeated[index] if repeated else Difference(name)
            own[name] = Sensitivity(
                optimized[index].error if optimized else 0.0,
                max((run.error for run in runs), default=0.0),
                again.error,
                frozenset(run.problem_kind for run in [*runs, again] if run.problem_kind is not None),
            )
            logger.debug("output %s: %s", name, own[name])
        return own

    def _noise(self, feeds: Sequence[Feed], options: RunOptions) -> list[Difference]:
        try:
            found = run_model(self.runtime, self.model, feeds, options)
        except RuntimeFailure as failure:
            logger.info("no noise measured with optimization %s: %s", options.optimization, failure)
            return []  # then this run allows nothing
        return _differences(self.names, self.outputs, found)


def compare(
    reference: Model | Reference,
    candidate: Model,
    feeds: Sequence[Feed],
    runtime: Runtime,
    *,
    tolerance: float = DEFAULT_TOLERANCE,
    options_reference: RunOptions = REFERENCE,
    options_candidate: RunOptions = REFERENCE,
    allowance: bool = True,
) -> Comparison:
    """Run both models on ``feeds`` and judge every output of ``candidate``.

    Raises:
        RuntimeFailure: The reference does not run.
    """
    if not isinstance(reference, Reference):
        reference = Reference(reference, feeds, runtime, options=options_reference)
    return reference.compare(candidate, tolerance=tolerance, options=options_candidate, allowance=allowance)


def _differences(
    names: Sequence[str], reference: Sequence[Sequence[Value]], found: Sequence[Sequence[Value]]
) -> list[Difference]:
    return [
        worse([difference(name, a[index], b[index]) for a, b in zip(reference, found, strict=True)], name)
        for index, name in enumerate(names)
    ]
