"""Netron is served with each model; two of them share a page."""

import json
import re
import socket
import urllib.error
import urllib.request

import onnx
import pytest

from onnxcompress.errors import ModelError, RecipeError
from onnxcompress.models import path as model_path
from onnxcompress.view import Viewer
from onnxcompress.view.changes import NodeChange
from onnxcompress.view.serving import side_by_side

pytest.importorskip("netron")


def read(url):
    with urllib.request.urlopen(url, timeout=20) as answer:
        return answer.read()


def status(url):
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def shown_model(url):
    """The file that Netron's page asks for, as its script makes an address of it."""
    [name] = re.findall(r'<meta name="file" content="([^"]*)">', read(url).decode())
    return read(url + name)


@pytest.fixture
def two(tmp_path):
    """The embedded model, and one with a name of its own that lost a node's weight."""
    proto = onnx.load(model_path("digits"))
    tensor = next(t for t in proto.graph.initializer if t.name.endswith("weight"))
    tensor.raw_data = bytes(len(tensor.raw_data))
    other = tmp_path / "a <b> %20.onnx"
    onnx.save(proto, other)
    return model_path("digits"), other


def test_one_model_is_served_by_netron():
    with Viewer([model_path("digits")]) as viewer:
        assert "netron" in read(viewer.url).decode().lower()
        assert shown_model(viewer.url) == model_path("digits").read_bytes()


def test_two_models_share_a_page_and_each_pane_shows_its_own(two):
    with Viewer(two) as viewer:
        page = read(viewer.url).decode()
        assert "a &lt;b&gt; %20.onnx" in page
        panes = [part.split('"')[0] for part in page.split(' src="')[1:]]
        assert [shown_model(viewer.url + pane) for pane in panes] == [model.read_bytes() for model in two]


def test_the_page_lists_the_nodes_that_differ(two):
    with Viewer(two) as viewer:
        [text] = re.findall(r'<script id="changes" type="application/json">(.*?)</script>', read(viewer.url).decode())
        assert [one["status"] for one in json.loads(text)] == ["changed"] == [one.status for one in viewer.changes]


def test_another_format_is_shown_without_a_list(tmp_path):
    (tmp_path / "m.ort").write_bytes(b"no protobuf")
    with Viewer([model_path("digits"), tmp_path / "m.ort"]) as viewer:
        page = read(viewer.url).decode()
        assert viewer.changes is None and "nodes of .onnx files alone are compared" in page
        assert shown_model(f"{viewer.url}1/") == b"no protobuf"


def test_netron_sends_nothing_and_asks_for_nothing():
    with Viewer([model_path("digits")]) as viewer:
        with urllib.request.urlopen(viewer.url, timeout=20) as answer:
            assert answer.headers["Set-Cookie"].startswith("consent=")
        # Netron sends telemetry when it has a version, and shows nothing when its date is half a year ago.
        page = read(viewer.url).decode()
        assert '<meta name="version" content="0.0.0">' in page
        assert re.search(r'<meta name="date" content="20\d\d-\d\d-\d\d \d\d:\d\d:\d\d">', page)


def test_only_netron_and_the_models_folder_are_served(two, tmp_path):
    (tmp_path / "secret").write_text("secret")
    inner = tmp_path / "in"
    inner.mkdir()
    model = inner / "m.onnx"
    model.write_bytes(two[0].read_bytes())
    (inner / "weights.bin").write_bytes(b"weights")
    (inner / "link").symlink_to(tmp_path / "secret")
    with Viewer([model]) as viewer:
        assert read(viewer.url + "data/weights.bin") == b"weights" and read(viewer.url + "index.js")
        outside = (
            "data/../../secret",
            "data/%2e%2e/secret",
            "data/link",
            "../../secret",
            "server.py",
            "data",
            "none.js",
        )
        assert [status(viewer.url + path) for path in outside] == [404] * len(outside)
        assert status(viewer.url.replace("/0/", "/1/")) == 404


def test_a_missing_file_and_a_taken_port_are_named(tmp_path):
    with pytest.raises(ModelError, match="no such file"):
        Viewer([tmp_path / "none.onnx"])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for models in ([model_path("digits")], [model_path("digits")] * 2):
            with pytest.raises(RecipeError, match=f"port {port} cannot be used"):
                Viewer(models, port=port)


def test_a_damaged_model_is_named_and_another_format_is_netrons(tmp_path):
    (tmp_path / "cut.onnx").write_bytes(model_path("digits").read_bytes()[:5000])
    (tmp_path / "net.cfg").write_text("[net]")
    whole = model_path("digits")
    for models in (
        [tmp_path / "cut.onnx"],
        [whole, tmp_path / "cut.onnx"],
        [tmp_path / "cut.onnx", tmp_path / "net.cfg"],
    ):
        with pytest.raises(ModelError, match=r"cut\.onnx is not an ONNX model, or it is damaged"):
            Viewer(models)
    with Viewer([tmp_path / "net.cfg"]) as viewer:
        assert read(viewer.url + "data/net.cfg") == b"[net]"
    with Viewer([whole, tmp_path / "net.cfg"]) as viewer:
        assert viewer.changes is None


def test_the_page_is_complete_and_names_stay_text():
    change = NodeChange("new", "</script><b>", "y", "Conv", "{{title}}")
    page = side_by_side([("a", "0/"), ("b", "1/")], [change])
    assert page.startswith("<!doctype html>") and page.rstrip().endswith("</html>")
    assert "</script><b>" not in page and "0 changed, 1 new, 0 gone" in page
    [text] = re.findall(r'<script id="changes" type="application/json">(.*?)</script>', page)
    assert json.loads(text)[0]["name"] == "</script><b>" and json.loads(text)[0]["detail"] == "{{title}}"
