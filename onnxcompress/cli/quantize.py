"""`onnxcompress quantize`: codebook weights within a size, a ratio or a drop of quality."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import click

from onnxcompress.cli.options import LARGEST_SIZE, FilePath, InputShape, Size, shapes_by_name
from onnxcompress.cli.reporting import check_report, report_option, with_provenance
from onnxcompress.errors import RecipeError

POSITIVE = click.IntRange(min=1)
LAYERS_SHOWN = 60
T = TypeVar("T")


class Parsed(click.ParamType[float]):
    """A number that one of our functions reads."""

    def __init__(self, name: str, read: str) -> None:
        self.name = name
        self.read = read

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        from onnxcompress.codebook import options

        reader: Callable[[str], float] = getattr(options, self.read)
        try:
            return reader(str(value))
        except RecipeError as error:
            self.fail(str(error), param, ctx)


@click.command("quantize")
@click.argument("source", metavar="IN", type=FilePath())
@click.argument("target", metavar="[OUT]", required=False, type=FilePath())
@click.option("-o", "--output", type=FilePath(), help="Where to write [default: IN.quantized.onnx].")
@click.option(
    "--data",
    required=True,
    metavar="D",
    help="Calibration samples, without labels: .npz, folder of .npy or images, sklearn:digits:train, module:function; "
    "'none' goes without, at several times the error.",
)
@click.option("--ratio", type=Parsed("ratio", "parse_ratio"), metavar="19x", help="Original bytes over the result's.")
@click.option("--size", "size_bytes", type=Size(), metavar="5M", help="Largest size of the result.")
@click.option(
    "--max-drop",
    type=Parsed("drop", "parse_share"),
    metavar="1%",
    help="Smallest file that loses no more of --metric on --val; without --val, of the agreement with the original.",
)
@click.option("--val", metavar="D", help="Labelled samples to measure on.")
@click.option("--metric", metavar="M", help="Figure on --val [default: top1]; as for validate.")
@click.option(
    "--method",
    type=click.Choice(["sweep", "em", "kmeans", "bgd"]),
    default="sweep",
    show_default=True,
    help="sweep does everything, em stops after the codebooks; kmeans and bgd are plain and published baselines.",
)
@click.option(
    "--permute",
    type=click.Choice(["auto", "none"]),
    default="none",
    show_default=True,
    help="auto puts channels between layers in an order in which weights quantize better, which takes no bytes, and "
    "stores those of a layer in an order of its own where that is worth its bytes.",
)
@click.option(
    "--tune",
    type=click.Choice(["none", "joint", "full"]),
    default="none",
    show_default=True,
    help="Tune all codebooks together, without labels, in about two minutes for a small net; needs torch. full is the "
    "published recipe: each layer, then all.",
)
@click.option("--tune-steps", type=POSITIVE, help="Steps of tuning all together [default: what takes two minutes].")
@click.option(
    "--optimize/--no-optimize",
    default=None,
    help="Run the exact passes of `optimize` first [default: on, but off with --method bgd and --tune full, which need "
    "BatchNormalization]. Layers are then named as in the optimized graph; comparisons are with IN.",
)
@click.option("--keep", multiple=True, metavar="GLOB", help="Leave the weights of these names as they are.")
@click.option("--only", multiple=True, metavar="GLOB", help="Quantize the weights of these names only.")
@click.option(
    "--limit",
    type=POSITIVE,
    help="Use at most so many samples of --data [default: 256, of small ones 1024; with --tune 4096, to tune on].",
)
@click.option("--preprocess", metavar="SPEC", help="How images become inputs: size=224,layout=nchw,mean=...,std=...")
@click.option("--batch", type=click.IntRange(1, LARGEST_SIZE), help="Samples in a run of the model.")
@click.option(
    "--input-shape",
    "input_shapes",
    multiple=True,
    type=InputShape(),
    help="Size of the samples where the input leaves it open: NAME:1,3,224,224.",
)
@click.option("--jobs", type=POSITIVE, help="Layers at once [default: one a processor]; the result is the same.")
@click.option("--dask", metavar="ADDRESS", help="Quantize layers on a Dask cluster, as in tcp://host:8786.")
@click.option("--custom-ops", type=FilePath(), help="Shared library with custom operators.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Same seed, same bytes.")
@click.option("--resume/--no-resume", default=True, help="Go on with a run that was stopped (default).")
@click.option("--dry-run", is_flag=True, help="Show the plan: sizes are exact, errors predicted. Writes nothing.")
@report_option
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
def command(
    source: Path,
    target: Path | None,
    output: Path | None,
    report: Path | None,
    as_json: bool,
    quiet: bool,
    input_shapes: tuple[tuple[str, tuple[int, ...]], ...],
    **wishes: Any,
) -> None:
    """Store the weights of IN in codebooks; OUT runs on stock onnxruntime, as fast as IN.

    Give a size, a ratio or a drop: it is kept, or the exit code is 1 and the nearest reachable figure is named. With
    none of them the file is the smallest whose outputs are predicted to be off by 10 %. Sizes are of the file on disk,
    and what is reported was measured with that file, on samples that no fit has used. A run that was stopped goes on
    with the same command, from the layer where it was.
    """
    from onnxcompress import report as reports
    from onnxcompress.codebook.options import QuantizeOptions

    if target is not None and output is not None:
        raise RecipeError(f"the output is named twice: {target} and {output}")
    check_report(report)
    shapes = shapes_by_name(input_shapes)
    options = QuantizeOptions(**wishes, input_shapes=shapes)
    place = output or target or source.with_name(f"{source.stem}.quantized{source.suffix}")
    from onnxcompress.codebook.quantizer import checkpoint_folder, quantize

    with _bar(quiet) as progress:
        try:
            result = quantize(source, None if options.dry_run else place, options, progress=progress)
        except KeyboardInterrupt as stop:
            if options.dry_run or not checkpoint_folder(place).exists():
                raise
            again = shlex.join(["onnxcompress", *sys.argv[1:]])
            raise KeyboardInterrupt(f"resume with: {again}") from stop
    found = {**result.as_dict(), "environment": reports.environment()}
    if report is not None:
        reports.write_quantization(report, with_provenance(found, "quantize", source, result.output))
    if as_json:
        click.echo(json.dumps(found, indent=1))
    elif not quiet:
        _show(found, dry_run=options.dry_run)


@contextlib.contextmanager
def _bar(quiet: bool) -> Iterator[Callable[[Any], None] | None]:
    """A bar with time left for layers, a spinner for the rest."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def show(state: Any) -> None:
            if state.step not in tasks:
                for task in tasks.values():
                    bar.update(task, visible=False)
                tasks[state.step] = bar.add_task(state.step, total=state.total or None)
            text = f"{state.step} {state.layer}" if state.layer else state.step
            bar.update(
                tasks[state.step],
                description=escape(text),
                completed=state.done,
                total=state.total or None,
                visible=True,
            )

        yield show


def _show(found: dict[str, Any], *, dry_run: bool) -> None:
    from rich.console import Console
    from rich.markup import escape

    from onnxcompress import report as reports
    from onnxcompress.cli.terminal import print_rows, width

    rows = reports.layer_rows(found)
    shown = rows[:LAYERS_SHOWN]
    error = "error" if not dry_run else "error (estimate)"
    print_rows(("layer", "operator", "weights", "form", "bits", "bytes", error), shown)
    console = Console(highlight=False, soft_wrap=True, width=width())
    if len(rows) > len(shown):
        console.print(f"... and {len(rows) - len(shown)} more layers (--report FILE.md lists all)")
    for line in reports.quantization_lines(found):
        console.print(escape(line))
