"""The program inside the child process of ``runtime.Runtime``: onnxruntime behind a pipe.

It is started by ``Runtime``, answers one request at a time on its standard output, and ends when its standard input
does. It imports numpy, onnxruntime and ``runtime_frames``, nothing else of the package.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxcompress.runtime_frames import ELEMENT_NAMES, LAST_NUMPY_TYPE, Buffers, decode, encode, receive, send

# How onnxruntime names the tensor types that its numpy interface converts; float8e4m3fn would come back as uint8.
NUMPY_TYPES = frozenset(
    f"tensor({name})"
    for name in (
        *("float", "double", "float16", "string", "bool"),
        *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    )
)


def is_foreign(type_name: str) -> bool:
    """Whether onnxruntime's numpy interface cannot hand out a value of this type, as it names it."""
    return type_name.startswith("tensor(") and type_name not in NUMPY_TYPES


class Refusal(Exception):
    """onnxruntime's own error, at a stage: "load" or "run"."""

    def __init__(self, stage: str, error: Exception) -> None:
        super().__init__("out of memory" if isinstance(error, MemoryError) else str(error) or type(error).__name__)
        self.stage = stage


@dataclass(frozen=True)
class Session:
    """A loaded model, with what each run asks for looked up once."""

    ort: Any
    session: Any
    types: dict[str, str]  # of the outputs, in their order

    def run(self, feed: dict[str, Any], names: Sequence[str] | None = None) -> list[Any]:
        """Run on a feed: the outputs in ``names``, or all."""
        wanted = list(self.types) if names is None else list(names)
        foreign = [name for name in wanted if is_foreign(self.types.get(name, ""))]
        try:
            if not foreign:
                return list(self.session.run(wanted, feed))
            values = dict(zip(foreign, self.session.run_with_ort_values(foreign, self._ort_values(feed)), strict=True))
            rest = [name for name in wanted if name not in values]
            if rest:
                # A second run: onnxruntime has no call that returns a bfloat16 tensor and a sequence together.
                values.update(zip(rest, self.session.run(rest, feed), strict=True))
            return [values[name] for name in wanted]
        except Exception as error:  # pybind11 raises onnxruntime's errors, and C++'s, under many types
            raise Refusal("run", error) from error

    def _ort_values(self, feed: dict[str, Any]) -> dict[str, Any]:
        kind = self.ort.OrtValue
        values = {}
        for name, value in feed.items():
            if isinstance(value, np.ndarray) and value.dtype != object:
                value = kind.ortvalue_from_numpy(value)
            if not isinstance(value, kind):
                raise TypeError(
                    f"onnxruntime's Python interface cannot take input {name!r}, which is no numeric tensor, "
                    "when an output has a type that NumPy lacks"
                )
            values[name] = value
        return values


class Worker:
    """The requests, one method each: the header's fields as arguments, a reply's header, its buffers into ``out``."""

    def __init__(self, ort: Any) -> None:
        self._ort = ort
        self._sessions: dict[int, Session] = {}
        self._feed: dict[str, Any] = {}

    def answer(self, request: str, fields: dict[str, Any], buffers: list[bytes], out: Buffers) -> dict[str, Any]:
        """Do what a header asks."""
        requests: dict[str, Callable[..., dict[str, Any]]] = {
            "open": self.open,
            "run": self.run,
            "time": self.time,
            "load": self.load,
            "peak": self.peak,
            "close": self.close,
        }
        return requests[request](buffers, out, **fields)

    def open(self, buffers: list[bytes], out: Buffers, slot: int, model: Any, options: Any) -> dict[str, Any]:
        """Load a model into a slot and reply with its interface."""
        opened = self._sessions[slot] = self._load(model, buffers, options)
        return {
            side: [[value.name, value.type, list(value.shape)] for value in values]
            for side, values in (("inputs", opened.session.get_inputs()), ("outputs", opened.session.get_outputs()))
        }

    def run(self, buffers: list[bytes], out: Buffers, slot: int, feed: Any, names: Any, reply: bool) -> dict[str, Any]:
        """Run the model in a slot, on a new feed or on the last one (null)."""
        if feed is not None:
            self._feed = self._decode_feed(feed, buffers)
        values = self._sessions[slot].run(self._feed, names)
        if not reply:
            return {}
        try:
            return {"values": [encode(value, out) for value in values]}
        except TypeError as error:  # a sparse tensor
            raise Refusal("run", error) from error

    def time(
        self, buffers: list[bytes], out: Buffers, slots: int, min_runs: int, max_runs: int, budget_s: float
    ) -> dict[str, Any]:
        """Time the models in the first slots on the last feed, interleaved: nanoseconds per run."""
        sessions = [self._sessions[slot] for slot in range(slots)]
        elapsed: list[list[int]] = [[] for _ in sessions]
        gc.collect()
        gc.disable()
        try:
            end = time.perf_counter() + budget_s
            while len(elapsed[0]) < max_runs and (len(elapsed[0]) < min_runs or time.perf_counter() < end):
                for index in turn(len(elapsed[0]), slots):
                    start = time.perf_counter_ns()
                    sessions[index].run(self._feed)
                    elapsed[index].append(time.perf_counter_ns() - start)
        finally:
            gc.enable()
        return {"nanoseconds": elapsed}

    def load(self, buffers: list[bytes], out: Buffers, model: Any, options: Any, repeats: int) -> dict[str, Any]:
        """Time the creation of a session, after one that warms the file cache: nanoseconds per load."""
        elapsed = []
        for _ in range(repeats + 1):
            start = time.perf_counter_ns()
            opened = self._load(model, list(buffers), options)
            elapsed.append(time.perf_counter_ns() - start)
            del opened  # its end is not part of the next one's time
        return {"nanoseconds": elapsed[1:]}

    def peak(self, buffers: list[bytes], out: Buffers, model: Any, options: Any, feed: Any) -> dict[str, Any]:
        """Load and run once: how far the resident memory rose above what it was before, in bytes."""
        source = [] if "path" in model else [buffers.pop(0)]
        values = self._decode_feed(feed, buffers)
        before = resident_bytes()
        opened = self._load(model, source, options)
        opened.run(values)
        return {"bytes": max(0, peak_resident_bytes() - before)}

    def close(self, buffers: list[bytes], out: Buffers) -> dict[str, Any]:
        """Forget every model."""
        self._sessions.clear()
        self._feed = {}
        return {}

    def _load(self, model: Any, buffers: list[bytes], options: Any) -> Session:
        ort = self._ort
        try:
            settings = ort.SessionOptions()
            settings.graph_optimization_level = getattr(ort.GraphOptimizationLevel, options["level"])
            settings.intra_op_num_threads = options["threads"]
            settings.inter_op_num_threads = 1
            for key, value in options["config"].items():
                settings.add_session_config_entry(key, value)
            if options["optimized_model"]:
                settings.optimized_model_filepath = options["optimized_model"]
            if options["custom_ops"]:
                settings.register_custom_ops_library(options["custom_ops"])
            session = ort.InferenceSession(
                model["path"] if "path" in model else buffers.pop(0),
                settings,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=options["disabled"],
                enable_fallback=0,  # it would print, and try again
            )
        except Exception as error:  # as in Session.run
            raise Refusal("load", error) from error
        return Session(ort, session, {value.name: value.type for value in session.get_outputs()})

    def _decode_feed(self, feed: Sequence[tuple[str, Any]], buffers: list[bytes]) -> dict[str, Any]:
        return {name: decode(node, buffers, self._tensor) for name, node in feed}

    def _tensor(self, number: int, shape: list[int], data: bytes) -> Any:
        if number <= LAST_NUMPY_TYPE:
            return np.frombuffer(data, ELEMENT_NAMES[number]).reshape(shape)
        value = self._ort.OrtValue.ortvalue_from_shape_and_type(shape, number)
        if data:
            ctypes.memmove(value.data_ptr(), data, len(data))
        return value


def turn(number: int, count: int) -> list[int]:
    """The order of the models in one round: 01, 10, 10, 01 and again, so that a steady drift falls on all alike."""
    order = [(index + number // 2) % count for index in range(count)]
    return order[::-1] if number % 2 else order


def resident_bytes() -> int:
    """Resident memory now; on Linux the peak starts over from here."""
    try:
        with open("/proc/self/clear_refs", "w") as refs:
            refs.write("5")
        return _status_bytes("VmRSS")
    except OSError:
        return peak_resident_bytes()


def peak_resident_bytes() -> int:
    try:
        return _status_bytes("VmHWM")
    except OSError:
        import resource  # not on Windows

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _status_bytes(field: str) -> int:
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _be_a_good_child() -> None:
    """Leave no core file, be the first to go when memory runs out, and do not outlive the parent."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with open("/proc/self/oom_score_adj", "w") as score:
            score.write("500")
    except (ImportError, OSError):
        pass  # a comfort of Linux, nothing depends on it
    if os.name == "posix":
        threading.Thread(target=_follow, args=(os.getppid(),), daemon=True).start()


def _follow(parent: int) -> None:
    # The end of the pipe tells it too, but only between requests.
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(0)


def main() -> None:
    """Serve until the standard input ends."""
    source = os.fdopen(os.dup(0), "rb")
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what onnxruntime and custom operators print must not get between the frames
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    _be_a_good_child()

    import onnxruntime as ort

    ort.disable_telemetry_events()  # what users do with their models is theirs

    ort.set_default_logger_severity(4)  # a warning would be taken for the last words of a crash
    worker = Worker(ort)
    send(sink, {"onnxruntime": ort.__version__})
    while True:
        try:
            header, buffers = receive(source)
        except EOFError:
            os._exit(0)
        _forget_stderr()
        out: Buffers = []
        try:
            reply = worker.answer(header.pop("do"), header, buffers, out)
        except Refusal as refusal:
            reply = {"refused": str(refusal), "stage": refusal.stage}
            out = []
        del buffers
        send(sink, reply, out)


def _forget_stderr() -> None:
    # Its last line is to belong to this request, and custom operators that print are not to fill the disk.
    try:
        os.ftruncate(2, 0)
        os.lseek(2, 0, os.SEEK_SET)
    except OSError:
        pass  # a terminal, when somebody started the program by hand


if __name__ == "__main__":
    main()
