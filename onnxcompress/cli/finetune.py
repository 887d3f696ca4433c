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

from onnxcompress.cli.options import MOST_THREADS, FilePath, Number
from onnxcompress.cli.reporting import check_report, report_option, with_weight_bytes, write_report
from onnxcompress.cli.terminal import print_rows
from onnxcompress.cli.training import POSITIVE, optimizer_options
from onnxcompress.errors import RecipeError


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
@click.option("--labels", is_flag=True, help="Learn from labels (the default where there are any).")
@click.option("--distill", is_flag=True, help="Learn from the teacher's outputs; with --labels from both.")
@click.option("--feature", multiple=True, metavar="T[=U]", help="Match the tensor T inside with the teacher's U.")
@click.option("--target-output", metavar="NAME", help="Output that labels and metric are for; the first by default.")
@click.option("--metric", metavar="M", help="Figure to judge by: top1, mse, agreement, ..., or module:function.")
@click.option(
    "--epochs", type=Number(min=0, min_open=True), default=10.0, show_default=True, help="Passes over the data."
)
@click.option("--steps", type=POSITIVE, help="Steps, instead of epochs.")
@optimizer_options
@click.option(
    "--temperature", type=Number(min=0, min_open=True), default=2.0, show_default=True, help="Of distilled logits."
)
@click.option(
    "--distill-weight", type=Number(0, 1), default=0.5, show_default=True, help="Share of the teacher beside labels."
)
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
@click.option("--augment", default="", metavar="LIST", help="Vary images: flip, shift:PIXELS, as in flip,shift:2.")
@click.option("--preprocess", metavar="SPEC", help="How images become inputs: size=224,layout=nchw,mean=...,std=...")
@click.option("--limit", type=POSITIVE, help="Use at most so many samples of each source.")
@click.option("--eval-every", type=POSITIVE, metavar="STEPS", help="Steps between validations [default: an epoch].")
@click.option("--patience", type=POSITIVE, help="End after so many validations without a new best.")
@click.option("--checkpoint", type=FilePath(), metavar="DIR", help="Where the state is kept [default: OUT.checkpoint].")
@click.option("--checkpoint-every", type=POSITIVE, metavar="STEPS", help="[default: about every 30 seconds]")
@click.option("--resume/--no-resume", default=True, help="Go on from a checkpoint that is there (default).")
@click.option("--tensorboard", type=FilePath(), metavar="DIR", help="Write figures for TensorBoard.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option(
    "--precision",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Of the operators that gain by it; auto is float32 on a CPU.",
)
@click.option("--channels-last/--no-channels-last", default=None, help="Memory format [default: with half precision].")
@click.option("--threads", type=click.IntRange(0, MOST_THREADS), default=0, help="Threads; 0 is torch's choice.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Same seed, same result.")
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
    try:
        import torch  # noqa: F401  # asked for before anything of train is imported
    except ImportError as error:
        raise RecipeError("finetune needs torch: pip install onnxcompress[train]") from error
    from onnxcompress.train.finetune import FinetuneOptions
    from onnxcompress.train.losses import LossSettings
    from onnxcompress.train.settings import TrainSettings
    from onnxcompress.train.supervision import Wishes

    def take(*names: str, **renamed: str) -> dict[str, Any]:
        return {name: wishes[name] for name in names} | {ours: wishes[name] for ours, name in renamed.items()}

    losses = LossSettings(**take("temperature", "distill_weight", "feature_weight", smoothing="label_smoothing"))
    supervision = Wishes(
        losses=losses, **take("labels", "distill", "distill_loss", "metric", features="feature", output="target_output")
    )
    training = TrainSettings(
        **take("epochs", "steps", "batch", "accumulate", "optimizer", "weight_decay", "momentum", "schedule", "warmup"),
        **take("clip_norm", "seed", "eval_every", "patience", "checkpoint_every", "precision", "device"),
        **take("channels_last", learning_rate="lr", ema_decay="ema", freeze_statistics="freeze_bn"),
    )
    rest = take("data", "val", "teacher", "freeze", "only", "bn_only", "augment", "preprocess", "limit")
    rest |= take("tensorboard", "checkpoint", "resume", "threads")
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
