"""What the targets have in common: what is asked for, what is found, the model's files and the templates."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files as resource_files
from pathlib import Path
from typing import Any

from onnx import ModelProto

from onnxcompress.deployment.samples import CheckedSamples
from onnxcompress.deployment.staging import MANIFEST
from onnxcompress.errors import OutputError, RecipeError
from onnxcompress.measure import gzip_bytes
from onnxcompress.model_io import external_files
from onnxcompress.runtime import Runtime

TARGETS = ("onnxruntime", "ort-format", "web")
DEFAULT_TOLERANCE = 1e-4
LOW_MEMORY = {"optimization.constant_folding_max_output_size_in_bytes": "65536"}
PROGRAM_TIMEOUT_S = 600.0
OWN_FILES = ("run.py", "index.html", "page.mjs", "model.mjs", "check.mjs", "sample.bin", MANIFEST)


@dataclass(frozen=True)
class DeployOptions:
    """What a user can ask of ``deploy``.

    Args:
        target: "onnxruntime", "ort-format" or "web".
        data: Samples, see ``onnxcompress.data``; seeded inputs without.
        preprocess: How images are prepared.
        input_shapes: Sizes of seeded inputs.
        tolerance: Largest max|d| / max|y| of an output on the target.
        weights: For ort-format: "packed" keeps codebooks, "folded" stores what they decode to.
        ort_web: Folder of the npm package onnxruntime-web, or one whose node_modules has it; fetched without.
        check: Run the result where it is to run. Only the page of "web" can be left unchecked.
        force: Replace an earlier deployment.
        seed: Same seed, same inputs.
    """

    target: str
    data: str | None = None
    preprocess: str | None = None
    input_shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    tolerance: float = DEFAULT_TOLERANCE
    weights: str | None = None
    ort_web: Path | None = None
    check: bool = True
    force: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise RecipeError(f"target {self.target!r}: must be one of {', '.join(TARGETS)}")
        if self.weights not in (None, "packed", "folded"):
            raise RecipeError(f"weights {self.weights!r}: must be packed or folded")
        for option, given, target in (
            ("--weights", self.weights is not None, "ort-format"),
            ("--ort-web", self.ort_web is not None, "web"),
            ("--no-check", not self.check, "web"),
        ):
            if given and self.target != target:
                raise RecipeError(f"{option} is for --target {target}, not {self.target}")


@dataclass(frozen=True)
class Setting:
    """A way to run the result, measured.

    Attributes:
        name: What it is called.
        error: Largest max|d| / max|y| of any output, or share of integers that differ.
        load_ms: Time to create a session.
        latency_ms: Median of a run on the first sample.
        size_bytes: Of the model in this setting.
        gzip_bytes: The same after gzip; None where it was not measured.
        peak_memory_bytes: What loading and one run added at most; None where it was not measured.
    """

    name: str
    error: float
    load_ms: float
    latency_ms: float
    size_bytes: int
    gzip_bytes: int | None = None
    peak_memory_bytes: int | None = None


@dataclass(frozen=True)
class Deployment:
    """What was written.

    Attributes:
        source: The model.
        folder: Where it is.
        target: For what.
        runtime: Name and version of what ran it; None where nothing did.
        files: Bytes by name.
        settings: Ways to run it; the first is the one that was asked for.
        samples: What it was run on, one line each.
        allowed: Largest error that an output may have.
        notes: What the user should know.
    """

    source: Path
    folder: Path
    target: str
    runtime: str | None
    files: dict[str, int]
    settings: list[Setting]
    samples: list[str]
    allowed: float
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "source": str(self.source), "folder": str(self.folder)}


@dataclass
class Work:
    """A deployment being made.

    Attributes:
        model: The model.
        proto: The same, without external data.
        codebooks: Whether nodes decode weights in it.
        folder: Where to write.
        place: Where it will be when it is done.
        runtime: Where models run.
        samples: Inputs with their outputs.
        options: The user's wishes.
        manifest: What ``deployment.json`` will hold.
        notes: What the user should know.
    """

    model: Path
    proto: ModelProto
    codebooks: bool
    folder: Path
    place: Path
    runtime: Runtime
    samples: CheckedSamples
    options: DeployOptions
    manifest: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    def copy_model(self) -> None:
        """Copy the model and its external data, byte for byte.

        Raises:
            OutputError: A data file has a name that is taken.
        """
        home = self.model.resolve().parent
        data = sorted({file.resolve().relative_to(home).as_posix() for file in external_files(self.proto, home)})
        for name in (self.model.name, *data):
            if name in OWN_FILES or name.startswith("ort/"):
                raise OutputError(f"the model's file {name} has the name of a file that deploy writes; rename it")
            place = self.folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(home / name, place)
        self.manifest |= {"model": self.model.name, "external_data": data}

    def add_template(self, name: str) -> None:
        """Write one of our files."""
        stored = f"{name}.txt" if name.endswith(".py") else name  # a .py file among the package's is a module
        text = (resource_files("onnxcompress.deployment") / "templates" / stored).read_text(encoding="utf-8")
        (self.folder / name).write_text(text, encoding="utf-8")

    def sizes(self) -> dict[str, int]:
        """Bytes by file."""
        found = (path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in sorted(found)}

    def model_bytes(self) -> tuple[int, int | None]:
        """Bytes of the deployed model with its data, and of the same after gzip."""
        places = [self.folder / name for name in (self.manifest["model"], *self.manifest["external_data"])]
        packed = [gzip_bytes(place) for place in places]
        known = [size for size in packed if size is not None]
        return sum(place.stat().st_size for place in places), sum(known) if len(known) == len(packed) else None


def run_program(command: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a program in a folder, to its end.

    Raises:
        RecipeError: It took too long.
    """
    try:
        return subprocess.run(
            command, cwd=folder, capture_output=True, text=True, errors="replace", timeout=PROGRAM_TIMEOUT_S
        )
    except subprocess.TimeoutExpired as error:
        raise RecipeError(f"{Path(command[0]).name} took more than {PROGRAM_TIMEOUT_S:.0f} s") from error


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """What a program said last, for an error's one line."""
    lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    return lines[-1] if lines else f"exit code {done.returncode}"
