"""``--report`` on the command line: every verb has it, the file tells how to repeat it, bad wishes are early errors."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import shlex
import threading
from collections import Counter

import onnx
import pytest
from click.testing import CliRunner

from onnxcompress import cli, models
from onnxcompress.errors import OutputError, RecipeError

DIGITS = models.path("digits")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "m.onnx").write_bytes(DIGITS.read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def invoke(*arguments):
    given = [str(one) for one in arguments]
    result = CliRunner().invoke(cli.cli, given, obj={"arguments": given})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def content_of(path):
    held = re.search(r'<script type="application/json" id="content">(.*?)</script>', path.read_text(), re.DOTALL)
    return json.loads(held.group(1))


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_can_write_a_report(verb):
    command = importlib.import_module(f"onnxcompress.cli.{verb.replace('-', '_')}").command
    option = next(one for one in command.params if one.name == "report")
    assert option.opts == ["--report"] and ".html" in option.help


COMMANDS = {
    "inspect": ["inspect", "m.onnx"],
    "validate": ["validate", "m.onnx", "m.onnx"],
    "bench": ["bench", "m.onnx", "--runs", "5", "--seconds", "0.2"],
    "optimize": ["optimize", "m.onnx", "-o", "o.onnx", "--no-latency", "-q"],
    "prune-width": ["prune-width", "m.onnx", "--macs", "0.7x", "--dry-run", "-q"],
    "deploy": ["deploy", "m.onnx", "--target", "onnxruntime", "-o", "out", "-q"],
}


@pytest.mark.parametrize("verb", COMMANDS)
def test_the_page_tells_how_to_repeat_it(folder, verb):
    given = [*COMMANDS[verb], "--report", "a report.html"]
    assert invoke(*given).exit_code == 0
    found = content_of(folder / "a report.html")
    assert shlex.split(found["run"]["command"]) == ["onnxcompress", *given] and found["run"]["verb"] == verb
    digest = hashlib.sha256(DIGITS.read_bytes()).hexdigest()
    assert {"path": "m.onnx", "bytes": DIGITS.stat().st_size, "sha256": digest} in found["run"]["files"]
    assert {"onnxruntime", "python", "machine"} <= set(found["environment"])


def test_bytes_by_layer_are_those_of_the_files(folder):
    invoke(*COMMANDS["optimize"], "--report", "r.html")
    found = content_of(folder / "r.html")["weight_bytes"]
    for side, name in (("before", "m.onnx"), ("after", "o.onnx")):
        weights = json.loads(invoke("inspect", name, "--json").stdout)["initializers"]
        assert found[side]["rows"] == weights and found[side]["rest"] == {"count": 0, "bytes": 0}


def test_a_model_replaced_in_place_has_no_bytes_before(folder):
    invoke("optimize", "m.onnx", "--in-place", "--no-latency", "-q", "--report", "r.html")
    assert set(content_of(folder / "r.html")["weight_bytes"]) == {"after"}


@pytest.mark.parametrize("verb", ["inspect", "validate", "bench"])
@pytest.mark.parametrize("suffix", [".md", ".json"])
def test_other_forms(folder, verb, suffix):
    assert invoke(*COMMANDS[verb], "--report", f"r{suffix}").exit_code == 0
    text = (folder / f"r{suffix}").read_text()
    assert json.loads(text)["run"]["verb"] == verb if suffix == ".json" else "## Repeat it" in text


@pytest.mark.parametrize("verb", COMMANDS)
def test_a_report_that_cannot_be_written_is_said_before_the_work(folder, verb):
    with pytest.raises(RecipeError, match=r"\.html, \.json or \.md"):
        invoke(*COMMANDS[verb], "--report", "r.pdf")
    with pytest.raises(OutputError, match=r"no/r\.html: the folder no does not exist"):
        invoke(*COMMANDS[verb], "--report", "no/r.html")
    assert sorted(path.name for path in folder.iterdir()) == ["m.onnx"]


@pytest.mark.parametrize("models", [["m.onnx"], ["m.onnx", "o.onnx"]])
def test_what_is_viewed_can_be_kept(folder, models, monkeypatch):
    pytest.importorskip("netron")
    from onnxcompress.view import Viewer

    def closing(viewer):
        threading.Timer(0.1, viewer.close).start()
        return viewer

    monkeypatch.setattr(Viewer, "__enter__", closing)
    invoke(*COMMANDS["optimize"])
    assert invoke("view", *models, "--no-browser", "--report", "r.html").exit_code == 0
    found = content_of(folder / "r.html")
    assert found["run"]["verb"] == "view"
    if len(models) == 1:
        assert found["nodes"] == len(onnx.load("m.onnx").graph.node) and "changes" not in found
    else:
        by_status = Counter(change["status"] for change in found["changes"])
        assert by_status == {"gone": 32, "new": 5, "changed": 2}
        assert found["after"]["nodes"] == len(onnx.load("o.onnx").graph.node)
