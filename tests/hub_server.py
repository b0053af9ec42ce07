"""A small server that speaks the two routes of a hub which are used, for one repository: team/sql."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BufferedIOBase

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """`files` of the repository. `answers`: status codes to give first, in their order."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {CONFIG: b"{}", WEIGHTS: b"w" * 100_000, "README.md": b"no"}
        self.answers: list[int] = []
        self.seen: list[tuple[str, str | None]] = []
        self.elsewhere: str | None = None  # where downloads are redirected
        self.cut = False  # whether bodies end early
        self.pause = 0.0  # seconds before each 512 bytes of a body
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.seen.append((self.path, self.headers.get("authorization")))
                status, body, headers = hub.answer(self.path)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(body)))
                self.send_header("connection", "close")  # else a client may send its next request into the end
                self.end_headers()
                with suppress(ConnectionError):
                    hub.send(self.wfile, body[: len(body) // 2] if hub.cut else body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def send(self, out: BufferedIOBase, body: bytes) -> None:
        size = 512 if self.pause else len(body)
        for start in range(0, len(body), max(1, size)):
            time.sleep(self.pause)
            out.write(body[start : start + size])

    def answer(self, path: str) -> tuple[int, bytes, dict[str, str]]:
        if self.answers:
            return self.answers.pop(0), b"no", {}
        if path == "/api/models/team/sql/revision/main":
            body = {"sha": COMMIT, "siblings": [{"rfilename": name} for name in self.files]}
            return 200, json.dumps(body).encode(), {}
        name = path.removeprefix(f"/team/sql/resolve/{COMMIT}/")
        if name in self.files:
            if self.elsewhere is not None:
                return 302, b"", {"location": f"{self.elsewhere}{path}"}
            return 200, self.files[name], {}
        return 404, b"no", {}


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        thread.join()
        hub.server.server_close()
