"""Pages: everything that a run gave is on them, names are only text, nothing is loaded, and the HTML is sound."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

try:
    import tomllib
except ImportError:
    import tomli as tomllib

from onnxcompress.errors import OutputError, RecipeError
from onnxcompress.report import check_suffix, write_as
from onnxcompress.report.page import Axis, Bar, Bars, Content, Plot, Point, Row, Series, Table, code, number, text
from onnxcompress.report.pages import VERBS, build
from onnxcompress.report.pages.sections import metric_name
from onnxcompress.report.plots import draw, nice_step
from onnxcompress.report.rendering import to_html, to_markdown

ROOT = Path(__file__).parents[2]
RUNS = Path(__file__).with_name("runs")
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&\"'`|{{ 7 * 7 }}"
VOID = {"meta", "link", "br", "hr", "img", "input", "wbr"}
LOADING = {"src", "srcset", "poster", "data", "action", "background", "formaction", "manifest", "ping"}


class Reader(HTMLParser):
    """Checks that every element is closed where it should be, and keeps what a reader sees."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.seen: list[str] = []
        self.problems: list[str] = []

    def handle_starttag(self, tag, attrs):
        if len({name for name, _ in attrs}) != len(attrs):
            self.problems.append(f"<{tag}> has an attribute twice")
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open[-1] != tag:
            self.problems.append(f"</{tag}> closes {self.open[-3:]}")
        else:
            self.open.pop()

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.seen.append(data)

    @property
    def words(self) -> str:
        return " ".join("".join(self.seen).split())


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert not reader.problems and not reader.open, (reader.problems[:5], reader.open)
    ids = [attrs["id"] for _, attrs in reader.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    links = {attrs["href"] for tag, attrs in reader.elements if tag == "a"}
    assert links <= {f"#{name}" for name in ids}
    return reader


def run_of(verb: str) -> dict:
    return json.loads((RUNS / f"{verb}.json").read_text())


def leaves(value):
    if isinstance(value, dict):
        for inner in value.values():
            yield from leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from leaves(inner)
    else:
        yield value


def poisoned(value):
    """The same with every string made hostile, but for the few that decide what is shown."""
    if isinstance(value, dict):
        kept = {"verb", "written", "criterion", "metric", "axis", "ranking"}
        return {key: inner if key in kept else poisoned(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [poisoned(inner) for inner in value]
    return f"{HOSTILE} {value}" if isinstance(value, str) and value else value


@pytest.mark.parametrize("verb", VERBS)
def test_every_name_and_reason_of_a_run_is_on_its_page(verb):
    content = run_of(verb)
    reader = read(to_html([build(content, verb)]))
    words = "".join(reader.words.split()).lower()
    titles = "".join("".join(str(v) for v in attrs.values()) for _, attrs in reader.elements)
    for leaf in leaves(content):
        if isinstance(leaf, str) and leaf not in ("agreement", "cosine"):
            leaf = metric_name(leaf)
            leaf = leaf.replace("T", " ").partition("+")[0] if re.fullmatch(r"\d{4}-\d\d-\d\dT.*", leaf) else leaf
            assert "".join(leaf.split()).lower() in words or leaf in titles, leaf


@pytest.mark.parametrize("verb", VERBS)
def test_the_whole_run_is_in_the_page_as_data(verb):
    content = run_of(verb)
    html = to_html([build(content, verb)])
    held = re.search(r'<script type="application/json" id="content">(.*?)</script>', html, re.DOTALL)
    assert json.loads(held.group(1)) == content


@pytest.mark.parametrize("verb", [*VERBS, "unheard-of"])
def test_hostile_names_are_text(verb):
    content = poisoned(run_of(verb if verb in VERBS else "inspect"))
    html = to_html([build(content, verb)])
    reader = read(html)
    assert "alert(1)" in reader.words and "{{ 7 * 7 }}" in reader.words
    assert sum(tag == "script" for tag, _ in reader.elements) == 2
    assert not any(tag in ("img", "iframe", "object", "embed", "base", "form") for tag, _ in reader.elements)
    assert not any(name.startswith("on") for _, attrs in reader.elements for name in attrs)
    assert "alert(1)</script>" not in html
    markdown = to_markdown([build(content, verb)])
    outside_code = re.sub(r"^```.*?^```$", "", markdown, flags=re.DOTALL | re.MULTILINE)
    assert "<script" not in outside_code and "<img" not in outside_code


@pytest.mark.parametrize("verb", VERBS)
def test_a_page_loads_nothing(verb):
    html = to_html([build(run_of(verb), verb)])
    reader = read(html)
    for tag, attrs in reader.elements:
        assert tag not in ("link", "iframe", "object", "embed", "img", "video", "audio", "source")
        assert not LOADING & set(attrs), (tag, attrs)
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL).group(1)
    assert "url(" not in style and "@import" not in style
    policy = next(attrs["content"] for tag, attrs in reader.elements if attrs.get("http-equiv"))
    assert policy.startswith("default-src 'none'; ") and "unsafe-eval" not in policy
    assert re.search(r"script-src 'sha256-[A-Za-z0-9+/=]{44}'", policy)


@pytest.mark.parametrize("verb", VERBS)
def test_markdown_holds_the_same_tables(verb):
    page = build(run_of(verb), verb)
    lines = to_markdown([page]).splitlines()
    assert lines[0].startswith("# ") and all(f"## {section.title}" in lines for section in page.sections)
    tables = [block for section in page.sections for block in section.blocks if isinstance(block, Table)]
    for table in tables:
        for row in table.rows:
            assert any(line.startswith("|") and line.count("|") == len(row) + 1 for line in lines)


def test_the_templates_are_shipped():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = settings["package-data"]["onnxcompress.report"]
    package = ROOT / "onnxcompress/report"
    others = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert others and others == {path for pattern in patterns for path in package.glob(pattern)}


def test_several_models_are_one_page():
    one = run_of("optimize")
    reader = read(to_html([build(one, "optimize"), build({**one, "input": "other.onnx"}, "optimize")]))
    assert "2 models" in reader.words and "other.onnx" in reader.words
    assert sum(tag == "h1" for tag, _ in reader.elements) == 1


def test_what_no_section_asks_for_is_shown_as_well():
    page = build({**run_of("bench"), "surprise": {"depth": [1, 2]}, "rows": [{"a": 1, "b": None}]}, "bench")
    assert page.sections[2].title == "More figures"
    words = read(to_html([page])).words
    assert "surprise" in words and "depth" in words and "1, 2" in words
    content = Content({"a": 1, "b": 2})
    assert content["a"] == 1 and content.rest == {"b": 2}


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["r.html", "r.HTML", "r.json", "r.md"])
def test_the_ending_says_the_form(tmp_path, name):
    write_as(tmp_path / name, run_of("bench"), verb="bench")
    text = (tmp_path / name).read_text()
    start = {"html": "<!DOCTYPE html>", "json": "{", "md": "# "}[name.rpartition(".")[2].lower()]
    assert text.startswith(start) and [p.name for p in tmp_path.iterdir()] == [name]


def test_another_ending_is_an_error(tmp_path):
    with pytest.raises(RecipeError, match=r"must end in \.html, \.json or \.md"):
        write_as(tmp_path / "r.pdf", {})
    assert check_suffix(Path("a.b/r.md")) == ".md" and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["r.html", "r.json", "r.md"])
def test_a_report_that_fails_leaves_the_old_one(tmp_path, name, monkeypatch):
    (tmp_path / name).write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OutputError, match="No space left on device"):
        write_as(tmp_path / name, run_of("bench"), verb="bench")
    assert (tmp_path / name).read_text() == "old" and [p.name for p in tmp_path.iterdir()] == [name]


def test_a_link_stays_a_link_and_the_file_is_for_others_to_read(tmp_path):
    (tmp_path / "real.md").write_text("old")
    (tmp_path / "link.md").symlink_to("real.md")
    write_as(tmp_path / "link.md", run_of("bench"), verb="bench")
    assert (tmp_path / "link.md").is_symlink() and (tmp_path / "real.md").read_text().startswith("# ")
    write_as(tmp_path / "new.md", run_of("bench"), verb="bench")
    assert (tmp_path / "new.md").stat().st_mode & 0o777 == (tmp_path / "real.md").stat().st_mode & 0o777


# -- marks -------------------------------------------------------------------------------------------------------------


def test_ticks_are_round_and_marks_lie_inside():
    assert [nice_step(rough) for rough in (0.9, 1, 1.1, 3, 7, 0.03)] == [1, 1, 2, 5, 10, 0.05]
    points = [Point(0.5, 1e6), Point(2.5, 3e6), Point(float("nan"), 1.0)]
    drawing = draw(Plot("t", Axis("x"), Axis("y", "bytes"), [Series("s", points)]))
    marks = drawing.curves[0].marks
    assert len(marks) == 2 and [tick.text for tick in drawing.y_ticks] == ["1 MB", "1.5 MB", "2 MB", "2.5 MB", "3 MB"]
    for mark in marks:
        assert drawing.left <= mark.x <= drawing.right and drawing.top <= mark.y <= drawing.bottom
    assert marks[0].x < marks[1].x and marks[0].y > marks[1].y


@pytest.mark.parametrize("value", [0.0, 0.9933, 1.0, -3.5, 1e-12, 1e15])
def test_one_point_alone_can_be_drawn(value):
    for unit in ("", "share", "bytes", "ms"):
        drawing = draw(Plot("t", Axis("x", unit), Axis("y", unit), [Series("s", [Point(value, value)])]))
        assert drawing.x_ticks and drawing.left <= drawing.curves[0].marks[0].x <= drawing.right


def test_bars_share_a_scale_and_bear_what_is_no_number():
    bars = Bars("t", [Bar("a", 2, "2", 4), Bar("b", float("nan"), "?"), Bar("c", -1, "-1")])
    assert [bars.per_cent(bar.value) for bar in bars.bars] == [50.0, 0.0, 0.0] and bars.per_cent(4) == 100.0
    assert Bars("t", []).per_cent(0) == 0.0


def test_columns_of_numbers_are_told_from_words():
    table = Table(("a", "b", "c"), [[code("x"), number(1), text("")], [code("y"), text("kept"), text("")]])
    assert table.numeric == [False, True, False]
    assert number(float("inf")).text == "not finite" and number(None).text == ""


# -- runs of other kinds ---------------------------------------------------------------------------------------------


def changed(verb, **values):
    return {**run_of(verb), **values}


FAILED = {"failure": "node 'c' (Conv): no such operator", "outputs": [], "equivalent": False, "feeds": 0}
VARIANTS = {
    "a plan": ("quantize", {"quality": None, "output": None}, "nothing was written"),
    "nothing to quantize": ("quantize", {"unchanged": True, "layers": []}, "the result is a copy"),
    "a list of groups": ("prune-width", {"output": None, "macs": [9, 9], "quality": None, "fits": []}, "nothing was"),
    "by latency": ("prune-width", {"latency": run_of("prune-depth")["latency"]}, "as fast"),
    "nothing to improve": ("optimize", {"unchanged": True, "passes": [], "latency": None}, "nothing to improve"),
    "not checked": ("optimize", {"equivalence": None, "quality": {}}, "Not checked"),
    "statistics alone": ("finetune", {"training": None, "metric": None, "before": None, "after": None}, "Written to"),
    "blocks by name": ("prune-depth", {"found": None, "fits": [], "training": None, "goal": ""}, "were pruned"),
    "a failed model": ("validate", {"equivalence": {**FAILED, "summary": "x"}, "metric": None}, "no such operator"),
    "another interface": ("validate", {"interface": ["output 'z' is gone"]}, "cannot stand in"),
    "a given triple": ("prune-scale", {"predictor": None}, "together"),
    "no way to the goal": ("compress", {"goal_met": False, "output": None}, "not reached"),
    "nothing known of the run": ("bench", {"run": None, "environment": None}, "as fast"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_runs_of_other_kinds_have_a_page(name):
    verb, values, said = VARIANTS[name]
    page = build(changed(verb, **values), verb)
    assert said in read(to_html([page])).words and to_markdown([page])


def test_one_model_alone_can_be_timed():
    content = run_of("bench")
    words = read(to_html([build({**content, "models": content["models"][:1]}, "bench")])).words
    assert "One run takes" in words


def test_figures_that_are_no_numbers_are_said():
    content = run_of("quantize")
    content["layers"][0] |= {"error": float("nan"), "bits_per_weight": float("inf")}
    reader = read(to_html([build(content, "quantize")]))
    assert "not finite" in reader.words and "nan" not in reader.words.split() and "inf" not in reader.words.split()


def test_latencies_of_a_compression_are_drawn_as_of_one_minute():
    """A busy machine does not make a step slower than the original that was timed with it."""
    content = run_of("compress")
    content["before"]["latency"] |= {"original_ms": 0.05, "result_ms": 0.05, "ratio": 1.0}
    content["attempts"][0]["figures"]["latency"] |= {"original_ms": 8.0, "result_ms": 4.0, "ratio": 2.0}
    blocks = [block for section in build(content, "compress").sections for block in section.blocks]
    series = [one for row in blocks if isinstance(row, Row) for plot in row.plots[1:] for one in plot.series]
    drawn = {point.label: point.x for one in series for point in one.points}
    assert drawn["original"] == 0.05 and drawn["1 optimize"] == 0.025
