"""Figures of a model: nodes, bytes, parameters, MACs; what a report shows before and after."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from onnxcompress.cost import count
from onnxcompress.graph import Graph
from onnxcompress.model_io import external_files
from onnxcompress.runtime import Model, RunOptions, Runtime, median_ratio
from onnxcompress.validation.equivalence import LoweredModel


@dataclass(frozen=True)
class Figures:
    """What a model weighs.

    Args:
        nodes: Operators, subgraphs included, Constant nodes not counted.
        constant_nodes: Constant nodes.
        by_operator: Operator type to count, most frequent first.
        size_bytes: Model file and external data.
        download_bytes: The same after gzip, what a browser fetches; None when not measured.
        parameters: Elements of constants: floating-point ones, and integer ones of more than 64.
        macs: Multiply-accumulates at batch 1; nominal sizes stand for unknown ones when ``macs_exact`` is False.
    """

    nodes: int
    constant_nodes: int
    by_operator: dict[str, int]
    size_bytes: int
    parameters: int
    macs: int
    macs_exact: bool
    download_bytes: int | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def figures(graph: Graph, size_bytes: int, *, download_bytes: int | None = None) -> Figures:
    """Figures of a graph whose shapes are inferred."""
    counted = count(graph)
    constants = counted.by_operator.get("Constant", 0)
    by_operator = {op: n for op, n in counted.by_operator.items() if op != "Constant"}
    return Figures(
        nodes=sum(by_operator.values()),
        constant_nodes=constants,
        by_operator=by_operator,
        size_bytes=size_bytes,
        parameters=counted.parameters,
        macs=counted.macs,
        macs_exact=counted.exact,
        download_bytes=download_bytes,
    )


def with_plain_macs(found: Figures, prepared: Graph) -> Figures:
    """Figures of a file with the MACs of what it was made into, where its own sizes hide behind shape arithmetic.

    Args:
        found: Of the file.
        prepared: A graph that computes the same, its shapes inferred and its constants folded.
    """
    if found.macs_exact:
        return found
    counted = count(prepared)
    return replace(found, macs=counted.macs, macs_exact=True) if counted.exact else found


def size_on_disk(path: Path, graph: Graph) -> int:
    """Bytes of a model file and of the data files it reads."""
    assert graph.model is not None
    return path.stat().st_size + sum(data.stat().st_size for data in external_files(graph.model, graph.folder))


def gzip_bytes(path: Path, *, limit_bytes: int = 1 << 28) -> int | None:
    """Size after gzip level 6; None for files above ``limit_bytes``, where it would take long."""
    if path.stat().st_size > limit_bytes:
        return None
    packer, total = zlib.compressobj(6, zlib.DEFLATED, 31), 0
    with open(path, "rb") as source:
        while block := source.read(1 << 20):
            total += len(packer.compress(block))
    return total + len(packer.flush())


@dataclass(frozen=True)
class LatencyFigures:
    """Interleaved latency of original and result on onnxruntime with its own optimizations on.

    Args:
        original_ms: Median of the original.
        result_ms: Median of the result.
        ratio: Median over neighbouring runs of original / result; above 1 the result is faster.
        low: Lower end of the ratio's 95 % bootstrap interval.
        high: Upper end.
        runs: Number of pairs.
    """

    original_ms: float
    result_ms: float
    ratio: float
    low: float
    high: float
    runs: int


def compare_latency(
    runtime: Runtime,
    original: Model,
    result: Model,
    feed: Mapping[str, Any],
    *,
    threads: int = 0,
    custom_ops: Path | None = None,
    budget_s: float = 1.0,
    max_runs: int = 200,
) -> LatencyFigures:
    """Time two models that take the same feed, in turns.

    Raises:
        RuntimeFailure: onnxruntime refused or crashed.
    """
    folder = next((source.folder for source in (original, result) if isinstance(source, LoweredModel)), None)
    config = {} if folder is None else {"session.model_external_initializers_file_folder_path": str(folder)}
    options = RunOptions(optimization="all", threads=threads, custom_ops=custom_ops, session_config=config)
    first, second = runtime.latency(
        [original, result], feed, options=options, warmup=1, min_runs=3, max_runs=max_runs, budget_s=budget_s
    )
    ratio, low, high = median_ratio(first, second)
    return LatencyFigures(float(np.median(first)), float(np.median(second)), ratio, low, high, len(first))
