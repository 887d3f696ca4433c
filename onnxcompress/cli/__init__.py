"""The command line: one verb, one module; nothing else prints.

Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 not equivalent or over budget, 2 bad input or
usage; each failure is one line. A verb's module is imported when the verb is called.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from onnxcompress.errors import OnnxCompressError

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
# In the order of --help.
VERBS = (
    "compress",
    "optimize",
    "quantize",
    "validate",
    "inspect",
    "bench",
    "view",
    "deploy",
    "export",
    "finetune",
    "prune-depth",
    "prune-width",
    "prune-scale",
)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point: runs a verb and ends the process with its exit code."""
    signal.signal(signal.SIGTERM, lambda number, frame: _interrupt())
    _open_standard_streams()
    try:
        with contextlib.suppress(AttributeError, ValueError):
            sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # a name that the terminal cannot show
        given = list(sys.argv[1:] if arguments is None else arguments)
        code = cli.main(args=given, prog_name="onnxcompress", standalone_mode=False, obj={"arguments": given})
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
    """Each verb is ``command`` in the module of its name, with _ for -."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            return None
        command: click.Command = importlib.import_module(f"onnxcompress.cli.{name.replace('-', '_')}").command
        return command

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
