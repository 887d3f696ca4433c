"""`onnxcompress deploy`: a folder with a model and what runs it on a target."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from onnxcompress.cli.options import FilePath, InputShape, Number, shapes_by_name
from onnxcompress.cli.reporting import check_report, report_option, write_report
from onnxcompress.cli.terminal import model_progress, print_rows


@click.command("deploy")
@click.argument("model", metavar="M", type=FilePath())
@click.option(
    "--target",
    required=True,
    type=click.Choice(["onnxruntime", "ort-format", "web"]),
    help="onnxruntime: the model and a program; ort-format: a .ort file and a program; web: a page.",
)
@click.option("-o", "--output", required=True, type=FilePath(), metavar="DIR", help="Folder to write.")
@click.option("--data", metavar="D", help="Samples to run, as for validate; seeded inputs without.")
@click.option("--preprocess", metavar="SPEC", help="How images become inputs: size=224,layout=nchw,mean=...,std=...")
@click.option(
    "--input-shape", "input_shapes", multiple=True, type=InputShape(), help="Sizes of seeded inputs: NAME:1,3,224,224."
)
@click.option(
    "--tolerance", type=Number(min=0), default=1e-4, show_default=True, help="Largest max|d| / max|y| on the target."
)
@click.option(
    "--weights",
    type=click.Choice(["packed", "folded"]),
    help="ort-format: keep codebooks and decode them in every run, or store what they decode to [default: packed].",
)
@click.option(
    "--ort-web",
    type=FilePath(),
    metavar="FOLDER",
    help="web: the npm package onnxruntime-web, or a folder that has it in node_modules [default: fetched with npm].",
)
@click.option(
    "--check/--no-check", default=True, help="web: run the page's files in Node before they appear (default)."
)
@click.option("--force", is_flag=True, help="Replace an earlier deployment in DIR.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of inputs and samples.")
@report_option
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
def command(
    model: Path, output: Path, input_shapes: Any, report: Path | None, as_json: bool, quiet: bool, **wishes: Any
) -> None:
    """Write a folder that runs model M on a target, with a sample and its expected outputs.

    The folder appears when the target has loaded the model and its outputs agree with those of onnxruntime without its
    own optimizations.
    """
    from onnxcompress.deployment.deploying import deploy
    from onnxcompress.deployment.targets import DeployOptions
    from onnxcompress.report.wording import bytes_text

    check_report(report)
    options = DeployOptions(**wishes, input_shapes=shapes_by_name(input_shapes))
    with model_progress(1, quiet or as_json) as progress:
        done = deploy(model, output, options, say=progress.say)
    if report is not None:
        write_report(report, done.as_dict(), "deploy", model)
    if as_json:
        click.echo(json.dumps(done.as_dict(), indent=1))
        return
    if quiet:
        return
    click.echo(f"{done.source} -> {done.folder} for {done.target}, {done.runtime or 'not run'}")
    for line in done.samples:
        click.echo(line)
    memory = any(one.peak_memory_bytes is not None for one in done.settings)
    rows = [
        (
            one.name,
            f"{one.size_bytes:,}",
            "" if one.gzip_bytes is None else f"{one.gzip_bytes:,}",
            f"{one.error:.1e}",
            f"{one.load_ms:.1f}",
            f"{one.latency_ms:.3f}",
            *(["" if one.peak_memory_bytes is None else bytes_text(one.peak_memory_bytes)] if memory else []),
        )
        for one in done.settings
    ]
    header = ["setting", "bytes", "after gzip", f"error (allowed {done.allowed:.0e})", "load ms", "latency ms"]
    print_rows(header + (["memory"] if memory else []), rows)
    click.echo(f"files: {', '.join(f'{name} {size:,}' for name, size in done.files.items())}")
    for note in done.notes:
        click.echo(f"note: {note}")
