"""`onnxcompress finetune`: train a model's weights on labels, on a teacher, or both."""

from __future__ import annotations

import contextlib
import json
import os
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


@click.command("finetune")
@click.argument("source", metavar="IN", type=FilePath())
@click.option("-o", "--output", type=FilePath(), required=True, help="Where to write.")
@click.option(
    "--data",
    required=True,
    metavar="D",
    help="Samples to train on: .npz, folder of .npy or images, sklearn:digits:train, module:function.",
)
@click.option("--val", metavar="D", help="Samples to judge by; the weights that are best on them are kept.")
@click.option("--teacher", type=FilePath(), help="Model to learn from, such as the one that IN was made of.")
@teaching_options
@click.option("--feature", multiple=True, metavar="T[=U]", help="Match the tensor T inside with the teacher's U.")
@click.option("--epochs", type=ABOVE_ZERO, default=10.0, show_default=True, help="Passes over the data.")
@click.option("--steps", type=POSITIVE, help="Steps, instead of epochs.")
@optimizer_options
@loss_options
@click.option(
    "--distill-loss",
    type=click.Choice(["auto", "kl", "mse"]),
    default="auto",
    show_default=True,
    help="How far from the teacher's outputs; auto takes those with two axes for logits.",
)
@click.option("--feature-weight", type=Number(min=0), default=1.0, show_default=True, help="Factor of --feature.")
@click.option("--freeze", multiple=True, metavar="GLOB", help="Leave the initializers of these names as they are.")
@click.option("--train", "only", multiple=True, metavar="GLOB", help="Train the initializers of these names only.")
@click.option("--freeze-bn", is_flag=True, help="Leave the running statistics of BatchNormalization as they are.")
@click.option("--bn-only", is_flag=True, help="Estimate these statistics anew, and train nothing.")
@sample_options
@state_options
@click.option("--checkpoint-every", type=POSITIVE, metavar="STEPS", help="[default: about every 30 seconds]")
@click.option("--tensorboard", type=FilePath(), metavar="DIR", help="Write figures for TensorBoard.")
@click.option("--channels-last/--no-channels-last", default=None, help="Memory format [default: with half precision].")
@machine_options
@report_option
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
def command(source: Path, output: Path, report: Path | None, as_json: bool, quiet: bool, **wishes: Any) -> None:
    """Train the weights of IN and write the result, with the same graph and interface, to OUT.

    The weights that are best on --val are kept, and those of IN count: on --val the result is never worse than IN. A
    run that was stopped goes on with the same command, and ends with the weights of a run in one go. Several processes
    share a run: torchrun --nproc-per-node 2 -m onnxcompress finetune ...
    """
    check_report(report)
    first = os.environ.get("RANK", "0") == "0"
    options = _options(wishes)
    from onnxcompress.train.finetune import finetune

    with _bar(quiet or not first) as (say, progress):
        found = finetune(source, output, options, say=say, progress=progress)
    if found is None:
        return
    if report is not None:
        write_report(report, with_weight_bytes(found.as_dict(), None, output), "finetune", source, output)
    if as_json:
        click.echo(json.dumps(found.as_dict(), indent=1))
    elif not quiet:
        _show(found)


def _options(wishes: dict[str, Any]) -> Any:
    require_torch("finetune")
    from onnxcompress.train.finetune import FinetuneOptions

    more = take(wishes, "distill_loss", features="feature")
    supervision = supervision_wishes(wishes, losses=take(wishes, "feature_weight"), **more)
    training = train_settings(
        wishes, **take(wishes, "checkpoint_every", "channels_last", freeze_statistics="freeze_bn")
    )
    rest = take(wishes, "data", "val", "teacher", "freeze", "only", "bn_only", "augment", "preprocess", "limit")
    rest |= take(wishes, "tensorboard", "checkpoint", "resume", "threads")
    return FinetuneOptions(wishes=supervision, training=training, **rest)


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
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def advance(now: Any) -> None:
            best = "" if now.best_figure is None else f"  best {now.best_figure:.4g}"
            bar.update(task, total=now.total, completed=now.step, description=f"loss {now.loss:.4g}{best}")

        yield (lambda text: bar.update(task, description=text)), advance


def _show(found: Any) -> None:
    click.echo(f"{found.source} -> {found.output}; learned from {found.learned_from}")
    if found.metric is not None:
        name = f"{found.metric} on {found.samples} validation samples"
        change = f"{found.after - found.before:+.4g}"
        print_rows(("", "before", "after", "change"), [(name, f"{found.before:.4g}", f"{found.after:.4g}", change)])
    run = found.training
    if run is None:
        click.echo(f"{len(found.changed)} initializers changed, {found.seconds:.1f} s")
        return
    ended = f"{run.steps} of {run.total} steps" + (" (no new best, ended early)" if run.stopped_early else "")
    resumed = f", resumed at step {run.resumed_from}" if run.resumed_from is not None else ""
    best = f"best at step {run.best_step}" if run.best_step else "no step was better than the input, which is kept"
    click.echo(f"{ended}{resumed}, {run.seconds:.1f} s; {best}; {len(found.changed)} initializers changed")
