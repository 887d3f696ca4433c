"""`onnxcompress bench`: models timed in turns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from onnxcompress.cli.options import MOST_THREADS, FilePath, InputShape, Number, shapes_by_name
from onnxcompress.cli.reporting import check_report, report_option, write_report
from onnxcompress.cli.terminal import print_rows


@click.command("bench")
@click.argument("models", nargs=-1, required=True, metavar="A [B...]", type=FilePath())
@click.option(
    "--threads",
    type=click.IntRange(0, MOST_THREADS),
    default=0,
    help="Threads within an operator; 0 is onnxruntime's choice.",
)
@click.option(
    "--runs", type=click.IntRange(min=1), default=50, show_default=True, help="Timed runs of each model at most."
)
@click.option(
    "--warmup", type=click.IntRange(min=1), default=3, show_default=True, help="Runs before the clock starts."
)
@click.option("--seconds", type=Number(min=0.05), default=10.0, show_default=True, help="Time for all runs together.")
@click.option(
    "--optimization",
    type=click.Choice(["off", "basic", "extended", "all"]),
    default="all",
    show_default=True,
    help="onnxruntime's own optimizations.",
)
@click.option(
    "--input-shape", "input_shapes", multiple=True, type=InputShape(), help="Sizes to time at: NAME:1,3,224,224."
)
@click.option("--data", metavar="D", help="Time on the first sample of this data instead of a seeded input.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the input.")
@report_option
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def command(models: tuple[Path, ...], as_json: bool, report: Path | None, input_shapes: Any, **wishes: Any) -> None:
    """Time models on onnxruntime, taking turns, and compare each with the first: latency, load time, peak memory."""
    from onnxcompress import report as reports
    from onnxcompress.bench import bench_models

    check_report(report)
    found = bench_models(models, input_shapes=shapes_by_name(input_shapes), **wishes)
    if report is not None:
        write_report(report, found, "bench", *models)
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    click.echo(f"{found['input']}; {found['threads'] or 'default'} threads, {found['models'][0]['runs']} runs in turns")
    rows = []
    for entry in found["models"]:
        ratio = (
            ""
            if entry["ratio"] is None
            else f"x{entry['ratio']:.3f} ({entry['ratio_low']:.3f}-{entry['ratio_high']:.3f})"
        )
        rows.append(
            (
                entry["path"],
                f"{entry['p10_ms']:.3f}",
                f"{entry['p50_ms']:.3f}",
                f"{entry['p90_ms']:.3f}",
                ratio,
                f"{entry['load_ms']:.1f}",
                reports.bytes_text(entry["peak_memory_bytes"]),
            )
        )
    print_rows(("model", "p10 ms", "p50 ms", "p90 ms", "speed-up (95 %)", "load ms", "peak memory"), rows)
