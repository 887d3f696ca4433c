"""`onnxcompress prune-scale`: prune depth, width and resolution together."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from onnxcompress.cli.options import FilePath
from onnxcompress.cli.reporting import check_report, report_option, with_weight_bytes, write_report
from onnxcompress.cli.terminal import print_rows
from onnxcompress.cli.training import (
    ABOVE_ZERO,
    POSITIVE,
    SHARE,
    loss_options,
    machine_options,
    optimizer_options,
    require_torch,
    sample_options,
    state_options,
    supervision_wishes,
    take,
    teaching_options,
    train_settings,
)
from onnxcompress.errors import RecipeError


@click.command("prune-scale")
@click.argument("source", metavar="IN", type=FilePath())
@click.option("-o", "--output", type=FilePath(), help="Where to write.")
@click.option(
    "--data", metavar="D", help="Samples to train on: .npz, folder of .npy or images, sklearn:digits:train, ..."
)
@click.option("--val", metavar="D", help="Samples to judge by, which the predictor is fed with; not those of a test.")
@click.option("--macs", metavar="0.5x", help="Prune until so many MACs are left; or 300M.")
@click.option(
    "--latency", metavar="0.5x", help="Prune until latency, measured here, is half of the original's; or 3.5ms."
)
@click.option("--axes", default="d,w,r", show_default=True, metavar="LIST", help="Depth, width, resolution.")
@click.option("--rounds", type=POSITIVE, default=4, show_default=True, help="Steps along each axis down to the goal.")
@click.option("--round-epochs", type=ABOVE_ZERO, default=1.0, show_default=True, help="Training after each step.")
@click.option(
    "--mixed", type=click.IntRange(min=0), default=3, show_default=True, help="Points pruned along several axes."
)
@click.option(
    "--candidates",
    type=POSITIVE,
    default=6,
    show_default=True,
    help="Networks that are trained for a while before one is chosen; 1 leaves it to the predictor.",
)
@click.option(
    "--finalists", type=POSITIVE, default=2, show_default=True, help="So many of them are trained to the end."
)
@click.option("--dry-run", is_flag=True, help="Print the points with expected cost and time, and do nothing.")
@click.option(
    "--rank-blocks",
    "depth_ranking",
    type=click.Choice(["fits", "probes"]),
    default="fits",
    show_default=True,
    help="Blocks go by what the outputs lose, or by what linear probes gain (needs labels).",
)
@click.option(
    "--rank-channels",
    "width_ranking",
    type=click.Choice(["data", "magnitude"]),
    default="data",
    show_default=True,
    help="Channels go by what layers read, or by scales of BatchNormalization.",
)
@click.option("--only", multiple=True, metavar="GLOB", help="Delete blocks of these names or kinds only.")
@click.option("--skip", multiple=True, metavar="GLOB", help="Do not delete blocks of these names or kinds.")
@click.option("--round-to", type=POSITIVE, default=8, show_default=True, help="Multiple of the numbers of channels.")
@click.option("--min-keep", type=SHARE, default=0.1, show_default=True, help="Share of a group's channels that stays.")
@click.option("--native-input", "native", is_flag=True, help="Let OUT take the smaller image itself.")
@click.option(
    "--calibration", type=click.IntRange(min=2), default=256, show_default=True, help="Samples for fits and statistics."
)
@click.option("--jobs", type=POSITIVE, metavar="N", help="Processes for the points [default: one a processor].")
@click.option("--dask", metavar="ADDRESS", help="Make the points on a Dask cluster, tcp://host:8786.")
@click.option("--teacher", type=FilePath(), help="Model to learn from [default: IN].")
@teaching_options
@click.option("--epochs", type=ABOVE_ZERO, default=10.0, show_default=True, help="For the result.")
@click.option("--steps", type=POSITIVE, help="Steps for the result, instead of epochs.")
@optimizer_options
@loss_options
@sample_options
@click.option("--tolerance", type=ABOVE_ZERO, default=1e-5, show_default=True, help="Of merged to unmerged.")
@state_options
@machine_options
@report_option
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
def command(source: Path, output: Path | None, as_json: bool, quiet: bool, report: Path | None, **wishes: Any) -> None:
    """Prune blocks, channels and pixels of IN together until a goal is reached, and write the result to OUT.

    Networks pruned along one axis alone, and a few pruned along several, say how much each axis costs; of all that keep
    the goal the best is made, fitted to what IN gave and trained. OUT is an ordinary model file with the interface of
    IN. A run that was stopped goes on with the same command.
    """
    _check(output, report, wishes)
    require_torch("prune-scale")
    from onnxcompress.train.scale.pruning import plan_scale, prune_scale

    check_report(report)
    options = _options(wishes)
    with _bar(quiet) as (told, stepped):
        if wishes["dry_run"]:
            plan = plan_scale(source, options, progress=told)
        else:
            assert output is not None
            found = prune_scale(source, output, options, progress=told, steps=stepped)
    if wishes["dry_run"]:
        _show_plan(plan, as_json, quiet)
    else:
        _show(found, as_json, quiet, report)


def _check(output: Path | None, report: Path | None, wishes: dict[str, Any]) -> None:
    if wishes["macs"] is not None and wishes["latency"] is not None:
        raise RecipeError("--macs and --latency are two goals: give one")
    if output is None and not wishes["dry_run"]:
        raise RecipeError("there is no output: give -o OUT, or --dry-run to see what would be done")
    if report is not None and wishes["dry_run"]:
        raise RecipeError("--report is for a run: with --dry-run take --json")


def _options(wishes: dict[str, Any]) -> Any:
    from onnxcompress.channels.options import parse_goal
    from onnxcompress.train.scale.options import ScaleOptions, parse_axes

    goal = None
    if wishes["macs"] is not None:
        goal = parse_goal("macs", wishes["macs"])
    elif wishes["latency"] is not None:
        goal = parse_goal("latency", wishes["latency"])
    return ScaleOptions(
        data=wishes["data"] or "",
        val=wishes["val"] or "",
        goal=goal,
        axes=parse_axes(wishes["axes"]),
        **take(wishes, "rounds", "mixed", "round_epochs", "candidates", "finalists", "depth_ranking"),
        **take(wishes, "width_ranking", "only", "skip"),
        **take(
            wishes, "round_to", "min_keep", "native", "teacher", "calibration", "jobs", "dask", "augment", "preprocess"
        ),
        **take(wishes, "limit", "tolerance", "threads", "checkpoint", "resume"),
        wishes=supervision_wishes(wishes),
        training=train_settings(wishes),
    )


@contextlib.contextmanager
def _bar(quiet: bool) -> Iterator[tuple[Callable[[Any], None], Callable[[Any], None] | None]]:
    """Where the run stands, on stderr: a bar with time left on a terminal, a line per point and validation else."""
    if quiet:
        yield (lambda now: None), None
        return
    if not sys.stderr.isatty():

        def line(now: Any) -> None:
            if now.total:
                left = "" if now.seconds_left is None else f", about {now.seconds_left:.0f} s left"
                print(f"point {now.done}/{now.total}  {now.text}{left}", file=sys.stderr)

        def step_line(now: Any) -> None:
            if now.figure is not None:
                print(f"step {now.step}/{now.total}  loss {now.loss:.4g}  validation {now.figure:.4g}", file=sys.stderr)

        yield line, step_line
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None, left="")

        def advance(now: Any) -> None:
            left = "" if now.seconds_left is None else f"{now.seconds_left / 60:.0f} min left"
            bar.update(task, total=now.total or None, completed=now.done, description=escape(now.text), left=left)

        def step(now: Any) -> None:
            best = "" if now.best_figure is None else f"  best {now.best_figure:.4g}"
            bar.update(task, total=now.total, completed=now.step, description=f"loss {now.loss:.4g}{best}", left="")

        yield advance, step


def _show_plan(plan: Any, as_json: bool, quiet: bool) -> None:
    from onnxcompress.train.scale.describing import POINT_HEADER, plan_lines, point_rows

    if as_json:
        click.echo(json.dumps(plan.as_dict(), indent=1))
    elif not quiet:
        print_rows(POINT_HEADER[:-2], [row[:-2] for row in point_rows(plan.points)])
        for line in plan_lines(plan):
            click.echo(line)


def _show(found: Any, as_json: bool, quiet: bool, report: Path | None) -> None:
    from onnxcompress.train.scale.describing import FIGURE_HEADER, figure_rows, result_lines, result_markdown

    if report is not None:
        models = (found.source, found.output)
        content = with_weight_bytes(found.as_dict(), *models)
        write_report(report, content, "prune-scale", *models, as_markdown=lambda: result_markdown(found))
    if as_json:
        click.echo(json.dumps(found.as_dict(), indent=1))
    elif not quiet:
        print_rows(FIGURE_HEADER, figure_rows(found))
        for line in result_lines(found):
            click.echo(line)
