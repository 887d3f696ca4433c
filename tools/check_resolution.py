"""Models at other resolutions: which work, what is mended, which are refused and why, and whether they compute right.

    python tools/check_resolution.py models/*.onnx corpus/*.onnx [--ratio 0.75] [--shape NAME=1,3,320,320] [--repairs]

Each model is cleaned up and scaled, with its own input and with a Resize behind it. On onnxruntime without its own
optimizations

    native   is held against the same graph whose input is declared smaller, bitwise, where that runs at all
    inside   against the native one fed with images that onnxruntime resized

Exit code 1 when one of them differs by more than --tolerance, or onnxruntime refuses a graph that was scaled.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxcompress.channels.preparing import prepare
from onnxcompress.cost import count
from onnxcompress.errors import ModelError, OnnxCompressError, PassError
from onnxcompress.model_io import load, to_proto
from onnxcompress.resolution.scaling import Resolution, scale_resolution
from onnxcompress.runtime import Runtime
from onnxcompress.shapes import infer_shapes
from onnxcompress.testing import relative_error

Feed = dict[str, np.ndarray]
OPEN_SIZE = 2  # of a batch and the like


@dataclass
class Found:
    """What was found out about one model."""

    lines: list[str] = field(default_factory=list)
    worst: float = 0.0


def check(path: Path, ratio: float, shapes: Mapping[str, list[int]], runtime: Runtime, *, show: bool) -> Found:
    """Scale a model in both ways and compare."""
    graph = load(path)
    infer_shapes(graph)
    prepared = to_proto(prepare(graph, runtime))
    found = Found()
    names = [t.name for t in graph.inputs]
    shape = next((shapes[name] for name in names if name in shapes), None)
    made: dict[bool, tuple[onnx.ModelProto, Resolution]] = {}
    macs = {}
    for native in (True, False):
        started = time.monotonic()
        copied = _copy(prepared)
        scaled = load(copied)
        infer_shapes(scaled)
        before = count(scaled).macs
        kind = "native" if native else "inside"
        try:
            resolution = scale_resolution(scaled, ratio, native=native, input_shape=shape)
        except PassError:
            raise
        except ModelError as error:
            found.lines.append(f"{path.name} {kind}: refused: {error}")
            continue
        made[native] = to_proto(scaled), resolution
        macs[native] = f"MACs {before:,} -> {count(scaled).macs:,}; {time.monotonic() - started:.1f} s"
        if show:
            found.lines += [f"    {repair.node}: {repair.what}" for repair in resolution.repairs]
    for native, (proto, resolution) in made.items():
        feed = _feed(proto, resolution, native)
        actual = _run(runtime, proto, feed)
        if native:
            name, error = "the original at that size", _against_original(runtime, prepared, resolution, feed, actual)
        else:
            other = made.get(True)
            name, error = "native on resized images", None
            if other is not None:
                error = _against_native(runtime, other[0], resolution, feed, actual, proto)
        verdict = "not compared, it does not run" if error is None else f"{error:.1e} off {name}"
        kind = "native" if native else "inside"
        sizes = f"{resolution.old[0]}x{resolution.old[1]} -> {resolution.new[0]}x{resolution.new[1]}"
        losses = f", {len(resolution.losses)} losses" if resolution.losses else ""
        found.lines.append(
            f"{path.name} {kind}: {sizes}, {len(resolution.repairs)} repairs{losses}; {verdict}; {macs[native]}"
        )
        found.worst = max(found.worst, error or 0.0)
    return found


def _copy(proto: onnx.ModelProto) -> onnx.ModelProto:
    copied = onnx.ModelProto()
    copied.CopyFrom(proto)
    return copied


def _run(runtime: Runtime, proto: onnx.ModelProto, feed: Feed) -> list[np.ndarray]:
    (values,) = runtime.run(proto.SerializeToString(), [feed])
    return [np.asarray(value) for value in values]


def _feed(proto: onnx.ModelProto, resolution: Resolution, native: bool) -> Feed:
    """Signed numbers for all inputs."""
    rng = np.random.default_rng(0)
    stored = {t.name for t in proto.graph.initializer}
    feed = {}
    for value in proto.graph.input:
        if value.name in stored:
            continue
        shape = [dim.dim_value if dim.dim_value > 0 else OPEN_SIZE for dim in value.type.tensor_type.shape.dim]
        if value.name == resolution.input_name:
            axes = (1, 2) if shape[3] in (1, 3, 4) and shape[1] not in (1, 3, 4) else (2, 3)
            for axis, size in zip(axes, resolution.new if native else resolution.old, strict=True):
                shape[axis] = size
        dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        feed[value.name] = rng.normal(size=shape).astype(dtype)
    return feed


def _against_original(
    runtime: Runtime, prepared: onnx.ModelProto, resolution: Resolution, feed: Feed, actual: list[np.ndarray]
) -> float | None:
    """Off the graph as it was, declared smaller; None where it does not run so."""
    smaller = _copy(prepared)
    del smaller.graph.value_info[:]
    for output in smaller.graph.output:
        output.type.tensor_type.ClearField("shape")
    for value in smaller.graph.input:
        if value.name == resolution.input_name:
            for dim, size in zip(value.type.tensor_type.shape.dim, feed[value.name].shape, strict=True):
                dim.dim_value = size
    try:
        expected = _run(runtime, smaller, feed)
    except OnnxCompressError:
        return None
    return _error(expected, actual)


def _error(expected: list[np.ndarray], actual: list[np.ndarray]) -> float | None:
    if any(a.shape != b.shape for a, b in zip(expected, actual, strict=True)):
        return None  # what was global before is so no more
    return max(relative_error(a, b) for a, b in zip(expected, actual, strict=True))


def _against_native(
    runtime: Runtime,
    native: onnx.ModelProto,
    resolution: Resolution,
    feed: Feed,
    actual: list[np.ndarray],
    proto: onnx.ModelProto,
) -> float:
    image = feed[resolution.input_name]
    axes = (1, 2) if image.shape[3] in (1, 3, 4) and image.shape[1] not in (1, 3, 4) else (2, 3)
    small = list(image.shape)
    for axis, size in zip(axes, resolution.new, strict=True):
        small[axis] = size
    values = _run(runtime, native, {**feed, resolution.input_name: _resized(runtime, image, small)})
    expected = [
        _resized(runtime, value, list(given.shape)) if value.shape != given.shape else value
        for value, given in zip(values, actual, strict=True)
    ]
    return max(relative_error(a, b) for a, b in zip(expected, actual, strict=True))


def _resized(runtime: Runtime, images: np.ndarray, shape: list[int]) -> np.ndarray:
    """Bilinear, half-pixel, by onnxruntime."""
    node = helper.make_node("Resize", ["x", "", "", "sizes"], ["y"], mode="linear")
    kind = helper.np_dtype_to_tensor_dtype(images.dtype)
    inputs = [helper.make_tensor_value_info("x", kind, images.shape)]
    outputs = [helper.make_tensor_value_info("y", kind, shape)]
    sizes = numpy_helper.from_array(np.array(shape, np.int64), "sizes")
    graph = helper.make_graph([node], "resize", inputs, outputs, [sizes])
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    return _run(runtime, model, {"x": images})[0]


def _shape(text: str) -> tuple[str, list[int]]:
    name, _, sizes = text.rpartition("=")
    return name, [int(size) for size in sizes.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--ratio", type=float, default=0.75, help="of each side")
    parser.add_argument("--shape", type=_shape, action="append", default=[], help="of an input that leaves sizes open")
    parser.add_argument("--repairs", action="store_true", help="list what is mended")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="of max|d| / max|y|")
    given = parser.parse_args()
    worst = 0.0
    with Runtime(timeout_s=600.0) as runtime:
        for path in given.models:
            try:
                found = check(path, given.ratio, dict(given.shape), runtime, show=given.repairs)
            except OnnxCompressError as failure:
                found = Found([f"{path.name}: failed: {failure}"], float("inf"))
            for line in found.lines:
                print(line, flush=True)
            worst = max(worst, found.worst)
    return int(worst > given.tolerance)


if __name__ == "__main__":
    sys.exit(main())
