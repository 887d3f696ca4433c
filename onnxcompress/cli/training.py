"""Options that every verb which trains has."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import click

from onnxcompress.cli.options import LARGEST_SIZE, Number

POSITIVE = click.IntRange(min=1)
SHARE = Number(0, 1, max_open=True)

_OPTIMIZER: tuple[Callable[[Any], Any], ...] = (
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
    return reduce(lambda decorated, option: option(decorated), reversed(_OPTIMIZER), command)
