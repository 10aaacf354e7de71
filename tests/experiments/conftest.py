from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

BESIDE_THE_CHECKOUT = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Return the folder of the real data sets; skip where there is none."""
    folder = Path(os.environ.get("PERSAMPLE_DATA") or BESIDE_THE_CHECKOUT)
    if not folder.is_dir():
        pytest.skip(f"no data sets in {folder}; set PERSAMPLE_DATA to a folder with them")
    return folder


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Let nothing but this empty folder be the cache, and no environment variable name another one."""
    folder = tmp_path / "cache"
    monkeypatch.delenv("PERSAMPLE_DATA", raising=False)
    monkeypatch.setattr("persample.experiments.data.load.cache_root", lambda: folder)
    return folder


class Handler(SimpleHTTPRequestHandler):
    """Serve a folder; a file with the further suffix `.cut` is sent by half, and the connection closed."""

    def do_GET(self) -> None:
        cut = Path(self.translate_path(self.path) + ".cut")
        if not cut.exists():
            return super().do_GET()
        content = cut.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])
        return None

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Serve a new folder over HTTP on this machine; its address, ending in a slash, and its path."""
    folder = tmp_path / "served"
    folder.mkdir()
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}/", folder
    httpd.shutdown()
    httpd.server_close()
    thread.join()
