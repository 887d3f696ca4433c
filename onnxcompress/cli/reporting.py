"""``--report`` of every verb: what a report file says beyond what the run itself gave."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from onnxcompress.cli.options import FilePath

WEIGHTS_LISTED = 200

report_option = click.option(
    "--report",
    type=FilePath(),
    metavar="FILE",
    help="Write a report: FILE.html (one page, nothing to load), FILE.md or FILE.json.",
)


def check_report(report: Path | None) -> None:
    """Refuse, before the work, a report that cannot be written."""
    if report is None:
        return
    from onnxcompress.optimizer import check_target
    from onnxcompress.report import check_suffix

    check_suffix(report)
    if report.exists() and not (report.is_file() or report.is_dir()):
        return  # /dev/stdout and its like are written to, not replaced
    check_target(report)


def with_provenance(content: Mapping[str, Any], verb: str, *models: str | Path | None) -> dict[str, Any]:
    """A run's dictionary with the command that repeats it and the models' digests."""
    from onnxcompress.report import provenance_of

    given = (click.get_current_context().find_root().obj or {}).get("arguments")
    command = "" if given is None else shlex.join(["onnxcompress", *given])
    return {**content, "run": provenance_of(verb, command, [Path(model) for model in models if model is not None])}


def with_weight_bytes(
    content: Mapping[str, Any], before: str | Path | None, after: str | Path | None
) -> dict[str, Any]:
    """A run's dictionary with the bytes of the largest weights of the models before and after."""
    from onnxcompress.inspection import largest_initializers

    if after is None:
        return dict(content)
    sides = {"after": after}
    if before is not None and Path(before).resolve() != Path(after).resolve():  # otherwise it has been replaced
        sides = {"before": before, **sides}
    found = {side: largest_initializers(path, WEIGHTS_LISTED) for side, path in sides.items()}
    return {**content, "weight_bytes": found}


def write_report(
    report: Path,
    content: Mapping[str, Any],
    verb: str,
    *models: str | Path | None,
    as_markdown: Callable[[], str] | None = None,
) -> None:
    """Write the report of one run.

    Args:
        report: Where.
        content: What the run gave.
        verb: Of the command line.
        models: Files that were read or written.
        as_markdown: Its Markdown; made of the page when None.
    """
    from onnxcompress.report import write_as

    write_as(report, with_provenance(content, verb, *models), as_markdown, verb=verb)
