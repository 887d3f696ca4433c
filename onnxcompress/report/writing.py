"""Report files: the ending of the name says which form, and a file appears only when it is complete."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxcompress.errors import OutputError, RecipeError
from onnxcompress.report.optimization import markdown
from onnxcompress.report.pages import build
from onnxcompress.report.provenance import environment
from onnxcompress.report.quantization import quantization_markdown
from onnxcompress.report.rendering import to_html, to_markdown

SUFFIXES = (".html", ".json", ".md")


def write(path: Path, reports: Sequence[Mapping[str, Any]]) -> None:
    """Write what ``optimize`` did to a ``.html``, ``.json`` or ``.md`` file.

    Raises:
        RecipeError: Another suffix.
        OutputError: The file cannot be written.
    """
    content = reports[0] if len(reports) == 1 else list(reports)
    write_as(path, content, lambda: markdown(reports), verb="optimize")


def write_quantization(path: Path, report: Mapping[str, Any]) -> None:
    """Write what ``quantize`` did to a ``.html``, ``.json`` or ``.md`` file.

    Raises:
        RecipeError: Another suffix.
        OutputError: The file cannot be written.
    """
    write_as(path, report, lambda: quantization_markdown(report), verb="quantize")


def write_as(path: Path, content: Any, as_markdown: Callable[[], str] | None = None, *, verb: str = "") -> None:
    """Write a report as a page, as JSON or as Markdown, as the name of the file says.

    Args:
        path: Where to write; the file appears only when it is complete.
        content: The dictionary of one run, or a list of them.
        as_markdown: Its Markdown; made of the page when None.
        verb: Whose page it is; one that has none, and "", gives everything as tables.

    Raises:
        RecipeError: Another suffix.
        OutputError: The file cannot be written.
    """
    suffix = check_suffix(path)
    several = isinstance(content, list)
    found = [
        {**one, "environment": one.get("environment") or environment()} for one in (content if several else [content])
    ]
    if suffix == ".json":
        text = json.dumps(found if several else found[0], indent=1)
    elif suffix == ".md" and as_markdown is not None:
        text = as_markdown()
    else:
        pages = [build(one, verb) for one in found]
        text = to_html(pages) if suffix == ".html" else to_markdown(pages)
    try:
        _replace(path, text.rstrip("\n") + "\n")
    except OSError as error:
        raise OutputError(f"cannot write the report {path}: {error.strerror}") from error


def _replace(path: Path, text: str) -> None:
    """Put a complete file in the place of ``path``; what is no file, such as /dev/stdout, is written to."""
    encoded = text.encode("utf-8", errors="replace")  # a name may hold halves of characters
    if path.exists() and not path.is_file():
        path.write_bytes(encoded)
        return
    target = path.resolve()  # a link stays one
    handle, name = tempfile.mkstemp(prefix=".onnxcompress-", suffix=path.suffix, dir=target.parent)
    staged = Path(name)
    try:
        with open(handle, "wb") as out:
            out.write(encoded)
        mask = os.umask(0)
        os.umask(mask)
        staged.chmod(0o666 & ~mask)
        staged.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            staged.unlink()
        raise


def check_suffix(path: Path) -> str:
    """The report's suffix.

    Raises:
        RecipeError: Neither ``.html`` nor ``.json`` nor ``.md``.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise RecipeError(f"report {path}: the name must end in .html, .json or .md")
    return suffix
