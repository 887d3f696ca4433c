"""`onnxcompress validate`: one model against another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from onnxcompress.cli.options import LARGEST_SIZE, FilePath, Number
from onnxcompress.cli.reporting import check_report, report_option, write_report
from onnxcompress.cli.terminal import print_rows

EXIT_NOT_EQUIVALENT = 1


@click.command("validate")
@click.argument("reference", metavar="A", type=FilePath())
@click.argument("candidate", metavar="B", type=FilePath())
@click.option("--data", metavar="D", help="Samples: .npz, folder of .npy or images, sklearn:digits, module:function.")
@click.option("--preprocess", metavar="SPEC", help="How images become inputs: size=224,layout=nchw,mean=...,std=...")
@click.option("--metric", metavar="M", help="top1, top5, mse, mae, psnr, cosine, agreement, or module:function.")
@click.option("--limit", type=click.IntRange(min=1), help="Use at most so many samples.")
@click.option("--batch", type=click.IntRange(1, LARGEST_SIZE), help="Samples at once.")
@click.option("--tolerance", type=Number(min=0), help="Largest max|d| / max|y|, or largest drop of the metric.")
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Seed of inputs and of the choice of samples.",
)
@report_option
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def command(reference: Path, candidate: Path, report: Path | None, as_json: bool, **wishes: Any) -> int:
    """Compare model B with model A: interface, outputs, and a metric on labelled data.

    Exits with 1 when B differs by more than the tolerance.
    """
    from onnxcompress.validation.judge import validate as run

    check_report(report)
    found = run(reference, candidate, **wishes)
    if report is not None:
        content = {"input": str(reference), "output": str(candidate), **found.as_dict()}
        write_report(report, content, "validate", reference, candidate)
    if as_json:
        click.echo(json.dumps(found.as_dict(), indent=1))
    else:
        for line in found.interface:
            click.echo(f"interface: {line}")
        for line in found.inputs:
            click.echo(line)
        rows = [(d.name, *_difference_cells(d)) for d in found.comparison.outputs]
        print_rows(("output", "max|d|", "max|d|/max|y|", "cosine", "agreement", "allowed", ""), rows)
        print_rows(
            ("metric", "A", "B", "change"),
            [(name, f"{a:.4g}", f"{b:.4g}", f"{b - a:+.4g}") for name, (a, b) in found.quality.items()],
        )
        click.echo(found.message())
    return 0 if found.within_tolerance and not found.interface else EXIT_NOT_EQUIVALENT


def _difference_cells(found: Any) -> tuple[str, ...]:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    return (
        number(found.max_abs, ".2e"),
        number(found.error, ".2e"),
        number(found.cosine, ".6f"),
        number(found.agreement, ".4f"),
        number(found.allowed, ".0e"),
        "ok" if found.equivalent else "differs",
    )
