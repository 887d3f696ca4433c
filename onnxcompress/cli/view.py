"""`onnxcompress view`: Netron on one model or two."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxcompress.cli.options import FilePath
from onnxcompress.cli.reporting import check_report, report_option, with_weight_bytes, write_report
from onnxcompress.errors import RecipeError

if TYPE_CHECKING:
    from onnxcompress.view.changes import NodeChange

COMPARED = ("size_bytes", "nodes", "parameters", "macs", "operators")


@click.command("view")
@click.argument("models", nargs=-1, required=True, metavar="A [B]", type=FilePath())
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Port; any free one by default.")
@click.option("--browser/--no-browser", default=True, help="Open the page (default).")
@report_option
def command(models: tuple[Path, ...], port: int, browser: bool, report: Path | None) -> None:
    """Show a model in Netron, or two side by side with a list of the nodes that differ: a click shows one in both.

    Nodes that a pass made have its name among their metadata.
    """
    from onnxcompress.view import Viewer

    if len(models) > 2:
        raise RecipeError(f"{len(models)} models given, one or two can be shown")
    check_report(report)
    with Viewer(models, port=port) as viewer:
        if report is not None:
            write_report(report, _content(models, viewer.changes), "view", *models)
        click.echo(f"{viewer.url} (Ctrl-C ends)")
        sys.stdout.flush()
        if browser:
            click.launch(viewer.url)
        with contextlib.suppress(KeyboardInterrupt):
            viewer.closed.wait()


def _content(models: Sequence[Path], changes: Sequence[NodeChange] | None) -> dict[str, Any]:
    """What is in one model, or what is different in the second of two."""
    from onnxcompress.inspection import inspect_model

    if len(models) == 1:
        return inspect_model(models[0])
    before, after = (inspect_model(model, download=False) for model in models)
    content = {
        "input": str(models[0]),
        "output": str(models[1]),
        "before": {key: before[key] for key in COMPARED},
        "after": {key: after[key] for key in COMPARED},
        "changes": [asdict(one) for one in changes or ()],
    }
    return with_weight_bytes(content, *models)
