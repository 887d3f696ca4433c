"""Netron, served from this machine alone, and a page with two of it side by side.

Netron's own server keeps one model a process, so that two panes would show the same one, and its page asks for consent
to telemetry before it shows anything. Here its files are served as they are, each model under a path of its own, with
telemetry off. All come from one address, so that the page can show a node in either pane.
"""

from __future__ import annotations

import datetime
import html
import json
import logging
import mimetypes
import re
import threading
import urllib.parse
from collections.abc import Sequence
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files as resource_files
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from onnx import ModelProto

from onnxcompress.errors import ModelError, RecipeError
from onnxcompress.model_io import read_proto
from onnxcompress.view.changes import NodeChange, node_changes

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
TYPES = {
    ".js": "text/javascript",
    ".html": "text/html; charset=utf-8",
    ".css": "text/css",
    ".onnx": "application/octet-stream",
}
PANE = '<section><h1>{name}</h1><iframe title="{name}" src="{url}"></iframe></section>'
COUNT = "{count} {status}"


class Viewer:
    """A server of Netron for the models, and for two of them of a page that shows both.

    Args:
        models: One or two files.
        port: Port of the page, 0 for any free one.

    Attributes:
        url: Where to look.
        changes: Of two ONNX models, the nodes that differ; None where one is of another format, which Netron may know.

    Raises:
        ModelError: A file is missing, or one named .onnx is no ONNX model.
        RecipeError: Netron is not installed, or the port is taken.
    """

    def __init__(self, models: Sequence[Path], *, port: int = 0) -> None:
        protos = [_proto(model) for model in models]
        netron = find_spec("netron")
        if netron is None or not netron.submodule_search_locations:
            raise RecipeError("netron is not installed: pip install 'onnxcompress[view]'")
        self.closed = threading.Event()
        self.changes: list[NodeChange] | None = None
        page = None
        paths = [f"{number}/" for number in range(len(models))]
        if len(models) == 2:
            known = [proto.graph for proto in protos if proto is not None]
            self.changes = node_changes(*known) if len(known) == 2 else None
            page = side_by_side(list(zip([model.name for model in models], paths, strict=True)), self.changes)
        handler = _handler(Path(netron.submodule_search_locations[0]), dict(zip(paths, models, strict=True)), page)
        try:
            self._server = _Server((HOST, port), handler)
        except OSError as error:
            raise RecipeError(f"port {port} cannot be used: {error.strerror}") from error
        self.url = f"http://{HOST}:{self._server.server_address[1]}/{'' if page is not None else paths[0]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stop the server."""
        if not self.closed.is_set():
            self._server.shutdown()
            self._server.server_close()
            self.closed.set()

    def __enter__(self) -> Viewer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _proto(model: Path) -> ModelProto | None:
    """An ONNX model; None for a file of another format, which is Netron's to read."""
    if not model.is_file():
        raise ModelError(f"{model}: no such file")
    try:
        return read_proto(model)
    except ModelError:
        if model.suffix.lower() == ".onnx":
            raise
        return None


def side_by_side(panes: Sequence[tuple[str, str]], changes: Sequence[NodeChange] | None) -> str:
    """The page that shows Netrons next to each other, with a list of nodes to show in them; None: not compared."""
    shown = [PANE.format(name=html.escape(name), url=urllib.parse.quote(url, safe=":/")) for name, url in panes]
    known = changes or ()
    counts = {status: sum(one.status == status for one in known) for status in ("changed", "new", "gone")}
    summary = ", ".join(COUNT.format(count=count, status=status) for status, count in counts.items())
    filled = {
        "title": html.escape(" | ".join(name for name, _ in panes)),
        "panes": "\n".join(shown),
        "summary": summary if changes is not None else "no list: nodes of .onnx files alone are compared",
        # In a script element, </script> ends it, wherever it stands.
        "changes": json.dumps([asdict(one) for one in known]).replace("<", "\\u003c"),
        "script": _template("page.js"),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: filled[found[1]], _template("page.html"))


def _template(name: str) -> str:
    return (resource_files("onnxcompress.view") / "templates" / name).read_text(encoding="utf-8")


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that closed a connection is no news."""
        logger.debug("connection of %s ended early", client_address, exc_info=True)


def _handler(netron: Path, models: dict[str, Path], page: str | None) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer()

        def do_HEAD(self) -> None:
            self._answer()

        def _answer(self) -> None:
            path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
            found = _found(path, netron, models, page)
            body, kind = found if found is not None else (b"", "text/plain")
            self.send_response(404 if found is None else 200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            # Netron asks for consent to its telemetry unless it has been given; there is no telemetry, see _index.
            self.send_header("Set-Cookie", "consent=0; Path=/; SameSite=Strict")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing: the terminal belongs to the command line."""

    return Handler


def _found(path: str, netron: Path, models: dict[str, Path], page: str | None) -> tuple[bytes, str] | None:
    """The content of a path and its type; None where there is none."""
    if path in ("/", "/index.html"):
        return None if page is None else (page.encode(), TYPES[".html"])
    prefix, slash, rest = path.removeprefix("/").partition("/")
    model = models.get(prefix + slash)
    if model is None:
        return None
    if rest in ("", "index.html"):
        return _index(netron, model).encode(), TYPES[".html"]
    if rest.startswith("data/"):
        name = rest.removeprefix("data/")
        data = model if name == model.name else _inside(model.resolve().parent, name)
        return None if data is None else (data.read_bytes(), TYPES[".onnx"])
    file = _inside(netron, rest)
    if file is None or file.suffix == ".py":
        return None
    kind = TYPES.get(file.suffix) or mimetypes.guess_type(file.name)[0] or TYPES[".onnx"]
    return file.read_bytes(), kind


def _inside(folder: Path, name: str) -> Path | None:
    """A file below a folder, by its name; links out of the folder lead nowhere."""
    place = (folder / name).resolve()
    return place if place.is_file() and place.is_relative_to(folder.resolve()) else None


def _index(netron: Path, model: Path) -> str:
    """Netron's page with the model's address; no version means no telemetry, and one too old would show nothing."""
    text = (netron / "index.html").read_text(encoding="utf-8")
    name = urllib.parse.quote(model.name)
    text = re.sub(
        r'<meta name="version" content="[^"]*">',
        f'<meta name="type" content="Python">\n<meta name="version" content="0.0.0">\n'
        f'<meta name="file" content="data/{name}">\n<meta name="identifier" content="{html.escape(model.name)}">',
        text,
    )
    today = datetime.datetime.now(tz=datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%S")
    return re.sub(r'<meta name="date" content="[^"]*">', f'<meta name="date" content="{today}">', text)
