"""Models in Netron (https://netron.app), one or two side by side, served from this machine alone."""

from __future__ import annotations

import html
import socket
import threading
import urllib.parse
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

from onnxcompress.errors import ModelError, RecipeError

HOST = "127.0.0.1"

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
html,body{{margin:0;height:100%;font:14px system-ui,sans-serif;background:#fff;color:#222}}
body{{display:flex}} section{{flex:1;display:flex;flex-direction:column;min-width:0}}
section+section{{border-left:2px solid #888}}
h1{{font-size:14px;font-weight:600;margin:0;padding:6px 10px;white-space:nowrap;overflow:hidden;text-overflow:ellipsis}}
iframe{{flex:1;border:0;width:100%}}
@media (max-width:700px){{body{{flex-direction:column}}section+section{{border-left:0;border-top:2px solid #888}}}}
@media (prefers-color-scheme:dark){{html,body{{background:#1e1e1e;color:#ddd}}}}
</style></head><body>
{panes}
</body></html>
"""
PANE = '<section><h1>{name}</h1><iframe title="{name}" src="{url}"></iframe></section>'


class Viewer:
    """Netron servers for the models, and for two of them a page that shows both.

    Args:
        models: One or two files.
        port: Port of the page, 0 for any free one; Netron's own servers take free ports.

    Raises:
        ModelError: A file is missing.
        RecipeError: Netron is not installed, or the port is taken.
    """

    def __init__(self, models: Sequence[Path], *, port: int = 0) -> None:
        for model in models:
            if not model.is_file():
                raise ModelError(f"{model}: no such file")
        try:
            import netron
        except ImportError as error:
            raise RecipeError("netron is not installed: pip install 'onnxcompress[view]'") from error
        self._netron: Any = netron
        self._addresses: list[tuple[str, int]] = []
        self._server: ThreadingHTTPServer | None = None
        self.closed = threading.Event()
        try:
            for model in models:
                address = (HOST, port if len(models) == 1 and port else _free_port())
                _check_free(address)  # netron itself would wait for ever
                self._netron.serve(str(model), None, address=address, browse=False)
                self._addresses.append(address)
            urls = [f"http://{host}:{number}" for host, number in self._addresses]
            if len(models) == 1:
                self.url = urls[0]
                return
            page = side_by_side(list(zip([model.name for model in models], urls, strict=True)))
            self._server = ThreadingHTTPServer((HOST, port), _handler(page))
        except OSError as error:
            self.close()
            raise RecipeError(f"port {port} cannot be used: {error.strerror}") from error
        self.url = f"http://{HOST}:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stop all servers."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
        for address in self._addresses:
            self._netron.stop(address)
        self._addresses = []
        self.closed.set()

    def __enter__(self) -> Viewer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def side_by_side(panes: Sequence[tuple[str, str]]) -> str:
    """The page that shows several Netron servers next to each other."""
    shown = [PANE.format(name=html.escape(name), url=urllib.parse.quote(url, safe=":/")) for name, url in panes]
    title = html.escape(" | ".join(name for name, _ in panes))
    return PAGE.format(title=title, panes="\n".join(shown))


def _handler(page: str) -> type[BaseHTTPRequestHandler]:
    body = page.encode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path in ("/", "/index.html")
            self.send_response(200 if found else 404)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body) if found else 0))
            self.end_headers()
            if found:
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing: the terminal belongs to the command line."""

    return Handler


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _check_free(address: tuple[str, int]) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address)
