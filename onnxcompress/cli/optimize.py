"""`onnxcompress optimize`: exact rewrites, checked, one model or many."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from onnxcompress.cli.options import (
    LARGEST_SIZE,
    MOST_THREADS,
    FilePath,
    InputShape,
    Number,
    pass_names,
    shapes_by_name,
)
from onnxcompress.cli.reporting import check_report, report_option, with_provenance, with_weight_bytes
from onnxcompress.cli.terminal import model_progress, width
from onnxcompress.errors import OnnxCompressError, OutputError, RecipeError

MODEL_TIMEOUT_S = 300.0  # for one load or one run of a model
LEVELS = {
    0: "nothing, a checked copy",
    1: "cleanup: constants, dead code, no-ops, duplicates",
    2: "and fusions and folding of BatchNormalization and per-channel constants",
    3: "and merges of linear operators (the default)",
}


def _show_passes(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    from onnxcompress import pipeline

    known = {cls.name: stage.name for stage in pipeline.ORDER for cls in stage.passes}
    for cls in pipeline.all_passes():
        module = sys.modules[cls.__module__]
        summary = (module.__doc__ or cls.__doc__ or "").strip().splitlines()[0].rstrip(".")
        click.echo(f"{cls.name:40} {known.get(cls.name, 'foreign'):8} {summary}")
    ctx.exit(0)


@click.command("optimize")
@click.argument("models", nargs=-1, metavar="[IN...]", type=FilePath())
@click.option("-o", "--output", type=FilePath(), help="Where to write: a file, or a folder for several inputs.")
@click.option("--in-place", is_flag=True, help="Replace each input by its result.")
@click.option(
    "-O",
    "level",
    type=click.IntRange(0, 3),
    default=3,
    help="How much: " + "; ".join(f"{k} {v}" for k, v in LEVELS.items()) + ".",
)
@click.option("--only", multiple=True, metavar="PASS", help="Run these passes only (repeat, or separate by commas).")
@click.option("--skip", multiple=True, metavar="PASS", help="Leave these passes out.")
@click.option(
    "--list-passes",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_passes,
    help="Show the passes in their order.",
)
@click.option(
    "--input-shape", "input_shapes", multiple=True, type=InputShape(), help="Fix an input's shape: NAME:1,3,224,224."
)
@click.option("--batch", type=click.IntRange(1, LARGEST_SIZE), help="Fix the dynamic first axis of every input to N.")
@click.option(
    "--check/--no-check", default=True, help="Compare result and original on onnxruntime before writing (default)."
)
@click.option(
    "--verify-each", is_flag=True, help="Check after every pass; the one that breaks the model is named and left out."
)
@click.option("--tolerance", type=Number(min=0), help="Largest max|d| / max|y| of an output.")
@click.option(
    "--data",
    metavar="D",
    help="Samples for the check: .npz, folder of .npy or images, sklearn:digits, module:function.",
)
@click.option("--metric", metavar="M", help="With labelled --data: measure this before and after (top1, top5, ...).")
@click.option(
    "--max-constant-mb",
    type=Number(min=0),
    default=1.0,
    show_default=True,
    help="Constant folding makes no larger tensor.",
)
@click.option(
    "--cost",
    type=click.Choice(["estimate", "measured"]),
    default="estimate",
    show_default=True,
    help="How merges are priced.",
)
@click.option(
    "--allow-approximate",
    type=Number(min=0, min_open=True),
    metavar="REL",
    help="Do approximate merges up to this error.",
)
@click.option(
    "--latency/--no-latency", default=True, help="Time original and result; a slower result is refused (default)."
)
@click.option(
    "--threads", type=click.IntRange(0, MOST_THREADS), default=0, help="Threads for timing; 0 is onnxruntime's choice."
)
@click.option("--custom-ops", type=FilePath(), help="Shared library with custom operators, loaded for the check.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the check's inputs.")
@report_option
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Models at once.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON instead of the table.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
def command(
    models: tuple[Path, ...],
    output: Path | None,
    in_place: bool,
    level: int,
    report: Path | None,
    jobs: int,
    as_json: bool,
    quiet: bool,
    metric: str | None,
    input_shapes: tuple[tuple[str, tuple[int, ...]], ...],
    only: tuple[str, ...],
    skip: tuple[str, ...],
    max_constant_mb: float,
    latency: bool,
    tolerance: float | None,
    **wishes: Any,
) -> int:
    """Make models smaller and faster by exact rewrites, checked on onnxruntime.

    IN is a model file or a folder of them; `IN OUT` works for one model. Without -o the result of IN.onnx is
    IN.optimized.onnx. Without IN the embedded digits model is optimized and its accuracy on held-out digits shown.
    """
    from onnxcompress import report as reports

    check_report(report)
    if not models:
        models, output, wishes["data"], metric = _embedded(output, wishes["data"], metric)
    if metric is not None:
        from onnxcompress.validation.metrics import find_metric

        find_metric(metric)
        if wishes["data"] is None:
            raise RecipeError(f"metric {metric} needs samples: give --data")
    plan = plan_outputs(models, output, in_place)
    if tolerance is not None:
        wishes["tolerance"] = tolerance
    wishes |= {
        "only": pass_names(only),
        "skip": pass_names(skip),
        "level": level,
        "input_shapes": shapes_by_name(input_shapes),
        "max_constant_bytes": int(max_constant_mb * (1 << 20)),
        "measure_latency": latency,
        "measure_download": report is not None or as_json,
    }
    done: list[dict[str, Any]] = []
    with _naming_what_was_written([target for _, target in plan]):
        worst = _show_all(_run_all(plan, wishes, metric, jobs, quiet), done, quiet or as_json)
        if as_json:
            click.echo(json.dumps(done[0] if len(plan) == 1 and done else done, indent=1))
        if report is not None and done:
            reports.write(report, [_with_origin(found) for found in done])
    return worst


def _with_origin(found: dict[str, Any]) -> dict[str, Any]:
    source, output = found["input"], found["output"]
    return with_provenance(with_weight_bytes(found, source, output), "optimize", source, output)


def _show_all(results: Iterator[dict[str, Any]], done: list[dict[str, Any]], quiet: bool) -> int:
    """Print results as they come and collect them; returns the worst exit code."""
    worst = 0
    for found in results:
        if "error" in found:
            named = found["error"].startswith(found["input"])
            print(f"onnxcompress: {'' if named else found['input'] + ': '}{found['error']}", file=sys.stderr)
            worst = max(worst, found["code"])
            continue
        done.append(found)
        if not quiet:
            _print_table(found)
    return worst


@contextlib.contextmanager
def _naming_what_was_written(targets: Sequence[Path]) -> Iterator[None]:
    """Let an interrupt say which outputs had been written before it came."""

    def stamp(path: Path) -> tuple[int, int] | None:
        try:
            found = path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns

    before = {target: stamp(target) for target in targets}
    try:
        yield
    except KeyboardInterrupt as stop:
        written = [str(target) for target in targets if stamp(target) not in (before[target], None)]
        raise KeyboardInterrupt(*([f"{', '.join(written)} had been written"] if written else [])) from stop


def _embedded(
    output: Path | None, data: str | None, metric: str | None
) -> tuple[tuple[Path, ...], Path, str | None, str | None]:
    from onnxcompress import models

    path = models.path("digits")
    print("no model given: optimizing the embedded digits network", file=sys.stderr)
    return (path,), output or Path("digits.optimized.onnx"), data or "sklearn:digits", metric or "top1"


def plan_outputs(models: Sequence[Path], output: Path | None, in_place: bool) -> list[tuple[Path, Path]]:
    """Pairs of input and output file.

    Raises:
        RecipeError: The outputs cannot be told, collide, or would overwrite an input unasked.
        OutputError: The output folder cannot be made.
    """
    if in_place and output is not None:
        raise RecipeError("--in-place and -o exclude each other")
    if output is None and not in_place and len(models) == 2 and not models[0].is_dir() and not models[1].is_dir():
        if models[1].exists():
            raise RecipeError(f"two inputs: give -o FOLDER or --in-place; to overwrite {models[1]} say -o {models[1]}")
        models, output = models[:1], models[1]
    inputs: list[tuple[Path, Path]] = []  # file, and its name inside an output folder
    for model in models:
        if model.is_dir():
            files = sorted(p for p in model.rglob("*.onnx") if p.is_file())
            if not files:
                raise RecipeError(f"folder {model} holds no .onnx file")
            inputs += [(path, path.relative_to(model)) for path in files]
        else:
            inputs.append((model, Path(model.name)))
    if in_place:
        return [(path, path) for path, _ in inputs]
    several = len(inputs) > 1 or any(model.is_dir() for model in models)
    if output is None:
        if several:
            raise RecipeError(f"several models or a folder ({len(inputs)} found): give -o FOLDER or --in-place")
        return [(path, path.with_name(f"{path.stem}.optimized.onnx")) for path, _ in inputs]
    if not several and not output.is_dir() and not str(output).endswith(os.sep):
        pairs = [(inputs[0][0], output)]
    else:
        if output.exists() and not output.is_dir():
            raise RecipeError(f"{len(inputs)} models need a folder, and {output} is a file")
        pairs = [(path, output / name) for path, name in inputs]
        try:
            for _, target in pairs:
                target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot make the folder {error.filename}: {error.strerror}") from error
    targets = [target for _, target in pairs]
    twice = next((target for target in targets if targets.count(target) > 1), None)
    if twice is not None:
        raise RecipeError(f"two inputs would be written to {twice}")
    sources = {path.resolve() for path, _ in pairs}
    clash = next((target for _, target in pairs if target.resolve() in sources), None)
    if clash is not None:
        raise RecipeError(f"{clash} is an input and would be overwritten; --in-place allows it")
    return pairs


def _run_all(
    plan: Sequence[tuple[Path, Path]], wishes: dict[str, Any], metric: str | None, jobs: int, quiet: bool
) -> Iterator[dict[str, Any]]:
    if len(plan) == 1 or jobs == 1:
        with model_progress(len(plan), quiet) as progress:
            for source, target in plan:
                found = optimize_one(source, target, wishes, metric, progress.say, raising=len(plan) == 1)
                with progress.aside():
                    yield found
        return
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from multiprocessing import get_context

    with ProcessPoolExecutor(min(jobs, len(plan)), mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(optimize_one, source, target, wishes, metric) for source, target in plan]
        with model_progress(len(plan), quiet) as progress:
            try:
                for future in as_completed(futures):
                    found = future.result()
                    with progress.aside():
                        yield found
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def optimize_one(
    source: Path,
    target: Path,
    wishes: dict[str, Any],
    metric: str | None,
    say: Callable[[str], None] | None = None,
    raising: bool = False,
) -> dict[str, Any]:
    """Optimize one file; with ``raising`` False a failure comes back as a dictionary with ``error`` and ``code``."""
    from onnxcompress.runtime import Runtime

    # Started before the rest is imported: onnxruntime is imported in the child at the same time.
    with Runtime(timeout_s=MODEL_TIMEOUT_S) as runtime:
        return _optimize_one(source, target, wishes, metric, say or (lambda line: None), raising, runtime)


def _optimize_one(
    source: Path,
    target: Path,
    wishes: dict[str, Any],
    metric: str | None,
    say: Callable[[str], None],
    raising: bool,
    runtime: Any,
) -> dict[str, Any]:
    from onnxcompress import report as reports
    from onnxcompress.optimizer import optimize as run

    try:
        result = run(source, target, progress=say, runtime=runtime, **wishes)
        if metric is not None:
            from onnxcompress.validation.judge import validate as compare

            say(f"measuring {metric}")
            checked = compare(source, target, data=wishes["data"], metric=metric, runtime=runtime)
            result.quality = checked.quality
        return reports.as_dict(result)
    except OnnxCompressError as error:
        if raising:
            raise
        return {"input": str(source), "error": " ".join(str(error).split()), "code": error.exit_code}


def _print_table(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from onnxcompress import report as reports

    console = Console(highlight=False, soft_wrap=True, width=width())
    title = f"{report['input']} -> {report['output']}" if report["output"] else report["input"]
    table = Table(title=escape(title), title_justify="left", box=None, pad_edge=False)
    for name, side in (("", "left"), ("before", "right"), ("after", "right"), ("change", "right")):
        table.add_column(name, justify=side)  # type: ignore[arg-type]  # literals of rich
    for row in reports.rows(report):
        table.add_row(*map(escape, row))
    console.print(table)
    merges = [(one, done) for one in report["passes"] if one["is_merge"] for done in one["done"]]
    for one, done in merges[:8]:
        console.print(escape(f"{one['name']}: {done['detail']}"))
    if len(merges) > 8:
        console.print(f"... and {len(merges) - 8} more (--report FILE.md lists all)")
    for dropped in report["dropped"]:
        console.print(escape(f"left out: {dropped['what']}, because {dropped['reason']}"))
    if report["unchanged"]:
        console.print("nothing to improve: the output is equivalent to the input")
    console.print(escape(f"{reports.proof_line(report)}; {report['seconds']:.1f} s"))
