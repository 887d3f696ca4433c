"""The child process of ``runtime.Runtime``: started, spoken to, limited in time, and replaced when it dies."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any, cast

from onnxcompress import runtime_frames as frames
from onnxcompress.errors import RuntimeFailure
from onnxcompress.runtime_messages import cause_of_death, informative_line, last_line

START_LIMIT_S = 120.0  # numpy and onnxruntime import in 0.2 s here; a cold network disk is slower


class SessionFailure(RuntimeFailure):
    """onnxruntime refused a model, crashed on it or took too long.

    Attributes:
        stage: "start" (of the child process), "load" or "run".
        kind: "refused", "crashed" or "timeout".
    """

    def __init__(self, message: str, stage: str, kind: str) -> None:
        super().__init__(message)
        self.stage = stage
        self.kind = kind


class ChildProcess:
    """A process that runs ``runtime_worker``, and another one when that has died.

    It is started at once and first waited for when it is asked something.
    """

    def __init__(self) -> None:
        self._closed = False
        self._version: str | None = None
        self._start()

    @property
    def version(self) -> str:
        """onnxruntime's version."""
        self._ready()
        assert self._version is not None
        return self._version

    @property
    def alive(self) -> bool:
        """Whether the process that answered last is still there."""
        return self._process is not None and self._process.poll() is None

    def close(self) -> None:
        """End it for good. Also done when the object is collected and when the interpreter exits."""
        self._closed = True
        self._stop()

    def ask(
        self,
        header: Mapping[str, Any],
        buffers: Sequence[bytes | memoryview],
        what: str,
        stage: str,
        limit_s: float | None,
    ) -> tuple[dict[str, Any], list[bytes]]:
        """Send a request and wait for the answer.

        Args:
            header: The request.
            buffers: What it refers to.
            what: The model, for the message of a failure.
            stage: "load" or "run", should the process die of it.
            limit_s: Longest wait, None for no limit.

        Raises:
            SessionFailure: onnxruntime refused, the process died, or the time is over.
        """
        self._ready()
        reply, data = self._exchange(header, buffers, what, stage, limit_s)
        if "refused" in reply:
            message = f"onnxruntime cannot {reply['stage']} {what}: {informative_line(reply['refused'])}"
            raise SessionFailure(message, reply["stage"], "refused")
        return reply, data

    def _ready(self) -> None:
        """Make sure that there is a child and that it has said hello."""
        if self._closed:
            raise ValueError("this Runtime is closed")
        if self._process is not None and self._version is not None and self._process.poll() is not None:
            self._stop()  # something ended it between two requests
        if self._process is None:
            self._start()
        if self._version is None:
            hello, _ = self._exchange(None, (), "", "start", START_LIMIT_S)
            self._version = hello["onnxruntime"]

    def _exchange(
        self,
        header: Mapping[str, Any] | None,
        buffers: Sequence[bytes | memoryview],
        what: str,
        stage: str,
        limit_s: float | None,
    ) -> tuple[dict[str, Any], list[bytes]]:
        """Send one frame, or none, and receive one. An interrupted child would be out of step, so it is ended."""
        with self._limited(limit_s) as expired:
            try:
                if header is not None:
                    frames.send(self._stdin, header, buffers)
                reply, data = frames.receive(self._stdout)
            except (EOFError, OSError) as error:
                raise self._death(what, stage, limit_s if expired() else None) from error
            except BaseException:
                self._stop()
                raise
        if expired():  # the answer came in the same moment
            self._stop()
        return reply, data

    @contextlib.contextmanager
    def _limited(self, limit_s: float | None) -> Iterator[Callable[[], bool]]:
        """Kill the child when the time is over; the function given tells whether it was."""
        process = self._process
        if limit_s is None or process is None:
            yield lambda: False
            return
        fired = threading.Event()

        def expire() -> None:
            fired.set()
            process.kill()

        timer = threading.Timer(limit_s, expire)
        timer.daemon = True
        timer.start()
        try:
            yield fired.is_set
        finally:
            timer.cancel()
            timer.join()

    def _death(self, what: str, stage: str, limit_s: float | None) -> SessionFailure:
        """Say what the child died of, and bury it."""
        process = self._process
        assert process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)  # its end of the pipe closes a moment before it is gone
        status, last = process.poll(), last_line(self._stderr)
        self._stop()
        doing = f"{stage} {what}".strip()
        if limit_s is not None:
            return SessionFailure(f"onnxruntime did not {doing} within {limit_s:g} s", stage, "timeout")
        message = f"onnxruntime {cause_of_death(status)}, asked to {doing}" + (f": {last}" if last else "")
        return SessionFailure(message, stage, "crashed")

    def _start(self) -> None:
        # Not -m: it would put the working folder, and a json.py that may lie there, before everything else.
        path = [os.path.abspath(entry) for entry in sys.path]
        program = f"import sys; sys.path[:] = {path!r}; from onnxcompress.runtime_worker import main; main()"
        stderr = tempfile.TemporaryFile()  # noqa: SIM115  closed by _end
        # A group of its own, so that Ctrl-C in the terminal reaches the parent alone, which then ends the child.
        group: dict[str, Any] = {"start_new_session": True}
        if sys.platform == "win32":
            group = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        process = subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, **group
        )
        self._process: subprocess.Popen[bytes] | None = process
        self._stdin = cast(IO[bytes], process.stdin)
        self._stdout = cast(IO[bytes], process.stdout)
        self._stderr: IO[bytes] = stderr
        self._end = weakref.finalize(self, _end, process, stderr)

    def _stop(self) -> None:
        self._end()
        self._process = None
        self._version = None


def _end(process: subprocess.Popen[bytes], stderr: IO[bytes]) -> None:
    process.kill()  # it holds nothing that a polite end would save
    for stream in (process.stdin, process.stdout, stderr):
        with contextlib.suppress(OSError):  # what was not yet written has no reader
            cast(IO[bytes], stream).close()
    process.wait()
