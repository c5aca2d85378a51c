"""Serve one folder to browsers on this machine only."""

import errno
import os
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from mmvssm.errors import UserError

HOST = "127.0.0.1"
POLICY = (
    "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; worker-src 'self'; base-uri 'none'; form-action 'none'"
)
"""Load only the page's own files, and evaluate no text as code. index.html repeats it; here it covers workers too."""

_HEADERS = {
    "Content-Security-Policy": f"{POLICY}; frame-ancestors 'none'",
    # Browsers allow threads with shared memory only on a page that these two isolate from others.
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # the browser asks each time whether a file has changed
}
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".wasm": "application/wasm",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
    ".bmp": "image/bmp",
    "": "application/octet-stream",
}


class PageServer:
    """Serve a folder's files on the loopback address.

    Args:
        folder: The folder, with an ``index.html``.
        port: The port; 0 for any free one.

    Raises:
        UserError: If the port is in use or not allowed.
    """

    def __init__(self, folder: Path, port: int) -> None:
        handler = partial(_Handler, directory=str(folder))
        try:
            self._server = _Server((HOST, port), handler)
        except (OSError, OverflowError) as error:
            in_use = getattr(error, "errno", None) == errno.EADDRINUSE
            why = "is in use" if in_use else f"cannot be used ({error})"
            raise UserError(f"port {port} {why}; choose another with PORT=... or --port") from error

    @property
    def address(self) -> str:
        """URL of the page."""
        return f"http://{HOST}:{self._server.server_port}/"

    def serve(self) -> None:
        """Answer requests until Ctrl-C, or until another thread calls :meth:`stop`."""
        try:
            self._server.serve_forever()
        except KeyboardInterrupt:
            print()  # ends the line on which terminals show ^C

    def stop(self) -> None:
        """End :meth:`serve`."""
        self._server.shutdown()

    def __enter__(self) -> "PageServer":
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *request: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # browsers close connections as they like
            super().handle_error(*request)


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    extensions_map = _TYPES
    timeout = 60  # seconds that a connection may say nothing

    def send_head(self) -> Any:
        # A foreign site could point its own host name at this machine (DNS rebinding) and read our files.
        name = self.headers.get("Host", "").split(":")[0]
        if name not in (HOST, "localhost"):
            self.send_error(403, "Only for this machine")
            return None
        path, folder = self.translate_path(self.path), os.path.realpath(self.directory)
        path = os.path.join(path, "index.html") if os.path.isdir(path) else path
        # No folders, FIFOs, or links to what lies elsewhere.
        if not os.path.isfile(path) or not Path(os.path.realpath(path)).is_relative_to(folder):
            self.send_error(404)
            return None
        return super().send_head()

    def end_headers(self) -> None:
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, *_: Any) -> None:
        """Log nothing; browsers report failed requests themselves."""
