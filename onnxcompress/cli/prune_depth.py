"""`onnxcompress prune-depth`: make whole blocks one operator each, or nothing."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from onnxcompress.cli.options import FilePath, Number
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

STAGES = "supernet,search,train"


@click.command("prune-depth")
@click.argument("source", metavar="IN", type=FilePath())
@click.option("-o", "--output", type=FilePath(), help="Where to write.")
@click.option(
    "--data", metavar="D", help="Samples to train on: .npz, folder of .npy or images, sklearn:digits:train, ..."
)
@click.option("--val", metavar="D", help="Samples to judge subnets and weights by.")
@click.option("--blocks", metavar="N", help="Prune so many blocks.")
@click.option(
    "--latency", metavar="0.7x", help="Prune until latency, measured here, is 0.7 of the original's; or 3.5ms."
)
@click.option("--macs", metavar="0.5x", help="Prune until so many MACs are left; or 300M.")
@click.option("--stages", default=STAGES, show_default=True, metavar="LIST", help="What to do.")
@click.option("--list-blocks", is_flag=True, help="Print the blocks with what each would save, and do nothing.")
@click.option("--dry-run", is_flag=True, help="Print what would be done, with expected figures and time.")
@click.option("--block", "named", multiple=True, metavar="FIRST:LAST", help="Offer the convolutions between two nodes.")
@click.option("--only", multiple=True, metavar="GLOB", help="Offer the blocks of these names or kinds only.")
@click.option("--skip", multiple=True, metavar="GLOB", help="Do not offer the blocks of these names or kinds.")
@click.option(
    "--delete", multiple=True, metavar="GLOB", help="Delete the blocks of these names or kinds, not merge them."
)
@click.option(
    "--deletions/--no-deletions", default=True, help="Whether a search for latency or MACs may delete blocks (default)."
)
@click.option(
    "--activation",
    type=click.Choice(["nothing", "batchnorm"]),
    default="nothing",
    show_default=True,
    help="What inner activations become.",
)
@click.option(
    "--search",
    type=click.Choice(["auto", "ga", "exhaustive", "greedy", "random"]),
    default="auto",
    show_default=True,
    help="How to look for blocks; auto tries all sets of up to 12 blocks.",
)
@click.option("--population", type=click.IntRange(min=2), default=20, show_default=True, help="Of ga.")
@click.option("--generations", type=click.IntRange(min=0), default=10, show_default=True, help="Of ga.")
@click.option("--mutation", type=Number(0, 1), default=0.1, show_default=True, help="Of ga, for each bit.")
@click.option("--crossover", type=Number(0, 1), default=0.5, show_default=True, help="Of ga.")
@click.option(
    "--shortlist",
    type=POSITIVE,
    default=8,
    show_default=True,
    help="Subnets that are fitted whole and judged again.",
)
@click.option(
    "--ranking",
    type=POSITIVE,
    default=512,
    show_default=True,
    help="Samples of --val that subnets are ranked for the shortlist by; all are taken where there is none.",
)
@click.option("--evaluations", type=POSITIVE, help="Of random [default: as many as ga].")
@click.option(
    "--calibration", type=click.IntRange(min=2), default=256, show_default=True, help="Samples for statistics."
)
@click.option("--jobs", type=POSITIVE, metavar="N", help="Processes for the search [default: one a processor].")
@click.option("--dask", metavar="ADDRESS", help="Search on a Dask cluster, tcp://host:8786.")
@click.option(
    "--supernet",
    type=click.Choice(["fitted", "trained"]),
    default="fitted",
    show_default=True,
    help="Subnets are ranked with pruned blocks fitted to the original, or after training by the sandwich rule.",
)
@click.option(
    "--start",
    type=click.Choice(["fitted", "original"]),
    default="fitted",
    show_default=True,
    help="Train from blocks that are pruned and fitted, or let blocks fade from the original weights.",
)
@click.option("--ramp", type=SHARE, help="With --start original: share of the steps over which blocks fade [0.4].")
@click.option(
    "--ramp-shape", type=click.Choice(["linear", "cosine"]), help="With --start original: how they fade [linear]."
)
@click.option("--teacher", type=FilePath(), help="Model to learn from [default: IN].")
@teaching_options
@click.option("--epochs", type=ABOVE_ZERO, default=10.0, show_default=True, help="For the chosen blocks.")
@click.option("--supernet-epochs", type=ABOVE_ZERO, default=2.0, show_default=True, help="For a trained supernet.")
@click.option("--steps", type=POSITIVE, help="Steps for the chosen blocks, instead of epochs.")
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
    """Prune blocks of IN, such as residual blocks, until a goal is reached, and write the result to OUT.

    Each block that is pruned loses what is not linear inside it and is merged into one operator. Which blocks go is
    searched; they are fitted to what they gave before, and the network is trained. OUT is an ordinary model file with
    the interface of IN. A run that was stopped goes on with the same command.
    """
    _check(output, report, wishes)
    require_torch("prune-depth")
    from onnxcompress.train.depth.pruning import list_blocks, plan_depth, prune_depth

    check_report(report)
    options = _options(wishes)
    with _bar(quiet) as (say, progress):
        if wishes["list_blocks"]:
            listed = list_blocks(source, options, say=say)
        elif wishes["dry_run"]:
            plan = plan_depth(source, options, say=say)
        else:
            assert output is not None
            found = prune_depth(source, output, options, say=say, progress=progress)
    if wishes["list_blocks"]:
        _show_blocks(listed, as_json, quiet)
    elif wishes["dry_run"]:
        _show_plan(plan, as_json, quiet)
    else:
        _show(found, as_json, quiet, report)


def _check(output: Path | None, report: Path | None, wishes: dict[str, Any]) -> None:
    goals = [f"--{name}" for name in ("blocks", "latency", "macs") if wishes[name] is not None]
    if len(goals) > 1:
        raise RecipeError(f"{' and '.join(goals)} are two goals: give one")
    if wishes["list_blocks"] and wishes["dry_run"]:
        raise RecipeError("--list-blocks and --dry-run are two things to print: give one")
    only_prints = wishes["list_blocks"] or wishes["dry_run"]
    if output is None and not only_prints:
        raise RecipeError("there is no output: give -o OUT, or --dry-run to see what would be done")
    if report is not None and only_prints:
        raise RecipeError("--report is for a run: with --list-blocks and --dry-run take --json")


def _options(wishes: dict[str, Any]) -> Any:
    from onnxcompress.train.depth.offers import Goal, parse_goal
    from onnxcompress.train.depth.options import DepthOptions
    from onnxcompress.train.depth.search import SearchSettings

    goal: Goal | None = None
    if wishes["blocks"] is not None:
        goal = parse_goal("blocks", wishes["blocks"])
    elif wishes["latency"] is not None:
        goal = parse_goal("latency", wishes["latency"])
    elif wishes["macs"] is not None:
        goal = parse_goal("macs", wishes["macs"])
    stages = tuple(part.strip() for part in wishes["stages"].split(",") if part.strip())
    if wishes["list_blocks"]:
        stages, goal = ("train",), None
    searching = SearchSettings(
        **take(wishes, "population", "generations", "mutation", "crossover", "evaluations", "seed", method="search")
    )
    return DepthOptions(
        data=wishes["data"] or "",
        val=wishes["val"] or "",
        **take(wishes, "only", "skip", "delete", "activation", "teacher", "calibration", "jobs", "dask"),
        **take(wishes, "supernet", "supernet_epochs", "start", "deletions", "shortlist", "ranking"),
        **take(wishes, "augment", "preprocess", "limit", "tolerance", "threads", "checkpoint", "resume"),
        goal=goal,
        stages=stages,
        named_runs=tuple(_run_of(text) for text in wishes["named"]),
        wishes=supervision_wishes(wishes),
        training=train_settings(wishes),
        ramp=_ramp(wishes["ramp"], wishes["ramp_shape"]),
        search=searching,
    )


def _ramp(share: float | None, shape: str | None) -> Any:
    """What was asked for; None where nothing was."""
    from onnxcompress.train.depth.training import Ramp

    if share is None and shape is None:
        return None
    return Ramp(Ramp().share if share is None else share, shape or Ramp().shape)


def _run_of(text: str) -> tuple[str, str]:
    first, colon, last = text.partition(":")
    if not (first and colon and last):
        raise RecipeError(f"block {text!r}: expected the names of its first and last node, FIRST:LAST")
    return first, last


@contextlib.contextmanager
def _bar(quiet: bool) -> Iterator[tuple[Callable[[str], None], Callable[[Any], None] | None]]:
    """Where the run stands, on stderr: a bar with time left on a terminal, a line per validation in a file."""
    if quiet:
        yield (lambda line: None), None
        return
    if not sys.stderr.isatty():

        def line(now: Any) -> None:
            if now.figure is not None:
                print(f"step {now.step}/{now.total}  loss {now.loss:.4g}  validation {now.figure:.4g}", file=sys.stderr)

        yield (lambda line: None), line
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def advance(now: Any) -> None:
            best = "" if now.best_figure is None else f"  best {now.best_figure:.4g}"
            bar.update(task, total=now.total, completed=now.step, description=f"loss {now.loss:.4g}{best}")

        yield (lambda text: bar.update(task, description=text)), advance


def _show_blocks(listed: Any, as_json: bool, quiet: bool) -> None:
    from onnxcompress.train.depth.describing import BLOCK_HEADER, block_rows, refusal_lines

    offers, refusals = listed
    if as_json:
        plain = {"blocks": [offer.as_dict() for offer in offers], "refused": [vars(refusal) for refusal in refusals]}
        click.echo(json.dumps(plain, indent=1))
    elif not quiet:
        print_rows(BLOCK_HEADER, block_rows(offers))
        for line in refusal_lines(refusals):
            click.echo(line)


def _show_plan(plan: Any, as_json: bool, quiet: bool) -> None:
    from onnxcompress.train.depth.describing import BLOCK_HEADER, block_rows, plan_lines

    if as_json:
        click.echo(json.dumps(plan.as_dict(), indent=1))
    elif not quiet:
        print_rows(BLOCK_HEADER, block_rows(plan.offers))
        for line in plan_lines(plan):
            click.echo(line)


def _show(found: Any, as_json: bool, quiet: bool, report: Path | None) -> None:
    from onnxcompress.train.depth.describing import FIGURE_HEADER, figure_rows, result_lines, result_markdown

    if report is not None:
        models = (found.source, found.output)
        content = with_weight_bytes(found.as_dict(), *models)
        write_report(report, content, "prune-depth", *models, as_markdown=lambda: result_markdown(found))
    if as_json:
        click.echo(json.dumps(found.as_dict(), indent=1))
    elif not quiet:
        first, *lines = result_lines(found)
        click.echo(first)
        print_rows(FIGURE_HEADER, figure_rows(found))
        for line in lines:
            click.echo(line)
