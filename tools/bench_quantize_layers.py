"""Measure codebooks layer by layer: k-means of scikit-learn, the EM of BGD, and ours, at no more bytes.

    python tools/bench_quantize_layers.py MODEL.onnx --data PHOTOS --preprocess scale=1,mean=127,std=128 --layers NAME
    python tools/bench_quantize_layers.py MODEL.onnx --data TEXT.npz --layers NAME NAME

Every layer reads what it reads in the float net. Samples are drawn at random: some to fit to, of which ours keeps a
quarter to choose damping and form by, and others, which no method saw, for the errors in the table. An error is
||Y - Y_q|| / ||Y - mean(Y)|| over all rows and outputs. k-means and BGD hold float16 codewords; ours takes the best of
float16, int8, and int8 with channel factors on its own held-out rows, with as many codewords as the bytes of the others
leave. A bias counts for all.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.cluster import KMeans

from onnxcompress.codebook.codebook import Choice, QuantizedLayer, Statistics, size_bytes
from onnxcompress.codebook.layer import quantize_layer
from onnxcompress.codebook.layers import Layer, find_layers
from onnxcompress.codebook.statistics import Calibration
from onnxcompress.codebook.target import relative_error
from onnxcompress.data import load_data
from onnxcompress.errors import OnnxCompressError
from onnxcompress.model_io import load, read_proto
from onnxcompress.runtime import Runtime
from onnxcompress.validation.judge import input_specs

FORMS = (("float16", False), ("int8", False), ("int8", True))
HEADER = "| layer | outputs x D | d | k | bytes | k-means | BGD | ours | ours / BGD | bytes | form | s |"
RULE = "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|---|--:|"


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    text: str
    ratio: float
    below_kmeans: bool


def sklearn_kmeans(weight: np.ndarray, choice: Choice, seed: int) -> np.ndarray:
    """(outputs, D) float32, decoded."""
    vectors = weight.reshape(-1, choice.block)
    found = KMeans(choice.codewords, n_init=1, random_state=seed).fit(vectors)
    return found.cluster_centers_.astype(np.float16).astype(np.float32)[found.labels_].reshape(weight.shape)


def fitting_choices(shape: Sequence[int], base: Choice) -> list[Choice]:
    """Our forms with at most the bytes of ``base``: as many of its codewords as fit."""
    limit = size_bytes(shape, base, has_bias=True)
    found = []
    for codebook_type, scaled in FORMS:
        sizes = range(base.codewords, base.codewords // 2, -1)
        forms = (Choice(base.block, size, codebook_type, scaled) for size in sizes)
        found += [form for form in forms if size_bytes(shape, form, has_bias=True) <= limit][:1]
    return found


def measure(
    layer: Layer, fit: Statistics, held_out: Statistics, pooled: Statistics, test: Statistics, base: Choice, seed: int
) -> Row:
    weight = layer.matrix()
    bias = layer.bias() if layer.bias() is not None else np.zeros(len(weight), np.float32)

    def error(decoded: np.ndarray, stored_bias: np.ndarray | None) -> float:
        return relative_error(weight, bias, decoded, stored_bias, test)

    kmeans = error(sklearn_kmeans(weight, base, seed), bias)
    published = quantize_layer(weight, bias, pooled, base, seed=seed, method="bgd")
    bgd = error(published.decode(), published.bias)
    started = time.process_time()
    choices = fitting_choices(weight.shape, base)
    tried = [quantize_layer(weight, bias, fit, choice, held_out=held_out, seed=seed) for choice in choices]
    # Codewords that fell back from int8 to float16 no longer fit the bytes.
    results = [result for result, choice in zip(tried, choices, strict=True) if result.choice == choice]
    seconds = time.process_time() - started
    best = min(results, key=_held_out_error)
    ours = error(best.decode(), best.bias)
    form = f"{best.method}, {best.choice.codebook_type}{', scaled' if best.choice.scaled else ''}"
    cells: list[Any] = [layer.name, f"{len(weight)} x {weight.shape[1]}", base.block, base.codewords]
    cells += [published.size_bytes(), f"{kmeans:.4f}", f"{bgd:.4f}", f"{ours:.4f}", f"{ours / bgd:.2f}"]
    cells += [best.size_bytes(), form, f"{seconds:.1f}"]
    return Row(f"| {' | '.join(map(str, cells))} |", ours / bgd, ours < kmeans)


def _held_out_error(result: QuantizedLayer) -> float:
    assert result.held_out_error is not None
    return result.held_out_error


def base_choice(layer: Layer, codewords: int) -> Choice | None:
    """Blocks of 9 for 3x3 convolutions, of 4 elsewhere, a quarter as many codewords as sub-vectors at most."""
    kernel = layer.uses[0].origin.values().shape[2:]
    block = 9 if tuple(kernel) == (3, 3) else 4
    size = min(codewords, layer.outputs * layer.length // block // 4)
    if layer.depthwise or layer.length % block or size < 16:
        return None
    return Choice(block, size)


def gather(
    model: Path, samples: Sequence[Mapping[str, Any]], fraction: float, wanted: Sequence[str], seed: int
) -> tuple[list[Layer], dict[str, list[Statistics | None]]]:
    """The layers, and the statistics of fit and held-out samples of each."""
    graph = load(model)
    every = {layer.name: layer for layer in find_layers(graph)[0]}
    missing = [name for name in wanted if name not in every]
    if missing:
        sys.exit(f"no such layers: {', '.join(missing)}; there are {', '.join(every)}")
    layers = [every[name] for name in wanted] or list(every.values())
    found: dict[str, list[Statistics | None]] = {}
    with Runtime(timeout_s=600.0) as runtime:
        calibration = Calibration(graph, layers, samples, runtime=runtime, held_out_fraction=fraction, seed=seed)
        with calibration:
            for stage in calibration.stages():
                for layer in stage:
                    parts = (calibration.statistics(layer, part) for part in ("fit", "held_out"))
                    found[layer.name] = list(parts)
    return layers, found


def pooled(first: Statistics, second: Statistics) -> Statistics:
    rows = first.rows + second.rows
    mean = (first.rows * first.mean + second.rows * second.mean) / rows
    return replace(
        first, rows=rows, gram=first.gram + second.gram, mean=mean, cross=None, float_mean=None, float_gram=None
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", required=True, help="samples, as for `onnxcompress quantize --data`")
    parser.add_argument("--preprocess", help="how images are prepared, as for `onnxcompress quantize`")
    parser.add_argument("--layers", nargs="*", default=[], help="names of weights; all by default")
    parser.add_argument("--calibration", type=int, default=128, help="samples to fit to (128)")
    parser.add_argument("--test", type=int, default=64, help="samples to measure on (64)")
    parser.add_argument("--codewords", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    specs = input_specs(read_proto(arguments.model))
    data = load_data(arguments.data, inputs=specs, preprocess=arguments.preprocess, seed=arguments.seed)
    feeds = [feed for feed, _ in data.batches(1)]
    order = np.random.default_rng(arguments.seed).permutation(len(feeds))
    if len(feeds) < arguments.calibration + arguments.test:
        sys.exit(f"{len(feeds)} samples; {arguments.calibration} to fit and {arguments.test} to test are asked for")
    fitted = [feeds[i] for i in order[: arguments.calibration]]
    tested = [feeds[i] for i in order[arguments.calibration :][: arguments.test]]
    layers, known = gather(arguments.model, fitted, 0.25, arguments.layers, arguments.seed)
    _, unseen = gather(arguments.model, tested, 0.0, arguments.layers, arguments.seed)
    print(HEADER, RULE, sep="\n")
    rows = []
    for layer in layers:
        base = base_choice(layer, arguments.codewords)
        fit, held_out = known.get(layer.name, [None, None])
        test = unseen.get(layer.name, [None])[0]
        if base is None or fit is None or held_out is None or test is None:
            print(f"{layer.name}: left out, no codebook of that form or no rows", file=sys.stderr)
            continue
        rows.append(measure(layer, fit, held_out, pooled(fit, held_out), test, base, arguments.seed))
        print(rows[-1].text, flush=True)
    if rows:
        mean = float(np.exp(np.mean([np.log(row.ratio) for row in rows])))
        within = sum(row.ratio <= 0.6 for row in rows)
        below = sum(row.below_kmeans for row in rows)
        print(f"\n{len(rows)} layers: ours / BGD {mean:.2f} on average (geometric), at most 0.6 on {within}, ", end="")
        print(f"below k-means on {below}")


if __name__ == "__main__":
    try:
        main()
    except OnnxCompressError as error:
        sys.exit(f"{type(error).__name__}: {error}")
