"""`onnxcompress view`: Netron on one model or two."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import click

from onnxcompress.cli.options import FilePath
from onnxcompress.errors import RecipeError


@click.command("view")
@click.argument("models", nargs=-1, required=True, metavar="A [B]", type=FilePath())
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Port; any free one by default.")
@click.option("--browser/--no-browser", default=True, help="Open the page (default).")
def command(models: tuple[Path, ...], port: int, browser: bool) -> None:
    """Show a model in Netron, or two side by side with a list of the nodes that differ: a click shows one in both.

    Nodes that a pass made have its name among their metadata.
    """
    from onnxcompress.view import Viewer

    if len(models) > 2:
        raise RecipeError(f"{len(models)} models given, one or two can be shown")
    with Viewer(models, port=port) as viewer:
        click.echo(f"{viewer.url} (Ctrl-C ends)")
        sys.stdout.flush()
        if browser:
            click.launch(viewer.url)
        with contextlib.suppress(KeyboardInterrupt):
            viewer.closed.wait()
