"""Processes that layers are quantized in: on this machine by joblib's loky, or on a Dask cluster.

Each process computes with one thread, also where there is only one process: so the result does not depend on how many
there are. Large arrays reach processes on this machine through files that are mapped into memory.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from onnxcompress.errors import RecipeError

T = TypeVar("T")
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS", "BLIS_NUM_THREADS")
MAPPED_BYTES = 1 << 22  # arrays from this size on go through files
IDLE_S = 600.0


def processors() -> int:
    """How many this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


class Workers:
    """Runs functions of arrays in other processes. A context manager: leaving it ends them.

    Args:
        jobs: How many at once on this machine; None for one a processor.
        dask: Address of a Dask scheduler to use instead, "tcp://host:8786".

    Raises:
        RecipeError: Dask is asked for and not installed, or nobody answers there.
    """

    def __init__(self, jobs: int | None = None, dask: str | None = None) -> None:
        self.jobs = jobs or processors()
        self._client: Any = None
        self._executor: Any = None
        if dask is not None:
            self._client = _connect(dask)
            self._executor = self._client.get_executor()
            self.jobs = max(1, sum(self._client.nthreads().values()))

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._client is not None:
            self._client.close()
        elif self._executor is not None:
            # Killed, they leave semaphores behind, and the tracker tells so on stderr: only an interrupt is in a hurry.
            self._executor.shutdown(wait=True, kill_workers=error is not None and not isinstance(error, Exception))
        self._executor = None

    def map(
        self, function: Callable[..., T], tasks: Iterable[Sequence[Any]], done: Callable[[int, T], None] | None = None
    ) -> list[T]:
        """Call a function with each task's arguments; tasks are read as processes get free.

        Args:
            function: At the top of a module; gets the arguments of a task.
            tasks: Arguments; dataclasses of arrays among them.
            done: Called with a task's number and result, in the order in which they end.

        Returns:
            The results in the order of the tasks.
        """
        from concurrent.futures import FIRST_COMPLETED, Future, wait

        executor = self._start()
        results: dict[int, T] = {}
        running: dict[Future[T], int] = {}
        with tempfile.TemporaryDirectory(prefix="onnxcompress-") as folder:

            def collect(at_most: int) -> None:
                while len(running) > at_most:
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        number = running.pop(future)
                        results[number] = future.result()
                        if done is not None:
                            done(number, results[number])

            try:
                for number, task in enumerate(tasks):
                    arguments = task if self._client is not None else [_spilled(value, folder) for value in task]
                    running[executor.submit(_call, function, arguments)] = number
                    del task, arguments
                    collect(self.jobs)  # one waits, ready to be taken
                collect(0)
            except BaseException:
                for future in running:
                    future.cancel()
                raise
        return [results[number] for number in sorted(results)]

    def _start(self) -> Any:
        if self._executor is None:
            from joblib.externals.loky import ProcessPoolExecutor

            self._executor = ProcessPoolExecutor(max_workers=self.jobs, timeout=IDLE_S, env=dict.fromkeys(THREADS, "1"))
        return self._executor


def _connect(address: str) -> Any:
    try:
        from distributed import Client
    except ImportError as error:
        raise RecipeError("--dask needs Dask: pip install onnxcompress[dask]") from error
    try:
        return Client(address, timeout="10s", set_as_default=False)
    except (OSError, ValueError) as error:
        raise RecipeError(f"no Dask scheduler answers at {address}: {' '.join(str(error).split())}") from error


class _Mapped:
    """An array in a file, given in its place."""

    def __init__(self, array: np.ndarray, folder: str) -> None:
        with tempfile.NamedTemporaryFile(suffix=".npy", dir=folder, delete=False) as file:
            np.save(file, array, allow_pickle=False)
        self.path = Path(file.name)

    def read(self) -> np.ndarray:
        return np.asarray(np.load(self.path, mmap_mode="r", allow_pickle=False))


def _spilled(value: Any, folder: str) -> Any:
    """The value with its large arrays in files; dataclasses become the pair of their type and fields."""
    if isinstance(value, np.ndarray) and value.nbytes >= MAPPED_BYTES:
        return _Mapped(value, folder)
    if is_dataclass(value) and not isinstance(value, type):
        arrays = {f.name: getattr(value, f.name) for f in fields(value)}
        if any(isinstance(array, np.ndarray) and array.nbytes >= MAPPED_BYTES for array in arrays.values()):
            return _Taken(type(value), {name: _spilled(array, folder) for name, array in arrays.items()})
    return value


class _Taken:
    """A dataclass taken apart."""

    def __init__(self, kind: type, values: dict[str, Any]) -> None:
        self.kind, self.values = kind, values


def _restored(value: Any) -> Any:
    if isinstance(value, _Mapped):
        return value.read()
    if isinstance(value, _Taken):
        return value.kind(**{name: _restored(part) for name, part in value.values.items()})
    return value


def _call(function: Callable[..., T], arguments: Sequence[Any]) -> T:
    return function(*[_restored(value) for value in arguments])
