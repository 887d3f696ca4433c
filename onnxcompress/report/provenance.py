"""Where a figure comes from: versions, machine, files, and the command."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("onnxcompress", "onnx", "onnxruntime", "onnx-graphsurgeon", "numpy")
# Named where they took part in what is reported.
PACKAGES_IF_LOADED = ("torch",)


def environment() -> dict[str, str]:
    """Versions and machine, so that a figure can be placed."""
    found = {}
    for name in (*PACKAGES, *(name for name in PACKAGES_IF_LOADED if name in sys.modules)):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    machine = f"{platform.system()} {platform.machine()}"
    return {**found, "python": platform.python_version(), "machine": machine, "processor": _processor()}


def _processor() -> str:
    """The processor's name and how many of it this process may use."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass  # another system; its own name is good enough
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{name}, {count} usable" if name else f"{count} usable"


def provenance_of(verb: str, command: str, files: Iterable[Path]) -> dict[str, Any]:
    """What a report file says of its own making.

    Args:
        verb: Of the command line.
        command: The whole of it, as a shell reads it; "" where it is not known.
        files: Models that were read or written; those that are gone are left out.
    """
    return {
        "verb": verb,
        "command": command,
        "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "files": [_fingerprint(path) for path in dict.fromkeys(files) if path.is_file()],
    }


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with open(path, "rb") as source:
        while block := source.read(1 << 20):
            digest.update(block)
    return {"path": str(path), "bytes": path.stat().st_size, "sha256": digest.hexdigest()}
