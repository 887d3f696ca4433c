"""Measure whole networks: bytes against quality, ours at several ratios beside what others make of the same file.

    python tools/bench_quantize.py MODEL.onnx --data CALIBRATION --test SAMPLES --ratio 9x 19x 29x
    python tools/bench_quantize.py NET.onnx --data train.npz --test test.npz --ratio 10x 20x --tune none joint

SAMPLES are such as no method saw. The output that counts is the first of floats. With labels the accuracy is shown,
without them the agreement with the original, with ``--cosine`` the mean cosine between embeddings (of a row a token,
the mean over the tokens). The feature error is ||F - F_q|| / ||F|| of what the last matrix product reads. Others:
float16 weights, onnxruntime's int8 (dynamic, static in QDQ form) and its 4-bit MatMulNBits. Each file is run by
onnxruntime with its default optimizations. ``plot_frontier.py`` draws what ``--json`` writes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, ValueInfoProto

from onnxcompress.codebook.encoding import encode
from onnxcompress.codebook.layers import find_layers
from onnxcompress.codebook.narrow import to_float16
from onnxcompress.codebook.options import parse_ratio
from onnxcompress.codebook.quantizer import quantize
from onnxcompress.data import Dataset, load_data
from onnxcompress.errors import OnnxCompressError
from onnxcompress.model_io import load, read_proto, save
from onnxcompress.runtime import DEPLOYED, Runtime
from onnxcompress.validation.judge import input_specs

BATCH = 8
PRODUCTS = ("Gemm", "MatMul")
HEADER = "| | bytes | ratio | feature error | output error | {quality} | s |"
RULE = "|---|--:|--:|--:|--:|--:|--:|"


@dataclass(frozen=True)
class Row:
    """One file."""

    name: str
    size_bytes: int
    ratio: float
    feature_error: float | None
    output_error: float
    quality: float
    seconds: float

    def text(self) -> str:
        feature = "" if self.feature_error is None else f"{self.feature_error:.3f}"
        cells = (self.name, f"{self.size_bytes:,}", f"{self.ratio:.2f}", feature, f"{self.output_error:.3f}")
        return f"| {' | '.join((*cells, f'{self.quality:.4f}', f'{self.seconds:.0f}'))} |"


class Bench:
    """Runs files on the test samples and compares them with the original."""

    def __init__(self, path: Path, test: Dataset, runtime: Runtime, *, cosine: bool = False) -> None:
        self.path, self.test, self.runtime = path, test, runtime
        self.figure = "cosine" if cosine else "agreement" if test.labels is None else "accuracy"
        self.bytes = file_bytes(path)
        self.tap = feature_name(read_proto(path))
        self.expected = self.run(path, self.tap)

    def run(self, path: Path, tap: str | None) -> list[np.ndarray]:
        """The first output of floats, and the tap where there is one."""
        proto = onnx.load(path)
        if tap is not None:
            proto.graph.output.append(ValueInfoProto(name=tap))
        feeds = (feed for feed, _ in self.test.batches(BATCH))
        results = self.runtime.run(proto.SerializeToString(), feeds, options=DEPLOYED)
        first = next(i for i, values in enumerate(results[0]) if np.asarray(values).dtype.kind == "f")
        outputs = (first, *((len(results[0]) - 1,) if tap is not None else ()))
        return [np.concatenate([np.asarray(result[i]) for result in results]) for i in outputs]

    def row(self, name: str, path: Path, seconds: float) -> Row:
        proto = read_proto(path)
        made = {output for node in proto.graph.node for output in node.output}
        tap = self.tap if self.tap in made else feature_name(proto)  # small files have names of their own
        found = self.run(path, tap)
        feature = None
        if self.tap is not None and tap is not None and found[-1].shape == self.expected[-1].shape:
            feature = relative(self.expected[-1], found[-1])
        size = file_bytes(path)
        quality = self.quality(found[0])
        return Row(name, size, self.bytes / size, feature, relative(self.expected[0], found[0]), quality, seconds)

    def quality(self, output: np.ndarray) -> float:
        """Accuracy, agreement or cosine."""
        if self.figure == "accuracy":
            return float(np.mean(output.argmax(axis=-1) == self.test.labels))
        if self.figure == "cosine":
            pairs = (rows.astype(np.float64) for rows in (output, self.expected[0]))
            ours, theirs = (rows.mean(axis=1) if rows.ndim == 3 else rows for rows in pairs)
            norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
            return float(np.mean((ours * theirs).sum(axis=1) / norms))
        return float(np.mean(output.argmax(axis=-1) == self.expected[0].argmax(axis=-1)))


def relative(y: np.ndarray, other: np.ndarray) -> float:
    return float(np.linalg.norm(y.astype(np.float64) - other) / np.linalg.norm(y.astype(np.float64)))


def file_bytes(path: Path) -> int:
    data = path.with_name(f"{path.name}.data")
    return path.stat().st_size + (data.stat().st_size if data.exists() else 0)


def feature_name(proto: ModelProto) -> str | None:
    """What the last matrix product reads."""
    products = [node for node in proto.graph.node if node.op_type in PRODUCTS]
    return products[-1].input[0] if products else None


# -- the others ------------------------------------------------------------------------------------------------------


def float16_weights(source: Path, target: Path, feeds: list[dict[str, Any]]) -> None:
    graph = load(source)
    for layer in find_layers(graph)[0]:
        encode(graph, layer, to_float16(layer.matrix()))
    save(graph, target)


def int8_dynamic(source: Path, target: Path, feeds: list[dict[str, Any]]) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(source, target, weight_type=QuantType.QInt8, per_channel=True)


def int8_static(source: Path, target: Path, feeds: list[dict[str, Any]]) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # without annotations
        def __init__(self) -> None:
            self.rest: Iterator[dict[str, Any]] = iter(feeds)

        def get_next(self) -> dict[str, Any] | None:
            return next(self.rest, None)

    quantize_static(
        source, target, Reader(), quant_format=QuantFormat.QDQ, per_channel=True, weight_type=QuantType.QInt8
    )


def matmul_4_bits(source: Path, target: Path, feeds: list[dict[str, Any]]) -> None:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(onnx.load(source), bits=4, block_size=32, is_symmetric=True)
    quantizer.process()
    onnx.save(quantizer.model.model, target)


OTHERS: dict[str, Callable[[Path, Path, list[dict[str, Any]]], None]] = {
    "float16 weights": float16_weights,
    "onnxruntime int8 dynamic": int8_dynamic,
    "onnxruntime int8 static": int8_static,
    "onnxruntime MatMulNBits 4": matmul_4_bits,
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", required=True, help="calibration samples")
    parser.add_argument("--test", required=True, help="samples to measure on")
    parser.add_argument("--ratio", nargs="+", default=["9x", "19x", "29x"])
    parser.add_argument("--tune", nargs="+", default=["none"], choices=["none", "joint", "full"])
    parser.add_argument("--method", nargs="+", default=["sweep"], choices=["sweep", "em", "kmeans", "bgd"])
    parser.add_argument("--preprocess")
    parser.add_argument("--limit", type=int, default=64, help="calibration samples")
    parser.add_argument("--tune-limit", type=int, help="samples for tuning, those to calibrate included")
    parser.add_argument("--test-limit", type=int)
    parser.add_argument("--others", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--cosine", action="store_true", help="the output is an embedding")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    wishes = parse(arguments)
    specs = input_specs(read_proto(wishes.model))
    test = load_data(wishes.test, inputs=specs, limit=wishes.test_limit, preprocess=wishes.preprocess)
    calibration = load_data(wishes.data, inputs=specs, limit=wishes.limit, preprocess=wishes.preprocess)
    rows: list[Row] = []
    with Runtime(timeout_s=600) as runtime, tempfile.TemporaryDirectory() as folder:
        bench = Bench(wishes.model, test, runtime, cosine=wishes.cosine)
        quality = bench.figure
        print(f"{wishes.model.name}, {len(calibration)} samples to calibrate, {len(test)} to measure\n")
        print(f"{HEADER.format(quality=quality)}\n{RULE}")

        def show(name: str, make: Callable[[Path], Any]) -> None:
            target, started = Path(folder) / f"{len(rows)}.onnx", time.monotonic()
            try:
                make(target)
                rows.append(bench.row(name, target, time.monotonic() - started))
                print(rows[-1].text(), flush=True)
            except Exception as error:  # another tool may raise anything; the row says so
                print(f"| {name} | {type(error).__name__}: {' '.join(str(error).split())[:120]} |||||", flush=True)
                if isinstance(error, OnnxCompressError):
                    print(error, file=sys.stderr)

        rows.append(bench.row("original", wishes.model, 0.0))
        print(rows[-1].text(), flush=True)
        if wishes.others:
            feeds = [feed for feed, _ in calibration.batches(1)]
            for name, other in OTHERS.items():
                show(name, lambda target, other=other: other(wishes.model, target, feeds))  # type: ignore[misc]
        for method in wishes.method:
            for tune in wishes.tune:
                for ratio in wishes.ratio:
                    options = {
                        "data": wishes.data,
                        "preprocess": wishes.preprocess,
                        "limit": wishes.limit if tune == "none" else wishes.tune_limit,
                        "ratio": parse_ratio(ratio),
                        "tune": tune,
                        "method": method,
                        "seed": wishes.seed,
                    }
                    name = f"ours {ratio}" + ("" if method == "sweep" else f", {method}")
                    name += "" if tune == "none" else f", {tune}"
                    show(name, lambda target, options=options: quantize(wishes.model, target, **options))  # type: ignore[misc]
    if wishes.json is not None:
        record = {
            "model": wishes.model.stem,
            "calibration": len(calibration),
            "test": len(test),
            "quality": quality,
            "rows": [asdict(row) for row in rows],
        }
        wishes.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
