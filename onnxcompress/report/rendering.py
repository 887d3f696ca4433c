"""A page as HTML, in one file that asks for nothing else, or as Markdown.

Names of nodes and tensors come from strangers: the template escapes everything, and the page's own policy lets no
script run but the one that is written here, and loads nothing.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any

from onnxcompress.report.page import Bars, Block, Cell, Code, Lines, Page, Plot, Row, Table, finite_points
from onnxcompress.report.plots import draw

TEMPLATE, STYLE, SCRIPT = "page.html.jinja", "page.css", "page.js"


def to_html(pages: Sequence[Page]) -> str:
    """One document of one run or more."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("onnxcompress.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    folder = files("onnxcompress.report") / "templates"
    script = (folder / SCRIPT).read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment.filters |= {"breakable": breakable, "words": words}
    contents = [finite(page.content) for page in pages]
    page = environment.get_template(TEMPLATE).render(
        pages=pages,
        content=contents[0] if len(contents) == 1 else contents,
        draw=draw,
        # Ours, and not to be escaped; its digest is what the policy knows it by.
        style=Markup((folder / STYLE).read_text(encoding="utf-8")),
        script=Markup(script),
        digest=digest,
    )
    return page.lstrip()


def breakable(name: str) -> Any:
    """A name, escaped, that a narrow window may break behind its slashes, dots and underscores."""
    from markupsafe import Markup, escape

    parts = re.split(r"(?<=[/._:])(?=[^/._:])", name)
    return Markup("<wbr>").join(escape(part) for part in parts)


def words(command: str) -> Any:
    """A command, escaped, that breaks between its words and not behind the dashes of an option."""
    from markupsafe import Markup

    return Markup(" ").join(Markup("<span>{}</span>").format(word) for word in command.split(" "))


def finite(value: Any) -> Any:
    """The same with None for what JSON has no number for."""
    if isinstance(value, Mapping):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_markdown(pages: Sequence[Page]) -> str:
    """The same as Markdown, where plots and bars are tables."""
    return "\n".join(line for page in pages for line in _page_lines(page))


def _page_lines(page: Page) -> Iterator[str]:
    yield f"# {_cell(page.title)}\n"
    yield f"{_cell(page.summary)}\n"
    if page.verdict:
        yield f"{_cell(page.verdict)}\n"
    if page.cards:
        rows = [[Cell(c.name), Cell(c.before), Cell(c.value), Cell(c.change or c.note)] for c in page.cards]
        yield from _table_lines(("", "before", "now", "change"), rows)
    for section in page.sections:
        yield f"\n## {section.title}\n"
        if section.note:
            yield f"{_cell(section.note)}\n"
        for block in section.blocks:
            yield from _block_lines(block)
            yield ""


def _block_lines(block: Block) -> Iterator[str]:
    if isinstance(block, Code):
        lines = (" ".join(line.split()) if block.is_shell else line.replace("`", "'") for line in block.lines)
        yield from ("```console" if block.is_shell else "```", *lines, "```")
        return
    if not isinstance(block, Row) and block.title:
        yield f"### {_cell(block.title)}\n"
    if isinstance(block, Lines):
        yield from (f"- {_cell(line)}" for line in block.lines)
    elif isinstance(block, Table):
        yield from _table_lines(block.header, block.rows, block.numeric)
    elif isinstance(block, Bars):
        has_before = any(bar.before is not None for bar in block.bars)
        rows = [
            [
                Cell(bar.label, is_code=bar.is_code),
                *([Cell(f"{bar.before or 0:,.4g}")] if has_before else []),
                Cell(bar.text),
            ]
            for bar in block.bars
        ]
        yield from _table_lines(("", *block.names) if has_before else ("", block.note or "value"), rows)
    elif isinstance(block, Plot):
        rows = [
            [Cell(p.label or series.name), Cell(f"{p.x:.6g}"), Cell(f"{p.y:.6g}")]
            for series in block.series
            for p in finite_points(series.points)
        ]
        yield from _table_lines(("", block.x.name, block.y.name), rows)
    elif isinstance(block, Row):
        for plot in block.plots:
            yield from _block_lines(plot)
            yield ""


def _table_lines(
    header: Sequence[str], rows: Sequence[Sequence[Cell]], numeric: Sequence[bool] | None = None
) -> Iterator[str]:
    yield f"| {' | '.join(map(_cell, header))} |"
    yield f"|{'|'.join('--:' if right else '---' for right in numeric or [False] * len(header))}|"
    for row in rows:
        yield f"| {' | '.join(f'`{_cell(c.text)}`' if c.is_code and c.text else _cell(c.text) for c in row)} |"


def _cell(words: str) -> str:
    return " ".join(words.split()).replace("|", "&#124;").replace("<", "&lt;")
