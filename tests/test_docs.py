"""The pages of ``docs/``: one for each verb, no option that is not there, no message that the code does not have."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import click
import pytest

from onnxcompress import cli

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
OPTION = re.compile(r"(?<![\w-])--?[a-zA-Z][\w-]*")
# Of other programs that pages name.
FOREIGN = {"--nproc-per-node", "-m", "-n", "-c", "--low-memory", "--directory"}


def options_of(verb: str) -> set[str]:
    command = importlib.import_module(f"onnxcompress.cli.{verb.replace('-', '_')}").command
    named = {opt for one in command.params if isinstance(one, click.Option) for opt in (*one.opts, *one.secondary_opts)}
    return named | {"--help", "-h"}


ALL_OPTIONS = {option for verb in cli.VERBS for option in options_of(verb)} | {"-v", "-vv", "--version"}


def code_of(page: Path) -> list[str]:
    """Fenced blocks and inline code."""
    text = page.read_text()
    fenced = re.findall(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))
    return [*fenced, *inline]


def commands_of(page: Path) -> list[tuple[str, str]]:
    """Verb and arguments of each onnxcompress command in a session."""
    found = []
    for block in re.findall(r"^```console\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
        joined = re.sub(r"\\\n\s*", " ", block)
        for line in joined.splitlines():
            if line.startswith("$ onnxcompress "):
                verb, _, rest = line.removeprefix("$ onnxcompress ").partition(" ")
                found.append((verb, rest.partition(";")[0]))
    return found


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_a_page_that_the_index_names(verb):
    page = DOCS / f"{verb}.md"
    assert page.read_text().startswith(f"# onnxcompress {verb}\n")
    assert f"[{verb}]({verb}.md)" in (DOCS / "README.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_option_on_a_page_exists(page):
    known = (options_of(page.stem) if page.stem in cli.VERBS else set()) | FOREIGN
    named = {option for code in code_of(page) if not code.startswith("-O") for option in OPTION.findall(code)}
    for option in named:
        # A page may name another verb's option, in a session or as the next step.
        assert option in known or option in ALL_OPTIONS, f"{page.name} names {option}"


@pytest.mark.parametrize("verb", cli.VERBS)
def test_a_page_names_the_options_of_its_verb(verb):
    text = (DOCS / f"{verb}.md").read_text()
    command = importlib.import_module(f"onnxcompress.cli.{verb.replace('-', '_')}").command
    for one in command.params:
        if isinstance(one, click.Option):
            assert any(opt in text for opt in (*one.opts, *one.secondary_opts)), f"{verb}.md does not name {one.opts}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_of_a_session_are_understood(page):
    for verb, rest in commands_of(page):
        if verb.startswith("-"):
            continue
        known = options_of(verb)
        for option in OPTION.findall(re.sub(r"'[^']*'", "", rest)):
            assert option in known or option.startswith("-O"), f"{page.name}: {verb} has no {option}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_pages(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert target.startswith("https://") or (DOCS / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_sessions_have_output_and_no_traces_of_a_machine(page):
    text = page.read_text()
    assert "Traceback" not in text and "internal error," not in text and not re.search(r"/(tmp|root|home|work)/", text)


# -- messages ----------------------------------------------------------------------------------------------------------


def messages() -> list[str]:
    """Texts of the code with ``...`` for what changes."""

    def text(node: ast.expr) -> str:
        if isinstance(node, ast.Constant):
            return str(node.value)
        if isinstance(node, ast.JoinedStr):
            return "".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values)
        return "..."

    found = []
    for path in (ROOT / "onnxcompress").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Constant, ast.JoinedStr)):
                found.append(text(node))
    return found


def rows_of_messages() -> list[list[str]]:
    lines = (DOCS / "troubleshooting.md").read_text().splitlines()
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in rows if row[0].strip() != "message"]


def test_every_message_has_a_cause_and_a_way_out():
    rows = rows_of_messages()
    assert len(rows) > 60 and all(len(row) == 3 and all(row) for row in rows)


def test_every_message_on_the_page_is_one_of_the_code():
    known = [re.sub(r"(\.\.\.)+", "...", one) for one in messages()]
    joined = "\n".join(known)
    for row in rows_of_messages():
        for quoted in re.findall(r"^`([^`]+)`", row[0]):
            parts = [part for part in quoted.replace("\\|", "|").split("...") if len(part.strip()) > 2]
            assert parts and any(all(part in one for part in parts) for one in known), quoted
            assert all(part in joined for part in parts), quoted
