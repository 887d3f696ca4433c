"""What the benches that compare arms over paired seeds have in common: samples, accuracy, and rows of a file."""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxcompress.data import load_data
from onnxcompress.runtime import REFERENCE, Runtime
from onnxcompress.validation.equivalence import read_model, run_model
from onnxcompress.validation.judge import input_specs

HELD_OUT = 5  # one sample in so many

Row = dict[str, Any]


def accuracy(model: Path, spec: str) -> float:
    """Share of the samples whose label has the largest score, by onnxruntime."""
    return _accuracy(model, model.stat().st_mtime_ns, spec)  # a later run may have the same file


@functools.cache
def _accuracy(model: Path, _written: int, spec: str) -> float:
    data = load_data(spec, inputs=input_specs(read_model(model)))
    if data.labels is None:
        raise SystemExit(f"{spec} has no labels")
    with Runtime() as runtime:
        rows = run_model(runtime, model, (feed for feed, _ in data.batches(256)), REFERENCE)
    scores = np.concatenate([np.asarray(row[0]) for row in rows])
    return float((scores.argmax(axis=1) == data.labels).mean())


def split(arguments: argparse.Namespace, model: Path, folder: Path) -> tuple[str, str]:
    """Samples to train on and to choose by: as given, or a fifth held out, the same for all seeds."""
    if arguments.val:
        return arguments.data, arguments.val
    paths = [folder / "train.npz", folder / "val.npz"]
    if not all(path.exists() for path in paths):
        data = load_data(arguments.data, inputs=input_specs(read_model(model)))
        if data.labels is None:
            raise SystemExit(f"{arguments.data} has no labels")
        order = np.random.PCG64(0).random_raw(len(data)).argsort(kind="stable")
        held = len(data) // HELD_OUT
        for path, rows in zip(paths, (order[held:], order[:held]), strict=True):
            samples = [data.samples[int(row)] for row in rows]
            arrays: dict[str, Any] = {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}
            np.savez(path, **arrays, labels=data.labels[rows])
    return str(paths[0]), str(paths[1])


_NO_SETTING = {"model", "out", "summary", "arms", "seeds", "first_seed", "work", "jobs"}


def setting(arguments: argparse.Namespace) -> str:
    """A short name for all that rows have to share to be compared."""
    values = {name: value for name, value in vars(arguments).items() if name not in _NO_SETTING}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines() if line] if path.exists() else []


def mean(values: Sequence[float], digits: int = 4) -> str:
    """Mean and standard error."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}" if values else ""
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.{digits}f} +- {error:.{digits}f}"
