"""Report files: the ending of the name says which form."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxcompress.errors import OutputError, RecipeError
from onnxcompress.report.optimization import markdown
from onnxcompress.report.quantization import quantization_markdown


def write(path: Path, reports: Sequence[Mapping[str, Any]]) -> None:
    """Write reports to a ``.json`` or ``.md`` file.

    Raises:
        RecipeError: Another suffix.
        OutputError: The file cannot be written.
    """
    write_as(path, reports[0] if len(reports) == 1 else list(reports), lambda: markdown(reports))


def write_as(path: Path, content: Any, as_markdown: Callable[[], str]) -> None:
    """Write a report as JSON or as Markdown, as the name of the file says.

    Raises:
        RecipeError: Another suffix.
        OutputError: The file cannot be written.
    """
    text = as_markdown() if check_suffix(path) == ".md" else json.dumps(content, indent=1)
    try:
        path.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write the report {path}: {error.strerror}") from error


def check_suffix(path: Path) -> str:
    """The report's suffix.

    Raises:
        RecipeError: Neither ``.json`` nor ``.md``.
    """
    suffix = path.suffix.lower()
    if suffix not in (".json", ".md"):
        raise RecipeError(f"report {path}: the name must end in .json or .md")
    return suffix


def write_quantization(path: Path, report: Mapping[str, Any]) -> None:
    """Write the report of a quantization to a ``.json`` or ``.md`` file.

    Raises:
        RecipeError: Another suffix.
        OutputError: The file cannot be written.
    """
    write_as(path, report, lambda: quantization_markdown(report))
