"""The user's samples, parted: those that steps fit with, those that steps decide by, and those that judge the steps.

What judges has no part in any step: it is --val, or a part of --data kept back. Steps get files of their own, so that
no step can use more than its part.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto

from onnxcompress.codebook.resuming import feeds_digest
from onnxcompress.data import Dataset, load_data
from onnxcompress.data.files import LABEL_NAMES
from onnxcompress.errors import DataError, OutputError
from onnxcompress.validation.judge import input_specs

JUDGING_SHARE, MOST_JUDGING = 0.25, 2000  # of --data where there is no --val
DECIDING_SHARE, MOST_DECIDING = 0.2, 1024  # of the rest
LEAST = 8  # samples of a part
FITTING_BYTES = 512 << 20
JUDGING_BYTES = 1 << 30  # they are all in memory
BATCH = 32


@dataclass
class Parts:
    """Samples of a run.

    Attributes:
        fitting: File of those that steps fit with; "none" without data.
        deciding: File of those that a step decides by, such as which blocks go.
        judging: Those that every step is judged by; None without any.
        fitted: How many there are to fit with.
        labelled: Whether those have labels.
        digest: What tells them from others.
        notes: What the user should know.
    """

    fitting: str = "none"
    deciding: str = "none"
    judging: Dataset | None = None
    fitted: int = 0
    labelled: bool = False
    digest: str = ""
    notes: list[str] = field(default_factory=list)
    _files: dict[str, tuple[Dataset, Sequence[int]]] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Put the files of the steps into a folder."""
        for name, (dataset, rows) in self._files.items():
            path = folder / f"{name}.npz"
            if not path.exists():
                _write(path, dataset, rows)
        if self._files:
            self.fitting, self.deciding = (str(folder / f"{name}.npz") for name in ("fitting", "deciding"))


def read_parts(
    proto: ModelProto, data: str, val: str | None, *, limit: int | None, preprocess: str | None, seed: int
) -> Parts:
    """Read what --data and --val name, and part it.

    Raises:
        DataError: The samples are missing, too few, or do not fit the model.
    """
    specs = input_specs(proto) if data != "none" or val is not None else []
    parts = Parts()
    if val is not None:
        found = load_data(val, inputs=specs, preprocess=preprocess, seed=seed)
        most = max(LEAST, JUDGING_BYTES // _bytes(found))
        if len(found) > most:
            parts.notes.append(f"{most} of {len(found)} samples of {val} judge: {JUDGING_BYTES >> 20} MiB")
            found = load_data(val, inputs=specs, limit=most, preprocess=preprocess, seed=seed)
        parts.judging = found
    if data != "none":
        given = load_data(data, inputs=specs, limit=limit, preprocess=preprocess, seed=seed)
        _part(parts, given, seed)
    digests = [_digest(dataset, rows) for dataset, rows in parts._files.values()]
    if parts.judging is not None:
        digests.append(_digest(parts.judging, range(len(parts.judging))))
    parts.digest = " ".join(digests)
    return parts


def _part(parts: Parts, given: Dataset, seed: int) -> None:
    unit = given.batch or 1
    order = [int(row) for row in np.argsort(np.random.PCG64(seed).random_raw(len(given)), kind="stable")]

    def take(share: float, most: float) -> list[int]:
        count = int(min(share * len(order), most)) // unit * unit
        if count < min(LEAST, unit * LEAST) or len(order) - count < LEAST:
            way = "" if parts.judging is not None else ", or --val for those that judge"
            raise DataError(f"{given.source} gives {len(given)} samples, too few to be parted: give more{way}")
        taken = sorted(order[:count])
        del order[:count]
        return taken

    if given.whole:
        raise DataError(f"{given.source}: samples without a common batch axis cannot be parted: take --data none")
    if parts.judging is None:
        parts.judging = _rows(given, take(JUDGING_SHARE, MOST_JUDGING))
    deciding = take(DECIDING_SHARE, MOST_DECIDING)
    most = max(LEAST, FITTING_BYTES // _bytes(given)) // unit * unit
    fitting = sorted(order[: len(order) // unit * unit][:most])
    if len(fitting) < len(order) // unit * unit:
        parts.notes.append(f"{len(fitting)} of {len(order)} samples are used to fit with: {FITTING_BYTES >> 20} MiB")
    parts.fitted, parts.labelled = len(fitting), given.labels is not None
    parts._files = {"fitting": (given, fitting), "deciding": (given, deciding)}


def _bytes(dataset: Dataset) -> int:
    """Of the first sample."""
    return max(1, sum(np.asarray(array).nbytes for array in dataset.samples[0].values()))


def _rows(dataset: Dataset, rows: Sequence[int]) -> Dataset:
    labels = None if dataset.labels is None else dataset.labels[list(rows)]
    return Dataset([dataset.samples[row] for row in rows], labels, dataset.source, dataset.batch, dataset.whole)


def _digest(dataset: Dataset, rows: Sequence[int]) -> str:
    labels = np.zeros(0) if dataset.labels is None else dataset.labels[list(rows)]
    return feeds_digest([{"": labels}, *(dataset.samples[row] for row in rows)])[:16]


def _write(path: Path, dataset: Dataset, rows: Sequence[int]) -> None:
    samples = [dataset.samples[row] for row in rows]
    arrays: dict[str, Any] = {}
    for name in samples[0]:
        shapes = {np.shape(sample[name]) for sample in samples}
        if len(shapes) > 1:
            some = " and ".join(str(list(shape)) for shape in sorted(shapes)[:2])
            raise DataError(f"{dataset.source}: samples of {name!r} have shapes {some}: bring them to one")
        arrays[name] = np.stack([sample[name] for sample in samples])
    if dataset.labels is not None:
        label_name = next((name for name in LABEL_NAMES if name not in arrays), None)
        if label_name is not None:
            arrays[label_name] = dataset.labels[list(rows)]
    partial = path.with_suffix(".partial")
    try:
        with open(partial, "wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        os.replace(partial, path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
