"""Steps that were tried: each keeps its file and its figures, so that a run that was stopped does none of them twice.

Decisions follow from the figures alone. Those of latency were measured, and are taken from what is kept: a run that
goes on decides as the first one would have.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onnxcompress.codebook.resuming import Checkpoint
from onnxcompress.compression.meter import Meter
from onnxcompress.compression.point import Point, point_of
from onnxcompress.compression.recipe import Step
from onnxcompress.compression.settings import Shared
from onnxcompress.compression.steps import Say, run_step
from onnxcompress.errors import EquivalenceError, OnnxCompressError, OutputError
from onnxcompress.model_io import read_proto
from onnxcompress.runtime import Runtime
from onnxcompress.validation.signature import interface_differences

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Attempt:
    """One step that was tried; number 0 is the original.

    Attributes:
        number: In the order of the run.
        step: What was done.
        base: The attempt whose file it began with; None for the original.
        why: It was tried.
        path: Its file; None where it failed.
        point: Its figures; None where it failed.
        failure: Why it could not be done.
        summary: What it did, in words.
        repeat: Settings that do the same without a search that measures.
        seconds: That it took, measuring included.
        kept: Whether the result stands on it.
        verdict: Why, or why not.
    """

    number: int
    step: Step
    base: Attempt | None
    why: str
    path: Path | None = None
    point: Point | None = None
    failure: str = ""
    summary: list[str] = field(default_factory=list)
    repeat: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    kept: bool = False
    verdict: str = ""

    @property
    def chain(self) -> list[Attempt]:
        """The attempts from the original's first step to this one."""
        return [] if self.base is None else [*self.base.chain, self]

    @property
    def found(self) -> Point:
        """Its figures, where it did not fail."""
        assert self.point is not None
        return self.point

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "number": self.number,
            "verb": self.step.verb,
            "settings": {**self.step.settings},
            "on": None if self.base is None else self.base.number,
            "why": self.why,
            "summary": self.summary,
            "kept": self.kept,
            "verdict": self.verdict,
            "failure": self.failure,
            "seconds": round(self.seconds, 2),
            "figures": None if self.point is None else self.point.as_dict(),
        }


def _failed(why: str, started: float) -> dict[str, Any]:
    return {"failure": why, "summary": [], "repeat": {}, "seconds": time.monotonic() - started}


class Attempts:
    """Tries steps, and keeps what they gave.

    Args:
        source: The original.
        shared: What all steps are told.
        meter: Measures against the original.
        checkpoint: Where files and figures are kept.
        runtime: Where models run.
        say: Told what is being done.
        done: Called with each step that was tried.
    """

    def __init__(
        self,
        source: Path,
        shared: Shared,
        meter: Meter,
        checkpoint: Checkpoint,
        runtime: Runtime,
        say: Say,
        done: Callable[[Attempt], None] | None = None,
    ) -> None:
        assert checkpoint.folder is not None
        self.shared, self.meter, self.checkpoint, self.folder = shared, meter, checkpoint, checkpoint.folder
        self.runtime, self.say, self.done = runtime, say, done or (lambda attempt: None)
        self.proto = read_proto(source)
        self.original = Attempt(0, Step("original"), None, "", source, repeat={})
        kept = checkpoint.load("original")
        if kept is None:
            say("measuring the original")
            kept = meter.measure(source).as_dict()
            checkpoint.save("original", kept)
        self.original.point = point_of(kept)
        self.tried: list[Attempt] = []

    def attempt(self, step: Step, base: Attempt, why: str, *, planned: bool = True) -> Attempt:
        """Do a step on the file of another, and measure it.

        Args:
            step: What to do.
            base: Where to begin.
            why: For the report.
            planned: What cannot be done is a failed attempt; of a step that the user wrote, only what is out of reach.

        Raises:
            OnnxCompressError: Of a step of the user's own that is wrong.
        """
        for earlier in self.tried:
            if earlier.step == step and earlier.base is base:
                return earlier
        number = len(self.tried) + 1
        path = self.folder / f"{number:02}-{step.verb}.onnx"
        found = Attempt(number, step, base, why, path)
        self.tried.append(found)
        identity = {"verb": step.verb, "settings": {**step.settings}, "on": base.number}
        name = f"step-{number:02}"
        kept = self.checkpoint.load(name)
        if not isinstance(kept, dict) or kept.get("identity") != identity or not (kept["failure"] or path.exists()):
            kept = {"identity": identity, **self._do(found, planned)}
            self.checkpoint.save(name, kept)
        found.failure, found.summary, found.repeat = kept["failure"], kept["summary"], kept["repeat"]
        found.seconds = kept["seconds"]
        if found.failure:
            found.path, found.verdict = None, found.failure
        else:
            found.point = point_of(kept["figures"])
        self.done(found)
        return found

    def _do(self, found: Attempt, planned: bool) -> dict[str, Any]:
        started = time.monotonic()
        assert found.base is not None and found.base.path is not None and found.path is not None
        try:
            done = run_step(found.step, found.base.path, found.path, self.shared, self.runtime, self.say)
            different = interface_differences(self.proto, read_proto(found.path))
            if different:
                raise EquivalenceError(f"the interface has changed: {different[0]}")
            self.say(f"{found.step.verb}: measuring")
            figures = self.meter.measure(found.path).as_dict()
        except OnnxCompressError as error:
            if isinstance(error, OutputError) or not (planned or error.exit_code == 1):
                raise
            return _failed(str(error), started)
        except Exception as error:  # a bug of one step must not cost the user the others, and the report names it
            if not planned or isinstance(error, OSError) or os.environ.get("ONNXCOMPRESS_TRACEBACK"):
                raise
            logger.warning("%s: internal error, %s: %s", found.step.text, type(error).__name__, error)
            return _failed(f"internal error, {type(error).__name__}: {error}", started)
        seconds = time.monotonic() - started
        return {"failure": "", "summary": done.summary, "repeat": done.repeat, "seconds": seconds, "figures": figures}
