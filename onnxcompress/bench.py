"""Models timed in turns on onnxruntime: latency, load time, peak memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxcompress.errors import RecipeError
from onnxcompress.interface import set_input_shapes
from onnxcompress.model_io import read_proto
from onnxcompress.runtime import REFERENCE, RunOptions, Runtime, median_ratio, peak_memory_bytes
from onnxcompress.samples import check_samples
from onnxcompress.validation.equivalence import for_runtime, run_model
from onnxcompress.validation.judge import data_feeds
from onnxcompress.validation.signature import interface_differences


def bench_models(
    models: Sequence[Path],
    *,
    threads: int = 0,
    runs: int = 50,
    warmup: int = 3,
    seconds: float = 10.0,
    optimization: str = "all",
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    data: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Time models that take the same inputs, one run of each in turn.

    Args:
        models: Files; the first is what the others are compared with.
        threads: Threads within an operator, 0 for onnxruntime's choice.
        runs: Timed runs of each model at most.
        warmup: Runs that are not timed.
        seconds: Time for all timed runs together.
        optimization: onnxruntime's own optimizations: off, basic, extended or all.
        input_shapes: Sizes per input name; guessed where they are open.
        data: A source of samples, of which the first is used, instead of a seeded input.
        seed: Seed of the input.

    Returns:
        ``input`` (what was fed), ``threads``, ``optimization`` and per model p10, p50, p90 and load time in
        milliseconds, peak memory in bytes, and the ratio first / model with its 95 % interval.

    Raises:
        ModelError: A model is missing or damaged.
        RecipeError: The models' inputs differ.
        RuntimeFailure: onnxruntime refused a model.
    """
    options = RunOptions(optimization=optimization, threads=threads)
    protos = [read_proto(path) for path in models]
    for path, proto in zip(models[1:], protos[1:], strict=True):
        changes = [
            line for line in interface_differences(protos[0], proto) if line.startswith("input") and "gone" in line
        ]
        if changes:
            raise RecipeError(f"{path} does not take the inputs of {models[0]}: {changes[0]}")
    set_input_shapes(protos[0], input_shapes or {}, None)
    with Runtime(timeout_s=300) as runtime:
        sources = [for_runtime(path) for path in models]
        if data is not None:
            feed = data_feeds(data, protos[0], limit=1, seed=seed)[0]
        else:
            feed = check_samples(
                protos[0], lambda one: run_model(runtime, sources[0], [one], REFERENCE)[0], seed=seed, count=1
            )[0]
        elapsed = runtime.latency(
            sources,
            feed,
            options=options,
            warmup=warmup,
            min_runs=min(5, runs),
            max_runs=runs,
            budget_s=seconds,
        )
        loads = [runtime.load_time(source, options=options) for source in sources]
    memory = [peak_memory_bytes(source, feed, options) for source in sources]
    entries = []
    for i, path in enumerate(models):
        p10, p50, p90 = np.percentile(elapsed[i], [10, 50, 90])
        ratio = median_ratio(elapsed[0], elapsed[i]) if i else (None, None, None)
        entries.append(
            {
                "path": str(path),
                "runs": len(elapsed[i]),
                "p10_ms": float(p10),
                "p50_ms": float(p50),
                "p90_ms": float(p90),
                "ratio": ratio[0],
                "ratio_low": ratio[1],
                "ratio_high": ratio[2],
                "load_ms": loads[i],
                "peak_memory_bytes": memory[i],
            }
        )
    shapes = ", ".join(f"{name} {list(np.shape(value))}" for name, value in feed.items())
    return {"input": shapes, "threads": threads, "optimization": optimization, "models": entries}
