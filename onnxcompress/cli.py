"""The command line: one verb, one function; the only module that prints.

Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 not equivalent or over budget, 2 bad input or
usage; each failure is one line.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from onnxcompress.errors import OnnxCompressError, OutputError, RecipeError

EXIT_NOT_EQUIVALENT = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
LARGEST_SIZE = (1 << 31) - 1
MOST_THREADS = 4096
MODEL_TIMEOUT_S = 300.0  # for one load or one run of a model
LEVELS = {
    0: "nothing, a checked copy",
    1: "cleanup: constants, dead code, no-ops, duplicates",
    2: "and fusions and folding of BatchNormalization and per-channel constants",
    3: "and merges of linear operators (the default)",
}


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point: runs a verb and ends the process with its exit code."""
    signal.signal(signal.SIGTERM, lambda number, frame: _interrupt())
    _open_standard_streams()
    try:
        with contextlib.suppress(AttributeError, ValueError):
            sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # a name that the terminal cannot show
        code = cli.main(args=arguments, prog_name="onnxcompress", standalone_mode=False)
        sys.stdout.flush()
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(EXIT_USAGE)
    except click.ClickException as error:
        _fail(_usage_line(error), EXIT_USAGE)
    except OnnxCompressError as error:
        _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, click.Abort, Interrupted) as stop:
        _fail(f"interrupted; {str(stop) or 'no output was written'}", EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of stdout went away (a pager, head): not our failure, and nothing can be said there any more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except MemoryError:
        _fail("out of memory", EXIT_USAGE)
    except OSError as error:
        _fail(f"{error.filename or 'a file'}: {error.strerror or error}", EXIT_USAGE)
    except Exception as error:  # a bug of ours: one line, and the way to the traceback
        if os.environ.get("ONNXCOMPRESS_TRACEBACK"):
            raise
        text = str(error).splitlines()[0] if str(error) else ""
        _fail(f"internal error, {type(error).__name__}: {text} (ONNXCOMPRESS_TRACEBACK=1 shows where)", 1)


class Interrupted(Exception):
    """KeyboardInterrupt under another name: before passing that one on, click prints an empty line."""


class Verbs(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            raise Interrupted(*stop.args) from stop


def _open_standard_streams() -> None:
    """Give a stream that came closed (``>&-``) a place to go.

    The next file opened would get its number: a model in the place of stderr would hold what native code prints.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  # open until the end of the process
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115


def _interrupt() -> NoReturn:
    raise KeyboardInterrupt


def _fail(message: str, code: int) -> NoReturn:
    with contextlib.suppress(OSError):
        print(f"onnxcompress: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def _usage_line(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    where = f" ({context.command_path} --help)" if context is not None else ""
    return f"{error.format_message().rstrip('.')}{where}"


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="onnxcompress")
@click.option("-v", "--verbose", count=True, help="Say more: -v each pass, -vv each rewrite.")
def cli(verbose: int) -> None:
    """Smaller, faster .onnx files for stock onnxruntime, with the proof of what changed."""
    levels = {0: logging.WARNING, 1: logging.INFO}
    logging.basicConfig(level=levels.get(verbose, logging.DEBUG), format="onnxcompress: %(message)s", stream=sys.stderr)
    logging.getLogger("matplotlib").setLevel(logging.WARNING)


# -- types of options ------------------------------------------------------------------------------------------------


class Number(click.FloatRange):
    """A float in a range, infinity and nan excluded: nan is within no limit and above none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


class FilePath(click.Path):
    """A path; an empty one, as an unset variable gives it, is not the current folder."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("the name is empty", param, ctx)
        return super().convert(value, param, ctx)


class Size(click.ParamType[int]):
    """A number of bytes: 1048576, 10K, 5M, 1G; a bare number counts ``unit`` bytes each."""

    name = "size"

    def __init__(self, unit: int = 1) -> None:
        self.unit = unit

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        text = str(value).strip().upper().removesuffix("IB").removesuffix("B")
        factor = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 0)
        try:
            number = float(text[:-1] if factor else text) * (factor or self.unit)
        except ValueError:
            self.fail(f"{value!r} is not a size; expected bytes as 10K, 5M or 1G", param, ctx)
        if not 0 <= number < 1 << 62:
            self.fail(f"{value!r} is out of range", param, ctx)
        return int(number)


class InputShape(click.ParamType[tuple[str, tuple[int, ...]]]):
    """``NAME:1,3,224,224``; names may hold colons, the last one counts; -1 or ? leaves an axis dynamic."""

    name = "name:dims"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, tuple[int, ...]]:
        if isinstance(value, tuple):
            return value
        name, colon, dims = str(value).rpartition(":")
        try:
            shape = (
                tuple(-1 if dim.strip() in ("?", "") else int(dim) for dim in dims.replace("x", ",").split(","))
                if dims
                else ()
            )
        except ValueError:
            self.fail(f"{value!r}: expected NAME:1,3,224,224", param, ctx)
        if not colon or not name:
            self.fail(f"{value!r}: expected NAME:1,3,224,224", param, ctx)
        if any(size > LARGEST_SIZE for size in shape):
            self.fail(f"{value!r}: a size is above {LARGEST_SIZE}", param, ctx)
        return name, shape


def _names(values: Sequence[str]) -> tuple[str, ...]:
    names = tuple(name.strip() for value in values for name in value.split(",") if name.strip())
    if values and not names:
        raise RecipeError("a list of passes is empty: name one, or leave the option out")
    return names


def _shapes(given: Sequence[tuple[str, tuple[int, ...]]]) -> dict[str, tuple[int, ...]]:
    shapes = dict(given)
    for name, shape in given:
        if shapes[name] != shape:
            raise RecipeError(f"--input-shape gives {name!r} both {list(shape)} and {list(shapes[name])}")
    return shapes


# -- optimize --------------------------------------------------------------------------------------------------------


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


@cli.command()
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
@click.option("--report", type=FilePath(), metavar="FILE", help="Write a report: FILE.json or FILE.md.")
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Models at once.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON instead of the table.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
def optimize(
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
    from onnxcompress.optimizer import check_target

    if report is not None:
        reports.check_suffix(report)
        check_target(report)
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
        "only": _names(only),
        "skip": _names(skip),
        "level": level,
        "input_shapes": _shapes(input_shapes),
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
            reports.write(report, done)
    return worst


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
        with _progress(len(plan), quiet) as progress:
            for source, target in plan:
                found = optimize_one(source, target, wishes, metric, progress.say, raising=len(plan) == 1)
                with progress.aside():
                    yield found
        return
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from multiprocessing import get_context

    with ProcessPoolExecutor(min(jobs, len(plan)), mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(optimize_one, source, target, wishes, metric) for source, target in plan]
        with _progress(len(plan), quiet) as progress:
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


class _Progress:
    """What happens, on stderr: a bar with time left for several models, a spinner with the step for one.

    Args:
        bar: A rich Progress; None says nothing.
        total: Number of models.
    """

    def __init__(self, bar: Any, total: int) -> None:
        self.bar = bar
        self.task = None if bar is None else bar.add_task("starting", total=total)

    def say(self, line: str) -> None:
        if self.bar is not None:
            self.bar.update(self.task, description=line)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """A model is done; take the bar off the terminal while its result is printed."""
        if self.bar is not None:
            self.bar.advance(self.task)
            self.bar.stop()
        yield
        if self.bar is not None and not self.bar.finished:
            self.bar.start()


@contextlib.contextmanager
def _progress(total: int, quiet: bool) -> Iterator[_Progress]:
    if quiet or not sys.stderr.isatty():
        yield _Progress(None, total)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    several = [BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()] if total > 1 else []
    columns = [SpinnerColumn(), TextColumn("{task.description}"), *several]
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield _Progress(bar, total)


def _print_table(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from onnxcompress import report as reports

    console = Console(highlight=False, soft_wrap=True, width=_width())
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


# -- validate --------------------------------------------------------------------------------------------------------


@cli.command()
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
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def validate(reference: Path, candidate: Path, as_json: bool, **wishes: Any) -> int:
    """Compare model B with model A: interface, outputs, and a metric on labelled data.

    Exits with 1 when B differs by more than the tolerance.
    """
    from onnxcompress.validation.judge import validate as run

    found = run(reference, candidate, **wishes)
    if as_json:
        click.echo(json.dumps(found.as_dict(), indent=1))
    else:
        for line in found.interface:
            click.echo(f"interface: {line}")
        for line in found.inputs:
            click.echo(line)
        rows = [(d.name, *_difference_cells(d)) for d in found.comparison.outputs]
        _print_rows(("output", "max|d|", "max|d|/max|y|", "cosine", "agreement", "allowed", ""), rows)
        _print_rows(
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


# -- inspect ---------------------------------------------------------------------------------------------------------


@cli.command()
@click.argument("model", type=FilePath())
@click.option("--top", type=click.IntRange(min=0), default=10, show_default=True, help="Initializers to show.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def inspect(model: Path, top: int, as_json: bool) -> None:
    """Show what is in a model: interface, operator sets, operators, weights, MACs."""
    from onnxcompress import report as reports
    from onnxcompress.inspection import inspect_model

    found = inspect_model(model)
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
    _print_rows(("initializer", "type", "shape", "bytes", "read by"), rows)


# -- bench -----------------------------------------------------------------------------------------------------------


@cli.command()
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
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def bench(models: tuple[Path, ...], as_json: bool, input_shapes: Any, **wishes: Any) -> None:
    """Time models on onnxruntime, taking turns, and compare each with the first: latency, load time, peak memory."""
    from onnxcompress import report as reports
    from onnxcompress.bench import bench_models

    found = bench_models(models, input_shapes=_shapes(input_shapes), **wishes)
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
    _print_rows(("model", "p10 ms", "p50 ms", "p90 ms", "speed-up (95 %)", "load ms", "peak memory"), rows)


# -- view ------------------------------------------------------------------------------------------------------------


@cli.command()
@click.argument("models", nargs=-1, required=True, metavar="A [B]", type=FilePath())
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Port; any free one by default.")
@click.option("--browser/--no-browser", default=True, help="Open the page (default).")
def view(models: tuple[Path, ...], port: int, browser: bool) -> None:
    """Show a model in Netron, or two side by side. Nodes that a pass made have its name among their metadata."""
    from onnxcompress.view import Viewer

    if len(models) > 2:
        raise RecipeError(f"{len(models)} models given, one or two can be shown")
    with Viewer(models, port=port) as viewer:
        click.echo(f"{viewer.url} (Ctrl-C ends)")
        sys.stdout.flush()
        if browser:
            click.launch(viewer.url)
        with contextlib.suppress(KeyboardInterrupt):
            viewer.closed.wait()


def _width() -> int | None:
    """The terminal's width; wide where stdout is a file, so that nothing is cut."""
    return None if sys.stdout.isatty() else 200


def _print_rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    if not rows:
        return
    table = Table(box=None, pad_edge=False)
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(escape, row))
    Console(highlight=False, width=_width()).print(table)


if __name__ == "__main__":
    main()
