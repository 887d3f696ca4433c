"""``--target ort-format``: the model as a .ort file, which onnxruntime reads without protobuf and runs as it is.

onnxruntime folds constants when it writes such a file, and codebooks would be stored as the float32 they decode to. A
.ort file is not optimized when it is loaded either, so weights are decoded once, here, or in every run, there:

    packed    constants above a size are left alone: the file is small, every run decodes them
    folded    all constants are folded: the file is as large as the original, runs are as fast

The format has no types of 4 bits and less (onnxruntime writes them, and then refuses the file): such indices are stored
in 8 bits.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from onnx import ModelProto, TensorProto, numpy_helper

from onnxcompress.deployment.native import measured
from onnxcompress.deployment.targets import Setting, Work
from onnxcompress.errors import EquivalenceError, RuntimeFailure
from onnxcompress.measure import gzip_bytes
from onnxcompress.model_io import read_proto
from onnxcompress.model_io.stored import all_tensors, packed_bytes
from onnxcompress.runtime import REFERENCE, Model, RunOptions
from onnxcompress.validation.equivalence import LoweredModel

FOLDING_LIMIT = "optimization.constant_folding_max_output_size_in_bytes"
# The largest that leaves the weights packed is best: what is folded below it need not be decoded in each run.
LIMITS = (65536, 16384, 4096, 1024, 1)
# As onnxruntime's own converter has it: NCHWc operators exist on x86 alone.
DISABLED = ("NchwcTransformer",)
# Indices and int8 weights must stay; codewords, factors and biases, float16, may be widened where they are few.
STORED_TYPES = frozenset(
    getattr(TensorProto, name) for name in ("UINT2", "UINT4", "UINT8", "UINT16", "INT8") if hasattr(TensorProto, name)
)
MAX_GROWTH = 0.25
NARROW_TYPES = frozenset(getattr(TensorProto, name) for name in ("UINT2", "UINT4") if hasattr(TensorProto, name))


def deploy_ort_format(work: Work) -> list[Setting]:
    """Write the .ort file and ``run.py``; returns how it runs, as asked for first, and the other way.

    Raises:
        EquivalenceError: The converted model differs in interface or outputs.
    """
    wished = work.options.weights or ("packed" if work.codebooks else "folded")
    with tempfile.TemporaryDirectory(dir=work.folder.parent) as place:
        folded = Path(place) / "folded.ort"
        _convert(work, work.model, folded, None)
        found = {"folded": folded}
        packed = _packed(work, Path(place)) if work.codebooks else None
        if packed is not None:
            found["packed"] = packed
        elif wished == "packed" and not work.codebooks:
            work.notes.append("the model has no packed weights: the .ort file is as --weights folded makes it")
        order = sorted(found, key=lambda kind: kind != wished)
        settings = [_checked(work, kind, found[kind]) for kind in order]
        name = f"{work.model.stem}.ort"
        found[order[0]].replace(work.folder / name)
    work.manifest |= {"model": name, "external_data": [], "low_memory": {}}
    work.add_template("run.py")
    if len(settings) == 2:
        work.notes.append(_advice({setting.name: setting for setting in settings}, order[0]))
    return settings


def _advice(by_name: dict[str, Setting], chosen: str) -> str:
    packed, folded = by_name["packed"], by_name["folded"]
    what = (
        f"packed: {packed.size_bytes:,} bytes, weights decoded in every run; folded: {folded.size_bytes:,} bytes, "
        f"decoded once; latency packed / folded x{packed.latency_ms / folded.latency_ms:.2f}"
    )
    other = "folded" if chosen == "packed" else "packed"
    return f"{what}; --weights {other} writes the other; the .onnx file is both small and decoded once, at load"


def _convert(work: Work, model: Model, path: Path, limit: int | None) -> None:
    """Let onnxruntime write a model as it has optimized it; ``limit`` is of what it may fold, in bytes."""
    config = {"session.save_model_format": "ORT" if path.suffix == ".ort" else "ONNX"}
    if isinstance(model, bytes):
        config["session.model_external_initializers_file_folder_path"] = str(work.model.resolve().parent)
    if limit is not None:
        config[FOLDING_LIMIT] = str(limit)
    options = RunOptions("all", disabled_optimizers=DISABLED, session_config=config, optimized_model=path)
    work.runtime.interface(model, options=options)


def _packed(work: Work, place: Path) -> Path | None:
    """The conversion that folds most and still leaves the weights as they are; None, with a note, if there is none."""
    proto = ModelProto()
    proto.CopyFrom(work.proto)
    widened = _widen(proto)
    model = proto.SerializeToString() if widened else work.model
    stored, total = _constant_bytes(proto)
    reason = "onnxruntime decodes them in the conversion"
    for limit in LIMITS:
        # The same optimization written as .onnx shows what became of the weights.
        shown, path = place / f"{limit}.onnx", place / f"{limit}.ort"
        _convert(work, model, shown, limit)
        stored_now, total_now = _constant_bytes(read_proto(shown))
        if stored_now < stored or total_now > (1 + MAX_GROWTH) * total:
            continue
        _convert(work, model, path, limit)
        try:
            work.runtime.interface(path)
        except RuntimeFailure as failure:
            reason = str(failure)
            break
        if widened:
            work.notes.append(f"{widened} tensors of 2 or 4 bits are stored in 8: the .ort format has no such type")
        return path
    work.notes.append(f"weights cannot be kept packed in the .ort file, which is --weights folded: {reason}")
    return None


def _widen(proto: ModelProto) -> int:
    """Store indices of 2 and 4 bits in 8 where what reads them widens them anyway; returns how many."""
    readers: dict[str, list[tuple[str, str]]] = {}
    for node in proto.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append((node.op_type, node.output[0]))

    def casts(found: Iterable[tuple[str, str]]) -> bool:
        return all(op == "Cast" for op, _ in found)

    count = 0
    for tensor in proto.graph.initializer:
        if tensor.data_type not in NARROW_TYPES or tensor.data_location == TensorProto.EXTERNAL:
            continue
        uses = readers.get(tensor.name, [])
        if uses and all(op == "Cast" or (op == "Gather" and casts(readers.get(made, []))) for op, made in uses):
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype("uint8"), tensor.name))
            made_types = {made for op, made in uses if op == "Gather"}
            for value in [value for value in proto.graph.value_info if value.name in made_types]:
                proto.graph.value_info.remove(value)
            count += 1
    return count


def _constant_bytes(proto: ModelProto) -> tuple[int, int]:
    """Bytes of constants: indices and int8 weights, and all."""
    stored = total = 0
    for tensor in all_tensors(proto):
        size = packed_bytes(tensor.data_type, math.prod(tensor.dims))
        total += size
        stored += size if tensor.data_type in STORED_TYPES else 0
    return stored, total


def _checked(work: Work, kind: str, path: Path) -> Setting:
    """Load and run a .ort file: interface as it was, outputs as expected."""
    before = work.runtime.interface(work.model)
    try:
        after = work.runtime.interface(path)
    except RuntimeFailure as failure:
        way_out = "deploy the .onnx file with --target onnxruntime"
        raise RuntimeFailure(f"there is no .ort file of {work.model.name}: {failure}; {way_out}") from failure
    if before != after:
        raise EquivalenceError(f"{kind} .ort file: inputs and outputs are {after}, expected {before}")
    model = LoweredModel(path.read_bytes())  # onnxruntime tells the format from the first bytes
    options = replace(REFERENCE, optimization="all")
    return measured(work, kind, model, options, path.stat().st_size, gzip_bytes(path), memory=True)
