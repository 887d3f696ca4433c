"""Tensors of all calibration samples, in memory up to a limit and beyond it in files that are mapped into memory."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

MIN_FILE_BYTES = 1 << 16


class Activations:
    """Values by key and sample.

    Args:
        memory_limit_bytes: What is kept in memory; later tensors go to files.
        folder: Where a temporary folder for the files is made; the system's choice by default.
    """

    def __init__(self, memory_limit_bytes: int, folder: Path | None = None) -> None:
        self.memory_limit_bytes = memory_limit_bytes
        self.memory_bytes = 0
        self.peak_memory_bytes = 0
        self.file_bytes = 0
        self._parent = folder
        self._folder: Path | None = None
        self._values: dict[tuple[str, int], Any] = {}
        self._files = 0

    def put(self, name: str, sample: int, value: Any) -> None:
        """Keep a value; only arrays of some size go to files."""
        if isinstance(value, np.ndarray) and value.dtype != object and value.nbytes >= MIN_FILE_BYTES:
            if self.memory_bytes + value.nbytes > self.memory_limit_bytes:
                value = self._mapped(value)
            else:
                self.memory_bytes += value.nbytes
                self.peak_memory_bytes = max(self.peak_memory_bytes, self.memory_bytes)
        self._values[name, sample] = value

    def get(self, name: str, sample: int) -> Any:
        return self._values[name, sample]

    def __contains__(self, key: tuple[str, int]) -> bool:
        return key in self._values

    def drop(self, name: str) -> None:
        """Forget a tensor of all samples."""
        for key in [key for key in self._values if key[0] == name]:
            value = self._values.pop(key)
            if isinstance(value, np.memmap):
                path, size = Path(str(value.filename)), value.nbytes
                del value  # a mapped file cannot be removed on every system
                self.file_bytes -= size
                path.unlink(missing_ok=True)
            elif isinstance(value, np.ndarray) and value.dtype != object and value.nbytes >= MIN_FILE_BYTES:
                self.memory_bytes -= value.nbytes

    def names(self) -> set[str]:
        return {name for name, _ in self._values}

    def close(self) -> None:
        """Forget everything and remove the files."""
        self._values.clear()
        self.memory_bytes = self.file_bytes = 0
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _mapped(self, value: np.ndarray) -> np.ndarray:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="onnxcompress-", dir=self._parent))
        self._files += 1
        path = self._folder / f"{self._files}.bin"
        mapped = np.memmap(path, dtype=value.dtype, mode="w+", shape=value.shape)
        mapped[...] = value
        mapped.flush()
        self.file_bytes += value.nbytes
        return mapped
