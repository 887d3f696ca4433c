"""What commands show on the terminal: tables on stdout, progress on stderr."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any


class ModelProgress:
    """What happens, on stderr: a bar with time left for several models, a spinner with the step for one.

    Args:
        bar: A rich Progress; None says nothing.
        total: Number of models.
        quiet: Print nothing where there is no bar.
    """

    def __init__(self, bar: Any, total: int, *, quiet: bool = True) -> None:
        self.bar, self.quiet = bar, quiet
        self.task = None if bar is None else bar.add_task("starting", total=total)

    def say(self, line: str) -> None:
        if self.bar is not None:
            self.bar.update(self.task, description=line)

    def line(self, text: str) -> None:
        """Something is done: stays on the terminal, above the bar."""
        if self.bar is not None:
            self.bar.console.print(text, markup=False, highlight=False)
        elif not self.quiet:
            print(text, file=sys.stderr, flush=True)

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
def model_progress(total: int, quiet: bool) -> Iterator[ModelProgress]:
    if quiet or not sys.stderr.isatty():
        yield ModelProgress(None, total, quiet=quiet)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    several = [BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()] if total > 1 else [TimeElapsedColumn()]
    columns = [SpinnerColumn(), TextColumn("{task.description}"), *several]
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield ModelProgress(bar, total)


def width() -> int | None:
    """The terminal's width; wide where stdout is a file, so that nothing is cut."""
    return None if sys.stdout.isatty() else 200


def print_rows(header: Sequence[str], rows: Sequence[Sequence[str]], *, folded: Sequence[int] = ()) -> None:
    """A table; columns of words that are ``folded`` go on in further lines where the terminal is narrow."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    if not rows:
        return
    table = Table(box=None, pad_edge=False)
    for number, name in enumerate(header):
        words = number == 0 or number in folded
        table.add_column(name, justify="left" if words else "right", no_wrap=number not in folded, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    Console(highlight=False, width=width()).print(table)
