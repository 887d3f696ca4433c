"""onnxruntime in a child process, because a stranger's model can take the interpreter down with it.

    with Runtime(timeout_s=60) as runtime:
        inputs, outputs = runtime.interface("model.onnx")
        [[y]] = runtime.run("model.onnx", [{"x": x}])
        before, after = runtime.latency(["model.onnx", smaller], {"x": x})
        ratio, low, high = median_ratio(before, after)

One child serves every request of a Runtime and is replaced when a model kills it. It starts with the Runtime and is
first waited for at the first request, so what lies between them hides its imports. No session outlives the call that
needed it. A Runtime belongs to one thread; make one for each. Data goes through pipes as ``runtime_frames`` describes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from onnxcompress import runtime_frames as frames
from onnxcompress.runtime_process import ChildProcess, SessionFailure

Array = npt.NDArray[Any]
# A tensor; a sequence; a map (its items are plain scalars); None is an optional without a value.
Value: TypeAlias = "Array | list[Value] | dict[Any, Any] | float | str | None"
Model: TypeAlias = "bytes | str | os.PathLike[str]"

__all__ = [
    "DEPLOYED",
    "REFERENCE",
    "Model",
    "RunOptions",
    "Runtime",
    "SessionFailure",
    "Value",
    "ValueInfo",
    "geomean_ratio",
    "median_ratio",
    "peak_memory_bytes",
]

LEVELS = {
    "off": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}


@dataclass(frozen=True)
class RunOptions:
    """How onnxruntime loads a model.

    Attributes:
        optimization: "off", "basic", "extended" or "all".
        threads: Threads within an operator, 0 for onnxruntime's choice. Operators run one after another.
        custom_ops: Shared library with custom operators. It runs with the rights of the child process: trust it.
        disabled_optimizers: Names of onnxruntime's own rewrites to leave out, such as "ConstantFolding".
        session_config: Entries for ``SessionOptions.add_session_config_entry``.
        optimized_model: Where onnxruntime writes the model as it has optimized it; the entry
            "session.save_model_format" says whether as "ONNX" or as "ORT".
    """

    optimization: str = "off"
    threads: int = 0
    custom_ops: Path | None = None
    disabled_optimizers: tuple[str, ...] = ()
    session_config: Mapping[str, str] = field(default_factory=dict)
    optimized_model: Path | None = None

    def __post_init__(self) -> None:
        if self.optimization not in LEVELS:
            raise ValueError(f"optimization {self.optimization!r}: expected one of {', '.join(LEVELS)}")
        if self.threads < 0:
            raise ValueError(f"threads {self.threads}: expected 0 (onnxruntime's choice) or more")


REFERENCE = RunOptions()  # the model as it is written
DEPLOYED = RunOptions("all")  # as onnxruntime runs it for everybody


@dataclass(frozen=True)
class ValueInfo:
    """An input or output as onnxruntime sees it.

    Attributes:
        name: Its name.
        type: onnxruntime's spelling, "tensor(float)" or "seq(tensor(int64))".
        shape: A number, a symbol, or None per dimension; () also where the rank is unknown.
    """

    name: str
    type: str
    shape: tuple[int | str | None, ...]


class Runtime:
    """onnxruntime in a child process.

    Args:
        timeout_s: Longest that one load or one run may take, None for no limit.
    """

    def __init__(self, *, timeout_s: float | None = None) -> None:
        self.timeout_s = timeout_s
        self._child = ChildProcess()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the child process. Also done when the Runtime is collected and when the interpreter exits."""
        self._child.close()

    @property
    def version(self) -> str:
        """onnxruntime's version."""
        return self._child.version

    def interface(self, model: Model, *, options: RunOptions = REFERENCE) -> tuple[list[ValueInfo], list[ValueInfo]]:
        """Load a model and list its inputs and its outputs.

        Raises:
            SessionFailure: onnxruntime refused the model, crashed on it, or took too long.
        """
        with self._opened([model], options) as [reply]:
            inputs, outputs = (
                [ValueInfo(name, kind, tuple(shape)) for name, kind, shape in reply[side]]
                for side in ("inputs", "outputs")
            )
        return inputs, outputs

    def run(
        self,
        model: Model,
        feeds: Iterable[Mapping[str, Value]],
        *,
        options: RunOptions = REFERENCE,
        outputs: Sequence[str] | None = None,
    ) -> list[list[Value]]:
        """Run a model on several feeds in one session.

        Types that NumPy lacks (bfloat16, float8, int4, ...) come and go as ml_dtypes. Where a model has such an output
        beside one that is a sequence or a map, each run is two runs, one for either kind. Feeds are read one by one.

        Args:
            model: The serialized model, or its path; external data are looked for beside the path.
            feeds: One value per input name; inputs with a default may be left out.
            options: How onnxruntime loads it.
            outputs: Names in the order wanted, None for all.

        Returns:
            Per feed, one value per output.

        Raises:
            SessionFailure: onnxruntime refused the model or a feed, crashed on it, or took too long.
            TypeError: A feed holds something that has no ONNX type.
        """
        names = None if outputs is None else list(outputs)
        if names == []:
            raise ValueError("no outputs are asked for: name one, or pass None for all")
        with self._opened([model], options):
            return [self._run(model, 0, index, feed, names) for index, feed in enumerate(feeds)]

    def latency(
        self,
        models: Sequence[Model],
        feed: Mapping[str, Value],
        *,
        options: RunOptions = DEPLOYED,
        warmup: int = 2,
        min_runs: int = 5,
        max_runs: int = 200,
        budget_s: float = 1.0,
    ) -> list[npt.NDArray[np.float64]]:
        """Time models on one feed, taking turns in one process, so that what slows the machine slows all alike.

        A session's threads are told to sleep between its runs: they would otherwise spin into the next model's turn.

        Args:
            models: All take the same feed; a model twice gives the noise.
            feed: One value per input name.
            options: How onnxruntime loads them.
            warmup: Runs of each model that are not timed, at least 1.
            min_runs: Timed runs of each model, whatever the budget.
            max_runs: Timed runs of each model at most.
            budget_s: No new round is begun after this long.

        Returns:
            Per model, milliseconds per run (n,) float64, the same n for all; the i-th runs were neighbours in time.

        Raises:
            SessionFailure: onnxruntime refused a model or the feed, crashed on it, or took too long.
        """
        if not 1 <= min_runs <= max_runs or warmup < 1:
            raise ValueError(
                f"warmup {warmup}, min_runs {min_runs}, max_runs {max_runs}: expected 1 <= min_runs <= max_runs"
            )
        limit_s = None if self.timeout_s is None else 2 * budget_s + self.timeout_s * len(models) * min_runs
        with self._opened(models, options, {"session.force_spinning_stop": "1"}):
            for slot, model in enumerate(models):
                self._run(model, slot, 0, feed, None, reply=False)
                for _ in range(warmup - 1):
                    self._run(model, slot, 0, None, None, reply=False)
            what = " and ".join(dict.fromkeys(_name(model) for model in models))
            header = {
                "do": "time",
                "slots": len(models),
                "min_runs": min_runs,
                "max_runs": max_runs,
                "budget_s": budget_s,
            }
            reply, _ = self._child.ask(header, (), what, "run", limit_s)
        return [np.array(elapsed, np.float64) / 1e6 for elapsed in reply["nanoseconds"]]

    def load_time(self, model: Model, *, options: RunOptions = DEPLOYED, repeats: int = 3) -> float:
        """Milliseconds to create a session: the median of ``repeats``, the file being in the cache.

        Raises:
            SessionFailure: onnxruntime refused the model, crashed on it, or took too long.
        """
        source, buffers = _source(model)
        limit_s = None if self.timeout_s is None else self.timeout_s * (repeats + 1)
        header = {"do": "load", "model": source, "options": _settings(options), "repeats": repeats}
        reply, _ = self._child.ask(header, buffers, _name(model), "load", limit_s)
        return float(np.median(reply["nanoseconds"])) / 1e6

    def _peak(self, model: Model, feed: Mapping[str, Value], options: RunOptions) -> int:
        source, buffers = _source(model)
        header = {"do": "peak", "model": source, "options": _settings(options), "feed": _encode_feed(feed, buffers)}
        limit_s = None if self.timeout_s is None else 2 * self.timeout_s
        reply, _ = self._child.ask(header, buffers, _name(model), "run", limit_s)
        return int(reply["bytes"])

    @contextlib.contextmanager
    def _opened(
        self, models: Sequence[Model], options: RunOptions, config: Mapping[str, str] | None = None
    ) -> Iterator[list[dict[str, Any]]]:
        """Load each model into a slot; the replies hold its interface."""
        settings = _settings(options, config)
        try:
            replies = []
            for slot, model in enumerate(models):
                source, buffers = _source(model)
                header = {"do": "open", "slot": slot, "model": source, "options": settings}
                reply, _ = self._child.ask(header, buffers, _name(model), "load", self.timeout_s)
                replies.append(reply)
            yield replies
        finally:
            if self._child.alive:
                self._child.ask({"do": "close"}, (), "the model", "run", self.timeout_s)

    def _run(
        self,
        model: Model,
        slot: int,
        index: int,
        feed: Mapping[str, Value] | None,
        names: list[str] | None,
        *,
        reply: bool = True,
    ) -> list[Value]:
        buffers: frames.Buffers = []
        nodes = None if feed is None else _encode_feed(feed, buffers)
        header = {"do": "run", "slot": slot, "feed": nodes, "names": names, "reply": reply}
        what = f"{_name(model)}, feed {index}" if index else _name(model)
        answer, data = self._child.ask(header, buffers, what, "run", self.timeout_s)
        return [frames.decode(node, data, frames.array) for node in answer.get("values", ())]


def peak_memory_bytes(
    model: Model, feed: Mapping[str, Value], options: RunOptions = DEPLOYED, *, timeout_s: float | None = None
) -> int:
    """How far loading a model and running it once raises the resident memory of a fresh process, at its highest.

    The serialized model, where it is not a path, and the feed are there before and do not count.

    Raises:
        SessionFailure: onnxruntime refused the model or the feed, crashed on it, or took too long.
    """
    with Runtime(timeout_s=timeout_s) as runtime:
        return runtime._peak(model, feed, options)


def median_ratio(original: npt.ArrayLike, other: npt.ArrayLike) -> tuple[float, float, float]:
    """original / other, pair by pair: the median with its 95 % bootstrap interval. For the runs of two models."""
    return _ratio(original, other, lambda logs: np.median(logs, axis=-1))


def geomean_ratio(original: npt.ArrayLike, other: npt.ArrayLike) -> tuple[float, float, float]:
    """original / other, pair by pair: the geometric mean with its 95 % bootstrap interval. For a figure per model."""
    return _ratio(original, other, lambda logs: np.mean(logs, axis=-1))


def _ratio(original: npt.ArrayLike, other: npt.ArrayLike, middle: Callable[[Array], Any]) -> tuple[float, float, float]:
    above, below = np.asarray(original, np.float64), np.asarray(other, np.float64)
    if above.shape != below.shape or above.ndim != 1 or not above.size:
        raise ValueError(f"shapes {above.shape} and {below.shape}: expected two equal, (n,) with n > 0")
    logs = np.log(above) - np.log(below)
    draws = np.random.default_rng(0).integers(logs.size, size=(2000, logs.size))
    low, high = np.quantile(middle(logs[draws]), [0.025, 0.975])
    return float(np.exp(middle(logs))), float(np.exp(low)), float(np.exp(high))


def _name(model: Model) -> str:
    return "the model" if isinstance(model, bytes) else Path(model).name


def _source(model: Model) -> tuple[dict[str, Any], frames.Buffers]:
    if isinstance(model, bytes):
        return {}, [model]
    return {"path": os.path.abspath(model)}, []


def _settings(options: RunOptions, config: Mapping[str, str] | None = None) -> dict[str, Any]:
    return {
        "level": LEVELS[options.optimization],
        "threads": options.threads,
        "custom_ops": None if options.custom_ops is None else os.path.abspath(options.custom_ops),
        "disabled": list(options.disabled_optimizers),
        "optimized_model": None if options.optimized_model is None else os.path.abspath(options.optimized_model),
        "config": {**(config or {}), **options.session_config},
    }


def _encode_feed(feed: Mapping[str, Value], buffers: frames.Buffers) -> list[tuple[str, Any]]:
    nodes = []
    for name, value in feed.items():
        try:
            nodes.append((name, frames.encode(value, buffers)))
        except TypeError as error:
            raise TypeError(f"input {name!r}: {error}") from error
    return nodes
