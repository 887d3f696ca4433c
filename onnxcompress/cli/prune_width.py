"""`onnxcompress prune-width`: fewer channels, within a budget of multiply-accumulates or of latency."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from onnxcompress.cli.options import LARGEST_SIZE, MOST_THREADS, FilePath, Number
from onnxcompress.cli.reporting import check_report, report_option, with_weight_bytes, write_report
from onnxcompress.cli.terminal import print_rows
from onnxcompress.errors import RecipeError

POSITIVE = click.IntRange(min=1)
GROUP_HEADER = ("group", "channels", "kept", "width")


@click.command("prune-width")
@click.argument("source", metavar="IN", type=FilePath())
@click.option("-o", "--output", type=FilePath(), help="Where to write.")
@click.option("--macs", metavar="0.7x", help="Prune until so many MACs are left; or 300M.")
@click.option("--latency", metavar="0.7x", help="Prune until latency, measured here, is 0.7 of IN's; or 3.5ms.")
@click.option(
    "--data",
    metavar="D",
    help="Calibration samples, without labels: .npz, folder of .npy or images, sklearn:digits:train, ... Channels are "
    "ranked by what is lost with them, and weights that stay make up for those that go.",
)
@click.option(
    "--ranking",
    type=click.Choice(["auto", "data", "magnitude"]),
    default="auto",
    show_default=True,
    help="What says which channels go: auto is data where there is any; magnitude is BatchNormalization scales.",
)
@click.option(
    "--compensate/--no-compensate", default=True, help="Fit the weights that stay on --data (default with --data)."
)
@click.option("--round-to", type=POSITIVE, default=8, show_default=True, help="Keep multiples of so many channels.")
@click.option(
    "--min-keep", type=Number(0, 1, max_open=True), default=0.1, show_default=True, help="Share of a group that stays."
)
@click.option("--skip", multiple=True, metavar="GLOB", help="Leave the channels that these nodes make.")
@click.option("--only", multiple=True, metavar="GLOB", help="Prune the channels that these nodes make, and no others.")
@click.option(
    "--list-groups", is_flag=True, help="Print the channel groups, which can be pruned and why others cannot."
)
@click.option("--dry-run", is_flag=True, help="Print what would go, with exact MACs, and write nothing.")
@click.option("--val", metavar="D", help="Labelled samples to measure on.")
@click.option("--metric", metavar="M", help="Figure on --val [default: top1]; as for validate.")
@click.option(
    "--optimize/--no-optimize",
    default=True,
    help="Run the passes of `optimize` on the result (default); without, BatchNormalization stays for training.",
)
@click.option("--limit", type=POSITIVE, help="Use at most so many samples of --data [default: 256].")
@click.option("--batch", type=click.IntRange(1, LARGEST_SIZE), help="Samples in a run of the model.")
@click.option("--preprocess", metavar="SPEC", help="How images become inputs: size=224,layout=nchw,mean=...,std=...")
@click.option("--threads", type=click.IntRange(0, MOST_THREADS), default=1, show_default=True, help="For timing.")
@click.option("--custom-ops", type=FilePath(), help="Shared library with custom operators.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Same seed, same result.")
@report_option
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
def command(
    source: Path,
    output: Path | None,
    macs: str | None,
    latency: str | None,
    list_groups: bool,
    dry_run: bool,
    report: Path | None,
    as_json: bool,
    quiet: bool,
    **wishes: Any,
) -> None:
    """Remove channels of IN until a goal is reached, and write the result to OUT.

    Channels that belong together, such as those of a residual stream, go together; what an operator needs whole stays,
    and --list-groups says why. OUT is an ordinary model file with the interface of IN, and computes what IN does with
    these channels at zero: that is checked. No training is done here: to win back what is lost, go on with
    `onnxcompress finetune OUT --teacher IN --distill`.
    """
    from onnxcompress.channels.options import WidthOptions, parse_goal

    _check(output, macs, latency, list_groups, dry_run)
    check_report(report)
    goal = None
    if macs is not None:
        goal = parse_goal("macs", macs)
    elif latency is not None:
        goal = parse_goal("latency", latency)
    options = WidthOptions(**wishes, goal=None if list_groups else goal)
    from onnxcompress.channels.pruning import prune_width

    with _spinner(quiet) as say:
        found = prune_width(source, None if list_groups or dry_run else output, options, say=say)
    if report is not None:
        from onnxcompress.channels.describing import result_markdown

        content = with_weight_bytes(found.as_dict(), source, found.output)
        write_report(report, content, "prune-width", source, found.output, as_markdown=lambda: result_markdown(found))
    if as_json:
        click.echo(json.dumps(found.as_dict(), indent=1))
    elif not quiet:
        _show(found, is_list=list_groups)


def _check(output: Path | None, macs: str | None, latency: str | None, list_groups: bool, dry_run: bool) -> None:
    if macs is not None and latency is not None:
        raise RecipeError("--macs and --latency are two goals: give one")
    if list_groups and dry_run:
        raise RecipeError("--list-groups and --dry-run are two things to print: give one")
    if not list_groups and macs is None and latency is None:
        raise RecipeError("there is no goal: give --macs 0.7x or --latency 0.7x, or --list-groups to see what can go")
    if output is None and not (list_groups or dry_run):
        raise RecipeError("there is no output: give -o OUT, or --dry-run to see what would be done")


@contextlib.contextmanager
def _spinner(quiet: bool) -> Iterator[Callable[[str], None]]:
    """What is being done, on a terminal."""
    if quiet or not sys.stderr.isatty():
        yield lambda line: None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda line: bar.update(task, description=escape(line))


def _show(found: Any, *, is_list: bool) -> None:
    from onnxcompress.channels.describing import frozen_lines, group_rows, result_lines

    print_rows(GROUP_HEADER, group_rows(found))
    for line in [*frozen_lines(found), *result_lines(found, is_list=is_list)]:
        click.echo(line)
