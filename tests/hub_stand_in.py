"""A stand-in for the hub's HTTP interface, as far as huggingface_hub uses it for uploads: tokens,
repositories, branches, commits, and large files beside them.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_OfTheTestsWhichMayWrite"
READER = "hf_OfTheTestsWhichMayRead"
_LARGE = (".safetensors", ".parquet")


class Hub:
    """What was asked of it, and what lies in its repositories.

    Attributes:
        files: the content of every file by repository, branch and path.
        commits: the message and the branch of each, in order.
        private: whether each repository was made private.
        requests: method and path of each.
        broken: requests that it answers so, by a function of method and path.
        gate: what an upload waits for.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}
        self.commits: list[tuple[str, str]] = []
        self.private: dict[str, bool | None] = {}
        self.requests: list[tuple[str, str]] = []
        self.broken: Callable[[str, str], int | None] = lambda method, path: None
        self.gate = threading.Event()
        self.gate.set()
        self._large: dict[str, bytes] = {}

    def names(self, repo: str = "me/out", branch: str = "main") -> set[str]:
        """The files of a branch."""
        return set(self.files[repo, branch])

    def answer(
        self, method: str, path: str, token: str, body: bytes
    ) -> tuple[int, dict[str, Any] | list[Any] | None]:
        """The status and the JSON of a request."""
        if (status := self.broken(method, path)) is not None:
            return status, {"error": "broken"}
        if method == "PUT" and path.startswith("/store/"):
            self._large[path.removeprefix("/store/")] = body
            return 200, None
        if token not in (TOKEN, READER):
            return 401, {"error": "Invalid credentials"}
        if path == "/api/whoami-v2":
            return 200, {"name": "me", "type": "user", "orgs": []}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return self._create(json.loads(body), token)
        if path.endswith("/auth-check/write"):
            return (403, {"error": "no write access"}) if token == READER else (200, {})
        if path.endswith(".git/info/lfs/objects/batch"):
            return 200, self._batch(json.loads(body))
        repo, _, rest = path.removeprefix("/api/models/").partition("/")
        name, _, rest = rest.partition("/")
        return self._of_repository(f"{repo}/{name}", method, rest, body)

    def _create(self, asked: dict[str, Any], token: str) -> tuple[int, dict[str, Any]]:
        owner = asked.get("organization") or "me"
        repo = f"{owner}/{asked['name']}"
        found = {"url": f"{self.url}/{repo}", "name": repo, "id": repo}
        if (repo, "main") in self.files:
            return 409, {"error": "You already created this model repo", **found}
        if token == READER:
            return 403, {"error": "no write access"}
        self.files[repo, "main"] = {".gitattributes": b""}
        private = asked.get("private", asked.get("visibility"))
        self.private[repo] = None if private is None else private in (True, "private")
        return 200, found

    def _batch(self, asked: dict[str, Any]) -> dict[str, Any]:
        objects = [
            {
                "oid": entry["oid"],
                "size": entry["size"],
                "actions": {"upload": {"href": f"{self.url}/store/{entry['oid']}", "header": {}}},
            }
            for entry in asked["objects"]
        ]
        return {"transfer": "basic", "objects": objects}

    def _of_repository(
        self, repo: str, method: str, rest: str, body: bytes
    ) -> tuple[int, dict[str, Any] | list[Any] | None]:
        kind, _, branch = rest.partition("/")
        if kind == "branch":
            if (repo, branch) in self.files:
                return 409, {"error": "Reference already exists"}
            self.files[repo, branch] = dict(self.files[repo, "main"])
            return 200, {}
        branch = branch.split("/")[0] or "main"
        if (repo, branch) not in self.files:
            return 404, {"error": "Repository not found"}
        if kind == "preupload":
            return 200, {"files": [self._mode(f) for f in json.loads(body)["files"]]}
        if kind == "commit":
            self.gate.wait(30)
            return 200, self._commit(repo, branch, body)
        if kind == "tree":
            return 200, [
                {"type": "file", "path": path, "size": len(content), "oid": "0" * 40}
                for path, content in self.files[repo, branch].items()
            ]
        siblings = [{"rfilename": path} for path in self.files[repo, branch]]
        return 200, {"id": repo, "sha": "0" * 40, "siblings": siblings, "private": False}

    def _mode(self, file: dict[str, Any]) -> dict[str, Any]:
        mode = "lfs" if file["path"].endswith(_LARGE) else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}

    def _commit(self, repo: str, branch: str, body: bytes) -> dict[str, Any]:
        files = self.files[repo, branch]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.commits.append((value["summary"], branch))
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self._large[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                files[value["path"]] = content
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = f"{len(self.commits):040x}"
        return {"commitUrl": f"{self.url}/{repo}/commit/{oid}", "commitOid": oid}


@contextmanager
def hub_stand_in() -> Iterator[Hub]:
    """A hub on this machine, for the time of the block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            path = self.path.split("?")[0]
            hub.requests.append((self.command, path))
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            status, answer = hub.answer(self.command, path, token, body)
            text = b"" if answer is None else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            if status >= 400 and isinstance(answer, dict):
                self.send_header("X-Error-Message", answer["error"])
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(text)

        do_GET = do_POST = do_PUT = do_HEAD = _serve

        def log_message(self, format: str, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.block_on_close = False  # connections that the client keeps would be waited for
    hub = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.gate.set()
        server.shutdown()
        server.server_close()
        thread.join()
