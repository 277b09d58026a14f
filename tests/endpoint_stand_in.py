"""An OpenAI-compatible endpoint on this machine, for tests."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any


@contextmanager
def endpoint_stand_in() -> Iterator[SimpleNamespace]:
    """An endpoint at `url` that says what `answers` makes of a request, with what it was asked in
    `seen`; or the next `status`, a refusal, or the next (bytes, length it claims) of `raw`.
    """
    seen: list[dict[str, Any]] = []
    state = SimpleNamespace(
        seen=seen, answers=lambda text: "Score: 5", status=[], refuse=False, raw=[]
    )

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append(body | {"authorization": self.headers.get("Authorization")})
            status = state.status.pop(0) if state.status else 200
            said = state.answers(body["messages"][0]["content"])
            message = {"content": None, "refusal": "no"} if state.refuse else {"content": said}
            answer = {"choices": [{"message": message}], "usage": {"total_tokens": 10}}
            data = json.dumps(answer).encode()
            whole = len(data)
            if state.raw:
                data, whole = state.raw.pop(0)
            self.send_response(status)
            self.send_header("Content-Length", str(whole))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    state.url = f"http://127.0.0.1:{made.server_port}/v1"
    try:
        yield state
    finally:
        made.shutdown()
        made.server_close()
