"""`onnxcompress inspect`: what is in a model."""

from __future__ import annotations

import json
from pathlib import Path

import click

from onnxcompress.cli.options import FilePath
from onnxcompress.cli.reporting import check_report, report_option, write_report
from onnxcompress.cli.terminal import print_rows


@click.command("inspect")
@click.argument("model", type=FilePath())
@click.option("--top", type=click.IntRange(min=0), default=10, show_default=True, help="Initializers to show.")
@report_option
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def command(model: Path, top: int, report: Path | None, as_json: bool) -> None:
    """Show what is in a model: interface, operator sets, operators, weights, MACs."""
    from onnxcompress import report as reports
    from onnxcompress.inspection import inspect_model

    check_report(report)
    found = inspect_model(model)
    if report is not None:
        write_report(report, found, "inspect", model)
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    opsets = ", ".join(f"{domain} {number}" for domain, number in found["opsets"].items())
    click.echo(f"{model}: IR {found['ir_version']}, opset {opsets}, made by {found['producer'] or 'unknown'}")
    for side in ("inputs", "outputs"):
        for value in found[side]:
            shape = "of any shape" if value["shape"] is None else str(value["shape"]).replace("'", "")
            note = " (has a default)" if value["has_default"] else ""
            click.echo(f"{side[:-1]:6} {value['name']}: {value['type']} {shape}{note}")
    download = "" if found["download_bytes"] is None else f", {reports.bytes_text(found['download_bytes'])} after gzip"
    assumed = "" if found["macs_exact"] else " (unknown sizes assumed)"
    click.echo(f"size   {reports.bytes_text(found['size_bytes'])}{download}")
    click.echo(f"       {found['parameters']:,} parameters, {found['macs']:,} MACs{assumed}")
    for name in ("external_data", "functions"):
        if found[name]:
            click.echo(f"{name.replace('_', ' ')}: {', '.join(found[name])}")
    operators = "  ".join(f"{op} {count}" for op, count in found["operators"].items())
    click.echo(
        f"{found['nodes']} nodes and {found['constant_nodes']} constants, {found['subgraphs']} subgraphs: {operators}"
    )
    rows = [
        (entry["name"], entry["type"], str(entry["shape"]), f"{entry['bytes']:,}", entry["read_by"])
        for entry in found["initializers"][:top]
    ]
    print_rows(("initializer", "type", "shape", "bytes", "read by"), rows)
