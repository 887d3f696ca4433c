"""Options that every verb which trains has, and what is made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

import click

from onnxcompress.cli.options import LARGEST_SIZE, MOST_THREADS, FilePath, Number
from onnxcompress.errors import RecipeError

POSITIVE = click.IntRange(min=1)
SHARE = Number(0, 1, max_open=True)
ABOVE_ZERO = Number(0, min_open=True)

Options = tuple[Callable[[Any], Any], ...]

_TEACHING: Options = (
    click.option("--labels", is_flag=True, help="Learn from labels (the default where there are any)."),
    click.option("--distill", is_flag=True, help="Learn from the teacher's outputs; with --labels from both."),
    click.option(
        "--target-output", metavar="NAME", help="Output that labels and metric are for; the first of floats by default."
    ),
    click.option("--metric", metavar="M", help="Figure to judge by: top1, mse, agreement, ..., or module:function."),
)
_LOSS: Options = (
    click.option("--temperature", type=ABOVE_ZERO, default=2.0, show_default=True, help="Of distilled logits."),
    click.option(
        "--distill-weight", type=Number(0, 1), default=0.5, show_default=True, help="Share of the teacher with labels."
    ),
)
_SAMPLES: Options = (
    click.option("--augment", default="", metavar="LIST", help="Vary images: flip, shift:PIXELS, as in flip,shift:2."),
    click.option(
        "--preprocess", metavar="SPEC", help="How images become inputs: size=224,layout=nchw,mean=...,std=..."
    ),
    click.option("--limit", type=POSITIVE, help="Use at most so many samples of each source."),
    click.option("--eval-every", type=POSITIVE, metavar="STEPS", help="Steps between validations [default: an epoch]."),
    click.option("--patience", type=POSITIVE, help="End after so many validations without a new best."),
)
_STATE: Options = (
    click.option(
        "--checkpoint", type=FilePath(), metavar="DIR", help="Where the state is kept [default: OUT.checkpoint]."
    ),
    click.option("--resume/--no-resume", default=True, help="Go on from a checkpoint that is there (default)."),
)
_MACHINE: Options = (
    click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True),
    click.option(
        "--precision",
        type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
        default="auto",
        show_default=True,
        help="Of the operators that gain by it; auto is float32 on a CPU.",
    ),
    click.option(
        "--threads",
        type=click.IntRange(0, MOST_THREADS),
        default=0,
        help="Of torch, 0 is its choice; where latency is timed, 0 is one.",
    ),
    click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Same seed, same result."),
)
_OPTIMIZER: Options = (
    click.option(
        "--batch", type=click.IntRange(1, LARGEST_SIZE), default=64, show_default=True, help="Samples in a step."
    ),
    click.option("--accumulate", type=POSITIVE, default=1, show_default=True, help="Backward passes in a step."),
    click.option("--optimizer", type=click.Choice(["adamw", "sgd"]), default="adamw", show_default=True),
    click.option(
        "--lr", type=Number(min=0, min_open=True), help="Highest learning rate [default: adamw 5e-4, sgd 1e-2]."
    ),
    click.option("--weight-decay", type=Number(min=0), help="Of kernels and matrices [default: adamw 1e-2, sgd 1e-4]."),
    click.option("--momentum", type=SHARE, default=0.9, show_default=True, help="Of sgd."),
    click.option(
        "--schedule",
        type=click.Choice(["cosine", "linear", "constant", "onecycle"]),
        default="cosine",
        show_default=True,
        help="How the learning rate moves.",
    ),
    click.option(
        "--warmup", type=SHARE, default=0.05, show_default=True, help="Share of the steps with a rising rate."
    ),
    click.option("--clip-norm", type=Number(min=0, min_open=True), help="Largest norm of all gradients together."),
    click.option("--ema", type=SHARE, metavar="DECAY", help="Keep a moving average of the weights, as in 0.999."),
    click.option(
        "--label-smoothing", type=SHARE, default=0.0, show_default=True, help="Share spread over all classes."
    ),
)


def optimizer_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Batch, optimizer, schedule, clipping, averaging: the fields of ``TrainSettings`` by their names."""
    return _with(_OPTIMIZER, command)


def teaching_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What is learned from, and judged by."""
    return _with(_TEACHING, command)


def loss_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Weights of the terms."""
    return _with(_LOSS, command)


def sample_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """How samples are prepared, and how often they judge."""
    return _with(_SAMPLES, command)


def state_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Where a run is kept, and taken up from."""
    return _with(_STATE, command)


def machine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Where it is computed, and from which seed."""
    return _with(_MACHINE, command)


def _with(options: Options, command: Callable[..., Any]) -> Callable[..., Any]:
    return reduce(lambda decorated, option: option(decorated), reversed(options), command)


def require_torch(verb: str) -> None:
    """Ask for torch before anything of ``train`` is imported."""
    try:
        import torch  # noqa: F401  # only to see whether it is there
    except ImportError as error:
        raise RecipeError(f"{verb} needs torch: pip install onnxcompress[train]") from error


def take(wishes: Mapping[str, Any], *names: str, **renamed: str) -> dict[str, Any]:
    """Some of the wishes; ``ours="theirs"`` under another name."""
    return {name: wishes[name] for name in names} | {ours: wishes[theirs] for ours, theirs in renamed.items()}


def train_settings(wishes: Mapping[str, Any], **more: Any) -> Any:
    """``TrainSettings`` of the options above."""
    from onnxcompress.train.settings import TrainSettings

    names = ("epochs", "steps", "batch", "accumulate", "optimizer", "weight_decay", "momentum", "schedule", "warmup")
    own = take(wishes, *names, "clip_norm", "seed", "eval_every", "patience", "precision", "device")
    return TrainSettings(**own, **take(wishes, learning_rate="lr", ema_decay="ema"), **more)


def supervision_wishes(wishes: Mapping[str, Any], *, losses: Mapping[str, Any] | None = None, **more: Any) -> Any:
    """``Wishes`` of the options above."""
    from onnxcompress.train.losses import LossSettings
    from onnxcompress.train.supervision import Wishes

    weights = take(wishes, "temperature", "distill_weight", smoothing="label_smoothing")
    settings = LossSettings(**weights, **(losses or {}))
    return Wishes(losses=settings, **take(wishes, "labels", "distill", "metric", output="target_output"), **more)
