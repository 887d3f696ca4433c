"""Netron serves the models; two of them share a page."""

import socket
import urllib.request

import pytest

from onnxcompress.errors import ModelError, RecipeError
from onnxcompress.models import path as model_path
from onnxcompress.view import Viewer, side_by_side

pytest.importorskip("netron")


def read(url):
    with urllib.request.urlopen(url, timeout=20) as answer:
        return answer.read().decode()


def test_one_model_is_served_by_netron():
    with Viewer([model_path("digits")]) as viewer:
        assert "netron" in read(viewer.url).lower()


def test_two_models_share_a_page(tmp_path):
    other = tmp_path / "a <b>.onnx"
    other.write_bytes(model_path("digits").read_bytes())
    with Viewer([model_path("digits"), other]) as viewer:
        page = read(viewer.url)
        assert page.count("<iframe") == 2 and "a &lt;b&gt;.onnx" in page
        for part in page.split('src="')[1:]:
            assert "netron" in read(part.split('"')[0]).lower()


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


def test_the_page_is_complete():
    page = side_by_side([("a", "http://127.0.0.1:1"), ("b", "http://127.0.0.1:2")])
    assert page.startswith("<!doctype html>") and page.rstrip().endswith("</html>")
