"""`onnxcompress prune-scale`: prune depth, width and resolution together."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from onnxcompress.cli.options import MOST_THREADS, FilePath, Number
from onnxcompress.cli.reporting import check_report, report_option, with_weight_bytes, write_report
from onnxcompress.cli.terminal import print_rows
from onnxcompress.cli.training import POSITIVE, SHARE, optimizer_options
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
@click.option(
    "--round-epochs", type=Number(0, min_open=True), default=1.0, show_default=True, help="Training after each step."
)
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
@click.option("--labels", is_flag=True, help="Learn from labels; alone, from nothing else.")
@click.option("--distill", is_flag=True, help="Learn from the teacher's outputs; alone, from nothing else.")
@click.option("--target-output", metavar="NAME", help="Output that labels and metric are for; the first by default.")
@click.option("--metric", metavar="M", help="Figure to judge by: top1, mse, agreement, ..., or module:function.")
@click.option("--epochs", type=Number(0, min_open=True), default=10.0, show_default=True, help="For the result.")
@click.option("--steps", type=POSITIVE, help="Steps for the result, instead of epochs.")
@optimizer_options
@click.option(
    "--temperature", type=Number(0, min_open=True), default=2.0, show_default=True, help="Of distilled logits."
)
@click.option(
    "--distill-weight", type=Number(0, 1), default=0.5, show_default=True, help="Of the teacher, with labels."
)
@click.option("--augment", default="", metavar="LIST", help="Vary images: flip, shift:PIXELS, as in flip,shift:2.")
@click.option("--preprocess", metavar="SPEC", help="How images become inputs: size=224,layout=nchw,mean=...,std=...")
@click.option("--limit", type=POSITIVE, help="Use at most so many samples of each source.")
@click.option("--eval-every", type=POSITIVE, metavar="STEPS", help="Steps between validations [default: an epoch].")
@click.option("--patience", type=POSITIVE, help="End after so many validations without a new best.")
@click.option(
    "--tolerance", type=Number(0, min_open=True), default=1e-5, show_default=True, help="Of merged to unmerged."
)
@click.option("--checkpoint", type=FilePath(), metavar="DIR", help="Where the state is kept [default: OUT.checkpoint].")
@click.option("--resume/--no-resume", default=True, help="Go on from a checkpoint that is there (default).")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option(
    "--precision",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Of the operators that gain by it; auto is float32 on a CPU.",
)
@click.option(
    "--threads", type=click.IntRange(0, MOST_THREADS), default=0, help="Of torch; latency is timed with 1 if 0."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Same seed, same result.")
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
    with _torch():
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


@contextlib.contextmanager
def _torch() -> Iterator[None]:
    try:
        import torch  # noqa: F401  # asked for before anything of train is imported
    except ImportError as error:
        raise RecipeError("prune-scale needs torch: pip install onnxcompress[train]") from error
    yield


def _check(output: Path | None, report: Path | None, wishes: dict[str, Any]) -> None:
    if wishes["macs"] is not None and wishes["latency"] is not None:
        raise RecipeError("--macs and --latency are two goals: give one")
    if output is None and not wishes["dry_run"]:
        raise RecipeError("there is no output: give -o OUT, or --dry-run to see what would be done")
    if report is not None and wishes["dry_run"]:
        raise RecipeError("--report is for a run: with --dry-run take --json")


def _options(wishes: dict[str, Any]) -> Any:
    from onnxcompress.channels.options import parse_goal
    from onnxcompress.train.losses import LossSettings
    from onnxcompress.train.scale.options import ScaleOptions, parse_axes
    from onnxcompress.train.settings import TrainSettings
    from onnxcompress.train.supervision import Wishes

    def take(*names: str, **renamed: str) -> dict[str, Any]:
        return {name: wishes[name] for name in names} | {ours: wishes[name] for ours, name in renamed.items()}

    goal = None
    if wishes["macs"] is not None:
        goal = parse_goal("macs", wishes["macs"])
    elif wishes["latency"] is not None:
        goal = parse_goal("latency", wishes["latency"])
    losses = LossSettings(**take("temperature", "distill_weight", smoothing="label_smoothing"))
    training = TrainSettings(
        **take("epochs", "steps", "batch", "accumulate", "optimizer", "weight_decay", "momentum", "schedule", "warmup"),
        **take("clip_norm", "seed", "eval_every", "patience", "precision", "device"),
        **take(learning_rate="lr", ema_decay="ema"),
    )
    return ScaleOptions(
        data=wishes["data"] or "",
        val=wishes["val"] or "",
        goal=goal,
        axes=parse_axes(wishes["axes"]),
        **take("rounds", "mixed", "round_epochs", "candidates", "finalists", "depth_ranking"),
        **take("width_ranking", "only", "skip"),
        **take("round_to", "min_keep", "native", "teacher", "calibration", "jobs", "dask", "augment", "preprocess"),
        **take("limit", "tolerance", "threads", "checkpoint", "resume"),
        wishes=Wishes(losses=losses, **take("labels", "distill", "metric", output="target_output")),
        training=training,
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
