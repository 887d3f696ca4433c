"""`onnxcompress compress`: reach a goal of size, latency or MACs within a drop, by what the other verbs do."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from onnxcompress.cli.options import MOST_THREADS, FilePath
from onnxcompress.cli.reporting import check_report, report_option, with_weight_bytes, write_report
from onnxcompress.cli.terminal import model_progress, print_rows
from onnxcompress.errors import OnnxCompressError, RecipeError

POSITIVE = click.IntRange(min=1)


class OutOfReach(OnnxCompressError):
    """The goal was not reached; the message says how far it goes."""

    exit_code = 1


@click.command("compress")
@click.argument("source", metavar="IN", type=FilePath())
@click.argument("recipe", metavar="[RECIPE.toml]", required=False, type=FilePath())
@click.option("-o", "--output", type=FilePath(), help="Where to write.")
@click.option(
    "--goal",
    metavar="GOAL",
    help="'size=10x, drop=1%': size (10x, 5M), latency (0.5x, 3ms), macs (0.5x, 300M), within a drop (1%); a drop "
    "alone: the smallest file. Takes the name of a recipe file as well.",
)
@click.option(
    "--data",
    metavar="D",
    help="Samples, labelled or not: .npz, folder of .npy or images, sklearn:digits:train, module:function; 'none' goes "
    "without: exact rewrites and data-free quantization.",
)
@click.option("--val", metavar="D", help="Samples that judge every step [default: a part of --data, kept back].")
@click.option("--metric", metavar="M", help="Figure on labelled samples [default: top1]; as for validate.")
@click.option("--preprocess", metavar="SPEC", help="How images become inputs: size=224,layout=nchw,mean=...,std=...")
@click.option("--limit", type=POSITIVE, help="Use at most so many samples of --data.")
@click.option("--train/--no-train", default=None, help="Allow steps that tune or train, which takes minutes (default).")
@click.option("--nearest", is_flag=True, default=None, help="Write the nearest point where the goal is out of reach.")
@click.option("--dry-run", is_flag=True, help="Print the plan: steps, why, what is expected. Writes nothing.")
@click.option("--threads", type=click.IntRange(0, MOST_THREADS), help="For timing [default: 1].")
@click.option("--jobs", type=POSITIVE, metavar="N", help="Processes [default: one a processor]; same result.")
@click.option("--custom-ops", type=FilePath(), help="Shared library with custom operators.")
@click.option(
    "--seed", type=click.IntRange(min=0), help="Same seed, same bytes, but for latency, which is measured [0]."
)
@click.option("--resume/--no-resume", default=True, help="Go on with a run that was stopped (default).")
@report_option
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
def command(
    source: Path,
    recipe: Path | None,
    output: Path | None,
    goal: str | None,
    dry_run: bool,
    report: Path | None,
    as_json: bool,
    quiet: bool,
    **wishes: Any,
) -> None:
    """Make IN as small or as fast as the goal says, and lose no more than it allows.

    Exact rewrites, pruned blocks and channels, codebooks: what reaches the goal at the least loss is looked for, each
    step is measured against IN on samples that no step has used, and a step that costs more than it brings is backed
    out. OUT is an ordinary model file with the interface of IN. Where the goal is out of reach the exit code is 1 and
    the nearest point is named. A recipe says which steps, with which settings. A run that was stopped goes on with the
    same command.
    """
    if recipe is None and goal is not None and goal.endswith(".toml"):
        recipe, goal = Path(goal), None
    if output is None and not dry_run:
        raise RecipeError("there is no output: give -o OUT, or --dry-run to see what would be done")
    if report is not None and dry_run:
        raise RecipeError("--report is for a run: with --dry-run take --json")
    check_report(report)
    from onnxcompress.compression.compressing import compress, plan_compression, state_folder
    from onnxcompress.compression.describing import attempt_line

    options = _options(recipe, goal, wishes)
    with model_progress(1, quiet) as bar:
        if dry_run:
            plan = plan_compression(source, options, say=bar.say)
        else:
            assert output is not None
            try:
                found = compress(
                    source, output, options, say=bar.say, done=lambda attempt: bar.line(attempt_line(attempt))
                )
            except KeyboardInterrupt as stop:
                if not state_folder(output).exists():
                    raise
                again = shlex.join(["onnxcompress", *sys.argv[1:]])
                raise KeyboardInterrupt(f"resume with: {again}") from stop
    if dry_run:
        _show_plan(plan, as_json, quiet)
    else:
        _show(found, as_json, quiet, report)


def _options(recipe: Path | None, goal: str | None, wishes: dict[str, Any]) -> Any:
    from onnxcompress.compression.options import options_from
    from onnxcompress.compression.recipe import Recipe, read_recipe

    found = Recipe() if recipe is None else read_recipe(recipe)
    if goal is None and found.goal is None and not found.steps:
        raise RecipeError("there is nothing to reach: give --goal 'size=10x, drop=1%', or a recipe")
    if wishes["data"] is None and "data" not in found.wishes:
        raise RecipeError("no samples are named: give --data D, or --data none to go without")
    return options_from(found, goal, **wishes)


def _show_plan(plan: Any, as_json: bool, quiet: bool) -> None:
    from onnxcompress.compression.describing import plan_lines

    if as_json:
        click.echo(json.dumps(plan.as_dict(), indent=1))
    elif not quiet:
        for line in plan_lines(plan):
            click.echo(line)


def _show(found: Any, as_json: bool, quiet: bool, report: Path | None) -> None:
    from onnxcompress.compression.describing import (
        ATTEMPT_HEADER,
        attempt_rows,
        failure_line,
        result_lines,
        result_markdown,
    )

    if report is not None:
        models = (found.source, found.output)
        content = with_weight_bytes(found.as_dict(), *models)
        write_report(report, content, "compress", *models, as_markdown=lambda: result_markdown(found))
    if as_json:
        click.echo(json.dumps(found.as_dict(), indent=1))
    elif not quiet:
        print_rows(ATTEMPT_HEADER, attempt_rows(found), folded=(0, len(ATTEMPT_HEADER) - 1))
        for line in result_lines(found):
            click.echo(line)
    if not found.met:
        raise OutOfReach(failure_line(found))
