"""``nn.Module`` to ``.onnx``: BatchNormalization kept, nothing folded, names from module paths, checked against torch.

    exported = export_module(model, torch.randn(1, 3, 224, 224), "model.onnx", dynamic_batch=True)
    print(exported.nodes, exported.relative_error)

The file appears only when onnxruntime, its own optimizations off, gives what torch gives: on the example and on signed
random inputs, and where the batch is dynamic at three batch sizes.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from onnxcompress.errors import EquivalenceError, ModelError, OutputError
from onnxcompress.graph import STANDARD_DOMAINS
from onnxcompress.model_io import StagedFile, read_proto
from onnxcompress.optimizer import check_target
from onnxcompress.runtime import Runtime
from onnxcompress.shapes import skeleton
from onnxcompress.train.call import flat_forward, name_inputs, untouched
from onnxcompress.train.exported_graph import tidy_graph
from onnxcompress.train.exporters import opset_of, write_model
from onnxcompress.train.parity import Calls, Shape
from onnxcompress.validation.equivalence import DEFAULT_TOLERANCE

logger = logging.getLogger(__name__)

DEFAULT_EXPORTER = "torchscript"
MODEL_TIMEOUT_S = 300.0
METADATA_PREFIX = "onnxcompress.export."


@dataclass(frozen=True)
class Exported:
    """What was written, and how far onnxruntime is from torch on it.

    Attributes:
        path: The file.
        size_bytes: Its bytes, external data included.
        relative_error: Largest max|d| / max|y| of any output, onnxruntime against torch.
        tolerance: What was allowed.
        exporter: "torchscript" or "dynamo".
        opset: Of the file.
        nodes: Of the file; parameters do not count.
        inputs: Name and shape; the batch is "batch" where it is dynamic.
        outputs: Likewise.
        external_data: Whether the weights are in a file of their own.
        feeds: How many inputs were compared.
        batch_sizes: At which sizes of a dynamic batch; empty where shapes are fixed.
        notes: What a user should know: what the comparison could not see, what tracing took for constant.
    """

    path: Path
    size_bytes: int
    relative_error: float
    tolerance: float
    exporter: str
    opset: int
    nodes: int
    inputs: tuple[tuple[str, Shape], ...]
    outputs: tuple[tuple[str, Shape], ...]
    external_data: bool
    feeds: int
    batch_sizes: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()


def export_module(
    module: nn.Module,
    example: Tensor | Sequence[Tensor],
    path: str | Path,
    *,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_batch: bool = False,
    exporter: str = DEFAULT_EXPORTER,
    opset: int | None = None,
    tolerance: float = DEFAULT_TOLERANCE,
    metadata: Mapping[str, str] | None = None,
    seed: int = 0,
    runtime: Runtime | None = None,
) -> Exported:
    """Write a module in evaluation mode as an ONNX file and check it against torch.

    The module is left as it was: modes, buffers, gradient flags and torch's random state.

    Args:
        module: Any module; what it returns may be nested.
        example: Its inputs. Random ones are drawn like them: floats normal, integers between their least and greatest.
        path: Where to write.
        input_names: By default those of forward's parameters. When every name is such a parameter, the inputs go there.
        output_names: By default "output", the keys of a dict, or "output_0", "output_1", ...
        dynamic_batch: Make the first axis of every input symbolic, and of every output that follows it.
        exporter: "torchscript" or "dynamo".
        opset: 17 with torchscript and 18 with dynamo by default.
        tolerance: Largest max|d| / max|y| of an output.
        metadata: Kept in the file's ``metadata_props``, beside torch's version and the exporter.
        seed: Of the random inputs.
        runtime: Where the result runs; one of its own when None.

    Raises:
        DataError: The module does not take the example.
        EquivalenceError: onnxruntime gives something else than torch. No file is written.
        ModelError: The exporter does not take the module.
        OutputError: The file cannot be written.
        RecipeError: An exporter, an opset or a name that cannot be.
    """
    path = Path(path)
    check_target(path)
    chosen = opset_of(exporter, opset)
    tensors = [example] if isinstance(example, Tensor) else list(example)
    calls = Calls(module, tensors, name_inputs(module, len(tensors), input_names), dynamic_batch, seed)
    with contextlib.ExitStack() as stack:
        own = runtime or stack.enter_context(Runtime(timeout_s=MODEL_TIMEOUT_S))
        stack.enter_context(untouched(module))
        calls.run(stack.enter_context(flat_forward(module, calls.inputs)), output_names)
        folder = stack.enter_context(_folder_beside(path))
        traced = write_model(
            module,
            calls.feeds[0],
            folder / "draft.onnx",
            exporter=exporter,
            opset=chosen,
            input_names=calls.inputs,
            output_names=calls.outputs,
            batched=calls.batched,
        )
        for line in traced:
            logger.info("traced: %s", line)
        proto = read_proto(folder / "draft.onnx")
        written = next((entry.version for entry in proto.opset_import if entry.domain in STANDARD_DOMAINS), chosen)
        if written != chosen:  # dynamo converts what it made, and keeps it where it cannot
            raise ModelError(f"the {exporter} exporter wrote opset {written} in place of {chosen}: leave --opset out")
        calls.declare(proto)
        proto.graph.name = type(module).__name__
        graph = tidy_graph(proto, folder, module, lambda one, feeds: own.run(one.SerializeToString(), [feeds])[0])
        for key, value in {**(metadata or {}), "exporter": exporter, "torch": torch.__version__}.items():
            proto.metadata_props.add(key=METADATA_PREFIX + key, value=value)
        onnx.checker.check_model(skeleton(graph))
        staged = stack.enter_context(StagedFile(graph, path))
        comparison = calls.compare(staged.path, own, tolerance)
        if not comparison.equivalent:
            hint = "" if calls.repeats() else "; called twice, the module itself gives different outputs"
            raise EquivalenceError(f"{path} is not written, it differs from torch: {comparison.message()}{hint}")
        size_bytes = staged.size_bytes
        staged.commit()
    return Exported(
        path=path,
        size_bytes=size_bytes,
        relative_error=comparison.relative,
        tolerance=tolerance,
        exporter=exporter,
        opset=chosen,
        nodes=sum(len(inner.nodes) for inner in graph.walk()),
        inputs=tuple(calls.input_shapes().items()),
        outputs=tuple(calls.output_shapes().items()),
        external_data=staged.data_path is not None,
        feeds=len(calls.feeds),
        batch_sizes=tuple(calls.sizes),
        notes=(*calls.notes, *_tracing_note(traced)),
    )


def _tracing_note(warnings: Sequence[str]) -> list[str]:
    if not warnings:
        return []
    more = f", and {len(warnings) - 1} more (-v shows them)" if len(warnings) > 1 else ""
    return [f"tracing took for constant what may depend on the input: {warnings[0]}{more}"]


@contextlib.contextmanager
def _folder_beside(path: Path) -> Iterator[Path]:
    """A folder on the disk of ``path``: a model of several GB may not fit elsewhere."""
    try:
        folder = tempfile.TemporaryDirectory(prefix=".onnxcompress-", dir=path.parent)
    except OSError as error:
        raise OutputError(f"cannot write into {path.parent}: {error.strerror}") from error
    with folder as name:
        yield Path(name)
